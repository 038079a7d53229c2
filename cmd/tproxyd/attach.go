package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/tproxyd/tproxyd/internal/daemon"
	"github.com/tproxyd/tproxyd/internal/netns"
	"golang.org/x/sys/unix"
)

// attachVariable tells that this process is in the user namespace of its
// targets already, and which processes these are: who asked an engine from there
// would be another user to it.
const attachVariable = "TPROXYD_ATTACH_STAGE"

// attacher is one attach: targets, each served by a daemon of its own in this
// process.
type attacher struct {
	e       *env
	common  way // what holds for targets that have no way of their own
	targets []*attached
	cleanup bool
	logs    logFlags
}

// attached is a namespace to be served.
type attached struct {
	word string // as the command line names it
	find func() (place, error)
	way  way
	keep []string
}

func attachCommand(e *env) *cobra.Command {
	a := &attacher{e: e}
	c := &cobra.Command{
		Use:   "attach {--netns PATH | --pid N | --container NAME} [--socks LIST | --routes FILE] ...",
		Short: "Serve the network namespaces of containers",
		Long: `Serve existing network namespaces, such as those of containers, in the foreground:
what their programs connect or send to goes where the rules say, and nothing leaves
them in another way. Upstream connections are made from the caller's network.
Nothing is needed inside. SIGHUP reads the rules again, SIGTERM and SIGINT stop;
the namespaces stay closed then, without a way out, unless --cleanup-on-exit is given.

--netns, --pid and --container may be given more than once; --socks, --routes and
--keep are for the one before them, or for all if there is none before them. A
container that stops ends its part, the last one the program.`,
		Example: `  tproxyd attach --container web --socks 10.0.3.1
  tproxyd attach --container web --routes web.cnf --pid 4711 --routes other.cnf`,
		Args: cobra.NoArgs,
	}
	f := c.Flags()
	add := func(find func(string) (place, error)) func(string) error {
		return func(s string) error {
			a.targets = append(a.targets, &attached{word: s, find: func() (place, error) { return find(s) }})
			return nil
		}
	}
	last := func(set func(w *way, s string), keep bool) func(string) error {
		return func(s string) error {
			switch n := len(a.targets); {
			case n > 0 && keep:
				a.targets[n-1].keep = append(a.targets[n-1].keep, s)
			case keep:
				return errors.New("it is for the namespace before it, and there is none")
			case n > 0:
				set(&a.targets[n-1].way, s)
			default:
				set(&a.common, s)
			}
			return nil
		}
	}
	f.Func("netns", "a namespace by `PATH`, as /run/netns/NAME", add(byPath))
	f.Func("pid", "the namespace of process `N`", add(byPID))
	f.Func("container", "the namespace of the container `NAME`, of podman or docker", add(byContainer))
	f.Func("socks", "`LIST` of servers for all flows, as after @= in a rule", last(func(w *way, s string) { w.socks = s }, false))
	f.Func("routes", "`FILE` of rules", last(func(w *way, s string) { w.routes = s }, false))
	f.Func("keep", "interface `IF` stays as it is, as far as its own networks", last(nil, true))
	f.BoolVar(&a.cleanup, "cleanup-on-exit", false, "remove everything from the namespaces at a normal stop")
	a.common.commonFlags(c)
	a.logs.flags(c)
	c.RunE = func(c *cobra.Command, _ []string) error { return a.run(c.Context()) }
	return c
}

// part is a target being served.
type part struct {
	*attached
	daemon *daemon.Daemon
	ns     *netns.Namespace
	gone   <-chan struct{} // closed when the target has ended
	reload chan os.Signal
}

func (a *attacher) run(ctx context.Context) error {
	if len(a.targets) == 0 {
		return errors.New("nothing to attach to: give --netns PATH, --pid N or --container NAME")
	}
	resolvers, err := a.common.resolverList()
	if err != nil {
		return err
	}
	log, err := a.logs.logger(a.e)
	if err != nil {
		return failed(err)
	}
	var places []place
	entered := strings.Fields(a.e.getenv(attachVariable))
	for i, t := range a.targets {
		if len(entered) == len(a.targets) {
			t.find = func() (place, error) { return byPID(entered[i]) }
		}
		if t.way.socks != "" && t.way.routes != "" {
			return fmt.Errorf("%s: --socks and --routes exclude one another", t.word)
		}
		p, err := t.find()
		if err != nil {
			return failed(err)
		}
		places = append(places, p)
	}
	if user, need, err := foreignUser(places); err != nil {
		return failed(err)
	} else if need && len(entered) == 0 {
		return a.enterUser(user, places)
	}

	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	hup := make(chan os.Signal, 1)
	signal.Notify(hup, syscall.SIGHUP)
	defer signal.Stop(hup)
	a.e.leaveProcessors()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var parts []*part
	defer func() {
		for _, p := range parts {
			p.ns.Close()
		}
	}()
	for i, t := range a.targets {
		p, err := a.open(ctx, t, places[i], daemon.Enclosure{Resolvers: resolvers, Keep: t.keep, Open: a.cleanup}, log.With("namespace", t.word))
		if err != nil {
			return err
		}
		parts = append(parts, p)
	}
	go func() {
		for s := range hup {
			for _, p := range parts {
				select {
				case p.reload <- s:
				default: // one is under way
				}
			}
		}
	}()
	return a.serve(ctx, parts)
}

// open brings a target up. With an error nothing is left behind.
func (a *attacher) open(ctx context.Context, t *attached, where place, enclosure daemon.Enclosure, log *slog.Logger) (*part, error) {
	w := a.common
	if t.way.socks != "" || t.way.routes != "" {
		w.socks, w.routes = t.way.socks, t.way.routes
	}
	load, err := w.load(a.e)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", t.word, err)
	}
	gone, err := where.watch(ctx)
	if err != nil {
		return nil, failed(fmt.Errorf("%s: %w", t.word, err))
	}
	ns, err := netns.Open(where.path)
	if err != nil {
		return nil, failed(fmt.Errorf("%s: %w", t.word, err))
	}
	enclosure.Inside, enclosure.Load = ns.Do, load
	d, diags, err := daemon.NewEnclosed(enclosure, log)
	if told := a.e.tell(diags); told != nil || err != nil {
		ns.Close()
		if told != nil {
			return nil, told
		}
		return nil, failed(fmt.Errorf("%s: %w", t.word, err))
	}
	return &part{attached: t, daemon: d, ns: ns, gone: gone, reload: make(chan os.Signal, 1)}, nil
}

// serve runs the parts until each has ended, and returns what went wrong.
func (a *attacher) serve(ctx context.Context, parts []*part) error {
	var wg sync.WaitGroup
	errs := make([]error, len(parts))
	for i, p := range parts {
		wg.Go(func() {
			ctx, end := context.WithCancel(ctx)
			defer end()
			go func() {
				select {
				case <-p.gone:
					end()
				case <-ctx.Done():
				}
			}()
			ready := func(line string) { fmt.Fprintln(a.e.stdout, line+": "+p.word) }
			if err := p.daemon.Run(ctx, daemon.Signals{Reload: p.reload, Ready: ready}); err != nil {
				errs[i] = fmt.Errorf("%s: %w", p.word, err)
			}
		})
	}
	wg.Wait()
	return failed(errors.Join(errs...))
}

// enterUser starts this program again in the user namespace of a process: a Go
// program has too many threads to enter one itself.
func (a *attacher) enterUser(pid int, places []place) error {
	own, err := os.Executable()
	if err != nil {
		return failed(err)
	}
	path, err := exec.LookPath("nsenter")
	if err != nil {
		return failed(fmt.Errorf("attach: without root nsenter(1) is needed: %w", err))
	}
	args := append([]string{"nsenter", "--user", "--preserve-credentials", "--target=" + strconv.Itoa(pid), "--", own}, os.Args[1:]...)
	pids := make([]string, len(places))
	for i, p := range places {
		pids[i] = strconv.Itoa(p.pid)
	}
	return failed(os.NewSyscallError("exec", unix.Exec(path, args, append(os.Environ(), attachVariable+"="+strings.Join(pids, " ")))))
}
