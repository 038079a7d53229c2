package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"time"

	"github.com/tproxyd/tproxyd/internal/daemon"
	"github.com/tproxyd/tproxyd/internal/netns"
	"golang.org/x/sys/unix"
)

// insideResolver is what resolv.conf names inside. Any address would do.
const insideResolver = "192.0.0.8"

// stage is what the front hands down to the server.
type stage struct {
	alive, tell uintptr // pipes: one ends with the front, the other is told the command's process
	root        bool    // the server has the user's own rights; else it is root of a user namespace
	uid, gid    int     // who the user is
}

const stageForm = "%d %d %t %d %d"

func (s stage) String() string { return fmt.Sprintf(stageForm, s.alive, s.tell, s.root, s.uid, s.gid) }

// parseStage reads what String writes.
func parseStage(text string) (s stage, err error) {
	if _, err := fmt.Sscanf(text, stageForm, &s.alive, &s.tell, &s.root, &s.uid, &s.gid); err != nil {
		return s, fmt.Errorf("%s: %w", stageVariable, err)
	}
	return s, nil
}

// drainTime is how long what a command has sent is carried on after its end.
const drainTime = 3 * time.Second

// serve is the second process: the daemon, and the parent of the command.
func (r *runner) serve() error {
	stage, err := parseStage(r.e.getenv(stageVariable))
	if err != nil {
		return r.fail(exitOwnFailure, "%v", err)
	}
	unix.CloseOnExec(int(stage.alive))
	unix.CloseOnExec(int(stage.tell))
	signal.Notify(make(chan os.Signal, 1), forwarded()...) // the front passes them on; ignored they would be inherited
	if err := netns.Adopt(); err != nil {
		return r.fail(exitOwnFailure, "%v", err)
	}
	go func() {
		io.Copy(io.Discard, os.NewFile(stage.alive, "front"))
		netns.EndChildren()
		os.Exit(exitOwnFailure)
	}()
	log, err := r.logs.logger(r.e)
	if err != nil {
		return r.fail(exitOwnFailure, "%v", err)
	}
	load, err := r.way.load(r.e)
	if err != nil {
		return err
	}
	resolvers, err := r.way.resolverList()
	if err != nil {
		return err
	}
	ns, err := netns.NewPrivate()
	if err != nil {
		return r.fail(exitOwnFailure, "%v; %s", err, userNamespaceHint())
	}
	r.e.leaveProcessors()
	d, diags, err := daemon.NewEnclosed(daemon.Enclosure{Inside: ns.Do, Load: load, Resolvers: resolvers, Ends: true}, log)
	if diags.HasErrors() {
		return r.e.tell(diags)
	}
	if err != nil {
		return r.fail(exitOwnFailure, "%v", err)
	}
	os.Unsetenv("NOTIFY_SOCKET") // the command's, if anybody's
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- d.Run(ctx, daemon.Signals{}) }()
	if err := r.publishAll(ns); err != nil {
		return r.fail(exitOwnFailure, "--publish: %v", err)
	}
	command, status, err := r.start(ns, stage)
	if err != nil {
		return r.fail(status, "%v", err)
	}
	tell := os.NewFile(stage.tell, "front")
	fmt.Fprintln(tell, command)
	tell.Close()
	go func() {
		if err := <-ended; ctx.Err() == nil {
			r.fail(exitOwnFailure, "%v", err)
			unix.Kill(command, unix.SIGKILL) // nothing carries its flows any more
		}
	}()
	status = waitFor(command)
	netns.EndChildren()
	d.Drain(drainTime)
	return exited(status)
}

// start starts the command in the namespace, without any right over it. Status
// is the exit status if it cannot.
func (r *runner) start(ns *netns.Namespace, stage stage) (pid, status int, err error) {
	path, err := exec.LookPath(r.args[0])
	switch {
	case errors.Is(err, exec.ErrDot):
		err = nil // as a shell would, where PATH says so
	case errors.Is(err, exec.ErrNotFound), errors.Is(err, fs.ErrNotExist):
		return 0, exitNotFound, fmt.Errorf("%s: not found", r.args[0])
	case err != nil:
		return 0, exitCannotExecute, err
	}
	attr := &os.ProcAttr{
		Files: []*os.File{os.Stdin, os.Stdout, os.Stderr},
		Env:   withoutProxies(os.Environ()),
		Sys:   &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL},
	}
	if !stage.root {
		attr.Sys.Cloneflags = syscall.CLONE_NEWUSER
		attr.Sys.UidMappings = []syscall.SysProcIDMap{{ContainerID: stage.uid, HostID: 0, Size: 1}}
		attr.Sys.GidMappings = []syscall.SysProcIDMap{{ContainerID: stage.gid, HostID: 0, Size: 1}}
	}
	err = ns.Do(func() error {
		if err := netns.SetResolver(insideResolver); err != nil {
			return err
		}
		if stage.root {
			if err := netns.DropRights(); err != nil {
				return err
			}
		}
		p, err := os.StartProcess(path, r.args, attr)
		if err == nil {
			pid = p.Pid
		}
		return err
	})
	switch {
	case err == nil:
		return pid, 0, nil
	case errors.Is(err, fs.ErrNotExist):
		return 0, exitNotFound, err
	case errors.Is(err, fs.ErrPermission), errors.Is(err, unix.ENOEXEC):
		return 0, exitCannotExecute, err
	}
	return 0, exitOwnFailure, err
}

// waitFor waits for the command and for what becomes our child until it ends,
// and returns its exit status.
func waitFor(command int) int {
	for {
		var s unix.WaitStatus
		pid, err := unix.Wait4(-1, &s, 0, nil)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return exitOwnFailure
		case pid != command:
		case s.Signaled():
			return exitSignal + int(s.Signal())
		default:
			return s.ExitStatus()
		}
	}
}

// publishAll listens on this host for what is inside.
func (r *runner) publishAll(ns *netns.Namespace) error {
	list, err := parsePublish(r.publish)
	if err != nil {
		return err
	}
	for _, p := range list {
		ln, err := net.Listen("tcp", p.listen)
		if err != nil {
			return err
		}
		go forwardTo(ns, ln, p.inside)
	}
	return nil
}

// forwardTo carries what a listener accepts to a port on lo of the namespace,
// over IPv4 or, if nobody listens there, IPv6.
func forwardTo(ns *netns.Namespace, ln net.Listener, port string) {
	for {
		c, err := ln.Accept()
		if err != nil {
			if errors.Is(err, net.ErrClosed) {
				return
			}
			time.Sleep(10 * time.Millisecond) // out of descriptors: that passes
			continue
		}
		go func() {
			defer c.Close()
			var in net.Conn
			err := ns.Do(func() (err error) { // lo answers at once
				if in, err = net.Dial("tcp", "127.0.0.1:"+port); err != nil {
					in, err = net.Dial("tcp", "[::1]:"+port)
				}
				return err
			})
			if err != nil {
				c.(*net.TCPConn).SetLinger(0)
				return
			}
			defer in.Close()
			done := make(chan struct{})
			go func() {
				defer close(done)
				io.Copy(in, c)
				in.(*net.TCPConn).CloseWrite()
			}()
			io.Copy(c, in)
			c.(*net.TCPConn).CloseWrite()
			<-done
		}()
	}
}
