package netns_test

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// Topology: world, with danted on socks1. The client and the gateway itself
// send datagrams to services of the outside, which tell whom they saw:
//
//	client ---> gateway --tproxy--> tproxyd ==UDP ASSOCIATE==> danted --> outside:7, 1111, 2222
//	gateway's own --output--> lo --^

func TestUDP(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.dante(t)
	w.outside.udpServices(t, outsideAt, outsideAt6)
	d := serve(t, w.gateway, settings{local: true, routes: "SERVER one 198.51.100.11\nSOCKD5 @=one *\n"})
	w.observe(t)
	for _, h := range []*host{w.client, w.gateway} {
		for _, test := range []struct{ to, seen string }{{outsideAt, socks1Out}, {outsideAt6, socks1Out6}} {
			t.Run(h.name+" "+test.to, func(t *testing.T) {
				to := netip.MustParseAddr(test.to)
				t.Run("echo", func(t *testing.T) {
					c := h.connected(t, net.JoinHostPort(test.to, "7"))
					for _, n := range []int{1, 100, 1200, 1472, 4000, 9000, 60000} {
						echoed(t, c, n)
					}
				})
				t.Run("one mapping", func(t *testing.T) {
					c := h.socket(t, test.to)
					saw := map[string]bool{}
					for _, port := range []uint16{1111, 2222, 1111, 2222} {
						b, err := sayTo(c, netip.AddrPortFrom(to, port), []byte("who"), 5*time.Second)
						if err != nil {
							t.Fatalf("port %d: %v", port, err)
						}
						saw[string(b)] = true
					}
					if len(saw) != 1 {
						t.Errorf("two destinations saw one socket as %v", saw)
					}
					for s := range saw {
						if a := netip.MustParseAddrPort(s).Addr().String(); a != test.seen {
							t.Errorf("the outside saw %s, want %s", a, test.seen)
						}
					}
				})
				t.Run("third party", func(t *testing.T) { thirdParty(t, w, h, to) })
			})
		}
	}
	if n, who := w.leaked(t); n != 0 {
		t.Errorf("%d packets leaked:\n%s", n, who)
	}
	if n := d.metric(t, `tproxyd_udp_dropped_total{reason="stranger"}`); n != 0 {
		t.Errorf("%v datagrams were dropped", n)
	}
}

// thirdParty: who was not asked may answer, from the port and, to a socket that
// hears everybody, as the one who it is.
func thirdParty(t *testing.T, w *world, h *host, to netip.Addr) {
	other := w.outside.answerUDP(t, netip.AddrPortFrom(to, 0).String(), echoUDP)
	relayed := w.outside.answerUDP(t, netip.AddrPortFrom(to, 0).String(), func(b []byte, from netip.AddrPort) []byte {
		other.WriteToUDPAddrPort(append([]byte("other "), b...), from)
		return append([]byte("self "), b...)
	})
	at := func(c *net.UDPConn) netip.AddrPort { return c.LocalAddr().(*net.UDPAddr).AddrPort() }
	c := h.socket(t, to.String())
	for round := range 3 { // the later ones by sockets of the flows' own
		text := fmt.Sprint("round ", round)
		c.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err := c.WriteToUDPAddrPort([]byte(text), at(relayed)); err != nil {
			t.Fatal(err)
		}
		got := map[string]netip.AddrPort{}
		buf := make([]byte, 100)
		for range 2 {
			n, from, err := c.ReadFromUDPAddrPort(buf)
			if err != nil {
				t.Fatalf("round %d, after %v: %v", round, got, err)
			}
			got[string(buf[:n])] = netip.AddrPortFrom(from.Addr().Unmap(), from.Port())
		}
		if got["self "+text] != at(relayed) || got["other "+text] != at(other) {
			t.Errorf("round %d: %v, want answers from %v and %v", round, got, at(relayed), at(other))
		}
	}
	// Asked in turn, the third party sees the same client.
	b, err := sayTo(c, at(other), []byte("hello"), 5*time.Second)
	if err != nil || string(b) != "hello" {
		t.Errorf("the third party, asked itself: %q %v", b, err)
	}
}

// TestUDPTimeout: a rule's own limit of inactivity ends its flows, and no others.
func TestUDPTimeout(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.dante(t)
	w.outside.udpServices(t, outsideAt, outsideAt6)
	d := serve(t, w.gateway, settings{routes: "SERVER one 198.51.100.11\nSOCKD5 @=one " + outsideAt + " timeout=3s\nSOCKD5 @=one *\n"})
	for _, to := range []string{outsideAt, outsideAt6} {
		c := w.client.connected(t, net.JoinHostPort(to, "7"))
		echoed(t, c, 100)
	}
	of := func(to string) bool { return strings.Contains(d.ask(t, "/flows"), net.JoinHostPort(to, "7")) }
	eventually(t, 30*time.Second, "the end of the flow with timeout=", func() bool { return !of(outsideAt) })
	if !of(outsideAt6) {
		t.Error("the other flow has ended too")
	}
}

// TestUDPNames: a name's datagrams go to whatever the SOCKS server takes it
// for, and come back from the synthetic address.
func TestUDPNames(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.dante(t)
	w.outside.udpServices(t, outsideAt, outsideAt6)
	w.outsideDNS.add(t, "v4.example.net. 60 IN A "+outsideAt, "v6.example.net. 60 IN AAAA "+outsideAt6)
	serve(t, w.gateway, settings{local: true, routes: "SERVER one 198.51.100.11\nSOCKD5 @=one *\n"})
	w.observe(t)
	for _, h := range []*host{w.client, w.gateway} {
		for _, test := range []struct {
			name  string
			qtype uint16
		}{
			{"www.example.org", dns.TypeA}, {"www.example.org", dns.TypeAAAA},
			{"v4.example.net", dns.TypeAAAA}, {"v6.example.net", dns.TypeA}, // one family here, the other there
		} {
			a := h.mustLookup(t, insideNS, test.name, test.qtype)
			if !pool4.Contains(a) && !pool6.Contains(a) {
				t.Fatalf("%s is %v", test.name, a)
			}
			c := h.connected(t, netip.AddrPortFrom(a, 7).String())
			for _, n := range []int{1, 1200, 9000} {
				echoed(t, c, n)
			}
		}
	}

	// Two names on one port, which are one machine there, from one socket: each
	// answers as itself.
	c := w.client.socket(t, outsideAt)
	for round := range 3 {
		for i := range 2 {
			a := w.client.mustLookup(t, insideNS, fmt.Sprintf("n%d.example.org", i), dns.TypeA)
			text := fmt.Sprint(round, i)
			if b, err := sayTo(c, netip.AddrPortFrom(a, 7), []byte(text), 5*time.Second); err != nil || string(b) != text {
				t.Errorf("n%d.example.org: %q %v, want %q", i, b, err, text)
			}
		}
	}
	if n, who := w.leaked(t); n != 0 {
		t.Errorf("%d packets leaked:\n%s", n, who)
	}
	// A synthetic address that no name owns is refused.
	for _, a := range []string{"198.19.255.1", "fd74:7072:6f78::fff1"} {
		refusedAtOnce(t, a, w.client.connected(t, net.JoinHostPort(a, "7")))
	}
}
