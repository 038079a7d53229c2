package relay

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func dialEngine(t testing.TB, e *Engine, addr string) *Conn {
	t.Helper()
	c, err := e.Dial(context.Background(), DialOptions{}, netip.MustParseAddrPort(addr))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func newEngine(t testing.TB, o Options) *Engine {
	t.Helper()
	e, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { e.Close() })
	return e
}

func TestConnReadWrite(t *testing.T) {
	addr, servers := accepted(t)
	c := dialEngine(t, newEngine(t, Options{}), addr)
	s := <-servers
	mustWrite(t, c, "")
	mustWrite(t, c, "hello")
	mustRead(t, s, "hello")
	if !c.Quiet() {
		t.Error("not quiet")
	}
	time.AfterFunc(20*time.Millisecond, func() { s.Write([]byte("world")) })
	mustRead(t, c, "wor") // has to wait
	mustRead(t, c, "ld")
	if !c.Quiet() {
		t.Error("not quiet after all was read")
	}
	// More than the socket takes: Write waits for room.
	go func() {
		time.Sleep(20 * time.Millisecond)
		io.CopyN(io.Discard, s, 32<<20)
		s.Write([]byte("done"))
		s.CloseWrite()
	}()
	if n, err := c.Write(make([]byte, 32<<20)); n != 32<<20 || err != nil {
		t.Fatalf("%d, %v", n, err)
	}
	mustRead(t, c, "done")
	mustEOF(t, c)
	mustEOF(t, c)
	if c.Quiet() {
		t.Error("quiet after FIN")
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	mustEOF(t, s)
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	if c.Fd() != -1 || c.Quiet() {
		t.Error("closed Conn has a descriptor or is quiet")
	}
	for name, err := range map[string]error{
		"Close":       c.Close(),
		"Reset":       c.Reset(),
		"CloseWrite":  c.CloseWrite(),
		"SetDeadline": c.SetDeadline(time.Now()),
		"Control":     c.Control(func(int) error { return nil }),
	} {
		if !errors.Is(err, net.ErrClosed) {
			t.Errorf("%s after Close: %v", name, err)
		}
	}
}

func TestConnQuiet(t *testing.T) {
	for name, do := range map[string]func(*net.TCPConn){
		"bytes": func(s *net.TCPConn) { s.Write([]byte("x")) },
		"FIN":   func(s *net.TCPConn) { s.Close() },
		"RST":   func(s *net.TCPConn) { s.SetLinger(0); s.Close() },
	} {
		addr, servers := accepted(t)
		c := dialEngine(t, newEngine(t, Options{}), addr)
		s := <-servers
		if !c.Quiet() {
			t.Errorf("%s: not quiet before", name)
		}
		do(s)
		eventually(t, name+" ends the quiet", func() bool { return !c.Quiet() })
	}
}

func TestConnRoundTrip(t *testing.T) {
	addr, servers := accepted(t)
	c := dialEngine(t, newEngine(t, Options{}), addr)
	defer (<-servers).Close()
	if d := c.RoundTrip(); d <= 0 || d > time.Second {
		t.Errorf("loopback is %v away", d)
	}
	c.Close()
	if d := c.RoundTrip(); d != 0 {
		t.Errorf("after Close: %v", d)
	}
}

func TestConnAddresses(t *testing.T) {
	for _, network := range []string{"127.0.0.1:0", "[::1]:0"} {
		ln, err := net.Listen("tcp", network)
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		e := newEngine(t, Options{})
		got := make(chan *Conn, 1)
		go e.Serve(t.Context(), ln.(*net.TCPListener), func(c *Conn) { got <- c })
		d := dialEngine(t, e, ln.Addr().String())
		a := <-got
		if d.RemoteAddrPort() != a.LocalAddrPort() || d.LocalAddrPort() != a.RemoteAddrPort() || d.RemoteAddr().String() != ln.Addr().String() {
			t.Errorf("dialled %v -> %v, accepted %v <- %v", d.LocalAddr(), d.RemoteAddr(), a.LocalAddr(), a.RemoteAddr())
		}
		d.Close()
		if d.LocalAddr() != net.Addr(net.TCPAddrFromAddrPort(a.RemoteAddrPort())) && d.LocalAddr().String() != a.RemoteAddr().String() {
			t.Errorf("after Close: %v", d.LocalAddr())
		}
		a.Close()
	}
}

func TestConnDeadlines(t *testing.T) {
	addr, servers := accepted(t)
	c := dialEngine(t, newEngine(t, Options{}), addr)
	s := <-servers
	wantTimeout := func(what string, err error, start time.Time, least time.Duration) {
		t.Helper()
		var ne net.Error
		if !errors.Is(err, os.ErrDeadlineExceeded) || !errors.As(err, &ne) || !ne.Timeout() {
			t.Errorf("%s: %v", what, err)
		}
		if d := time.Since(start); d < least || d > least+5*time.Second {
			t.Errorf("%s took %v", what, d)
		}
	}
	buf := make([]byte, 1)
	start := time.Now()
	c.SetReadDeadline(start.Add(30 * time.Millisecond))
	_, err := c.Read(buf)
	wantTimeout("read", err, start, 30*time.Millisecond)
	_, err = c.Read(buf)
	wantTimeout("read again", err, time.Now(), 0)

	// One set while a Read waits holds at once; so does a later one.
	c.SetReadDeadline(time.Time{})
	start = time.Now()
	time.AfterFunc(20*time.Millisecond, func() { c.SetReadDeadline(start.Add(60 * time.Millisecond)) })
	_, err = c.Read(buf)
	wantTimeout("read with a deadline set meanwhile", err, start, 60*time.Millisecond)
	c.SetReadDeadline(time.Now().Add(20 * time.Millisecond))
	start = time.Now()
	time.AfterFunc(5*time.Millisecond, func() { c.SetReadDeadline(start.Add(80 * time.Millisecond)) })
	_, err = c.Read(buf)
	wantTimeout("read with a deadline put off", err, start, 80*time.Millisecond)

	big := make([]byte, 64<<20)
	start = time.Now()
	c.SetWriteDeadline(start.Add(50 * time.Millisecond))
	n, err := c.Write(big)
	wantTimeout("write", err, start, 50*time.Millisecond)
	c.SetDeadline(time.Time{})
	go io.Copy(io.Discard, s)
	mustWrite(t, c, "x")
	if n == 0 {
		t.Error("nothing written before the deadline")
	}
	mustWrite(t, s, "y")
	mustRead(t, c, "y")
}

func TestCloseWakes(t *testing.T) {
	addr, _ := accepted(t)
	for name, end := range map[string]func(*Conn, *Engine){
		"Close":        func(c *Conn, _ *Engine) { c.Close() },
		"Engine.Close": func(_ *Conn, e *Engine) { e.Close() },
	} {
		e := newEngine(t, Options{})
		c := dialEngine(t, e, addr)
		var wg sync.WaitGroup
		for range 3 {
			wg.Go(func() {
				if _, err := c.Read(make([]byte, 1)); !errors.Is(err, net.ErrClosed) {
					t.Errorf("%s: read: %v", name, err)
				}
			})
		}
		wg.Go(func() {
			if _, err := c.Write(make([]byte, 64<<20)); !errors.Is(err, net.ErrClosed) {
				t.Errorf("%s: write: %v", name, err)
			}
		})
		time.Sleep(20 * time.Millisecond)
		end(c, e)
		wg.Wait()
	}
}

func TestReset(t *testing.T) {
	addr, servers := accepted(t)
	c := dialEngine(t, newEngine(t, Options{}), addr)
	s := <-servers
	if err := c.Reset(); err != nil {
		t.Fatal(err)
	}
	mustReset(t, s)
}

func TestControl(t *testing.T) {
	addr, _ := accepted(t)
	c := dialEngine(t, newEngine(t, Options{}), addr)
	if err := c.Control(func(fd int) error {
		return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1)
	}); err != nil {
		t.Error(err)
	}
	want := errors.New("no")
	if err := c.Control(func(int) error { return want }); err != want {
		t.Error(err)
	}
}

func TestAdopt(t *testing.T) {
	addr, servers := accepted(t)
	e := newEngine(t, Options{MaxConns: 1})
	dial := func() *net.TCPConn {
		k, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		return k.(*net.TCPConn)
	}
	k := dial()
	c, err := e.Adopt(k)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	s := <-servers
	if _, err := k.Write([]byte("x")); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the original is not closed: %v", err)
	}
	if c.RemoteAddr().String() != addr || c.LocalAddr().String() != s.RemoteAddr().String() {
		t.Errorf("%v -> %v", c.LocalAddr(), c.RemoteAddr())
	}
	mustWrite(t, s, "to you")
	mustRead(t, c, "to you")
	mustWrite(t, c, "to me")
	mustRead(t, s, "to me")

	k = dial()
	if _, err := e.Adopt(k); !errors.Is(err, syscall.EMFILE) {
		t.Errorf("beyond MaxConns: %v", err)
	}
	mustEOF(t, <-servers)
}
