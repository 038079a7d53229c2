package netns_test

import (
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/tproxyd/tproxyd/internal/socksserver"
	"golang.org/x/sys/unix"
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
		return !strings.Contains(d.cli(t, "status", "--json", "-c", d.config).ok(t).out, `"before"`)
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

// TestTakenOverFollows: the new process is stopped, and the old one with it; it
// dies or fails, and the old one carries on, by the rules of whoever serves next.
func TestTakenOverFollows(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	startMicrosocks(t, w.socks1, socks1At+":1080")
	w.insideDNS.add(t, "here.example.org. 60 IN A "+outsideAt)
	const proxied = "SOCKD5 @=198.51.100.11 *\n"
	d := serve(t, w.gateway, settings{routes: "RESOLVE remote here.example.org\nDIRECT here.example.org\n" + proxied})
	w.outside.answerTCP(t, outsideAt+":7", func(c *net.TCPConn) { io.Copy(c, c) })
	dial := func(to string) net.Conn {
		c, err := w.client.dial("tcp", to+":7", 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		talk(t, c)
		return c
	}
	here := w.client.mustLookup(t, insideNS, "here.example.org", dns.TypeA).String()
	direct, through := dial(here), dial(outsideAt)
	old := d.takeover(t)
	d.process.kill()
	talk(t, direct)
	talk(t, through)
	d.routes(t, proxied)
	d.start(t)
	eventually(t, 5*time.Second, "what is no longer DIRECT is cut", func() bool {
		direct.SetDeadline(time.Now().Add(time.Second))
		_, err := direct.Write([]byte("hello"))
		if err == nil {
			_, err = direct.Read(make([]byte, 5))
		}
		return err != nil
	})
	talk(t, through)
	through.Close()
	if code, ended := old.wait(5 * time.Second); !ended || code != 0 {
		t.Errorf("with nothing left: ended %v, exit %d", ended, code)
	}

	alive := dial(outsideAt)
	defer alive.Close()
	d.takeover(t)
	w.gateway.run(t, command{args: []string{tool(t, "ss"), "-K", "-t", "-n", "state", "listening"}}).ok(t)
	if code, ended := d.process.wait(5 * time.Second); !ended || code != 1 {
		t.Errorf("with no listener: ended %v, exit %d", ended, code)
	}
	talk(t, alive)
	d.start(t)
	talk(t, alive)
	old = d.takeover(t)
	d.stop(t)
	if code, ended := old.wait(5 * time.Second); !ended || code != 0 {
		t.Errorf("stopped: ended %v, exit %d", ended, code)
	}
}

// attempt starts a process that is to take over, and waits for nothing.
func (d *daemon) attempt(t testing.TB) *process {
	t.Helper()
	return d.host.start(t, command{args: []string{d.bin, "serve", "-c", d.config, "--takeover"}})
}

// talk fails the test unless what is said comes back.
func talk(t testing.TB, c net.Conn) {
	t.Helper()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	b := make([]byte, 5)
	if _, err := io.WriteString(c, "hello"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, b); err != nil || string(b) != "hello" {
		t.Fatalf("%q came back: %v", b, err)
	}
}

// TestTakeoverKilled: one of the two is killed at any moment. Nothing leaks, what
// the other one carries goes on, and the next one serves.
func TestTakeoverKilled(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	startMicrosocks(t, w.socks1, socks1At+":1080")
	d := serve(t, w.gateway, settings{routes: "TIMEOUT connect=2s handshake=2s\nSOCKD5 @=198.51.100.11 *\n"})
	w.observe(t)
	address := w.client.mustLookup(t, outsideNS, "www.example.org", dns.TypeA)
	w.outside.answerTCP(t, outsideAt+":7", func(c *net.TCPConn) { io.Copy(c, c) })
	outcome := map[string]int{}
	for round := range 16 {
		flow, err := w.client.dial("tcp", outsideAt+":7", 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		talk(t, flow)
		next := d.attempt(t)
		time.Sleep(time.Duration(round/2) * 15 * time.Millisecond)
		victim := "new"
		if round%2 == 0 {
			next.kill()
			talk(t, flow) // it is the old one's
		} else {
			victim = "old"
			d.process.kill()
		}
		// Whoever is left serves, or nobody does: then all is refused at once.
		for range 4 {
			began := time.Now()
			if err := w.get(netip.MustParseAddr(outsideAt)); err != nil {
				atOnce(t, victim+" killed", began, err)
			}
		}
		if victim == "old" {
			eventually(t, 15*time.Second, "the new one serves, or has ended", func() bool {
				return !next.running() || strings.Contains(next.output(), "ready")
			})
			if next.running() {
				d.process = next
			}
		}
		flow.Close()
		serves := d.process.running() && !strings.Contains(d.process.output(), "handed over")
		outcome[fmt.Sprintf("%s killed, served: %v", victim, serves)]++
		if !serves {
			d.process.kill()
			d.start(t)
		}
		if err := w.get(netip.MustParseAddr(outsideAt)); err != nil {
			t.Fatalf("round %d, %s killed: %v\nold:\n%s\nnew:\n%s", round, victim, err, d.output(), next.output())
		}
		if now := w.client.mustLookup(t, outsideNS, "www.example.org", dns.TypeA); now != address {
			t.Errorf("the name was at %v and is at %v", address, now)
		}
	}
	t.Log(outcome)
	if n, who := w.leaked(t); n != 0 {
		t.Errorf("%d packets leaked:\n%s", n, who)
	}
}

// TestTakeoverRefused: what cannot take over says why, and changes nothing.
func TestTakeoverRefused(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	startMicrosocks(t, w.socks1, socks1At+":1080")
	d := serve(t, w.gateway, settings{routes: "SOCKD5 @=198.51.100.11 *\n"})
	config, err := os.ReadFile(d.config)
	w.gateway.must(t, err)
	w.outside.answerTCP(t, outsideAt+":7", func(c *net.TCPConn) { io.Copy(c, c) })
	flow, err := w.client.dial("tcp", outsideAt+":7", 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	w.observe(t)
	for _, test := range []struct {
		what, old, new string
		code           int
		err            string
	}{
		{"a wrong file", "local = false", "local = 7", 2, "error T03: intercept.local"},
		{"another table", "local = false", "table = 99", 2, "changed: [intercept] table; stop the daemon"},
		{"other marks", "local = false", `mark = "0x10000/0xf0000"`, 2, "changed: [intercept] mark; stop the daemon"},
		{"another state directory", quoted([]string{d.set.state}), quoted([]string{w.gateway.dir}), 2, "changed: [state] directory; stop the daemon"},
		{"an address that is in use", `metrics = ""`, `metrics = "198.51.100.11:1"`, 1, "[control] metrics"},
	} {
		other := w.gateway.file(t, "other.toml", strings.Replace(string(config), test.old, test.new, 1), 0o644)
		r := d.cli(t, "serve", "--takeover", "-c", other).exit(t, test.code)
		if !strings.Contains(r.err, test.err) {
			t.Errorf("%s: it says %s", test.what, r.err)
		}
		talk(t, flow)
		w.client.curl(t, "http://www.example.org/refused", "-4").ok(t)
	}
	if n, who := w.leaked(t); n != 0 {
		t.Errorf("%d packets leaked:\n%s", n, who)
	}

	// A daemon of a version that knows nothing of it.
	path := filepath.Join(w.gateway.dir, "older.sock")
	l, err := net.Listen("unix", path)
	w.gateway.must(t, err)
	defer l.Close()
	go http.Serve(l, http.NotFoundHandler())
	older := w.gateway.file(t, "older.toml", strings.Replace(string(config), d.socket(), path, 1), 0o644)
	if r := d.cli(t, "serve", "--takeover", "-c", older).exit(t, 1); !strings.Contains(r.err, "of a version that cannot be taken over") {
		t.Errorf("an older one: it says %s", r.err)
	}
	talk(t, flow)
}

// TestTakeoverSilent: a process that stops in the middle is ended, and the one
// that serves goes on.
func TestTakeoverSilent(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	startMicrosocks(t, w.socks1, socks1At+":1080")
	d := serve(t, w.gateway, settings{routes: "SOCKD5 @=198.51.100.11 *\n"})
	next := w.halfway(t, d)
	began := time.Now()
	if code, ended := next.wait(20 * time.Second); !ended || code != 128+int(syscall.SIGKILL) {
		t.Errorf("the silent one: ended %v, exit %d", ended, code)
	}
	if took := time.Since(began); took > 12*time.Second {
		t.Errorf("it was ended only after %v", took)
	}
	eventually(t, 2*time.Second, "the daemon goes on", w.served)
	if out := d.output(); !strings.Contains(out, "this one goes on") {
		t.Errorf("the log says\n%s", out)
	}
}

// halfway starts a process that is to take over and stops it when the daemon has
// stopped answering for it.
func (w *world) halfway(t *testing.T, d *daemon) *process {
	t.Helper()
	for delay := 10 * time.Millisecond; ; delay += 5 * time.Millisecond { // until it is met in the middle
		next := d.attempt(t)
		time.Sleep(delay)
		next.cmd.Process.Signal(syscall.SIGSTOP)
		time.Sleep(50 * time.Millisecond) // what it has sent is heard
		if strings.Contains(d.process.output(), "handed over") {
			t.Fatal("the process was never met in the middle")
		}
		if !w.served() {
			return next
		}
		next.kill()
	}
}

// TestTakeoverNoWayBack: a process fails to take over, and the daemon has no
// descriptor for what it needs to go on: it carries its flows, and serves as soon as
// there is one.
func TestTakeoverNoWayBack(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	startMicrosocks(t, w.socks1, socks1At+":1080")
	d := serve(t, w.gateway, settings{routes: "SOCKD5 @=198.51.100.11 *\n"})
	flows := w.startEchoes(t, 4)
	next := w.halfway(t, d)
	var old unix.Rlimit
	w.gateway.must(t, unix.Prlimit(d.pid(), unix.RLIMIT_NOFILE, nil, &old))
	w.gateway.must(t, unix.Prlimit(d.pid(), unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 10, Max: old.Max}, nil))
	next.kill()
	eventually(t, 5*time.Second, "it cannot go on", func() bool { return strings.Contains(d.output(), "nothing is taken before this works") })
	if w.served() {
		t.Error("a question is answered: there were descriptors, and the test shows nothing")
	}
	w.gateway.must(t, unix.Prlimit(d.pid(), unix.RLIMIT_NOFILE, &old, nil))
	eventually(t, 5*time.Second, "the daemon goes on", w.served)
	if err := w.get(netip.MustParseAddr(outsideAt)); err != nil {
		t.Error(err)
	}
	flows.finish(t)
	d.stop(t)
}

// served tells whether a question is answered within a moment.
func (w *world) served() bool {
	c, err := w.client.dial("udp", outsideNS+":53", time.Second)
	if err != nil {
		return false
	}
	defer c.Close()
	q, err := new(dns.Msg).SetQuestion("served.example.org.", dns.TypeA).Pack()
	if err != nil {
		return false
	}
	_, err = say(c.(*net.UDPConn), q, 100*time.Millisecond)
	return err == nil
}

// TestTakeoverTwice: of two at once one is first; the other one takes over from
// it, or is told to wait.
func TestTakeoverTwice(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	startMicrosocks(t, w.socks1, socks1At+":1080")
	d := serve(t, w.gateway, settings{routes: "SOCKD5 @=198.51.100.11 *\n"})
	flows := w.startEchoes(t, 8)
	for range 3 {
		both := []*process{d.attempt(t), d.attempt(t)}
		for _, p := range both {
			eventually(t, 15*time.Second, "each serves or says why not", func() bool { return !p.running() || strings.Contains(p.output(), "ready") })
			if !p.running() && !strings.Contains(p.output(), "another process is taking over") {
				t.Errorf("one has ended:\n%s", p.output())
			}
		}
		serving := 0
		for _, p := range both {
			if p.running() && !strings.Contains(p.output(), "handed over") {
				serving++
				d.process = p
			}
		}
		if serving != 1 {
			t.Fatalf("%d processes serve:\n%s\n%s", serving, both[0].output(), both[1].output())
		}
		w.client.curl(t, "http://www.example.org/twice", "-4").ok(t)
	}
	flows.finish(t)
}
