package netns_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/tproxyd/tproxyd/internal/socksserver"
)

// moody is a SOCKS server that a test can spoil and mend while it runs.
type moody struct {
	host   *host
	at     string
	asked  atomic.Int64 // requests that it has served
	server socksserver.Server

	mu    sync.Mutex
	ln    net.Listener
	mood  mood
	conns map[net.Conn]bool
	queue chan net.Conn
}

type mood int

const (
	fine mood = iota
	stopped
	blackHoled
	silent
	garbled
	noMethod
)

var moods = map[mood]string{stopped: "stopped", blackHoled: "black-holed", silent: "accepts and stays silent", garbled: "answers garbage", noMethod: "05 FF"}

func startMoody(t testing.TB, h *host, at string) *moody {
	t.Helper()
	m := &moody{host: h, at: at, queue: make(chan net.Conn), conns: map[net.Conn]bool{}}
	m.server.Dial = func(_ context.Context, network, addr string) (net.Conn, error) {
		return h.dial(network, addr, 5*time.Second)
	}
	m.server.OnRequest = func(socksserver.Request) { m.asked.Add(1) }
	m.listen(t)
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	go m.server.Serve(ctx, moodyListener{m, ctx})
	return m
}

// moodyListener hands the connections of a server in its good moods on.
type moodyListener struct {
	m   *moody
	ctx context.Context
}

func (l moodyListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.m.queue:
		return c, nil
	case <-l.ctx.Done():
		return nil, net.ErrClosed
	}
}
func (l moodyListener) Close() error   { return nil }
func (l moodyListener) Addr() net.Addr { return &net.TCPAddr{} }

func (m *moody) listen(t testing.TB) {
	ln := m.host.listen(t, "tcp", m.at)
	m.mu.Lock()
	m.ln = ln
	m.mu.Unlock()
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			m.mu.Lock()
			now := m.mood
			m.conns[c] = true
			m.mu.Unlock()
			switch now {
			case fine:
				go func() { m.queue <- c }()
			case garbled:
				go func() { c.Read(make([]byte, 3)); io.WriteString(c, "SSH-2.0-OpenSSH_9.2\r\n"); c.Close() }()
			case noMethod:
				go func() { c.Read(make([]byte, 3)); c.Write([]byte{5, 0xff}); c.Close() }()
			}
		}
	}()
}

// become changes the mood. A server that stops takes nobody any more: flows that
// it carries end with their pages, which no other server could save.
func (m *moody) become(t testing.TB, now mood) {
	t.Helper()
	m.mu.Lock()
	before := m.mood
	m.mood = now
	conns := m.conns
	m.conns = map[net.Conn]bool{}
	m.mu.Unlock()
	switch {
	case now == stopped:
		m.ln.Close()
	case now == blackHoled:
		m.host.nft(t, "table inet hole { chain in { type filter hook prerouting priority -300; tcp dport 1080 drop; }; }")
	case before == stopped:
		m.listen(t)
	case before == blackHoled:
		m.host.nft(t, "delete table inet hole")
	}
	if before != fine && before != stopped && before != blackHoled {
		for c := range conns {
			c.Close()
		}
	}
}

// stream opens flows at a rate until stop, each a small page, and returns what
// went wrong and how long the longest took.
type stream struct {
	mu      sync.Mutex
	flows   int
	wrong   []string
	longest time.Duration
	end     chan struct{}
	all     sync.WaitGroup
}

func (w *world) stream(rate int) *stream {
	s := &stream{end: make(chan struct{})}
	s.all.Go(func() {
		tick := time.NewTicker(time.Second / time.Duration(rate))
		defer tick.Stop()
		for {
			select {
			case <-s.end:
				return
			case <-tick.C:
				s.all.Go(func() { s.flow(w) })
			}
		}
	})
	return s
}

func (s *stream) flow(w *world) {
	began := time.Now()
	err := fetchPage(w.client)
	took := time.Since(began)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.flows++
	s.longest = max(s.longest, took)
	if err != nil {
		s.wrong = append(s.wrong, fmt.Sprintf("after %v: %v", took, err))
	}
}

// fetchPage asks the outside for one.
func fetchPage(from *host) error {
	c, err := from.dial("tcp", outsideAt+":80", 10*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(20 * time.Second))
	io.WriteString(c, "GET / HTTP/1.0\r\n\r\n")
	b, err := io.ReadAll(c)
	if err == nil && len(b) == 0 {
		err = io.ErrUnexpectedEOF
	}
	return err
}

func (s *stream) stop() {
	close(s.end)
	s.all.Wait()
}

// TestFailover: 300 flows a second over two servers, of which one fails in every
// way there is. No client sees it; and a second after it is back it has its share.
func TestFailover(t *testing.T) {
	t.Parallel()
	const connect = 3 * time.Second
	for how, name := range moods {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			one, two := startMoody(t, w.socks1, socks1At+":1080"), startMoody(t, w.socks2, socks2At+":1080")
			d := serve(t, w.gateway, settings{routes: fmt.Sprintf("SERVER int1 %s\nSERVER int2 %s\nTIMEOUT connect=%v\nSOCKD5 @=int1,int2 * balance=roundrobin\n", one.at, two.at, connect)})
			w.observe(t)
			s := w.stream(300)
			time.Sleep(time.Second)
			one.become(t, how)
			time.Sleep(2 * time.Second)
			began := two.asked.Load()
			time.Sleep(time.Second)
			if n := two.asked.Load() - began; n < 60 { // however slow the machine
				t.Errorf("%d flows by the other server in a second", n)
			}
			one.become(t, fine)
			time.Sleep(time.Second)
			a, b := one.asked.Load(), two.asked.Load()
			time.Sleep(time.Second)
			a, b = one.asked.Load()-a, two.asked.Load()-b
			if a < 30 || a < b*7/10 || b < a*7/10 {
				t.Errorf("a second after its return it has %d flows, and the other one %d", a, b)
			}
			s.stop()
			t.Logf("%d flows, the longest %v; the share afterwards %d and %d", s.flows, s.longest.Round(time.Millisecond), a, b)
			for i, err := range s.wrong {
				if t.Errorf("%s", err); i > 10 {
					break
				}
			}
			if s.flows < 500 || s.longest >= 2*connect { // nobody waits for the limit twice
				t.Errorf("%d flows, the longest %v", s.flows, s.longest)
			}
			if n, who := w.leaked(t); n != 0 {
				t.Errorf("%d packets leaked:\n%s", n, who)
			}
			d.stop(t)
		})
	}
}

// TestBalance: shares of three servers, and which flows move when one is lost.
func TestBalance(t *testing.T) {
	t.Parallel()
	const flows = 3000
	for order, slack := range map[string]int64{"random": flows / 30, "roundrobin": 0, "hash": flows / 30} {
		t.Run(order, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			servers := []*moody{startMoody(t, w.socks1, socks1At+":1080"), startMoody(t, w.socks2, socks2At+":1080"), startMoody(t, w.inside, insideAt+":1080")}
			serve(t, w.gateway, settings{routes: fmt.Sprintf("SOCKD5 @=%s,%s,%s * balance=%s\n", servers[0].at, servers[1].at, servers[2].at, order)})
			// Clients differ by address, destinations by port.
			for i := range 100 {
				w.client.ip(t, fmt.Sprintf("addr add 192.0.2.%d/24 dev eth0", 100+i))
			}
			carrier := map[string]string{}
			var mu sync.Mutex
			for _, m := range servers {
				m.server.OnRequest = func(r socksserver.Request) {
					m.asked.Add(1)
					mu.Lock()
					carrier[r.Target.String()] += m.at + " "
					mu.Unlock()
				}
			}
			round := func(clients int) {
				var all sync.WaitGroup
				for worker := range 10 {
					all.Go(func() {
						for i := worker; i < flows; i += 10 {
							from := fmt.Sprintf("192.0.2.%d:0", 100+i%clients)
							c, err := w.client.dialFrom(from, fmt.Sprintf("%s:%d", outsideAt, 10000+i))
							if errors.Is(err, syscall.ECONNRESET) {
								continue // as below, before we could look
							}
							if err != nil {
								t.Error(err)
								continue
							}
							c.SetDeadline(time.Now().Add(10 * time.Second))
							c.Read(make([]byte, 1)) // nobody listens there: a reset, after the server was asked
							c.Close()
						}
					})
				}
				all.Wait()
			}
			round(100)
			for _, m := range servers {
				if n := m.asked.Load(); n < flows/3-slack || n > flows/3+slack {
					t.Errorf("%s has %d of %d flows", m.at, n, flows)
				}
			}
			if order != "hash" {
				return
			}
			before := carrier
			carrier = map[string]string{}
			servers[1].become(t, stopped)
			round(100)
			moved := 0
			for to, m := range before {
				if m != servers[1].at+" " && carrier[to] != m {
					moved++
				}
			}
			if moved > 0 || len(before) != flows {
				t.Errorf("of %d destinations %d moved that the lost server did not have", len(before), moved)
			}
		})
	}
}

// dialFrom connects from one of the machine's addresses.
func (h *host) dialFrom(from, to string) (c net.Conn, err error) {
	local, err := net.ResolveTCPAddr("tcp", from)
	if err != nil {
		return nil, err
	}
	err = h.in(func() (err error) {
		d := net.Dialer{LocalAddr: local, Timeout: 10 * time.Second}
		c, err = d.Dial("tcp", to)
		return err
	})
	return c, err
}
