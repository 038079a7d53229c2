package netns_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/tproxyd/tproxyd/internal/socksserver"
)

// Topology: world. Sockets of the client talk to the outside all the time,
// while the SOCKS server, its control connections or the daemon come to an end
// and begin again; the observer at net counts:
//
//	client ==talk==> gateway --uplink--> net (observer) --> socks1 --> outside:7
//	                  ^ kill -9                              ^ kill -9, resets

// talker is a socket of the client that sends a datagram at a time, each with
// its own text, and waits for its echo.
type talker struct {
	conn  *net.UDPConn
	mu    sync.Mutex
	sent  int
	heard int   // the last one that came back, counted from 1
	last  error // of the last one; nil: it came back
	wrong error // an answer that was not asked for
}

// talks are some of them.
type talks struct {
	all  []*talker
	stop chan struct{}
	wg   sync.WaitGroup
}

// startTalks opens n sockets on the host, for both families in turn, that talk
// to port 7 of the outside until the test ends.
func (w *world) startTalks(t *testing.T, h *host, n int) *talks {
	t.Helper()
	ts := &talks{stop: make(chan struct{})}
	for i := range n {
		tk := &talker{conn: h.connected(t, net.JoinHostPort([]string{outsideAt, outsideAt6}[i%2], "7"))}
		ts.all = append(ts.all, tk)
		ts.wg.Go(func() { tk.talk(i, ts.stop) })
	}
	t.Cleanup(ts.finish)
	return ts
}

// finish has all stop; it may be called twice.
func (ts *talks) finish() {
	select {
	case <-ts.stop:
	default:
		close(ts.stop)
	}
	ts.wg.Wait()
}

func (tk *talker) talk(id int, stop <-chan struct{}) {
	for i := 1; ; i++ {
		select {
		case <-stop:
			return
		case <-time.After(10 * time.Millisecond):
		}
		tk.mu.Lock()
		tk.sent = i
		tk.mu.Unlock()
		text := fmt.Sprintf("talker %d says %d", id, i)
		b, err := say(tk.conn, []byte(text), 200*time.Millisecond)
		var from, number int
		if err == nil {
			if n, _ := fmt.Sscanf(string(b), "talker %d says %d", &from, &number); n != 2 || from != id || number > i {
				tk.mu.Lock()
				tk.wrong = fmt.Errorf("talker %d heard %q", id, b)
				tk.mu.Unlock()
				return
			}
		}
		tk.mu.Lock()
		tk.heard, tk.last = max(tk.heard, number), err
		tk.mu.Unlock()
	}
}

// each waits until something holds of every talker, or fails the test.
func (ts *talks) each(t *testing.T, limit time.Duration, what string, holds func(tk *talker) bool) {
	t.Helper()
	began := time.Now()
	for i, tk := range ts.all {
		eventually(t, time.Until(began.Add(limit)), fmt.Sprintf("talker %d of %d %s", i, len(ts.all), what), func() bool {
			tk.mu.Lock()
			defer tk.mu.Unlock()
			if tk.wrong != nil {
				t.Fatal(tk.wrong)
			}
			return holds(tk)
		})
	}
	t.Logf("after %v all %d sockets: %s", time.Since(began).Round(time.Millisecond), len(ts.all), what)
}

// heard waits until each talker hears an answer to what it says from now on.
func (ts *talks) heard(t *testing.T, limit time.Duration, what string) {
	t.Helper()
	since := map[*talker]int{}
	for _, tk := range ts.all {
		tk.mu.Lock()
		since[tk] = tk.sent
		tk.mu.Unlock()
	}
	ts.each(t, limit, what, func(tk *talker) bool { return tk.heard > since[tk] })
}

// refused waits until each talker is refused.
func (ts *talks) refused(t *testing.T, limit time.Duration, what string) {
	t.Helper()
	ts.each(t, limit, what, func(tk *talker) bool { return refused(tk.last) })
}

func TestUDPServerKilled(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	conf := openDante([]string{socks1At, socks1At6}, []string{socks1Out, socks1Out6})
	one := startDanted(t, w.socks1, socks1At+":1080", conf)
	w.outside.udpServices(t, outsideAt, outsideAt6)
	d := serve(t, w.gateway, settings{routes: "SERVER one 198.51.100.11\nSOCKD5 @=one *\n"})
	w.observe(t)
	ts := w.startTalks(t, w.client, 12)
	ts.heard(t, 5*time.Second, "are served")
	for range 2 {
		one.kill()
		ts.refused(t, 2*time.Second, "are refused without the server")
		one = startDanted(t, w.socks1, socks1At+":1080", conf)
		ts.heard(t, 5*time.Second, "are served again")
	}
	one.kill() // gone for a moment only
	startDanted(t, w.socks1, socks1At+":1080", conf)
	ts.heard(t, 5*time.Second, "are served by the next server")
	ts.finish()
	if n, who := w.leaked(t); n != 0 {
		t.Errorf("%d packets leaked:\n%s", n, who)
	}
	if n := d.metric(t, `tproxyd_udp_sessions`); n != 12 {
		t.Errorf("%v sessions, want the 12 that there always were", n)
	}
}

// startSocks serves SOCKS on the host with a server of ours, whose sockets are
// the host's. It speaks to destinations as the host does.
func (h *host) startSocks(t testing.TB, s *socksserver.Server, addrs ...string) *resetListener {
	t.Helper()
	packet := func(at netip.AddrPort) (c socksserver.PacketConn, err error) {
		err = h.in(func() error {
			var local *net.UDPAddr
			if at.IsValid() {
				local = net.UDPAddrFromAddrPort(at)
			}
			u, err := net.ListenUDP("udp", local)
			if err == nil {
				roomy(u)
				c = u
			}
			return err
		})
		return c, err
	}
	s.Dial = func(_ context.Context, network, addr string) (net.Conn, error) {
		return h.dial(network, addr, 5*time.Second)
	}
	s.UDP.Inside = func(at netip.Addr) (socksserver.PacketConn, error) { return packet(netip.AddrPortFrom(at, 0)) }
	s.UDP.Outside = func() (socksserver.PacketConn, error) { return packet(netip.AddrPort{}) }
	ctx, cancel := context.WithCancel(context.Background())
	t.Cleanup(cancel)
	r := &resetListener{conns: map[*net.TCPConn]bool{}}
	for _, a := range addrs {
		l := &keeper{h.listen(t, "tcp", a), r}
		go s.Serve(ctx, l)
	}
	return r
}

// resetListener remembers the connections of its listeners.
type resetListener struct {
	mu    sync.Mutex
	conns map[*net.TCPConn]bool
}

// keeper is one of the listeners.
type keeper struct {
	net.Listener
	r *resetListener
}

// Accept remembers the connection.
func (k *keeper) Accept() (net.Conn, error) {
	c, err := k.Listener.Accept()
	if err == nil {
		k.r.mu.Lock()
		k.r.conns[c.(*net.TCPConn)] = true
		k.r.mu.Unlock()
	}
	return c, err
}

// reset ends all connections with RST.
func (r *resetListener) reset() (n int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for c := range r.conns {
		if c.SetLinger(0) == nil {
			n++
		}
		c.Close()
	}
	clear(r.conns)
	return n
}

// TestUDPControlEnds: the end of a control connection, by FIN or RST, ends the
// association, and the client's next datagram opens another.
func TestUDPControlEnds(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.outside.udpServices(t, outsideAt, outsideAt6)
	s := &socksserver.Server{}
	r := w.socks1.startSocks(t, s, socks1At+":1080")
	serve(t, w.gateway, settings{routes: "SERVER one 198.51.100.11\nSOCKD5 @=one *\n"})
	w.observe(t)
	ts := w.startTalks(t, w.client, 12)
	ts.heard(t, 5*time.Second, "are served")
	for range 5 {
		n := r.reset()
		if n < 12 {
			t.Errorf("%d connections were reset, want one a session", n)
		}
		ts.heard(t, time.Second, "are served after resets")
		s.EndAssociations()
		ts.heard(t, time.Second, "are served after the associations ended")
	}
	ts.finish()
	if n, who := w.leaked(t); n != 0 {
		t.Errorf("%d packets leaked:\n%s", n, who)
	}
	if c := s.Counts(); c.Total < 11*12 || c.Alive != 12 {
		t.Errorf("%d associations of %d are alive, want 12 of 132 or more", c.Alive, c.Total)
	}
}

// TestUDPDaemonKilled: without the daemon datagrams are refused at once; with
// the next one the same sockets are served.
func TestUDPDaemonKilled(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.dante(t)
	w.outside.udpServices(t, outsideAt, outsideAt6)
	d := serve(t, w.gateway, settings{local: true, routes: "SERVER one 198.51.100.11\nSOCKD5 @=one *\n"})
	w.observe(t)
	for _, h := range []*host{w.client, w.gateway} {
		ts := w.startTalks(t, h, 12)
		ts.heard(t, 5*time.Second, h.name+": are served")
		for range 2 {
			d.process.kill()
			ts.refused(t, time.Second, h.name+": are refused without the daemon")
			for _, to := range []string{outsideAt, outsideAt6} { // new ones, too
				refusedAtOnce(t, h.name+": dead daemon, UDP to "+to, h.connected(t, net.JoinHostPort(to, "7")))
				refusedAtOnce(t, h.name+": dead daemon, DNS to "+to, h.connected(t, net.JoinHostPort(to, "53")))
			}
			d.start(t)
			ts.heard(t, 5*time.Second, h.name+": are served by the next daemon")
		}
		ts.finish()
	}
	if n, who := w.leaked(t); n != 0 {
		t.Errorf("%d packets leaked:\n%s", n, who)
	}

	// Stopped as systemd does it, it refuses likewise.
	c := w.client.connected(t, net.JoinHostPort(outsideAt, "7"))
	echoed(t, c, 100)
	d.stop(t)
	refusedAtOnce(t, "stopped", c)
	if _, err := say(c, []byte("again"), time.Second); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("stopped: %v", err)
	}
	if n, who := w.leaked(t); n != 0 {
		t.Errorf("%d packets leaked:\n%s", n, who)
	}
}
