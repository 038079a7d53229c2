package relay

import (
	"context"
	"errors"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

func listen(t testing.TB) *net.TCPListener {
	t.Helper()
	ln, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	return ln
}

func TestServeEndsWithItsContext(t *testing.T) {
	e := newEngine(t, Options{})
	ln := listen(t)
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error)
	go func() {
		served <- e.Serve(ctx, ln, func(c *Conn) {
			io.Copy(c, c)
			c.Close()
		})
	}()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	mustWrite(t, c, "x")
	mustRead(t, c, "x")
	cancel()
	if err := <-served; err != nil {
		t.Error(err)
	}
	// What was accepted lives on, and the listener still works.
	mustWrite(t, c, "y")
	mustRead(t, c, "y")
	go io.Copy(io.Discard, c)
	k, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	k.Close()
	if k, err := ln.Accept(); err != nil {
		t.Error(err)
	} else {
		k.Close()
	}
	if err := e.Serve(ctx, ln, nil); err != nil {
		t.Errorf("with an ended context: %v", err)
	}
	ln.Close()
	if err := e.Serve(t.Context(), ln, nil); !errors.Is(err, net.ErrClosed) {
		t.Errorf("with a closed listener: %v", err)
	}
	e.Close()
	if err := e.Serve(t.Context(), listen(t), nil); !errors.Is(err, net.ErrClosed) {
		t.Errorf("with a closed engine: %v", err)
	}
}

// crowd opens n connections and returns those that work; the others must have
// been reset, and at once.
func crowd(t *testing.T, addr string, n int) []net.Conn {
	t.Helper()
	var mu sync.Mutex
	var ok []net.Conn
	var wg sync.WaitGroup
	for range n {
		wg.Go(func() {
			c, err := net.DialTimeout("tcp", addr, 5*time.Second)
			if errors.Is(err, syscall.ECONNRESET) {
				return // seen before connect had returned
			}
			if err != nil {
				t.Error(err)
				return
			}
			t.Cleanup(func() { c.Close() })
			c.SetDeadline(time.Now().Add(10 * time.Second))
			// Whichever comes first after the RST is told of it.
			b := []byte("x")
			if _, err = c.Write(b); err == nil {
				_, err = c.Read(b)
			}
			switch {
			case err == nil:
				mu.Lock()
				ok = append(ok, c)
				mu.Unlock()
			case !errors.Is(err, syscall.ECONNRESET):
				t.Errorf("turned away with %v, want a RST", err)
			}
		})
	}
	wg.Wait()
	return ok
}

func TestMaxConns(t *testing.T) {
	c := startChild(t, "engine", serve(t, echo), "conns=20")
	ok := crowd(t, c.addr, 50)
	if len(ok) != 10 {
		t.Errorf("%d flows, want 10", len(ok))
	}
	if n := c.number("refused"); n != 50-len(ok) {
		t.Errorf("%d counted as refused, want %d", n, 50-len(ok))
	}
	// There is room again when some have gone.
	for _, k := range ok[:5] {
		k.Close()
	}
	eventually(t, "room for five", func() bool { return strings.Contains(c.ask("stats"), "Streams:5 ") })
	if again := crowd(t, c.addr, 5); len(again) != 5 {
		t.Errorf("then %d flows, want 5", len(again))
	}
}

// Descriptors run out below what MaxConns allows: clients are reset, not left
// hanging, no processor time is burnt, and the relay recovers.
func TestOutOfDescriptors(t *testing.T) {
	// A flow takes two. What Go itself holds differs from system to system, so
	// only one of an even and an odd limit leaves none at all.
	for _, nofile := range []string{"nofile=60", "nofile=61"} {
		t.Run(nofile, func(t *testing.T) { outOfDescriptors(t, nofile) })
	}
}

func outOfDescriptors(t *testing.T, nofile string) {
	c := startChild(t, "engine", serve(t, echo), nofile, "conns=1000")
	ok := crowd(t, c.addr, 100)
	if len(ok) > 30 { // there may be none: clients can take all before a server is dialled
		t.Errorf("%d flows with %s", len(ok), nofile)
	}
	if n := c.number("refused"); n == 0 {
		t.Error("none counted as refused")
	}
	// The last of the crowd may still be on its way out: one quiet moment of
	// many is asked for. Who spins has none.
	eventually(t, "a moment without work", func() bool {
		before := c.cpu()
		time.Sleep(300 * time.Millisecond)
		return c.cpu()-before < 100*time.Millisecond
	})
	t.Logf("%d flows; %s", len(ok), c.ask("stats"))
	for _, k := range ok {
		k.Close()
	}
	eventually(t, "all flows ended", func() bool { return strings.Contains(c.ask("stats"), "Streams:0 ") })
	// Their descriptors follow within a moment.
	again := 0
	for i := 0; again != 5 && i < 10; i++ {
		again = len(crowd(t, c.addr, 5))
	}
	if again != 5 {
		t.Errorf("then %d flows, want 5", again)
	}
}

// Without CAP_SYS_RESOURCE a user's pipes may have 64 MiB in all. More flows
// than that carry bytes at once, and each is served.
func TestUnprivileged(t *testing.T) {
	const flows = 150
	addr, servers := accepted(t)
	c := startChild(t, "engine", addr, "uid=65534", "pipes=256")
	buf := make([]byte, 1<<20)
	type ends struct {
		client, server net.Conn
		sent           int64
	}
	var all []ends
	for range flows {
		k, err := net.Dial("tcp", c.addr)
		if err != nil {
			t.Fatal(err)
		}
		defer k.Close()
		s := <-servers
		s.SetReadBuffer(64 << 10)
		// Fill the way until it blocks: a pipe with bytes in it, if to be had.
		n := int64(0)
		for {
			k.SetWriteDeadline(time.Now().Add(5 * time.Millisecond))
			w, err := k.Write(buf)
			n += int64(w)
			if err != nil {
				break
			}
		}
		all = append(all, ends{k, s, n})
	}
	t.Log(c.ask("stats"))
	var wg sync.WaitGroup
	for i, f := range all {
		wg.Go(func() {
			f.client.(*net.TCPConn).CloseWrite()
			if n, err := io.Copy(io.Discard, f.server); n != f.sent || err != nil {
				t.Errorf("flow %d: %d of %d bytes, %v", i, n, f.sent, err)
			}
		})
	}
	wg.Wait()
}

func TestNoDescriptorIsLost(t *testing.T) {
	before := openFDs(t)
	t.Run("flows", func(t *testing.T) {
		r := newRig(t, Options{}, JoinOptions{}, planServer(t))
		runPlans(t, r, 50)
		addr, servers := accepted(t)
		r = newRig(t, Options{}, JoinOptions{}, addr)
		for i := range 20 {
			a, b := r.pair(t, servers)
			mustWrite(t, a, "x")
			switch i % 4 {
			case 0:
				reset(t, a)
			case 1:
				reset(t, b)
			case 2:
				r.stream(t, i).Kill()
			case 3:
				a.CloseWrite()
			}
		}
	})
	var n int
	for range 100 {
		if n = openFDs(t); n <= before+2 { // what Go's poller may have made meanwhile
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("%d descriptors before, %d after", before, n)
}

// An idle flow holds two descriptors, no pipe, and little memory.
func TestIdleFlows(t *testing.T) {
	const flows, most = 4000, 2048
	c := startChild(t, "engine", serve(t, echo), "conns=19000")
	crowd(t, c.addr, 100) // what a first load leaves behind
	rss, fds := c.number("rss"), c.number("fds")
	var conns []net.Conn
	for range flows / 100 {
		conns = append(conns, crowd(t, c.addr, 100)...)
	}
	if len(conns) != flows {
		t.Fatalf("%d flows", len(conns))
	}
	pipes, _ := strconv.Atoi(field(c.ask("stats"), "Pipes"))
	perFlow := (c.number("rss") - rss) / flows
	t.Logf("%d bytes for each of %d idle flows; %s", perFlow, flows, c.ask("stats"))
	if perFlow > most && !raceDetector {
		t.Errorf("%d bytes for an idle flow, want at most %d", perFlow, most)
	}
	if n := c.number("fds") - fds; n > 2*flows+2*pipes+8 {
		t.Errorf("%d descriptors for %d flows", n, flows)
	}
	if n := field(c.ask("stats"), "PipesLent"); n != "0" {
		t.Errorf("%s pipes are lent", n)
	}
	for _, k := range conns {
		k.Close()
	}
}

// field takes a value out of Stats in its %+v form.
func field(stats, name string) string {
	_, s, _ := strings.Cut(" "+strings.Trim(stats, "{}")+" ", " "+name+":")
	s, _, _ = strings.Cut(s, " ")
	return s
}

func TestNewFails(t *testing.T) {
	if msg := childError(t, "engine", "127.0.0.1:1", "nofile=60"); !strings.Contains(msg, "RLIMIT_NOFILE is 60") {
		t.Errorf("%q", msg)
	}
}
