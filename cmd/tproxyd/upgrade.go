package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/tproxyd/tproxyd/internal/control"
	"golang.org/x/sys/unix"
)

// The daemon cannot start what takes its place: its sandbox lets it execute
// nothing. So the command does that, which systemd runs in the daemon's own cgroup
// and with the unit's limits.

// upgrade has this program file take the daemon's place, if the daemon runs another
// one; false: it runs this one.
func (e *env) upgrade(ctx context.Context, client *control.Client) (done bool, err error) {
	old, err := client.Process(ctx)
	if err != nil {
		return false, failed(err)
	}
	if same, err := isProgramOf(old.Pid); same || err != nil {
		return false, failed(err)
	}
	if unit := unitOf(old.Pid); unit != "" && unit != unitOf(os.Getpid()) {
		return false, failed(fmt.Errorf("the daemon belongs to the unit %s, and its successor has to: systemctl reload %s", unit, unit))
	}
	p, fd, err := startSuccessor(old)
	if err != nil {
		return false, failed(fmt.Errorf("%w; the daemon that runs (version %s) goes on", err, old.Version))
	}
	defer unix.Close(fd)
	if err := awaitService(ctx, client, p.Pid, fd); err != nil {
		p.Kill() // it could take over later, when nobody expects it
		code := exitFailed
		if s, err := p.Wait(); err == nil && s.ExitCode() > 0 {
			code = s.ExitCode()
		}
		fmt.Fprintf(e.stderr, "tproxyd: version %s %v; the daemon that runs (version %s) goes on\n", buildVersion(), err, old.Version)
		return false, exited(code)
	}
	fmt.Fprintf(e.stdout, "tproxyd: version %s (process %d) has taken over from version %s (process %d)\n", buildVersion(), p.Pid, old.Version, old.Pid)
	return true, nil
}

// isProgramOf tells whether a process executes the file that this one does.
func isProgramOf(pid int) (bool, error) {
	own, err := os.Stat("/proc/self/exe")
	if err != nil {
		return false, err
	}
	other, err := os.Stat(fmt.Sprintf("/proc/%d/exe", pid)) // also of a file that has been removed
	return err == nil && os.SameFile(own, other), err
}

// unitOf returns the service of systemd that a process belongs to; empty: none.
func unitOf(pid int) string {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	for line := range strings.Lines(string(b)) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) == 3 && (f[1] == "" || f[1] == "name=systemd") && strings.HasSuffix(f[2], ".service") {
			return filepath.Base(f[2])
		}
	}
	return ""
}

// startSuccessor starts this program as the daemon was started, to take over. The
// descriptor is the process's (pidfd_open(2)).
func startSuccessor(old control.Process) (p *os.Process, pidfd int, err error) {
	if len(old.Args) < 2 || old.Args[1] != "serve" {
		return nil, -1, fmt.Errorf("the daemon was not started by serve: %q", old.Args)
	}
	program, err := os.Executable()
	if err != nil {
		return nil, -1, err
	}
	args := old.Args
	if !slices.Contains(args, "--takeover") {
		args = slices.Insert(slices.Clone(args), 2, "--takeover")
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, -1, err
	}
	defer null.Close()
	dir, err := directoryOf(old.Pid) // names may be relative to it
	if err != nil {
		return nil, -1, err
	}
	attr := &syscall.SysProcAttr{Setsid: true, PidFD: &pidfd}
	if os.Getppid() == 1 {
		attr.Cloneflags = unix.CLONE_PARENT // systemd sees the end of its own children
	}
	p, err = os.StartProcess(program, args, &os.ProcAttr{Dir: dir, Files: []*os.File{null, os.Stdout, os.Stderr}, Sys: attr})
	return p, pidfd, err
}

// directoryOf returns the working directory of a process. From another mount
// namespace that is seen with all that is above its root, if that is no root of a
// mount namespace.
func directoryOf(pid int) (string, error) {
	root, err := os.Readlink(fmt.Sprintf("/proc/%d/root", pid))
	if err != nil {
		return "", err
	}
	dir, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", pid))
	return filepath.Join("/", strings.TrimPrefix(dir, root)), err
}

// awaitService returns when a process answers for the daemon. The error says what
// it does instead.
func awaitService(ctx context.Context, client *control.Client, pid, pidfd int) error {
	for {
		if now, err := client.Process(ctx); err == nil && now.Pid == pid {
			return nil
		}
		if ctx.Err() != nil {
			return errors.New("does not serve in time, and was ended")
		}
		ended := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
		if n, err := unix.Poll(ended, int((50 * time.Millisecond).Milliseconds())); err == nil && n > 0 {
			return errors.New("cannot take over, for the reason above")
		}
	}
}
