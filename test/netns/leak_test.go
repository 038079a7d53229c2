package netns_test

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// Topology: world. The storm comes from the client; the observer counts at
// net, which the gateway cannot influence:
//
//	client ==2,000 flows, questions====> gateway --uplink--> net (observer)
//	                                                           | socks1, socks2: counted apart
//	                                                           ' anybody else:   leaked

// leakRoutes sends everything to SOCKS, by names and addresses of both
// families, through servers reached by both families.
const leakRoutes = `SERVER one 198.51.100.11
SERVER two [2001:db8:2::12]:1080
TIMEOUT connect=2s handshake=2s
BALANCE
SOCKD5 @=one,two *
`

// outcomes counts how the attempts of a storm ended.
type outcomes struct {
	mu                               sync.Mutex
	done, served, refused, cut, hung int
	slowest                          time.Duration
	other                            map[string]int
}

// count sorts one attempt in.
func (o *outcomes) count(err error, took time.Duration) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.done++
	o.slowest = max(o.slowest, took)
	var ne net.Error
	switch {
	case err == nil:
		o.served++
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.EHOSTUNREACH), errors.Is(err, syscall.EACCES):
		o.refused++
	case errors.Is(err, syscall.ECONNRESET), errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
		o.cut++
	case errors.As(err, &ne) && ne.Timeout():
		o.hung++
		o.note("hung: " + err.Error())
	default:
		o.note(err.Error())
	}
}

func (o *outcomes) note(s string) {
	if o.other == nil {
		o.other = map[string]int{}
	}
	if len(o.other) < 8 {
		o.other[s]++
	}
}

func (o *outcomes) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return fmt.Sprintf("%d attempts: %d served, %d refused, %d cut, %d hung; slowest %v; %v",
		o.done, o.served, o.refused, o.cut, o.hung, o.slowest.Round(time.Millisecond), o.other)
}

// attempts are the ways to reach the outside that a storm takes in turn.
var attempts = []func(w *world, i int) error{
	func(w *world, i int) error { return w.get(netip.MustParseAddr(outsideAt)) },
	func(w *world, i int) error { return w.get(netip.MustParseAddr(outsideAt6)) },
	func(w *world, i int) error { return w.getNamed(outsideNS, i, dns.TypeA) },
	func(w *world, i int) error { return w.getNamed(outsideNS6, i, dns.TypeAAAA) },
	func(w *world, i int) error {
		network := []string{"udp", "tcp"}[i%2]
		server := []string{outsideNS, outsideNS6, insideNS}[i%3]
		_, err := w.client.ask(network, server, fmt.Sprintf("q%d.example.org", i), []uint16{dns.TypeA, dns.TypeHTTPS, dns.TypeTXT, dns.TypePTR}[i%4])
		return err
	},
	func(w *world, i int) error { // UDP that is not DNS has no way through microsocks
		c, err := w.client.dial("udp", net.JoinHostPort([]string{outsideAt, outsideAt6}[i%2], "9"), time.Second)
		if err != nil {
			return err
		}
		defer c.Close()
		for range 4 { // a datagram that the daemon had when it was killed is lost
			if _, err = say(c.(*net.UDPConn), []byte("x"), time.Second); !errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
		}
		return err
	},
}

// get fetches a page from the address, as the client.
func (w *world) get(a netip.Addr) error {
	c, err := w.client.dial("tcp", netip.AddrPortFrom(a, 80).String(), 5*time.Second)
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(8 * time.Second))
	if _, err := io.WriteString(c, "GET /storm HTTP/1.0\r\nHost: storm\r\n\r\n"); err != nil {
		return err
	}
	b, err := io.ReadAll(c)
	if err == nil && !strings.Contains(string(b), "host=storm") {
		return io.ErrUnexpectedEOF
	}
	return err
}

// getNamed asks for a name first. Without an answer it tries the address that
// it remembers from elsewhere, so that each attempt is a connection.
func (w *world) getNamed(server string, i int, qtype uint16) error {
	a, err := w.client.lookup(server, fmt.Sprintf("n%d.example.org", i), qtype)
	if err != nil {
		a = netip.MustParseAddr(map[uint16]string{dns.TypeA: outsideAt, dns.TypeAAAA: outsideAt6}[qtype])
	}
	return errors.Join(err, w.get(a))
}

// storm makes n attempts, up to 24 at a time and not faster than the pace, and
// returns when all have ended.
func (w *world) storm(n int, pace time.Duration) *outcomes {
	var o outcomes
	var wg sync.WaitGroup
	next := make(chan int)
	for range 24 {
		wg.Go(func() {
			for i := range next {
				began := time.Now()
				o.count(attempts[i%len(attempts)](w, i), time.Since(began))
			}
		})
	}
	for i := range n {
		next <- i
		time.Sleep(pace)
	}
	close(next)
	wg.Wait()
	return &o
}

// during runs a storm of 3,000 attempts, 2,000 of them TCP connections, and
// calls trouble again and again until it is over; if that was too soon for as
// many rounds of trouble as there must be, with a second storm. It fails the
// test if a packet leaked, and returns how the last storm ended.
func (w *world) during(t *testing.T, rounds int, trouble func(round int)) *outcomes {
	t.Helper()
	w.observe(t)
	over := make(chan *outcomes, 1)
	begin := func() { over <- w.storm(3000, time.Millisecond) }
	go begin()
	for round := 0; ; round++ {
		select {
		case o := <-over:
			if round < rounds {
				go begin()
				break
			}
			t.Logf("%v; %d packets to the SOCKS servers, trouble %d times", o, w.carried(t), round)
			if n, who := w.leaked(t); n != 0 {
				t.Errorf("%d packets leaked:\n%s", n, who)
			}
			if o.done != 3000 || o.hung != 0 {
				t.Errorf("attempts hung: %v", o)
			}
			return o
		default:
		}
		trouble(round)
	}
}

// leakWorld is a world with SOCKS servers that carry both families, and a
// daemon that is not started.
func leakWorld(t *testing.T) (*world, *daemon) {
	t.Helper()
	w := newWorld(t)
	startMicrosocks(t, w.socks1, socks1At+":1080")
	startMicrosocks(t, w.socks2, socks2At+":1080")
	d := newDaemon(t, w.gateway, settings{routes: leakRoutes})
	t.Cleanup(func() {
		if t.Failed() && d.process != nil {
			t.Logf("tproxyd printed:\n%s", d.output())
		}
	})
	return w, d
}

func rest(int) { time.Sleep(50 * time.Millisecond) }

// TestNoLeakClosed: not yet started, everything is refused by the closed
// table; and what the table keeps back, the observer would have seen.
func TestNoLeakClosed(t *testing.T) {
	t.Parallel()
	w, d := leakWorld(t)
	d.cli(t, "close", "-c", d.config).ok(t)
	o := w.during(t, 1, rest)
	if o.refused != o.done || w.carried(t) != 0 {
		t.Errorf("closed: not everything was refused: %v, %d packets to the SOCKS servers", o, w.carried(t))
	}

	d.cli(t, "cleanup").ok(t)
	w.storm(len(attempts), 0)
	n, who := w.leaked(t)
	if n < len(attempts) {
		t.Errorf("the observer counted %d packets of %d leaks made on purpose", n, len(attempts))
	}
	for _, want := range []string{
		outsideAt + " . tcp . 80", outsideAt6 + " . tcp . 80", // flows
		outsideNS + " . udp . 53", outsideNS6 + " . udp . 53", // questions
		" . udp . 9",
	} {
		if !strings.Contains(who, want) {
			t.Errorf("the observer did not see a leak to %s:\n%s", want, who)
		}
	}
}

// TestNoLeakKilled: in peace everything is served; killed and restarted, it
// is served or refused.
func TestNoLeakKilled(t *testing.T) {
	t.Parallel()
	w, d := leakWorld(t)
	d.start(t)
	o := w.during(t, 1, rest)
	if want := o.done * 4 / 6; o.served < want { // UDP other than DNS is refused, odd questions may fail
		t.Errorf("in peace: %v, want at least %d served", o, want)
	}
	o = w.during(t, 5, func(int) {
		d.process.kill()
		time.Sleep(100 * time.Millisecond)
		d.start(t)
		time.Sleep(400 * time.Millisecond)
	})
	if o.served == 0 || o.refused <= o.done/6 {
		t.Errorf("killed: %v, want some served and some refused", o)
	}
}

// TestNoLeakReloaded: ten reloads and more, with flows that survive them to
// the last byte.
func TestNoLeakReloaded(t *testing.T) {
	t.Parallel()
	w, d := leakWorld(t)
	d.start(t)
	flows := w.startEchoes(t, 16)
	const done = `tproxyd_reloads_total{result="done"}`
	o := w.during(t, 10, func(round int) {
		d.routes(t, leakRoutes+fmt.Sprintf("# edition %d\nDENY 192.0.2.%d\n", round, round%250))
		if round%2 == 0 {
			d.reload(t)
		} else {
			before := d.metric(t, done)
			d.cmd.Process.Signal(syscall.SIGHUP)
			eventually(t, 10*time.Second, "the signal is followed", func() bool { return d.metric(t, done) > before })
		}
		time.Sleep(50 * time.Millisecond)
	})
	if n := d.metric(t, done); n < 10 {
		t.Errorf("only %v reloads", n)
	}
	if want := o.done * 4 / 6; o.served < want {
		t.Errorf("reloads cost somebody the connection: %v, want at least %d served", o, want)
	}
	flows.finish(t)
}

// TestNoLeakTampered: somebody flushes the ruleset, deletes our rules, and
// re-plugs the LAN's interface.
func TestNoLeakTampered(t *testing.T) {
	t.Parallel()
	w, d := leakWorld(t)
	d.start(t)
	w.during(t, 10, func(round int) {
		if round%2 == 0 {
			w.gateway.run(t, command{args: []string{tool(t, "nft"), "flush", "ruleset"}})
		} else {
			w.gateway.dropRules(t)
		}
		time.Sleep(70 * time.Millisecond)
	})
	if d.metric(t, `tproxyd_healed_total{what="rule"}`) == 0 {
		t.Error("no rule was missed: the test shows nothing")
	}
	eventually(t, 5*time.Second, "all is put right", func() bool { return w.get(netip.MustParseAddr(outsideAt)) == nil })

	w.observe(t)
	w.gateway.ip(t, "link del lan0")
	w.plugLAN(t)
	eventually(t, 5*time.Second, "the new interface is served", func() bool {
		return w.getNamed(outsideNS6, 1, dns.TypeAAAA) == nil && w.get(netip.MustParseAddr(outsideAt)) == nil
	})
	if n, who := w.leaked(t); n != 0 {
		t.Errorf("%d packets leaked by a new interface:\n%s", n, who)
	}
}

// TestInterfaceComesLater: a daemon that is there before its interface says so,
// and serves it when it comes.
func TestInterfaceComesLater(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	startMicrosocks(t, w.socks1, socks1At+":1080")
	w.gateway.ip(t, "link del lan0")
	d := serve(t, w.gateway, settings{routes: "SOCKD5 @=198.51.100.11 *\n"})
	if out := d.output(); !strings.Contains(out, `"there is no such interface: its flows are taken once it is there" interface=lan0`) {
		t.Errorf("nothing is said of it:\n%s", out)
	}
	w.plugLAN(t)
	eventually(t, 5*time.Second, "the interface is served", func() bool { return w.get(netip.MustParseAddr(outsideAt)) == nil })
	eventually(t, 5*time.Second, "its coming is told", func() bool { return strings.Contains(d.output(), `"interface is up" interface=lan0`) })
}

// dropRules deletes every routing rule that is not the kernel's own.
func (h *host) dropRules(t testing.TB) {
	t.Helper()
	for _, family := range []string{"-4", "-6"} {
		list := h.run(t, command{args: []string{tool(t, "ip"), family, "rule"}}).ok(t).out
		for _, line := range strings.Split(strings.TrimSpace(list), "\n") {
			pref, _, _ := strings.Cut(line, ":")
			if pref != "0" && pref != "32766" && pref != "32767" {
				h.run(t, command{args: []string{tool(t, "ip"), family, "rule", "del", "pref", pref}})
			}
		}
	}
}

// echoes are flows through the gateway that talk until they are told to
// finish.
type echoes struct {
	stop chan struct{}
	wg   sync.WaitGroup
	mu   sync.Mutex
	errs []error
	sent int64
}

// startEchoes opens n flows of both families to an echo service of the
// outside, each sending random bytes and reading them back all the time.
func (w *world) startEchoes(t *testing.T, n int) *echoes {
	t.Helper()
	at := []string{outsideAt + ":7", "[" + outsideAt6 + "]:7"}
	for _, a := range at {
		l := w.outside.listen(t, "tcp", a)
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					io.Copy(c, c)
					c.Close()
				}()
			}
		}()
	}
	e := &echoes{stop: make(chan struct{})}
	for i := range n {
		c, err := w.client.dial("tcp", at[i%2], 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		e.wg.Go(func() {
			defer c.Close()
			sent, err := e.talk(c, uint64(i))
			e.mu.Lock()
			defer e.mu.Unlock()
			e.sent += sent
			if err != nil {
				e.errs = append(e.errs, fmt.Errorf("flow %d after %d bytes: %w", i, sent, err))
			}
		})
	}
	return e
}

// talk sends random chunks and hashes what it sent and what came back.
func (e *echoes) talk(c net.Conn, seed uint64) (int64, error) {
	rng := rand.New(rand.NewPCG(seed, 1))
	up, down := sha256.New(), sha256.New()
	buf, back := make([]byte, 16<<10), make([]byte, 16<<10)
	for sent := int64(0); ; {
		n := 1 + rng.IntN(len(buf))
		for i := range n {
			buf[i] = byte(rng.Uint32())
		}
		up.Write(buf[:n])
		c.SetDeadline(time.Now().Add(15 * time.Second))
		if _, err := c.Write(buf[:n]); err != nil {
			return sent, err
		}
		sent += int64(n)
		if _, err := io.ReadFull(c, back[:n]); err != nil {
			return sent, err
		}
		down.Write(back[:n])
		select {
		case <-e.stop:
			if string(up.Sum(nil)) != string(down.Sum(nil)) {
				return sent, errors.New("other bytes came back")
			}
			return sent, nil
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// finish ends the flows and fails the test if one of them lost a byte.
func (e *echoes) finish(t *testing.T) {
	t.Helper()
	close(e.stop)
	e.wg.Wait()
	for _, err := range e.errs {
		t.Error(err)
	}
	t.Logf("echoed %d bytes", e.sent)
}

// TestLeakAfterKill: packets of flows that were running when the daemon was
// killed do not find a way out either.
func TestLeakAfterKill(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	startMicrosocks(t, w.socks1, socks1At+":1080")
	d := serve(t, w.gateway, settings{routes: "SOCKD5 @=198.51.100.11 *\n"})
	l := w.outside.listen(t, "tcp", outsideAt+":7")
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go io.Copy(c, c)
		}
	}()
	w.observe(t)
	var conns []net.Conn
	for range 50 {
		c, err := w.client.dial("tcp", outsideAt+":7", 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		conns = append(conns, c)
		c.SetDeadline(time.Now().Add(5 * time.Second))
		c.Write([]byte("hello"))
		if _, err := io.ReadFull(c, make([]byte, 5)); err != nil {
			t.Fatal(err)
		}
	}
	d.process.kill()
	began := time.Now()
	for _, c := range conns {
		c.Write([]byte("are you there"))
	}
	for _, c := range conns {
		if _, err := c.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("a flow lives on without the daemon: %v", err)
		}
	}
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("the flows ended only after %v", took)
	}
	if n, who := w.leaked(t); n != 0 {
		t.Errorf("%d packets leaked:\n%s", n, who)
	}
}
