package netns_test

import (
	"fmt"
	"net"
	"net/netip"
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
			s := w.gateway.start(t, command{args: []string{tool(t, "strace"), "-f", "-qq", "-o", "/dev/null", "-p", fmt.Sprint(d.pid()),
				"-e", "trace=" + call, "-e", "inject=" + fault + ":when=5+7"}})
			eventually(t, 5*time.Second, "strace is at work", func() bool { return d.traced(t) })
			o := w.storm(300, time.Millisecond)
			t.Log(o)
			if o.hung != 0 || o.served < 60 || len(o.other) > 0 {
				t.Errorf("while it fails: %v", o)
			}
			if out := d.cli(t, "status", "-c", d.config); out.code != 0 {
				t.Errorf("status: exit %d\n%s", out.code, out.err)
			}
			if !s.running() {
				t.Errorf("strace has ended:\n%s", s.output())
			}
			s.cmd.Process.Signal(syscall.SIGINT)
			s.wait(5 * time.Second)
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

// traced tells whether a tracer holds every thread of the daemon.
func (d *daemon) traced(t testing.TB) bool {
	t.Helper()
	return !strings.Contains(d.host.run(t, command{args: []string{"/bin/sh", "-c", fmt.Sprintf("cat /proc/%d/task/*/status", d.pid())}}).ok(t).out, "TracerPid:\t0\n")
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
	if o := w.storm(60, time.Millisecond); o.served != 50 {
		t.Errorf("after: %v", o)
	}
	if n, who := w.leaked(t); n != 0 {
		t.Errorf("%d packets leaked:\n%s", n, who)
	}
	d.stop(t)
}
