package netns_test

import (
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Topology: the gateway of world; a neighbour's table, rule and route are in
// its kernel already and must be there, byte for byte, in the end.

// neighbour puts things of others into the gateway's kernel.
func neighbour(t *testing.T, h *host) {
	t.Helper()
	h.nft(t, `
table inet neighbour {
	set keep { type ipv4_addr; elements = { 192.0.2.77 } }
	chain forward { type filter hook forward priority 0; policy accept; ip daddr @keep counter drop; }
}`)
	h.ip(t, "rule add pref 1234 fwmark 0x1 lookup 99", "route add 192.0.2.128/25 dev lan0 table 99")
	h.run(t, command{args: strings.Fields(tool(t, "ip") + " -6 rule add pref 1234 fwmark 0x1 lookup 99")}).ok(t)
}

func TestCleanup(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.dante(t)
	neighbour(t, w.gateway)
	w.gateway.settle(t)
	before := w.gateway.kernel(t)
	d := newDaemon(t, w.gateway, settings{local: true, routes: "DIRECT 198.51.100.0/24\nDENY 192.0.2.66\nSOCKD5 @=198.51.100.11 *\n"})
	same := func(when string) {
		t.Helper()
		if now := w.gateway.kernel(t); now != before {
			t.Errorf("%s the kernel's state differs:\n%s", when, lineDiff(before, now))
		}
	}
	cleanup := func(when string) {
		t.Helper()
		for range 2 { // twice is once
			d.cli(t, "cleanup").ok(t)
			same(when)
		}
	}

	cleanup("with nothing to clean up,")

	d.start(t)
	if w.gateway.kernel(t) == before {
		t.Fatal("the running daemon left no trace in the kernel")
	}
	second := d.cli(t, "serve", "-c", d.config).exit(t, 1)
	if second.took > 10*time.Second || second.err == "" {
		t.Errorf("the second serve took %v and said %q", second.took, second.err)
	}
	if err := w.get(netip.MustParseAddr(outsideAt)); err != nil {
		t.Errorf("the first daemon after the second's attempt: %v", err)
	}
	if r := d.cli(t, "cleanup"); r.code != 1 {
		t.Errorf("cleanup under a living daemon: exit %d, want 1\n%s%s", r.code, r.out, r.err)
	}
	if err := w.get(netip.MustParseAddr(outsideAt)); err != nil {
		t.Errorf("the daemon after somebody's cleanup: %v", err)
	}

	// A normal stop keeps the closed table, by default.
	d.stop(t)
	began := time.Now()
	atOnce(t, "stopped", began, w.get(netip.MustParseAddr(outsideAt)))
	if !strings.Contains(w.gateway.kernel(t), "tproxyd") {
		t.Error("a normal stop removed the table")
	}
	cleanup("after stop and cleanup")
	w.client.curl(t, "http://"+outsideAt+"/free").fetched(t, clientAt)

	// A crash keeps it, too.
	d.start(t)
	d.process.kill()
	atOnce(t, "killed", time.Now(), w.get(netip.MustParseAddr(outsideAt)))
	cleanup("after kill -9 and cleanup")

	// A start over the remains of a crash, and over the closed table.
	d.start(t)
	d.process.kill()
	d.cli(t, "close", "-c", d.config).ok(t)
	d.start(t)
	if err := w.get(netip.MustParseAddr(outsideAt)); err != nil {
		t.Errorf("after a start over the closed table: %v", err)
	}
	d.process.kill()
	cleanup("after kill, close, start, kill and cleanup")
	d.cli(t, "close", "-c", d.config).ok(t)
	atOnce(t, "closed", time.Now(), w.get(netip.MustParseAddr(outsideAt)))
	cleanup("after close and cleanup")

	// fail = "open" removes at a normal stop, and only then.
	d.set.fail = "open"
	d.write(t)
	d.start(t)
	d.process.kill()
	atOnce(t, "killed with fail = open", time.Now(), w.get(netip.MustParseAddr(outsideAt)))
	d.start(t)
	if err := w.get(netip.MustParseAddr(outsideAt)); err != nil {
		t.Errorf("fail = open, running: %v", err)
	}
	d.stop(t)
	same("after a stop with fail = open")
}

// TestStopWithFlows: SIGTERM ends the daemon within a second though a thousand
// flows are running, and every client hears of it at once.
func TestStopWithFlows(t *testing.T) {
	t.Parallel()
	const n = 1000
	w := newWorld(t)
	w.startFaulty(t, func(c *net.TCPConn) { // carries nothing, but holds
		if _, err := greet(c); err == nil {
			reply(c, 0)
			io.Copy(io.Discard, c)
		}
		c.Close()
	})
	d := serve(t, w.gateway, settings{routes: "SOCKD5 @=198.51.100.11 *\n"})
	var wg sync.WaitGroup
	conns := make([]net.Conn, n)
	for worker := range 20 {
		wg.Go(func() {
			for i := worker; i < n; i += 20 {
				conns[i], _ = w.client.dial("tcp", net.JoinHostPort([]string{outsideAt, outsideAt6}[i%2], "7"), 10*time.Second)
			}
		})
	}
	wg.Wait()
	for _, c := range conns {
		if c == nil {
			t.Fatal("a flow was not accepted")
		}
		defer c.Close()
	}
	eventually(t, 10*time.Second, "all flows are carried", func() bool { return d.metric(t, "tproxyd_flows") == n })
	began := time.Now()
	d.stop(t)
	took := time.Since(began)
	t.Logf("stopped after %v", took.Round(time.Millisecond))
	if took > time.Second {
		t.Errorf("the stop took %v", took)
	}
	for _, c := range conns {
		c.SetReadDeadline(began.Add(3 * time.Second))
		if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Fatalf("a flow after the stop: %v", err)
		}
	}

	d.start(t)
	d.cmd.Process.Signal(syscall.SIGINT)
	if code, ended := d.wait(10 * time.Second); !ended || code != 0 {
		t.Errorf("SIGINT: ended %v, exit %d", ended, code)
	}
}

// settle waits until the kernel has stopped adding routes of its own.
func (h *host) settle(t testing.TB) {
	t.Helper()
	last := h.kernel(t)
	eventually(t, 10*time.Second, h.name+" settles", func() bool {
		time.Sleep(300 * time.Millisecond)
		now := h.kernel(t)
		same := now == last
		last = now
		return same
	})
}

// lineDiff shows the lines that only one of two texts has.
func lineDiff(a, b string) string {
	count := map[string]int{}
	for _, l := range strings.Split(b, "\n") {
		count[l]++
	}
	var out strings.Builder
	for _, l := range strings.Split(a, "\n") {
		if count[l]--; count[l] < 0 {
			out.WriteString("- " + l + "\n")
		}
	}
	for _, l := range strings.Split(b, "\n") {
		if count[l] > 0 {
			out.WriteString("+ " + l + "\n")
			count[l]--
		}
	}
	return out.String()
}
