package netns_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// command is a program to run on a host.
type command struct {
	args  []string
	stdin string
	env   []string      // added to the environment
	limit time.Duration // 0: 30 s
	alone bool          // in a PID namespace: what it forks ends with it
	files []*os.File    // its descriptors from 3 on
}

// result is what a program left when it ended.
type result struct {
	args     []string
	out, err string
	code     int
	took     time.Duration
}

// ok fails the test unless the program exited with 0.
func (r result) ok(t testing.TB) result {
	t.Helper()
	return r.exit(t, 0)
}

// exit fails the test unless the program exited with code.
func (r result) exit(t testing.TB, code int) result {
	t.Helper()
	if r.code != code {
		t.Fatalf("%s: exit %d, want %d\n%s%s", strings.Join(r.args, " "), r.code, code, r.out, r.err)
	}
	return r
}

// run runs a program to its end; one that does not end in time is killed and
// fails the test.
func (h *host) run(t testing.TB, c command) result {
	t.Helper()
	p := h.start(t, c)
	if c.limit == 0 {
		c.limit = 30 * time.Second
	}
	code, ended := p.wait(c.limit)
	if !ended {
		p.kill()
		t.Fatalf("%s: still running after %v\n%s", strings.Join(c.args, " "), c.limit, p.output())
	}
	return result{args: c.args, out: p.out.String(), err: p.err.String(), code: code, took: time.Since(p.began)}
}

// process is a program that runs on a host. It dies with the host.
type process struct {
	cmd      *exec.Cmd
	out, err buffer
	began    time.Time
	ended    chan struct{} // closed when it has been waited for
}

// start starts a program on the host.
func (h *host) start(t testing.TB, c command) *process {
	t.Helper()
	p := &process{began: time.Now(), ended: make(chan struct{})}
	args := c.args
	if c.alone {
		// The first process of the namespace must be one that stays root: who
		// changes its user, as servers do, outlives its parent.
		args = append([]string{"/bin/sh", "-c", `"$@" & wait $!`, "sh"}, args...)
	}
	p.cmd = exec.Command(args[0], args[1:]...)
	p.cmd.Env = append([]string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=" + h.dir, "LC_ALL=C"}, c.env...)
	p.cmd.Dir = h.dir
	p.cmd.ExtraFiles = c.files
	p.cmd.Stdin = strings.NewReader(c.stdin)
	p.cmd.Stdout, p.cmd.Stderr = &p.out, &p.err
	p.cmd.WaitDelay = time.Second
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if c.alone {
		p.cmd.SysProcAttr.Cloneflags = syscall.CLONE_NEWPID
	}
	// The thread that starts it must be the one that lasts: Pdeathsig is
	// about the thread.
	h.must(t, h.ns.Do(p.cmd.Start))
	go p.reap()
	t.Cleanup(p.kill)
	return p
}

func (p *process) reap() {
	defer close(p.ended)
	var exit *exec.ExitError
	if err := p.cmd.Wait(); err != nil && !errors.As(err, &exit) {
		io.WriteString(&p.err, "\n"+err.Error()+"\n")
	}
}

func (p *process) pid() int { return p.cmd.Process.Pid }

// kill kills the program and waits for its end. It may be called twice.
func (p *process) kill() {
	p.cmd.Process.Kill()
	<-p.ended
}

// wait returns the exit code, 128+N after a signal, or false if the program
// has not ended within limit.
func (p *process) wait(limit time.Duration) (int, bool) {
	select {
	case <-p.ended:
	case <-time.After(limit):
		return 0, false
	}
	s := p.cmd.ProcessState.Sys().(syscall.WaitStatus)
	if s.Signaled() {
		return 128 + int(s.Signal()), true
	}
	return s.ExitStatus(), true
}

// running says whether the program has not ended.
func (p *process) running() bool {
	select {
	case <-p.ended:
		return false
	default:
		return true
	}
}

// output is everything that the program has printed.
func (p *process) output() string { return p.out.String() + p.err.String() }

// buffer is a bytes.Buffer for a writer and readers in different goroutines.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// eventually waits until ok holds.
func eventually(t testing.TB, limit time.Duration, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); ; time.Sleep(10 * time.Millisecond) {
		if ok() {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", limit, what)
		}
	}
}
