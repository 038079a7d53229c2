package upstream

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tproxyd/tproxyd/pkg/flow"
	"github.com/tproxyd/tproxyd/pkg/socks"
)

// far is a server that is a round trip of 40 ms away: each message takes 20 ms.
// It has segments for messages, as microsocks has, or one stream.
type far struct {
	heard
	segments bool
	mute     bool // if more than a greeting comes in one segment
	near     bool // as far as a SYN can tell
	reply    string
	dials    int
}

const half = 20 * time.Millisecond

// later is a pipe whose bytes take their time.
type later struct {
	net.Conn
	out  chan []byte
	once sync.Once
	end  chan struct{}
}

func (c *later) Write(b []byte) (int, error) {
	select {
	case c.out <- append([]byte(nil), b...):
		return len(b), nil
	case <-c.end:
		return 0, net.ErrClosed
	}
}

func (c *later) Close() error {
	c.once.Do(func() { close(c.end) })
	return c.Conn.Close()
}

func newLater(c net.Conn) *later {
	l := &later{Conn: c, out: make(chan []byte, 64), end: make(chan struct{})}
	type sent struct {
		b  []byte
		at time.Time
	}
	queue := make(chan sent, 64)
	go func() {
		defer close(queue)
		for {
			select {
			case b := <-l.out:
				queue <- sent{b, time.Now().Add(half)}
			case <-l.end:
				return
			}
		}
	}()
	go func() {
		for s := range queue {
			time.Sleep(time.Until(s.at))
			c.Write(s.b)
		}
	}()
	return l
}

func (f *far) serve(ctx context.Context) (net.Conn, error) {
	if !f.near {
		time.Sleep(2 * half) // SYN
	}
	f.mu.Lock()
	f.dials++
	f.mu.Unlock()
	a, b := net.Pipe()
	client, server := newLater(a), newLater(b)
	go func() {
		defer server.Close()
		buf := make([]byte, 4096)
		var in []byte
		more := func(n int) []byte {
			for len(in) < n {
				k, err := server.Read(buf)
				if err != nil {
					return nil
				}
				f.mu.Lock()
				if f.mute && k == len(greet5+ask5) {
					k = 0
				}
				if in = append(in, buf[:k]...); f.segments && len(in) > n {
					in = in[:n] // what is more in a segment is lost
				}
				f.mu.Unlock()
			}
			m := in[:n]
			in = in[n:]
			return m
		}
		if more(len(greet5)) == nil {
			return
		}
		io.WriteString(server, chosen5)
		if more(len(ask5)) == nil {
			return
		}
		io.WriteString(server, f.reply)
		for { // an echo
			if len(in) > 0 {
				f.add(string(in))
				server.Write(in)
				in = nil
			}
			k, err := server.Read(buf)
			if err != nil {
				return
			}
			in = append(in, buf[:k]...)
		}
	}()
	return client, nil
}

func (f *far) made() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.dials
}

// firstByte carries a flow whose client says "GET" at once, and returns how long
// it was until the echo came.
func firstByte(t *testing.T, p *Pool, s *Server) time.Duration {
	t.Helper()
	start := time.Now()
	said := []byte("GET")
	c, err := p.Connect(t.Context(), &Group{Servers: []*Server{s}}, Request{To: target, Early: func(time.Duration) []byte { return said }})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Conn.Close()
	defer c.Done()
	if rest := said[c.Sent:]; len(rest) > 0 {
		c.Conn.Write(rest)
	}
	b := make([]byte, 16)
	n, err := c.Conn.Read(b)
	if string(b[:n]) != "GET" {
		t.Fatalf("%q, %v", b[:n], err)
	}
	return time.Since(start)
}

// named has p know a server with a name as long as the target's is, so that f knows
// the length of a request.
func (l *lab) named(p *Pool, f *far) *Server {
	l.hosts["192.0.2.1:443"] = f.serve
	o := *p.options.Load()
	o.Resolve = func(context.Context, string) ([]netip.Addr, error) {
		return []netip.Addr{netip.MustParseAddr("192.0.2.1")}, nil
	}
	s := &Server{Name: "s", Host: "example.org", Addr: netip.AddrPortFrom(netip.Addr{}, 443)}
	p.Configure(o, []*Server{s})
	return s
}

// TestFirstByte counts round trips of 40 ms: the first flow makes its connection,
// the next one finds a warm one.
func TestFirstByte(t *testing.T) {
	const trip = 2 * half
	tests := []struct {
		name        string
		segments    bool
		pipeline    Pipeline
		probe       flow.Target
		first, next int // round trips
		learned     string
	}{
		{"one message a segment", true, PipelineAuto, flow.Target{}, 4, 2, "off"},
		{"a stream", false, PipelineAuto, flow.Target{}, 4, 2, "greeting"},
		{"a stream, with a target of probes that answers", false, PipelineAuto, target, 4, 1, "data"},
		{"pipeline=off", false, PipelineOff, target, 4, 2, "off"},
		{"pipeline=off, warm=off", false, PipelineOff, target, 4, 4, "off"},
		{"pipeline=greeting", false, PipelineGreeting, flow.Target{}, 3, 2, "greeting"},
		{"pipeline=data", false, PipelineData, flow.Target{}, 2, 1, "data"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := &far{segments: tt.segments, reply: granted}
				l := &lab{hosts: map[string]behaviour{}}
				p := l.pool(t, Options{Probe: tt.probe})
				s := l.named(p, f)
				s.Pipeline, s.Cold = tt.pipeline, strings.Contains(tt.name, "warm=off")
				p.Configure(*p.options.Load(), []*Server{s})
				if got := firstByte(t, p, s); got != time.Duration(tt.first)*trip {
					t.Errorf("the first flow took %v, want %d round trips", got, tt.first)
				}
				time.Sleep(10 * time.Second) // what there is to be learned is known
				firstByte(t, p, s)
				time.Sleep(time.Second)
				for range 5 {
					if got := firstByte(t, p, s); got != time.Duration(tt.next)*trip {
						t.Errorf("the next flow took %v, want %d round trips", got, tt.next)
					}
					time.Sleep(200 * time.Millisecond)
				}
				if st := p.Status([]*Server{s})[0]; st.Pipeline != tt.learned || !st.Up || st.Faults != 0 {
					t.Errorf("%+v", st)
				}
			})
		})
	}
}

// TestBusy: what a server that is near can be sent ahead is found out when it is
// asked a lot, and forgotten when it turns out to be another now.
func TestBusy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &far{near: true, reply: granted}
		l := &lab{hosts: map[string]behaviour{}}
		p := l.pool(t, Options{})
		s := l.named(p, f)
		flows := func(n, trips int, learned string) {
			t.Helper()
			for range n {
				if got := firstByte(t, p, s); got != time.Duration(trips)*2*half {
					t.Fatalf("a flow took %v, want %d round trips", got, trips)
				}
			}
			time.Sleep(10 * time.Second) // what there is to be learned is known
			if st := p.Status([]*Server{s})[0]; st.Pipeline != learned || !st.Up {
				t.Fatalf("%+v, want %q", st, learned)
			}
		}
		flows(learnBusy, 3, "")
		flows(1, 3, "greeting")
		flows(20, 2, "greeting")
		f.mu.Lock()
		f.segments = true
		f.mu.Unlock()
		if _, err := p.Connect(t.Context(), &Group{Servers: []*Server{s}}, Request{To: target}); !errors.Is(err, errSilent) {
			t.Fatal(err)
		}
		flows(20, 3, "off")
		time.Sleep(learnPause)
		f.mu.Lock()
		f.segments = false
		f.mu.Unlock()
		flows(1, 3, "greeting")
		f.mu.Lock()
		f.mute = true
		f.mu.Unlock()
		start := time.Now()
		firstByte(t, p, s)
		if took := time.Since(start); took > 2*softLeast {
			t.Errorf("a server that does not greet any more as it did cost a flow %v", took)
		}
		flows(1, 3, "off")
	})
}

// TestEarlyReplay: what was sent ahead to a server that then failed is sent to
// the next one.
func TestEarlyReplay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var h heard
		l := &lab{hosts: map[string]behaviour{addrA: h.talks("garbage that is no reply"), addrB: h.talks(chosen5 + granted)}}
		p := l.pool(t, Options{})
		a := &Server{Name: "a", Addr: serverA.Addr, Pipeline: PipelineData}
		b := &Server{Name: "b", Addr: serverB.Addr, Pipeline: PipelineData}
		c, err := p.Connect(t.Context(), &Group{Servers: []*Server{a, b}}, Request{To: target, Early: func(time.Duration) []byte { return []byte("GET") }})
		if err != nil || c.Server != b || c.Sent != 3 {
			t.Fatalf("%+v, %v", c, err)
		}
		c.Conn.Close()
		want := greet5 + ask5 + "GET"
		if got := strings.Join(h.take(), "|"); got != want+"|"+want {
			t.Errorf("said %q", got)
		}
	})
}

// TestWarm: as many connections as are of use, none for nobody, and one that the
// server has given up costs nothing but the time for another.
func TestWarm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &far{reply: granted}
		l := &lab{hosts: map[string]behaviour{addrA: f.serve, addrB: replies(0)}}
		p := l.pool(t, Options{})
		s := &Server{Name: "s", Addr: serverA.Addr, Pipeline: PipelineOff}
		warm := func() int { return p.Status([]*Server{s})[0].Warm }
		p.Configure(*p.options.Load(), []*Server{s})
		if warm() != 0 {
			t.Error("warm connections before anybody came")
		}
		firstByte(t, p, s)
		firstByte(t, p, s)
		time.Sleep(time.Second)
		if n := warm(); n < 1 || n > 3 {
			t.Errorf("%d warm connections after two flows", n)
		}
		again := &Server{Name: "s", Addr: serverA.Addr, Pipeline: PipelineOff, Auth: &socks.Auth{Username: "a", Password: "b"}}
		p.Configure(*p.options.Load(), []*Server{again})
		if n := warm(); n != 0 {
			t.Errorf("%d warm connections that are not the new user's", n)
		}
		p.Configure(*p.options.Load(), []*Server{s})
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() { firstByte(t, p, s) })
		}
		wg.Wait()
		time.Sleep(time.Second)
		if n := warm(); n < 15 || n > warmMost {
			t.Errorf("%d warm connections after 20 flows at once", n)
		}
		before := f.made()
		wg = sync.WaitGroup{}
		for range 10 {
			wg.Go(func() {
				if took := firstByte(t, p, s); took != 4*half {
					t.Errorf("with warm connections: %v", took)
				}
			})
		}
		wg.Wait()
		time.Sleep(2 * time.Minute)
		if n := warm(); n != 0 {
			t.Errorf("%d warm connections long after the last flow", n)
		}
		time.Sleep(time.Hour)
		if n := f.made() - before; n > 300 {
			t.Errorf("%d connections were made for nobody", n)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		// Who says nothing for long is hung up on.
		l := &lab{hosts: map[string]behaviour{addrA: func(context.Context) (net.Conn, error) {
			time.Sleep(2 * half)
			client, server := net.Pipe()
			go func() {
				defer server.Close()
				b := make([]byte, 512)
				for _, answer := range []string{chosen5, granted} {
					server.SetReadDeadline(time.Now().Add(500 * time.Millisecond))
					if _, err := server.Read(b); err != nil {
						return
					}
					io.WriteString(server, answer)
				}
				server.SetReadDeadline(time.Time{})
				io.Copy(io.Discard, server)
			}()
			return client, nil
		}}}
		p := l.pool(t, Options{})
		s := &Server{Name: "s", Addr: serverA.Addr, Pipeline: PipelineOff}
		p.Configure(*p.options.Load(), []*Server{s})
		for i := range 6 {
			if got := connect(t, p, s); got != "s" {
				t.Fatalf("flow %d: %s", i, got)
			}
			time.Sleep(time.Second)
		}
		if st := p.Status([]*Server{s})[0]; st.Faults != 0 {
			t.Errorf("a server is blamed for ending what was idle: %+v", st)
		}
	})
}
