package relay

import (
	"context"
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"
)

// rig is an engine that relays from a listener to a server.
type rig struct {
	e     *Engine
	addr  string // of the listener
	pairs int    // made by pair

	mu      sync.Mutex
	streams []*Stream
	results chan Result
}

// newRig relays to the address to; when the test ends, the engine is closed and
// must have let go of everything.
func newRig(t testing.TB, o Options, j JoinOptions, to string) *rig {
	t.Helper()
	e, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	ln, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{e: e, addr: ln.Addr().String(), results: make(chan Result, 10000)}
	j.Done = func(x Result) { r.results <- x }
	target := netip.MustParseAddrPort(to)
	served := make(chan error, 1)
	go func() {
		served <- e.Serve(context.Background(), ln, func(c *Conn) {
			s, err := e.Dial(context.Background(), DialOptions{}, target)
			if err != nil {
				c.Reset()
				return
			}
			st := e.Join(c, s, j)
			r.mu.Lock()
			r.streams = append(r.streams, st)
			r.mu.Unlock()
		})
	}()
	t.Cleanup(func() {
		ln.Close()
		if err := e.Close(); err != nil {
			t.Error(err)
		}
		if err := <-served; err != net.ErrClosed {
			t.Errorf("Serve: %v, want net.ErrClosed", err)
		}
		if s := e.Stats(); s.Conns != 0 || s.Streams != 0 || s.Pipes != 0 || s.PipesLent != 0 {
			t.Errorf("after Close: %+v", s)
		}
	})
	return r
}

// dial connects through the rig.
func (r *rig) dial(t testing.TB) *net.TCPConn {
	t.Helper()
	c, err := net.Dial("tcp", r.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(20 * time.Second))
	return c.(*net.TCPConn)
}

// result waits for a flow to end.
func (r *rig) result(t testing.TB) Result {
	t.Helper()
	select {
	case x := <-r.results:
		return x
	case <-time.After(20 * time.Second):
		t.Fatalf("no flow ended; %+v", r.e.Stats())
		panic("not reached")
	}
}

// stream returns the n-th stream that was joined.
func (r *rig) stream(t testing.TB, n int) *Stream {
	t.Helper()
	var s *Stream
	eventually(t, "stream joined", func() bool {
		r.mu.Lock()
		defer r.mu.Unlock()
		if len(r.streams) > n {
			s = r.streams[n]
		}
		return s != nil
	})
	return s
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in 10 s: %s", what)
		}
	}
}

// accepted is a server that hands its connections to the test.
func accepted(t testing.TB) (addr string, conns <-chan *net.TCPConn) {
	t.Helper()
	ch := make(chan *net.TCPConn, 1000)
	addr = serve(t, func(c net.Conn) {
		c.SetDeadline(time.Now().Add(20 * time.Second))
		done := make(chan struct{})
		ch <- c.(*net.TCPConn)
		t.Cleanup(func() { close(done) })
		<-done
	})
	return addr, ch
}

func openFDs(t testing.TB) int {
	t.Helper()
	d, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(d)
}

func mustWrite(t testing.TB, w io.Writer, s string) {
	t.Helper()
	if _, err := io.WriteString(w, s); err != nil {
		t.Fatal(err)
	}
}

func mustRead(t testing.TB, r io.Reader, want string) {
	t.Helper()
	b := make([]byte, len(want))
	if _, err := io.ReadFull(r, b); err != nil || string(b) != want {
		t.Fatalf("read %q, %v; want %q", b, err, want)
	}
}

func mustEOF(t testing.TB, r io.Reader) {
	t.Helper()
	if n, err := r.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Fatalf("read %d bytes, %v; want EOF", n, err)
	}
}
