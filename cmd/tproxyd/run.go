package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/tproxyd/tproxyd/internal/netns"
	"golang.org/x/sys/unix"
)

// What run exits with if it is not as its command did; env(1) and others have
// the same.
const (
	exitOwnFailure    = 125
	exitCannotExecute = 126
	exitNotFound      = 127
	exitSignal        = 128 // and the number of the signal
)

// stageVariable tells the server from the front. Its value is a stage.
const stageVariable = "TPROXYD_RUN_STAGE"

// runner is one run. There are three processes:
//
//	front   what the user started: passes signals on, and has the exit status
//	server  its child: the daemon, root of a user namespace of its own if the
//	        user is not root; all its threads but one are in the user's network
//	command its child: in a user namespace below, as the user, without rights
//	        over the network that it is in
//
// Each ends with the one before it, whatever ends that.
type runner struct {
	e       *env
	way     way
	publish []string
	logs    logFlags
	args    []string
}

func runCommand(e *env) *cobra.Command {
	r := &runner{e: e}
	c := &cobra.Command{
		Use:   "run [--socks LIST | --routes FILE] [--] COMMAND [ARGUMENT...]",
		Short: "Run one command whose flows go through SOCKS servers",
		Long: `Run a command in a network namespace that leads nowhere but to this program. What
it connects or sends to goes where the rules say: TCP and UDP, IPv4 and IPv6, by
name, whatever the program is made of. What cannot be carried is refused at once.
Root is not needed. Flows that are DIRECT are made in the caller's network.

Without --socks and --routes the way is that of $ALL_PROXY or $SOCKS_SERVER.
The exit status is that of the command, 128 and more for a signal; 125 if tproxyd
itself failed, 126 if the command cannot be executed, 127 if it is not there.`,
		Example: `  tproxyd run --socks 10.0.3.1 -- curl https://www.example.org/
  tproxyd run --routes socks.cnf -v -- ./integration-test
  tproxyd run --socks 10.0.3.1 --publish 8080:80 -- python3 -m http.server 80`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return errors.New("run: COMMAND is missing")
			}
			return nil
		},
	}
	f := c.Flags()
	f.SetInterspersed(false)
	f.StringVar(&r.way.socks, "socks", "", "`LIST` of servers for all flows, as after @= in a rule")
	f.StringVar(&r.way.routes, "routes", "", "`FILE` of rules")
	r.way.commonFlags(c)
	f.StringArrayVar(&r.publish, "publish", nil, "`[ADDRESS:]PORT:PORT` of this host and of the command (TCP); an ADDRESS other\nthan 127.0.0.1 has to be named")
	r.logs.flags(c)
	c.MarkFlagsMutuallyExclusive("socks", "routes")
	c.RunE = func(_ *cobra.Command, args []string) error {
		r.args = args
		if e.getenv(stageVariable) != "" {
			return r.serve()
		}
		return r.front()
	}
	return c
}

// exited is the exit status of a run. What is to be said has been said.
type exited int

func (x exited) Error() string { return fmt.Sprintf("exit status %d", int(x)) }

// fail says why there is no run, and returns the exit status for that.
func (r *runner) fail(status int, format string, args ...any) error {
	fmt.Fprintf(r.e.stderr, "tproxyd: run: "+format+"\n", args...)
	return exited(status)
}

// front checks the command line and starts the server.
func (r *runner) front() error {
	load, err := r.way.load(r.e)
	if err != nil {
		return err
	}
	if _, err := parsePublish(r.publish); err != nil {
		return err
	}
	if _, err := r.way.resolverList(); err != nil {
		return err
	}
	if _, _, diags := load(); diags.HasErrors() {
		return r.e.tell(diags)
	}
	alive, release, err := os.Pipe() // its other end is closed when we end, by whatever
	if err != nil {
		return r.fail(exitOwnFailure, "%v", err)
	}
	defer release.Close()
	told, tell, err := os.Pipe()
	if err != nil {
		return r.fail(exitOwnFailure, "%v", err)
	}
	if err := netns.Adopt(); err != nil {
		return r.fail(exitOwnFailure, "%v", err)
	}
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, forwarded()...)

	runtime.LockOSThread() // Pdeathsig is about the thread that starts a process
	server := exec.Command("/proc/self/exe", os.Args[1:]...)
	server.Args[0] = os.Args[0]
	server.Stdin, server.Stdout, server.Stderr = os.Stdin, os.Stdout, os.Stderr
	server.SysProcAttr = &syscall.SysProcAttr{}
	s := stage{alive: alive.Fd(), tell: tell.Fd(), root: mayEnclose(), uid: os.Geteuid(), gid: os.Getegid()}
	if !s.root {
		server.SysProcAttr.Cloneflags = syscall.CLONE_NEWUSER
		server.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: s.uid, Size: 1}}
		server.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: s.gid, Size: 1}}
	}
	server.Env = append(os.Environ(), stageVariable+"="+s.String())
	// Not by ExtraFiles: what the caller has open at 3 and 4 is the command's.
	for _, fd := range []uintptr{s.alive, s.tell} {
		if _, err := unix.FcntlInt(fd, unix.F_SETFD, 0); err != nil {
			return r.fail(exitOwnFailure, "%v", err)
		}
	}
	if err := server.Start(); err != nil {
		return r.fail(exitOwnFailure, "a user namespace: %v; %s", err, userNamespaceHint())
	}
	alive.Close()
	tell.Close()
	go pass(signals, told)
	err = server.Wait()
	if state := server.ProcessState; state.Exited() {
		return exited(state.ExitCode())
	}
	netns.EndChildren() // nobody else does
	return r.fail(exitOwnFailure, "the serving process ended: %v", err)
}

// forwarded are the signals that the command gets if the front is sent them.
// What we were started to ignore (nohup(1)) stays ignored, there too.
func forwarded() []os.Signal {
	return slices.DeleteFunc([]os.Signal{unix.SIGINT, unix.SIGQUIT, unix.SIGTERM, unix.SIGHUP, unix.SIGUSR1, unix.SIGUSR2}, signal.Ignored)
}

// pass sends on what arrives, to the process that the pipe tells. What a
// terminal sends it sends to all of its foreground, the command included.
func pass(signals <-chan os.Signal, told *os.File) {
	b := make([]byte, 16)
	n, err := told.Read(b)
	told.Close()
	if err != nil {
		return
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b[:n])))
	if err != nil {
		return
	}
	for s := range signals {
		if (s == unix.SIGINT || s == unix.SIGQUIT) && inForeground() {
			continue
		}
		unix.Kill(pid, s.(syscall.Signal))
	}
}

// inForeground tells whether the terminal would send its signals to us.
func inForeground() bool {
	tty, err := os.OpenFile("/dev/tty", os.O_RDONLY, 0)
	if err != nil {
		return false
	}
	defer tty.Close()
	group, err := unix.IoctlGetInt(int(tty.Fd()), unix.TIOCGPGRP)
	return err == nil && group == unix.Getpgrp()
}

// mayEnclose tells whether this process may make namespaces as it is.
func mayEnclose() bool {
	h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var d [2]unix.CapUserData
	if err := unix.Capget(&h, &d[0]); err != nil {
		return false
	}
	for _, c := range []uint{unix.CAP_SYS_ADMIN, unix.CAP_NET_ADMIN, unix.CAP_NET_RAW, unix.CAP_SETPCAP} {
		if d[0].Effective&(1<<c) == 0 {
			return false
		}
	}
	return true
}

// userNamespaceHint says which knob forbids user namespaces, as far as can be
// seen.
func userNamespaceHint() string {
	for _, k := range []struct{ file, forbids, hint string }{
		{"/proc/sys/user/max_user_namespaces", "0", "there may be none: as root, sysctl user.max_user_namespaces=15000"},
		{"/proc/sys/kernel/unprivileged_userns_clone", "0", "they are for root alone: as root, sysctl kernel.unprivileged_userns_clone=1"},
		{"/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1", "AppArmor allows them by profile only: install tproxyd's, or as root, sysctl kernel.apparmor_restrict_unprivileged_userns=0"},
	} {
		if b, err := os.ReadFile(k.file); err == nil && strings.TrimSpace(string(b)) == k.forbids {
			return k.hint + ", or run this as root"
		}
	}
	return "the kernel, or the container that this is in, does not allow it; run this as root"
}

// publication is a port of this host that leads to one of the command.
type publication struct{ listen, inside string }

func parsePublish(list []string) (all []publication, err error) {
	for _, s := range list {
		i := strings.LastIndexByte(s, ':')
		if i < 0 {
			return nil, fmt.Errorf("--publish: %q is not [ADDRESS:]PORT:PORT", s)
		}
		host, port := s[:i], s[i+1:]
		if !strings.Contains(host, ":") {
			host = "127.0.0.1:" + host
		}
		_, own, err := splitPort(host)
		if err == nil {
			_, err = strconv.ParseUint(port, 10, 16)
		}
		if err != nil || own == "" || port == "0" {
			return nil, fmt.Errorf("--publish: %q is not [ADDRESS:]PORT:PORT", s)
		}
		all = append(all, publication{host, port})
	}
	return all, nil
}

var errPort = errors.New("no port")

// splitPort splits ADDRESS:PORT; 0 is a port that the kernel chooses.
func splitPort(s string) (host, port string, err error) {
	i := strings.LastIndexByte(s, ':')
	if i < 0 {
		return "", "", errPort
	}
	if _, err := strconv.ParseUint(s[i+1:], 10, 16); err != nil {
		return "", "", errPort
	}
	return s[:i], s[i+1:], nil
}
