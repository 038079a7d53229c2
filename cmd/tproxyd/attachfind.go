package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// place is where a network namespace is to be found.
type place struct {
	path string
	pid  int // a process in it; 0: none is known
}

func byPath(path string) (place, error) {
	_, err := os.Stat(path)
	return place{path: path}, err
}

func byPID(s string) (place, error) {
	pid, err := strconv.Atoi(s)
	if err != nil || pid <= 0 {
		return place{}, fmt.Errorf("--pid: %q is not the number of a process", s)
	}
	p := place{path: fmt.Sprintf("/proc/%d/ns/net", pid), pid: pid}
	if _, err := os.Readlink(p.path); err != nil {
		return p, fmt.Errorf("--pid: %w", err)
	}
	return p, nil
}

// engines are the commands that know of containers.
var engines = []string{"podman", "docker"}

// byContainer asks each engine that there is for the first process of a
// container.
func byContainer(name string) (place, error) {
	var said []string
	for _, engine := range engines {
		path, err := exec.LookPath(engine)
		if err != nil {
			continue
		}
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		out, err := exec.CommandContext(ctx, path, "container", "inspect", "--format", "{{.State.Pid}}", "--", name).Output()
		cancel()
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			said = append(said, engine+": "+strings.TrimSpace(string(exit.Stderr)))
			continue
		}
		if err != nil {
			return place{}, fmt.Errorf("--container: %s: %w", engine, err)
		}
		pid := strings.TrimSpace(string(out))
		if pid == "0" {
			return place{}, fmt.Errorf("--container: %s does not run; start it first", name)
		}
		return byPID(pid)
	}
	if said == nil {
		return place{}, fmt.Errorf("--container: neither %s is installed; give --pid or --netns", strings.Join(engines, " nor "))
	}
	return place{}, fmt.Errorf("--container: there is no %s: %s", name, strings.Join(said, "; "))
}

// pathCheck is how often a namespace that is known by a path alone is looked
// for.
const pathCheck = time.Second

// watch returns what is closed when the process has ended, or the path is no
// longer that of the namespace. It looks until ctx ends.
func (p place) watch(ctx context.Context) (<-chan struct{}, error) {
	gone := make(chan struct{})
	if p.pid != 0 {
		fd, err := unix.PidfdOpen(p.pid, unix.PIDFD_NONBLOCK)
		if err != nil {
			return nil, os.NewSyscallError("pidfd_open", err)
		}
		f := os.NewFile(uintptr(fd), "process") // readable at its end, for Go's poller too
		raw, err := f.SyscallConn()
		if err != nil {
			return nil, err
		}
		go func() {
			defer f.Close()
			stop := context.AfterFunc(ctx, func() { f.SetReadDeadline(time.Unix(1, 0)) })
			defer stop()
			ended := false
			raw.Read(func(fd uintptr) bool {
				n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 0)
				ended = err == nil && n > 0
				return ended
			})
			if ended {
				close(gone)
			}
		}()
		return gone, nil
	}
	var was unix.Stat_t
	if err := unix.Stat(p.path, &was); err != nil {
		return nil, &os.PathError{Op: "stat", Path: p.path, Err: err}
	}
	go func() {
		tick := time.NewTicker(pathCheck)
		defer tick.Stop()
		for {
			select {
			case <-ctx.Done():
				return
			case <-tick.C:
			}
			var now unix.Stat_t
			if err := unix.Stat(p.path, &now); err != nil || now.Dev != was.Dev || now.Ino != was.Ino {
				close(gone)
				return
			}
		}
	}()
	return gone, nil
}

// foreignUser tells whether the namespaces belong to another user namespace
// than ours, as those of containers without root do, and returns a process in
// it.
func foreignUser(places []place) (pid int, foreign bool, err error) {
	own, err := os.Readlink("/proc/self/ns/user")
	if err != nil {
		return 0, false, err
	}
	if os.Geteuid() == 0 && mayEnclose() {
		return 0, false, nil // root has every right there too
	}
	first := ""
	for _, p := range places {
		if p.pid == 0 {
			return 0, false, fmt.Errorf("attach: %s: without root a namespace is known by --pid or --container alone", p.path)
		}
		user, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/user", p.pid))
		if err != nil {
			return 0, false, err
		}
		if first == "" {
			first, pid = user, p.pid
		}
		if user != first {
			return 0, false, errors.New("attach: the containers have different user namespaces: run one tproxyd attach for each, or run it as root")
		}
	}
	return pid, first != own, nil
}
