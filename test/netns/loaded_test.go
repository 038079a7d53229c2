package netns_test

import (
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// Topology: world. What goes on while the daemon is changed, so that whatever is
// lost is seen, since nothing is asked twice:
//
//	client ==200 flows, checksummed=========> gateway ==SOCKS==> socks1 --> outside:7
//	client ==50 sockets of UDP=============>    "    ==SOCKS==> socks1 --> outside:9000
//	client --500 questions a second-------->    "    (answered there, or by TCP through SOCKS)
//	client --a new flow every 20 ms-------->    "    ==SOCKS==> socks1 --> outside:80

// lostAfter is when an answer counts as lost. On a busy machine a question can be
// under way at one takeover after the other, each of which begins it anew.
const lostAfter = 30 * time.Second

// loaded is such a load.
type loaded struct {
	w      *world
	flows  *echoes
	stop   chan struct{}
	wg     sync.WaitGroup
	counts map[string]*atomic.Int64

	mu    sync.Mutex
	wrong []string
	addrs map[string]netip.Addr // synthetic ones, by name
}

// whoSum answers with the socket that asked, and what it asked.
func whoSum(b []byte, from netip.AddrPort) []byte {
	return append(checkUDP(b, from), from.String()...)
}

// startLoad begins the load.
func (w *world) startLoad(t *testing.T) *loaded {
	t.Helper()
	l := &loaded{w: w, stop: make(chan struct{}), addrs: map[string]netip.Addr{}, counts: map[string]*atomic.Int64{
		"datagrams": {}, "questions": {}, "flows": {},
	}}
	for _, a := range []string{outsideAt, outsideAt6} {
		w.outside.answerUDP(t, net.JoinHostPort(a, "9000"), whoSum)
	}
	l.flows = w.startEchoes(t, 200)
	for i := range 50 {
		c := w.client.connected(t, net.JoinHostPort([]string{outsideAt, outsideAt6}[i%2], "9000"))
		l.wg.Go(func() { l.datagrams(c, i) })
	}
	for i := range 20 { // some over TCP, by one connection each
		c, err := w.client.dial([]string{"udp", "udp", "udp", "tcp"}[i%4], net.JoinHostPort([]string{outsideNS, outsideNS6}[i/4%2], "53"), 5*time.Second)
		w.client.must(t, err)
		t.Cleanup(func() { c.Close() })
		l.wg.Go(func() { l.questions(&dns.Conn{Conn: c}, i) })
	}
	l.wg.Go(l.newFlows)
	return l
}

// each calls f every so often until the load ends, or f has failed.
func (l *loaded) each(every time.Duration, what string, f func(n int) error) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for n := 0; ; n++ {
		if err := f(n); err != nil {
			l.mu.Lock()
			l.wrong = append(l.wrong, fmt.Sprintf("%s, the %dth: %v", what, n, err))
			l.mu.Unlock()
		}
		l.counts[strings.Fields(what)[0]].Add(1)
		select {
		case <-l.stop:
			return
		case <-tick.C:
		}
	}
}

// datagrams asks from one socket; every answer must come, and the far side must
// see the same socket of the server's for ever. Half of them are slow, and have no
// socket of their own in the daemon.
func (l *loaded) datagrams(c *net.UDPConn, i int) {
	seen := ""
	l.each([]time.Duration{20 * time.Millisecond, 300 * time.Millisecond}[i/2%2], fmt.Sprint("datagrams of socket ", i), func(n int) error {
		q := binary.BigEndian.AppendUint64(binary.BigEndian.AppendUint64(nil, uint64(i)), uint64(n))
		b, err := say(c, q, lostAfter)
		if err != nil {
			return err
		}
		sum, who := string(b[:min(16, len(b))]), string(b[min(16, len(b)):])
		if sum != string(checkUDP(q, netip.AddrPort{})) {
			return fmt.Errorf("another answer: %x", b)
		}
		if seen != "" && who != seen {
			err = fmt.Errorf("the outside saw %s, and %s before", who, seen)
		}
		seen = who
		return err
	})
}

// questions asks for new and old names from one socket, by turns for an address,
// whose answer must stay the same, and for a text, which goes through SOCKS.
func (l *loaded) questions(c *dns.Conn, i int) {
	l.each(40*time.Millisecond, fmt.Sprint("questions of socket ", i), func(n int) error {
		qtype := []uint16{dns.TypeA, dns.TypeA, dns.TypeA, dns.TypeTXT}[n%4]
		name := fmt.Sprintf("q%d-%d.example.org", i, n/2%50)
		q := new(dns.Msg).SetQuestion(name+".", qtype)
		c.SetDeadline(time.Now().Add(lostAfter))
		if err := c.WriteMsg(q); err != nil {
			return err
		}
		m, err := c.ReadMsg()
		if err != nil {
			return err
		}
		if m.Id != q.Id || m.Rcode != dns.RcodeSuccess || len(m.Answer) != 1 {
			return fmt.Errorf("%s %s: %s", name, dns.TypeToString[qtype], dns.RcodeToString[m.Rcode])
		}
		if a, ok := m.Answer[0].(*dns.A); ok {
			return l.same(name, netip.MustParseAddr(a.A.String()))
		}
		return nil
	})
}

// same tells whether a name has the address that it had.
func (l *loaded) same(name string, a netip.Addr) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if old, ok := l.addrs[name]; ok && old != a {
		return fmt.Errorf("%s was %v and is %v", name, old, a)
	}
	for n, other := range l.addrs {
		if other == a && n != name {
			return fmt.Errorf("%v is %s and %s", a, name, n)
		}
	}
	l.addrs[name] = a
	return nil
}

// newFlows makes a connection after the other.
func (l *loaded) newFlows() {
	l.each(20*time.Millisecond, "flows", func(n int) error {
		return l.w.get(netip.MustParseAddr([]string{outsideAt, outsideAt6}[n%2]))
	})
}

// finish ends the load and fails the test for all that was lost.
func (l *loaded) finish(t *testing.T) {
	t.Helper()
	close(l.stop)
	l.wg.Wait()
	l.flows.finish(t)
	for kind, n := range l.counts {
		t.Logf("%d %s", n.Load(), kind)
	}
	slices.Sort(l.wrong)
	for _, s := range l.wrong[:min(len(l.wrong), 10)] {
		t.Error(s)
	}
	if n := len(l.wrong); n > 10 {
		t.Errorf("and %d more", n-10)
	}
}
