// Package daemon is the lifecycle of the program: it reads the files, brings
// the rooms up in order, wires them, reloads them and takes them down. It is
// the only place that knows all of them.
//
// Up goes: claim of the table, state, sockets, kernel. Down goes the other way
// round. From the first to the last moment the kernel's table refuses what
// nobody serves, so there is no order in which a packet can leak; the order
// only decides how short the time is in which flows are refused.
package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tproxyd/tproxyd/internal/clash"
	"github.com/tproxyd/tproxyd/internal/config"
	"github.com/tproxyd/tproxyd/internal/control"
	"github.com/tproxyd/tproxyd/internal/gateway"
	"github.com/tproxyd/tproxyd/internal/watch"
	"github.com/tproxyd/tproxyd/pkg/fakedns"
	"github.com/tproxyd/tproxyd/pkg/redirect"
	"github.com/tproxyd/tproxyd/pkg/relay"
	"github.com/tproxyd/tproxyd/pkg/upstream"
	"golang.org/x/sync/errgroup"
)

// Signals is what the outside world tells a running daemon, and hears of it.
type Signals struct {
	Reload <-chan os.Signal  // each one makes it read its files again
	Ready  func(line string) // called once, when flows are served

	Version string // of the program, for who asks
}

// Daemon is one running instance. Make it with New, run it once with Run.
type Daemon struct {
	log     *slog.Logger
	started time.Time
	own     hostAddrs
	mark    redirect.Marks // never changes while the daemon runs

	enclosure *Enclosure // nor does this: where flows are taken; nil: here

	kernel  *redirect.Redirect
	flows   *redirect.Listener
	udp     *redirect.UDPListener
	refuser *redirect.Refuser
	dns     *redirect.DNS // nil: port 53 is not intercepted
	engine  *relay.Engine
	packets *relay.UDP
	servers *upstream.Pool
	names   *fakedns.Server
	gateway *gateway.Gateway
	socket  net.Listener // control
	metrics net.Listener // nil: not asked for
	clash   net.Listener // likewise
	logs    *clash.Logs  // for who watches by the Clash API
	watcher *watch.Watcher
	direct  directBytes // for dashboards
	shown   shownRules  // likewise

	relisted chan struct{} // has something once other rules are in force; see keepCopies

	admitting sync.RWMutex // writers: a reload, which must not lose an address admitted meanwhile

	lastTallies atomic.Pointer[map[string]redirect.Count] // while another process has the kernel; nil: it has not

	calls      chan *call   // of processes that want to be the successor
	before     *predecessor // nil: nobody was taken over from
	unanswered unanswered   // what the next take begins with

	mu        sync.Mutex // one reload at a time; guards what follows
	setup     *Setup
	version   string // of the program
	reloads   reloadCount
	takenOver bool // another process serves
	inherited bool // and this one does not yet: what it has is that one's too
	stored    bool // systemd keeps the sockets while the service restarts
}

type reloadCount struct {
	Done    uint64 `json:"done"`
	Refused uint64 `json:"refused"`
}

// New brings up everything of setup but the serving itself: what can fail
// fails here, and then nothing is left behind that was not there before.
// Sockets that systemd has kept are used again.
func New(setup *Setup, log *slog.Logger) (*Daemon, error) {
	var e *estate
	if setup.enclosure == nil {
		e = passed()
		defer e.close()
	}
	return inherit(setup, log, e)
}

// inherit is New with what another process had. The estate stays the caller's;
// nil: nobody had anything.
func inherit(setup *Setup, log *slog.Logger, e *estate) (*Daemon, error) {
	defer frugal()()
	d := &Daemon{
		log: log, started: time.Now(), setup: setup, mark: setup.Config.Intercept.Mark, enclosure: setup.enclosure,
		calls: make(chan *call), inherited: e.hold() != nil, logs: &clash.Logs{}, relisted: make(chan struct{}, 1),
	}
	if setup.Config.Control.Clash != "" {
		d.log = slog.New(d.logs.Handler(log.Handler()))
	}
	if err := d.open(e); err != nil {
		d.release(true)
		return nil, err
	}
	return d, nil
}

func (d *Daemon) open(e *estate) (err error) {
	c, part := d.setup.Config, func(name string) *slog.Logger { return d.log.With("part", name) }
	if d.engine, err = relay.New(d.relayOptions(part("relay"))); err != nil {
		return err
	}
	if err := d.setup.mayFindPrograms(); err != nil {
		return err
	}
	if err := d.inside(func() error { return d.listen(e, part("redirect")) }); err != nil {
		return err
	}
	d.watcher = watch.New(watch.Options{Log: part("watch")})
	d.watcher.Set(d.setup.lists)
	plan, err := d.setup.plan()
	if err != nil {
		return err
	}
	d.servers = upstream.New(d.upstreamOptions(d.setup), plan.Servers())
	// The server of names is asked what becomes of a name only once it serves,
	// and the gateway is there by then.
	if d.names, err = fakedns.New(fakedns.Options{
		Pool4:   c.DNS.Pool4,
		Pool6:   c.DNS.Pool6,
		Dir:     c.State.Directory,
		Taken:   e.names(),
		TTL:     c.DNS.TTL,
		Timeout: d.setup.Table.Limits().DNS,
		Decide:  func(name string, a fakedns.Asker) (fakedns.Verdict, bool) { return d.gateway.Decide(name, a) },
		Admit:   d.admitName,
		DialRemote: func(ctx context.Context, name string, a fakedns.Asker, resolver netip.AddrPort) (net.Conn, error) {
			return d.gateway.DialRemote(ctx, name, a, resolver)
		},
		Dial:        d.dialMarked,
		Resolvers:   d.setup.resolvers(),
		ResolversOf: func(name string) []netip.AddrPort { return d.gateway.Plan().Table().Resolvers(name) },
		Own:         d.ownAddr,
		Interface:   askerInterface,
		Log:         part("fakedns"),
	}); err != nil {
		return err
	}
	d.gateway = gateway.New(plan, gateway.Options{
		Names:     d.names,
		Upstream:  d.servers,
		Engine:    d.engine,
		Dial:      d.dial,
		DialUDP:   d.dialUDP,
		Resolve:   d.names.Resolve,
		Interface: d.inboundInterface,
		Entered:   d.interfaceName,
		Gone:      gone,
		Index:     d.kernel.InterfaceName,
		Who:       d.who,
		Program:   d.kernel.Program,
		Own:       d.ownListener,
		Admit:     d.admit(),
		Log:       part("gateway"),
	})
	if d.packets, err = relay.NewUDP(d.udpOptions()); err != nil {
		return err
	}
	d.packets.SetLimits(d.setup.udpLimits())
	if c.Control.Socket != "" {
		if d.socket, err = e.control(c.Control.Socket); err != nil {
			return err
		}
	}
	if c.Control.Metrics != "" {
		if d.metrics, err = e.metrics(c.Control.Metrics); err != nil {
			return fmt.Errorf("daemon: [control] metrics: %w", err)
		}
	}
	if c.Control.Clash != "" {
		if d.clash, err = e.clash(c.Control.Clash); err != nil {
			return fmt.Errorf("daemon: [control] clash: %w", err)
		}
	}
	p := kernelPlan(d.setup, d.ports())
	if p.Readmit, err = d.inherit(e, plan); err != nil {
		return err
	}
	if d.enclosure != nil {
		if err := d.setup.enclose(&p); err != nil {
			return err
		}
	}
	if err := d.kernel.Apply(p); err != nil {
		return err
	}
	d.noteDecided(d.setup)
	return nil
}

// listen makes everything that belongs to the network namespace of the calling
// thread, where flows are taken, or takes it from the estate.
func (d *Daemon) listen(e *estate, log *slog.Logger) (err error) {
	if d.kernel, err = redirect.Open(redirect.Options{Log: log, NoOwner: d.enclosure != nil && d.enclosure.Ends, Taken: e.hold(), Search: d.setup.search}); err != nil {
		return err
	}
	if d.flows, err = e.tcp(d.mark); err != nil {
		return err
	}
	if d.udp, err = e.udp(d.mark); err != nil {
		return err
	}
	if d.refuser, err = redirect.NewRefuser(d.mark); err != nil {
		return err
	}
	if d.setup.Config.Intercept.DNS {
		if d.dns, err = e.dns(d.mark); err != nil {
			return err
		}
	}
	d.missInterfaces()
	pools := d.setup.Config.DNS
	for _, h := range append(redirect.Hindrances(d.mark), redirect.SyntheticHindrances(pools.Pool4, pools.Pool6)...) {
		d.log.Warn(h.What+": "+h.Why, "mend", h.Mend)
	}
	return nil
}

// missInterfaces says in the log which named interfaces are not there.
func (d *Daemon) missInterfaces() {
	for _, name := range d.setup.Config.Intercept.Interfaces {
		if _, err := net.InterfaceByName(name); err != nil {
			d.log.Warn("there is no such interface: its flows are taken once it is there", "interface", name)
		}
	}
}

// noteDecided says in the log if it could not be done: nothing is worse for it
// but a restart.
func (d *Daemon) noteDecided(s *Setup) {
	if err := s.noteDecided(); err != nil {
		d.log.Warn("the next start will not keep what is let pass by name", "err", err)
	}
}

// Run serves until ctx ends or a part fails, and takes everything down. If
// another process takes over it returns when what is carried has ended.
func (d *Daemon) Run(ctx context.Context, s Signals) (err error) {
	defer func() { d.stop(err == nil) }()
	line := d.readyLine() // before there is somebody who can ask for a reload
	d.mu.Lock()
	d.version = s.Version
	d.mu.Unlock()
	g, ctx := errgroup.WithContext(ctx)
	taking := d.take(ctx, g)
	reach := newPart(ctx, g)
	offer := control.Options{
		Status:  func() any { return d.Status() },
		Flows:   func() any { return d.Flows() },
		Kill:    func(id uint64) bool { return d.Kill(id) > 0 },
		Reload:  func() error { return refusal(d.Reload()) },
		Metrics: d.metricsHandler(),
		Process: control.Process{Pid: pid, Version: s.Version, Args: os.Args},
		// It outlives reach, which ends when it has come to its end.
		TakeOver: func(c *net.UnixConn) { d.called(ctx, c) },
	}
	if d.socket != nil {
		reach.task("control", func(ctx context.Context) error { return control.Serve(ctx, d.socket, control.Handler(offer)) })
	}
	if d.metrics != nil {
		reach.task("metrics", func(ctx context.Context) error { return control.Serve(ctx, d.metrics, control.MetricsHandler(offer)) })
	}
	if d.clash != nil {
		api := d.clashOptions(s.Version)
		reach.task("clash", func(ctx context.Context) error { return clash.Serve(ctx, d.clash, api) })
	}
	reach.task("lists", d.watchLists)
	reach.task("copies of lists", d.keepCopies)
	rest := newPart(ctx, g)
	rest.task("memory", d.giveBack)
	rest.task("signals", func(ctx context.Context) error { return d.watchReload(ctx, s.Reload) })
	if d.before != nil && !settled(ctx) {
		return g.Wait()
	}
	d.claim()
	d.takeQuestions(taking)
	if d.before != nil {
		rest.task("the process before", d.watch)
	}
	rest.task("takeover", func(ctx context.Context) error { return d.awaitSuccessor(ctx, g, taking, reach) })

	if s.Ready != nil {
		s.Ready("tproxyd: ready: " + line)
	}
	if d.before == nil {
		d.announce()
	}
	if err = g.Wait(); errors.Is(err, errDrained) {
		return nil
	}
	return err
}

// announce tells systemd that this process serves, and what is to be kept for it.
func (d *Daemon) announce() {
	d.mu.Lock()
	defer d.mu.Unlock()
	notifyReady(d.readyLine())
	d.stored = d.store()
}

// awaitSuccessor gives the daemon's place to the first process that can take it,
// and carries on what there is.
func (d *Daemon) awaitSuccessor(ctx context.Context, g *errgroup.Group, taking, reach *part) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case c := <-d.calls:
			gone, err := d.handOver(ctx, c, taking)
			if gone {
				d.stopAnswering(reach)
				return d.drain(ctx, c)
			}
			if err != nil {
				return err
			}
			if taking.ctx.Err() != nil {
				taking = d.take(ctx, g)
				d.takeQuestions(taking)
			}
		}
	}
}

func (d *Daemon) readyLine() string {
	if d.enclosure != nil {
		return fmt.Sprintf("%d rules, %d servers", len(d.setup.Table.Rules()), len(d.setup.Table.Servers()))
	}
	c := d.setup.Config.Intercept
	what := "interfaces " + fmt.Sprint(c.Interfaces)
	if c.Local {
		what += ", this host's own flows"
	}
	return fmt.Sprintf("%s, %d rules, %d servers", what, len(d.setup.Table.Rules()), len(d.setup.Table.Servers()))
}

// stop ends what runs. With fail = "closed" the kernel's table stays and
// refuses what would have been proxied. Asked says that it is somebody's will: then
// those before this one end too, and otherwise they carry on what they have.
func (d *Daemon) stop(asked bool) {
	d.mu.Lock() // a reload that is under way comes to its end, a later one finds the kernel closed
	defer d.mu.Unlock()
	if !d.takenOver {
		notifyStopping()
	}
	d.log.Info("stopping")
	d.before.leave(asked)
	if d.stored && d.setup.Config.Intercept.Fail == config.FailClosed {
		d.kernel.Release() // flows wait in the sockets as long as systemd has them
	}
	d.release(d.setup.Config.Intercept.Fail == config.FailClosed)
}

// Drain waits until no TCP flow is being carried, at most so long: what a
// client has sent before it ended is still on its way.
func (d *Daemon) Drain(limit time.Duration) {
	const step = 2 * time.Millisecond
	for end := time.Now().Add(limit); d.gateway.Stats().Live > 0 && time.Now().Before(end); {
		time.Sleep(step)
	}
}

// refuseLeft tells who asked what was not answered, so that nobody waits for it.
func (d *Daemon) refuseLeft() {
	if d.names == nil {
		return
	}
	questions, streams := d.names.Left()
	for _, q := range questions {
		d.refuser.Refuse(q, redirect.PortUnreachable) // at most what the rate allows
	}
	for _, s := range streams {
		s.Conn.Close()
	}
}

// release takes down whatever is up, the kernel first, so that clients hear
// of it at once, the state last.
func (d *Daemon) release(keep bool) {
	if d.inherited { // all of it is the other one's
		d.disown()
	}
	if d.kernel != nil {
		if err := d.kernel.Close(keep); err != nil {
			d.log.Error("the kernel's table", "err", err)
		}
	}
	if d.watcher != nil {
		d.watcher.Close()
	}
	for _, ln := range []net.Listener{d.socket, d.metrics, d.clash} {
		if ln != nil {
			ln.Close()
		}
	}
	if d.flows != nil {
		d.flows.Close()
	}
	if d.packets != nil {
		d.packets.Close()
	}
	if d.udp != nil {
		d.udp.Close()
	}
	if d.refuser != nil {
		d.refuseLeft()
		d.refuser.Close()
	}
	if d.dns != nil {
		d.dns.Close()
	}
	if d.servers != nil {
		d.servers.Close()
	}
	if d.engine != nil {
		d.engine.Close()
	}
	if d.names != nil {
		if err := d.names.Close(); err != nil {
			d.log.Error("the synthetic addresses", "err", err)
		}
	}
}

// CloseTable puts the closed table of setup in place and leaves it there.
func CloseTable(setup *Setup) error {
	k, err := redirect.Open(redirect.Options{})
	if err != nil {
		return err
	}
	p := kernelPlan(setup, redirect.Ports{})
	p.Readmit = setup.readmitAtStart() // what other rules let pass by name is not let pass any longer
	return errors.Join(k.Apply(p), k.Close(true))
}
