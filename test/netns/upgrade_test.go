package netns_test

import (
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tproxyd/tproxyd/internal/socksserver"
)

// takeover has a new process take the place of the daemon's, which it returns.
func (d *daemon) takeover(t testing.TB) (old *process) {
	t.Helper()
	old, args := d.process, d.set.args
	d.set.args = append(slices.Clone(args), "--takeover")
	d.start(t)
	d.set.args = args
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the process taken over printed:\n%s", old.output())
		}
	})
	return old
}

// TestUpgrade: five processes, one after the other, and nothing is lost, nor
// leaks, nor has another address.
func TestUpgrade(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.socks1.startSocks(t, &socksserver.Server{}, socks1At+":1080")
	d := serve(t, w.gateway, settings{resolvers: []string{outsideNS}, routes: "SERVER one 198.51.100.11\nSOCKD5 @=one *\n"})
	w.observe(t)
	load := w.startLoad(t)
	time.Sleep(500 * time.Millisecond)
	var before []*process
	for range 5 {
		before = append(before, d.takeover(t))
		time.Sleep(400 * time.Millisecond)
	}
	for i, p := range before {
		if !p.running() && i == 0 {
			t.Errorf("the first process has ended, and its flows with it")
		}
	}
	if n := d.metric(t, "tproxyd_before_flows"); n < 200 {
		t.Errorf("the processes before carry %v flows, want 200", n)
	}
	if n := d.metric(t, "tproxyd_before_udp_sessions"); n < 50 {
		t.Errorf("the processes before carry %v sessions, want 50", n)
	}
	load.finish(t)
	if n, who := w.leaked(t); n != 0 {
		t.Errorf("%d packets leaked:\n%s", n, who)
	}
	d.routes(t, "SERVER one 198.51.100.11\nTIMEOUT udp=1s\nSOCKD5 @=one *\n") // so that UDP ends soon, there too
	d.reload(t)
	for i, p := range before {
		code, ended := p.wait(20 * time.Second)
		if !ended || code != 0 {
			t.Errorf("process %d, taken over: ended %v, exit %d", i, ended, code)
		}
	}
	eventually(t, 5*time.Second, "nobody else carries anything", func() bool {
		return !strings.Contains(d.cli(t, "status", "-c", d.config).ok(t).out, `"before"`)
	})
	d.stop(t)
}

// TestTakenOverEnds: what was taken over ends by SIGTERM, and nobody else does.
func TestTakenOverEnds(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	startMicrosocks(t, w.socks1, socks1At+":1080")
	d := serve(t, w.gateway, settings{routes: "SOCKD5 @=198.51.100.11 *\n"})
	w.startEchoes(t, 2)
	old := d.takeover(t)
	old.cmd.Process.Signal(syscall.SIGTERM)
	if code, ended := old.wait(5 * time.Second); !ended || code != 0 {
		t.Errorf("SIGTERM: ended %v, exit %d", ended, code)
	}
	w.client.curl(t, "http://www.example.org/after", "-4").ok(t)
}
