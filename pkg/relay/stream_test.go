package relay

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"time"
)

// pair is a relayed flow with both ends in the test's hand.
func (r *rig) pair(t testing.TB, servers <-chan *net.TCPConn) (client, server *net.TCPConn) {
	t.Helper()
	client = r.dial(t)
	select {
	case server = <-servers:
	case <-time.After(10 * time.Second):
		t.Fatal("no connection at the server")
	}
	// A server that resets before Dial has returned makes Dial fail.
	r.stream(t, r.pairs)
	r.pairs++
	return client, server
}

func reset(t testing.TB, c *net.TCPConn) {
	t.Helper()
	if err := c.SetLinger(0); err != nil {
		t.Fatal(err)
	}
	c.Close()
}

func mustReset(t testing.TB, c *net.TCPConn) {
	t.Helper()
	if n, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("read %d bytes, %v; want ECONNRESET", n, err)
	}
}

func TestHalfClose(t *testing.T) {
	for _, clientEndsFirst := range []bool{true, false} {
		addr, servers := accepted(t)
		r := newRig(t, Options{}, JoinOptions{}, addr)
		a, b := r.pair(t, servers)
		if !clientEndsFirst {
			a, b = b, a
		}
		mustWrite(t, a, "question")
		a.CloseWrite()
		mustRead(t, b, "question")
		mustEOF(t, b)
		mustWrite(t, b, "ans")
		mustRead(t, a, "ans")
		mustWrite(t, b, "wer")
		b.Close()
		mustRead(t, a, "wer")
		mustEOF(t, a)
		up, down := uint64(8), uint64(6)
		if !clientEndsFirst {
			up, down = down, up
		}
		if x := r.result(t); x != (Result{Up: up, Down: down}) {
			t.Errorf("%+v", x)
		}
	}
}

func TestResetIsPassedOn(t *testing.T) {
	for _, tt := range []struct {
		name string
		side int
		// what happens before the reset: words that are on their way
		before, other string
	}{
		{name: "client", side: client},
		{name: "server", side: server},
		{name: "client, with words before", side: client, before: "last words"},
		{name: "server, with words before", side: server, before: "last words"},
		{name: "client, with words to it", side: client, other: "unheard"},
		{name: "server, with words to it", side: server, other: "unheard"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			addr, servers := accepted(t)
			r := newRig(t, Options{}, JoinOptions{}, addr)
			a, b := r.pair(t, servers)
			want := ClientReset
			if tt.side == server {
				a, b, want = b, a, ServerReset
			}
			mustWrite(t, b, tt.other)
			if tt.before != "" {
				mustWrite(t, a, tt.before)
				mustRead(t, b, tt.before)
			}
			reset(t, a)
			mustReset(t, b)
			x := r.result(t)
			if x.Cause != want || !errors.Is(x.Err, syscall.ECONNRESET) {
				t.Errorf("%+v", x)
			}
		})
	}
}

// What a side sent before its RST still arrives, if the other side reads it
// late.
func TestResetAfterData(t *testing.T) {
	addr, servers := accepted(t)
	r := newRig(t, Options{}, JoinOptions{}, addr)
	c, s := r.pair(t, servers)
	// More than the buffers take, so that some is still in the server's socket
	// when the RST comes; a reader that starts late.
	payload := bytes.Repeat([]byte("0123456789abcdef"), 64<<10)
	mustWrite(t, c, "unread")
	var sent int
	s.SetWriteDeadline(time.Now().Add(500 * time.Millisecond))
	for {
		n, err := s.Write(payload)
		sent += n
		if err != nil {
			break
		}
	}
	reset(t, s)
	time.Sleep(50 * time.Millisecond)
	got, err := io.Copy(io.Discard, c)
	x := r.result(t)
	if !errors.Is(err, syscall.ECONNRESET) || x.Cause != ServerReset {
		t.Errorf("client got %d of %d bytes, %v; %+v", got, sent, err, x)
	}
	if uint64(got) != x.Down {
		t.Errorf("client got %d bytes, %d were delivered", got, x.Down)
	}
	// The relay's pipe and its socket to the client must have arrived.
	if got == 0 {
		t.Error("nothing arrived")
	}
	t.Logf("%d of %d bytes arrived", got, sent)
}

// A server that has closed answers what comes after with a RST; the client
// sees it, as it would without us.
func TestResetAfterClose(t *testing.T) {
	addr, servers := accepted(t)
	r := newRig(t, Options{}, JoinOptions{}, addr)
	c, s := r.pair(t, servers)
	mustWrite(t, s, "bye")
	s.Close()
	mustRead(t, c, "bye")
	mustEOF(t, c)
	mustWrite(t, c, "are you there?")
	if x := r.result(t); x.Cause != ServerReset || !errors.Is(x.Err, syscall.EPIPE) {
		t.Errorf("%+v", x)
	}
	// After a FIN the RST shows in writes only.
	eventually(t, "client sees the RST", func() bool {
		_, err := c.Write([]byte("x"))
		return errors.Is(err, syscall.EPIPE)
	})
}

func TestStoppedReaderStopsTheSender(t *testing.T) {
	for _, side := range []int{client, server} {
		addr, servers := accepted(t)
		r := newRig(t, Options{}, JoinOptions{}, addr)
		a, b := r.pair(t, servers)
		if side == server {
			a, b = b, a
		}
		// What the sockets between take, and one pipe: nothing else.
		const bound = 40 << 20
		buf := make([]byte, 1<<20)
		sent := 0
		for sent < 2*bound {
			a.SetWriteDeadline(time.Now().Add(300 * time.Millisecond))
			n, err := a.Write(buf)
			sent += n
			if err != nil {
				break
			}
		}
		if sent > bound {
			t.Errorf("side %d: %d bytes accepted for a reader that does not read", side, sent)
		}
		if s := r.e.Stats(); s.PipesLent > 1 {
			t.Errorf("%+v", s)
		}
		t.Logf("side %d: %d KiB", side, sent>>10)
		// And it goes on where it stopped.
		a.CloseWrite()
		if n, err := io.Copy(io.Discard, b); int(n) != sent || err != nil {
			t.Errorf("then %d of %d bytes, %v", n, sent, err)
		}
	}
}

// Two pipes, both in the hands of readers that stopped, and more of those than
// pipes: nobody else stalls.
func TestStrangersDoNotStall(t *testing.T) {
	addr, servers := accepted(t)
	r := newRig(t, Options{MaxPipes: 2, tick: 100 * time.Millisecond}, JoinOptions{}, addr)
	const stalled = 50
	buf := make([]byte, 1<<20)
	var held, readers []*net.TCPConn
	var sent [stalled]int64
	for i := range stalled {
		c, s := r.pair(t, servers)
		s.SetReadBuffer(256 << 10)
		c.SetWriteBuffer(64 << 10)
		for {
			c.SetWriteDeadline(time.Now().Add(20 * time.Millisecond))
			n, err := c.Write(buf)
			sent[i] += int64(n)
			if err != nil {
				break
			}
		}
		held, readers = append(held, c), append(readers, s)
	}
	c, s := r.pair(t, servers)
	go func() {
		for range 64 {
			c.Write(buf)
		}
		c.CloseWrite()
	}()
	start := time.Now()
	if n, err := io.Copy(io.Discard, s); n != 64<<20 || err != nil {
		t.Errorf("%d bytes, %v", n, err)
	}
	if r.e.Stats().Shortages == 0 {
		t.Error("there was no shortage")
	}
	t.Logf("64 MiB in %v beside %d stalled flows; %+v", time.Since(start), stalled, r.e.Stats())

	// After a while stalled flows' bytes are in memory, and a pipe is free.
	// Nothing is lost by that.
	eventually(t, "a pipe given back", func() bool { return r.e.Stats().PipesLent < 2 })
	if n := r.e.spilled.Load(); n == 0 {
		t.Error("nothing spilled")
	}
	for i, c := range held {
		c.CloseWrite()
		if n, err := io.Copy(io.Discard, readers[i]); err != nil || n != sent[i] {
			t.Errorf("stalled flow %d: %d of %d bytes, %v", i, n, sent[i], err)
		}
		c.Close()
	}
	if n := r.e.spilled.Load(); n != 0 {
		t.Errorf("%d bytes still count as spilled", n)
	}
}

func TestKill(t *testing.T) {
	addr, servers := accepted(t)
	r := newRig(t, Options{}, JoinOptions{}, addr)
	c, s := r.pair(t, servers)
	mustWrite(t, c, "x")
	mustRead(t, s, "x")
	st := r.stream(t, 0)
	if up, down := st.Bytes(); up != 1 || down != 0 {
		t.Errorf("Bytes: %d, %d", up, down)
	}
	st.Kill()
	mustReset(t, c)
	mustReset(t, s)
	x := r.result(t)
	if x.Cause != Killed || !errors.Is(x.Err, net.ErrClosed) || x.Up != 1 {
		t.Errorf("%+v", x)
	}
	st.Kill()
}

func TestCloseEndsFlows(t *testing.T) {
	addr, servers := accepted(t)
	r := newRig(t, Options{}, JoinOptions{}, addr)
	c, s := r.pair(t, servers)
	mustWrite(t, c, "x")
	mustRead(t, s, "x")
	r.stream(t, 0)
	r.e.Close()
	mustReset(t, c)
	mustReset(t, s)
	if x := r.result(t); x.Cause != EngineClosed {
		t.Errorf("%+v", x)
	}
}

func TestLimits(t *testing.T) {
	const tick = 20 * time.Millisecond
	for _, tt := range []struct {
		name  string
		j     JoinOptions
		half  bool // the client ends its direction
		talk  bool // and the server sends now and then
		cause Cause
	}{
		{name: "idle", j: JoinOptions{Idle: 5 * tick}, cause: IdleTimeout},
		{name: "half-closed", j: JoinOptions{Idle: time.Hour, HalfClosed: 5 * tick}, half: true, cause: HalfClosedTimeout},
		{name: "half-closed without idle", j: JoinOptions{HalfClosed: 5 * tick}, half: true, cause: HalfClosedTimeout},
		{name: "idle is the shorter", j: JoinOptions{Idle: 5 * tick, HalfClosed: time.Hour}, half: true, cause: IdleTimeout},
		{name: "half-closed but busy", j: JoinOptions{HalfClosed: 10 * tick}, half: true, talk: true, cause: HalfClosedTimeout},
		{name: "busy", j: JoinOptions{Idle: 10 * tick}, talk: true, cause: IdleTimeout},
	} {
		t.Run(tt.name, func(t *testing.T) {
			addr, servers := accepted(t)
			r := newRig(t, Options{tick: tick}, tt.j, addr)
			c, s := r.pair(t, servers)
			start := time.Now()
			if tt.half {
				c.CloseWrite()
				mustEOF(t, s)
			}
			if tt.talk {
				for range 10 {
					time.Sleep(3 * tick)
					mustWrite(t, s, "x")
					mustRead(t, c, "x")
				}
			}
			mustReset(t, c)
			x := r.result(t)
			if x.Cause != tt.cause || !errors.Is(x.Err, os.ErrDeadlineExceeded) {
				t.Errorf("%+v", x)
			}
			if took, least := time.Since(start), 5*tick; took < least {
				t.Errorf("ended after %v, before the limit", took)
			}
		})
	}
}

func TestEarlyBytes(t *testing.T) {
	addr, servers := accepted(t)
	early, up := bytes.Repeat([]byte("down"), 1<<20), bytes.Repeat([]byte("up"), 1<<20)
	r := newRig(t, Options{}, JoinOptions{Early: early, EarlyUp: up}, addr)
	c, s := r.pair(t, servers)
	mustWrite(t, s, "!")
	s.CloseWrite()
	mustWrite(t, c, "?")
	c.CloseWrite()
	time.Sleep(10 * time.Millisecond) // longer than the buffers take
	if b, err := io.ReadAll(c); err != nil || string(b) != string(early)+"!" {
		t.Errorf("client: %d bytes, %v", len(b), err)
	}
	if b, err := io.ReadAll(s); err != nil || string(b) != string(up)+"?" {
		t.Errorf("server: %d bytes, %v", len(b), err)
	}
	if x := r.result(t); x != (Result{Up: uint64(len(up) + 1), Down: uint64(len(early) + 1)}) {
		t.Errorf("%+v", x)
	}
}

func TestJoinOfClosed(t *testing.T) {
	addr, servers := accepted(t)
	e, err := New(Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	a, b := dialEngine(t, e, addr), dialEngine(t, e, addr)
	peer := <-servers
	if peer.RemoteAddr().String() != b.LocalAddr().String() {
		peer = <-servers
	}
	a.Close()
	done := make(chan Result, 1)
	e.Join(a, b, JoinOptions{Done: func(r Result) { done <- r }})
	if x := <-done; x.Cause != Killed || x.Err == nil {
		t.Errorf("%+v", x)
	}
	mustReset(t, peer)
	if err := b.Close(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Close of a joined Conn: %v", err)
	}
}
