package netns_test

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tproxyd/tproxyd/internal/socksserver"
)

// Topology: world. Many sockets of the client at once, most of them for one
// question and its answer, as DNS has them; port 9000 of the outside answers
// with a checksum of what it was asked, so that an answer that went to another
// socket is seen:
//
//	client ==2,000 short, 200 long==> gateway ==2,200 associations==> socks1 --> outside:9000

// checkUDP is the answer to a question.
func checkUDP(b []byte, _ netip.AddrPort) []byte {
	sum := sha256.Sum256(b)
	return append(sum[:8], b[:min(len(b), 8)]...)
}

// crowd counts what its sockets saw.
type crowd struct {
	w                     *world
	asked, again, refused atomic.Int64 // questions; those asked once more; ICMP errors
	mu                    sync.Mutex
	wrong                 []error
}

func (c *crowd) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.wrong) < 10 {
		c.wrong = append(c.wrong, err)
	}
}

// ask sends a question from the connected socket until it is answered, four
// times at most. Only an answer to it counts, or to the one before if it was
// asked again.
func (c *crowd) ask(conn *net.UDPConn, id, number uint64) {
	q := binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, id), number)
	want := string(checkUDP(q, netip.AddrPort{}))
	c.asked.Add(1)
	for try := range 4 {
		if try > 0 {
			c.again.Add(1)
		}
		b, err := say(conn, q, time.Second)
		switch {
		case err == nil && string(b) == want:
			return
		case err == nil:
			c.fail(fmt.Errorf("socket %d heard %x, want the answer %x to its question %d", id, b, want, number))
			return
		case refused(err):
			c.refused.Add(1)
			time.Sleep(100 * time.Millisecond)
		case !errors.Is(err, os.ErrDeadlineExceeded):
			c.fail(fmt.Errorf("socket %d: %w", id, err))
			return
		}
	}
	c.fail(fmt.Errorf("socket %d: no answer to question %d", id, number))
}

// run has short sockets for one question each, up to 32 at a time, and beside
// them long ones that ask all the time, each to one of the two addresses.
func (c *crowd) run(t *testing.T, short, long int) {
	t.Helper()
	at := func(i int) string { return net.JoinHostPort([]string{outsideAt, outsideAt6}[i%2], "9000") }
	stop := make(chan struct{})
	var longs, shorts sync.WaitGroup
	for i := range long {
		conn := c.w.client.connected(t, at(i))
		longs.Go(func() {
			for n := uint64(1); ; n++ {
				c.ask(conn, uint64(1_000_000+i), n)
				select {
				case <-stop:
					return
				case <-time.After(50 * time.Millisecond):
				}
			}
		})
	}
	next := make(chan int)
	for range 32 {
		shorts.Go(func() {
			for i := range next {
				conn, err := c.w.client.dial("udp", at(i), time.Second)
				if err != nil {
					c.fail(err)
					continue
				}
				c.ask(conn.(*net.UDPConn), uint64(i), 0)
				conn.Close()
			}
		})
	}
	for i := range short {
		next <- i
	}
	close(next)
	shorts.Wait()
	close(stop)
	longs.Wait()
	for _, err := range c.wrong {
		t.Error(err)
	}
	t.Logf("%d questions, %d asked again, %d refused", c.asked.Load(), c.again.Load(), c.refused.Load())
}

// descriptors returns how many the daemon has.
func (d *daemon) descriptors(t testing.TB) int {
	t.Helper()
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", d.pid()))
	if err != nil {
		t.Fatal(err)
	}
	return len(fds)
}

// load is a crowd of a size against a SOCKS server. Its associations live until
// a reload that lowers the idle limit; alive says how many the server has, if
// that can be known.
func (w *world) load(t *testing.T, short, long int, alive func() int) {
	t.Helper()
	for _, a := range []string{outsideAt, outsideAt6} {
		w.outside.answerUDP(t, net.JoinHostPort(a, "9000"), checkUDP)
	}
	rules := func(idle string) string {
		return fmt.Sprintf("SERVER one 198.51.100.11\nTIMEOUT udp=%s\nSOCKD5 @=one *\n", idle)
	}
	d := serve(t, w.gateway, settings{routes: rules("5m")})
	d.metric(t, "tproxyd_udp_sessions") // it has come as far as to answer
	fds := d.descriptors(t)
	// What is done for the first time costs memory once: code and tables.
	(&crowd{w: w}).run(t, 20, 20)
	sessions := 0.0
	for range 100 { // answering costs memory too
		sessions = d.metric(t, "tproxyd_udp_sessions_total")
	}
	memory := d.memory(t)
	w.observe(t)
	c := &crowd{w: w}
	began := time.Now()
	c.run(t, short, long)
	t.Logf("%d short and %d long sockets in %v: %d descriptors at the end of %d before, %d KB of %d",
		short, long, time.Since(began).Round(time.Millisecond), d.descriptors(t), fds, d.memory(t)>>10, memory>>10)
	if n, who := w.leaked(t); n != 0 {
		t.Errorf("%d packets leaked:\n%s", n, who)
	}
	few := (short + long) * 9 / 10 // the client's kernel uses a port again
	if n := d.metric(t, "tproxyd_udp_sessions_total") - sessions; int(n) < few {
		t.Errorf("%v sessions, want one for each of %d sockets", n, short+long)
	}
	d.routes(t, rules("2s"))
	d.reload(t)
	if alive != nil {
		eventually(t, 10*time.Second, "no association is left", func() bool { return alive() == 0 })
	}
	for _, what := range []string{"sessions", "flows", "outlets"} {
		eventually(t, 10*time.Second, "none is left of "+what, func() bool { return d.metric(t, "tproxyd_udp_"+what) == 0 })
	}
	near := func(now, before int) bool { return now <= before+before/10 }
	eventually(t, 5*time.Second, fmt.Sprintf("as few descriptors as the %d before", fds), func() bool { return near(d.descriptors(t), fds) })
	eventually(t, 5*time.Second, fmt.Sprintf("as little memory as the %d KB before", memory>>10), func() bool { return near(d.memory(t), memory) })
	t.Logf("afterwards %d descriptors and %d KB", d.descriptors(t), d.memory(t)>>10)
}

func TestUDPLoad(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	s := &socksserver.Server{}
	w.socks1.startSocks(t, s, socks1At+":1080")
	var most atomic.Int64
	s.OnRequest = func(socksserver.Request) { most.Store(max(most.Load(), int64(s.Counts().Alive))) }
	w.load(t, 2000, 200, func() int { return s.Counts().Alive })
	if c := s.Counts(); most.Load() < 2000 || c.Dropped != 0 {
		t.Errorf("%d associations at once of %d, %d datagrams went no further; want 2,000 and none", most.Load(), c.Total, c.Dropped)
	}
}

func TestUDPLoadDante(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.dante(t)
	w.load(t, 200, 20, nil)
}
