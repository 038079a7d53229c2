package redirect

import (
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A flow: its first datagram comes to the listener, the later ones to its
// socket; those of others do not.
func TestFlowOfDatagrams(t *testing.T) {
	everywhere(t, func(t *testing.T, w *world, p *Plan, from *netns, came <-chan arrival) {
		for _, to := range udpDestinations {
			dst := netip.MustParseAddrPort(to)
			c, other := w.dialUDP(from, to), w.dialUDP(from, to)
			c.say("one")
			a := w.expectText(came, "one")
			index := 1
			if !p.Local {
				index = 11
			}
			if a.d.Dst != dst || a.d.Src != c.addr() || a.d.IfIndex != index {
				t.Errorf("%s: it came from %s to %s by interface %d", to, a.d.Src, a.d.Dst, a.d.IfIndex)
			}
			w.reply(a.d, "answer one")
			c.hear("answer one")

			f := w.flowSocket(a.d.Src, a.d.Dst)
			c.say("two")
			f.hear("two")
			f.say("answer two")
			c.hear("answer two")
			other.say("other")
			w.expectText(came, "other") // and two has not come here
			c.say("three")
			f.hear("three")
			w.reply(a.d, "answer three") // by whichever way
			c.hear("answer three")
			long := strings.Repeat("x", 5000)
			f.say(long)
			c.hear(long)
			c.say(long)
			f.hear(long)

			// Conntrack can lose it, and see our answer first then.
			w.forgetAll()
			f.say("again")
			c.hear("again")
			c.say("four")
			f.hear("four")

			f.closed()
			c.say("five")
			w.expectText(came, "five")
		}
	})
}

// A client that is gone answers by an error, which the flow's socket sees.
func TestClientGone(t *testing.T) {
	everywhere(t, func(t *testing.T, w *world, p *Plan, from *netns, came <-chan arrival) {
		if p.Local {
			from.run("sysctl -qw net.ipv4.fwmark_reflect=1 net.ipv6.fwmark_reflect=1")
		}
		for _, to := range udpDestinations {
			for _, forget := range []bool{false, true} {
				c := w.dialUDP(from, to)
				c.say("one")
				a := w.next(came)
				f := w.flowSocket(a.d.Src, a.d.Dst)
				c.closed()
				if forget {
					w.forgetAll()
				}
				f.say("late")
				f.hear("ECONNREFUSED")
			}
		}
	})
}

// The rules decide each datagram anew, whatever was before.
func TestRulesDecideDatagrams(t *testing.T) {
	everywhere(t, func(t *testing.T, w *world, p *Plan, from *netns, came <-chan arrival) {
		proxied := p.Blocks
		for _, to := range udpDestinations[:2] {
			w.server.run("nft reset counters")
			c := w.dialUDP(from, to)
			c.say("one")
			a := w.next(came)
			f := w.flowSocket(a.d.Src, a.d.Dst)
			c.say("two")
			f.hear("two")
			for range 2 {
				p.Blocks = []Block{{Deny: ranges("203.0.113.0/24", "2001:db8:a::/48")}, {Proxy: ranges("0.0.0.0/0", "::/0")}}
				w.apply(*p)
				c.say("denied")
				c.hear(prohibited(a.d.Dst))
				p.Blocks = proxied
				w.apply(p.Closed())
				c.say("refused")
				c.hear("ECONNREFUSED")
				w.leaked()
				w.apply(*p)
				c.say("proxied")
				f.hear("proxied") // and nothing before
				f.say("answer")
				c.hear("answer")
			}
			p.Blocks = []Block{{Direct: ranges("203.0.113.0/24", "2001:db8:a::/48")}}
			w.apply(*p)
			f.closed()
			c.say("direct")
			c.hear("server direct")
			p.Blocks = proxied
			w.apply(*p)
			c.say("proxied")
			w.expectText(came, "proxied")
		}
		w.server.run("nft reset counters") // it has seen what was DIRECT
	})
}

// Where an answer of ours was the first packet of a flow that conntrack saw, the
// client's are no replies of a flow that was opened from outside, once refused or
// denied neither.
func TestAnswerFirst(t *testing.T) {
	everywhere(t, func(t *testing.T, w *world, p *Plan, from *netns, came <-chan arrival) {
		denying := *p
		denying.Blocks = []Block{{Deny: ranges("0.0.0.0/0", "::/0")}}
		for _, plan := range []Plan{denying, p.Closed()} {
			for _, to := range udpDestinations[:2] {
				c := w.dialUDP(from, to)
				c.say("one")
				a := w.next(came)
				f := w.flowSocket(a.d.Src, a.d.Dst)
				w.forgetAll()
				f.say("answer")
				c.hear("answer")
				w.apply(plan)
				want := "ECONNREFUSED"
				if plan.Ports.UDP != 0 {
					want = prohibited(a.d.Dst)
				}
				for range 3 {
					c.say("no more")
					c.hear(want)
				}
				w.leaked()
				w.apply(*p)
				c.say("again")
				f.hear("again")
			}
		}
	})
}

// prohibited is the error of what is denied.
func prohibited(dst netip.AddrPort) string {
	if dst.Addr().Is6() {
		return "EACCES"
	}
	return "EHOSTUNREACH"
}

// Nobody there: refused, within a moment. TestDeadListener has the rest.
func TestListenerGone(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := w.start(worldPlan())
	came := w.gather(&p, 2)
	for _, to := range udpDestinations {
		c := w.dialUDP(w.client, to)
		c.say("one")
		w.expectText(came, "one")
	}
	w.udp.Close()
	for _, to := range udpDestinations {
		for began := time.Now(); ; {
			c := w.dialUDP(w.client, to)
			c.say("two")
			if got := c.heardIn(200 * time.Millisecond); got == "ECONNREFUSED" {
				break
			} else if time.Since(began) > wait { // a child of another test has it for a moment
				t.Fatalf("%s: %s", to, got)
			}
		}
	}
	w.leaked()
}

// Without a port for datagrams they are refused, and all else is as it was.
func TestNoPortForDatagrams(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := worldPlan()
	p.Local = true
	p = w.start(p)
	p.Ports.UDP = 0
	w.apply(p)
	for _, from := range []*netns{w.client, w.gateway} {
		w.expect(from,
			asked{"udp 203.0.113.5:7000", "ECONNREFUSED"}, asked{"udp [2001:db8:a::5]:7000", "ECONNREFUSED"},
			asked{"udp 198.18.3.4:7000", "ECONNREFUSED"}, asked{"udp [fd74:7072:6f78::5]:7000", "ECONNREFUSED"},
			asked{"udp 198.51.100.5:7000", "server hello"})
	}
	w.expect(w.client, asked{"tcp 203.0.113.5:80", "proxy 203.0.113.5:80 lan"}, asked{"udp 203.0.113.5:53", "dns 203.0.113.5:53 lan hello"})
	w.expect(w.gateway, asked{"tcp 203.0.113.5:80", "proxy 203.0.113.5:80 lo"}, asked{"udp 203.0.113.5:53", "dns 203.0.113.5:53 lo hello"})
	w.leaked()
}

// All that a client's socket sends comes to one shard, and the shards share the
// clients.
func TestShards(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := w.start(worldPlan())
	came := w.gather(&p, 2)
	for _, dst := range [][]string{{"203.0.113.5:7000", "203.0.113.77:443", "198.18.3.4:7"}, {"[2001:db8:a::5]:7000", "[2001:db8:a::77]:443", "[fd74:7072:6f78::5]:7"}} {
		clients := map[int]int{} // of each shard
		for range 24 {
			var c net.PacketConn
			var err error
			w.client.do(func() { c, err = net.ListenPacket("udp", ":0") })
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			var shards []int
			for _, to := range dst {
				if _, err := c.WriteTo([]byte(to), net.UDPAddrFromAddrPort(netip.MustParseAddrPort(to))); err != nil {
					t.Fatal(err)
				}
				a := w.expectText(came, to)
				if a.d.Dst.String() != to {
					t.Errorf("%s came for %s", to, a.d.Dst)
				}
				shards = append(shards, a.shard)
			}
			if len(slices.Compact(shards)) != 1 {
				t.Errorf("what one socket sent came to more than one shard: %v", shards)
			}
			clients[shards[0]]++
		}
		if len(clients) != 2 {
			t.Errorf("the shards have %v clients", clients)
		}
	}
}

// A service of this host on all addresses has its port to itself; the flow goes
// on by the listener.
func TestPortOfService(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := w.start(worldPlan())
	came := w.gather(&p, 1)
	var service net.PacketConn
	var err error
	w.gateway.do(func() { service, err = net.ListenPacket("udp", ":7000") })
	if err != nil {
		t.Fatal(err)
	}
	defer service.Close()
	c := w.dialUDP(w.client, udpDestinations[0])
	c.say("one")
	a := w.expectText(came, "one")
	w.gateway.do(func() { _, err = testMarks.ConnectUDP(a.d.Src, a.d.Dst) })
	if !errors.Is(err, unix.EADDRINUSE) {
		t.Fatalf("the port is taken, and the error is %v", err)
	}
	w.reply(a.d, "answer")
	c.hear("answer")
	c.say("two")
	w.expectText(came, "two")
	w.gateway.do(func() { _, err = testMarks.ConnectUDP(a.d.Src, netip.MustParseAddrPort(udpDestinations[1])) })
	if !errors.Is(err, unix.EAFNOSUPPORT) {
		t.Errorf("a flow of two families: %v", err)
	}
}
