package netns_test

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestInjected: a call to the kernel that fails now and then, as it does on a small
// or busy machine, costs the flow that it was for and nothing else. strace makes it
// fail.
func TestInjected(t *testing.T) {
	for _, fault := range []string{
		"accept4:error=EMFILE",
		"socket:error=ENOBUFS",
		"epoll_ctl:error=ENOSPC", // fs.epoll.max_user_watches
		"splice:error=ENOMEM",
		"recvmmsg:error=ECONNABORTED",
	} {
		t.Run(fault, func(t *testing.T) {
			t.Parallel()
			w, d := leakWorld(t)
			d.start(t)
			w.observe(t)
			if o := w.storm(60, time.Millisecond); o.served != 50 { // UDP has no way through microsocks
				t.Fatalf("before: %v", o)
			}
			call, _, _ := strings.Cut(fault, ":")
			s := w.gateway.start(t, command{args: []string{tool(t, "strace"), "-I", "1", "-f", "-qq", "-o", "/dev/null", "-p", fmt.Sprint(d.pid()),
				"-e", "trace=" + call, "-e", "inject=" + fault + ":when=5+7"}})
			eventually(t, 5*time.Second, "strace is at work", func() bool { return !slices.Contains(d.tracers(t), 0) })
			o := w.storm(300, time.Millisecond)
			t.Log(o)
			if o.hung != 0 || o.served < 60 || len(o.other) > 0 {
				t.Errorf("while it fails: %v", o)
			}
			eventually(t, 5*time.Second, "status is told", func() bool { return d.cli(t, "status", "-c", d.config).code == 0 }) // a connection may be cut as any other
			if !s.running() {
				t.Errorf("strace has ended:\n%s", s.output())
			}
			s.cmd.Process.Signal(syscall.SIGTERM) // SIGINT is ignored in what runs in the background
			if _, ended := s.wait(5 * time.Second); !ended {
				t.Fatal("strace goes on")
			}
			if !d.running() {
				t.Fatal("the daemon has ended")
			}
			eventually(t, 5*time.Second, "served again", func() bool { return w.get(netip.MustParseAddr(outsideAt)) == nil })
			if o := w.storm(60, time.Millisecond); o.served != 50 {
				t.Errorf("after: %v", o)
			}
			eventually(t, 10*time.Second, "no flow is left", func() bool { return d.metric(t, "tproxyd_flows") == 0 })
			eventually(t, 10*time.Second, "a second without work", func() bool {
				before := d.cpu(t)
				time.Sleep(time.Second)
				return d.cpu(t)-before < 200*time.Millisecond
			})
			if n, who := w.leaked(t); n != 0 {
				t.Errorf("%d packets leaked:\n%s", n, who)
			}
			d.stop(t)
		})
	}
}

// tracers returns who traces each thread of the daemon; 0: nobody.
func (d *daemon) tracers(t testing.TB) (pids []int) {
	t.Helper()
	all := d.host.run(t, command{args: []string{"/bin/sh", "-c", fmt.Sprintf("cat /proc/%d/task/*/status", d.pid())}}).out // threads come and go
	for line := range strings.Lines(all) {
		var pid int
		if n, _ := fmt.Sscanf(line, "TracerPid: %d", &pid); n == 1 {
			pids = append(pids, pid)
		}
	}
	if len(pids) == 0 {
		t.Fatalf("it has ended\n%s", d.output())
	}
	return pids
}

// untrace ends the strace that the daemon was started by.
func (d *daemon) untrace(t testing.TB) {
	t.Helper()
	syscall.Kill(slices.Max(d.tracers(t)), syscall.SIGTERM)
	eventually(t, 5*time.Second, "strace has ended", func() bool { return slices.Max(d.tracers(t)) == 0 })
}

// TestSocketsKilled: an administrator who ends sockets by ss -K ends flows; datagrams
// are received as before.
func TestSocketsKilled(t *testing.T) {
	t.Parallel()
	w, d := leakWorld(t)
	d.start(t)
	w.observe(t)
	conn, err := w.client.dial("tcp", net.JoinHostPort(outsideAt, "80"), 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for _, which := range [][]string{{"-t"}, {"-u", "-a"}} { // flows; what waits for datagrams, too
		w.gateway.run(t, command{args: append([]string{tool(t, "ss"), "-K", "-n"}, which...)}).ok(t)
	}
	conn.SetDeadline(time.Now().Add(5 * time.Second))
	if _, err := conn.Read(make([]byte, 1)); err == nil || err.(net.Error).Timeout() {
		t.Errorf("the flow: %v, want its end", err)
	}
	var o *outcomes
	eventually(t, 10*time.Second, "all is served", func() bool { // connections to servers were killed too
		o = w.storm(60, time.Millisecond)
		return o.served == 50
	})
	t.Log(o)
	if n, who := w.leaked(t); n != 0 {
		t.Errorf("%d packets leaked:\n%s", n, who)
	}
	d.stop(t)
}

// TestTakeoverInjected: whatever a process lacks that takes over, the daemon that
// serves goes on, or the new one serves; no flow is cut.
func TestTakeoverInjected(t *testing.T) {
	t.Parallel()
	w, d := leakWorld(t)
	d.start(t)
	w.observe(t)
	flows := w.startEchoes(t, 4)
	outcome := map[string]int{}
	for n := 1; n <= 12; n++ {
		next := w.gateway.start(t, command{args: []string{tool(t, "strace"), "-D", "-I", "1", "-f", "-qq", "-o", "/dev/null", "-e", "trace=epoll_ctl",
			"-e", fmt.Sprintf("inject=epoll_ctl:error=ENOSPC:when=%d", n), d.bin, "serve", "--takeover", "-c", d.config}})
		eventually(t, 15*time.Second, "it serves, or has ended", func() bool {
			return !next.running() || strings.Contains(next.output(), "ready")
		})
		if next.running() {
			outcome["took over"]++
			d.process = next
			d.untrace(t) // nothing fails any longer
		} else {
			outcome["ended"]++
		}
		for _, at := range []string{outsideAt, outsideAt6} {
			if err := w.get(netip.MustParseAddr(at)); err != nil {
				t.Errorf("call %d: %v\n%s", n, err, next.output())
			}
		}
		d.cli(t, "status", "-c", d.config).ok(t)
	}
	t.Log(outcome)
	flows.finish(t)
	if n, who := w.leaked(t); n != 0 {
		t.Errorf("%d packets leaked:\n%s", n, who)
	}
}
