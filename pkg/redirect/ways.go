package redirect

import (
	"slices"

	"github.com/google/nftables"
)

// take writes the chains that divert. Each ends with a refusal of what it
// would have diverted, and the mark comes before the tproxy: a rule whose
// tproxy finds no socket ends there. The kernel allows a tproxy in prerouting
// only, so take, where output can come too, leaves it to the chain lan: it just
// ends, and lan goes on behind its jump.
func (t *table) take(p *Plan) {
	m := p.Marks
	c := t.chain("taken")
	t.unless(m, "take", "taken")
	c.add(proto(udp), going("taken_udp"))
	t.takenUDP(p)
	if p.Ports.TCP == 0 {
		c.add(going("refuse"))
	} else {
		c.add(protoNot(tcp), going("refuse"))
		if p.Local {
			t.noteOwn(p, c, mark(m, m.Local()))
			c.add(slices.Concat([]statement{mark(m, m.Local()), setCtMark(m, m.Own())}, t.briefly(tcp), []statement{count(countDiverted), accept()})...)
		}
	}

	if p.DNS {
		c := t.chain("dns")
		c.add(append(foreignReply(m), going("direct"))...)
		t.noteLan(p, c)
		c.add(append([]statement{setMark(m, m.Lan())}, t.briefly(tcp, udp)...)...)
		divert(c, udp, p.Ports.DNSUDP, countDNS)
		divert(c, tcp, p.Ports.DNSTCP, countDNS)
		c.add(going("refuse"))
	}
}

// takenUDP writes the chain of datagrams of flows. If one belongs to a flow that
// passed until the rules changed, and its source was translated, the kernel goes
// on to translate it, on its way to a socket of ours too, which would then see a
// client that is none. It is refused, as TCP is reset then; Apply has the kernel
// forget such flows.
func (t *table) takenUDP(p *Plan) {
	m := p.Marks
	c := t.chain("taken_udp")
	if p.Ports.UDP == 0 {
		c.add(going("refuse"))
		return
	}
	c.add(ctMarkNot(m, m.Own()), ctSourceTranslated(), going("refuse"))
	if p.Local {
		t.noteOwn(p, c, mark(m, m.Local()))
		c.add(mark(m, m.Local()), setCtMark(m, m.Own()), count(countDatagrams), accept())
	}
}

// diversion is a protocol and where its flows are diverted to.
type diversion struct {
	proto   l4
	port    uint16
	counter string
}

// diverted returns what is diverted; the rest is refused.
func (p Ports) diverted() (list []diversion) {
	for _, d := range []diversion{{tcp, p.TCP, countDiverted}, {udp, p.UDP, countDatagrams}} {
		if d.port != 0 {
			list = append(list, d)
		}
	}
	return list
}

func divert(c *chain, p l4, port uint16, counter string) {
	if port == 0 {
		return
	}
	for _, f := range []family{ip4, ip6} {
		c.add(isFamily(f), proto(p), tproxy(f, port), count(counter), accept())
	}
}

// ways writes the base chains and what they lead to: the ways in, and the guard
// on the way out.
func (t *table) ways(p *Plan) {
	m := p.Marks
	pre := t.base("prerouting", nftables.ChainTypeFilter, nftables.ChainHookPrerouting)
	post := t.base("postrouting", nftables.ChainTypeFilter, nftables.ChainHookPostrouting)
	t.enclose(p, pre, post)
	if len(p.Interfaces) > 0 {
		t.lan(p)
		for _, i := range p.Interfaces {
			pre.add(iif(i), going("lan"))
		}
	}
	if p.Local {
		pre.add(iif("lo"), mark(m, m.Local()), going("local"))
		t.local(p)
		t.unheard(p)
		t.output(p)
	}
	if len(p.Interfaces) > 0 {
		// A packet has one value, so these have none of those below.
		post.add(mark(m, m.Direct()), accept())
		for _, i := range p.Interfaces {
			post.add(mark(m, 0), oif(i), count(countAnswers), accept())
		}
		post.add(mark(m, 0), accept())
	}
	post.add(mark(m, m.Lan()), oifNot("lo"), count(countGuard), drop())
	post.add(mark(m, m.Local()), oifNot("lo"), count(countGuard), drop())
	// An answer leaves from the address that was asked, and only to where questions
	// come from: if that interface is gone, routing would send it elsewhere. Whose
	// source it is is asked last, since the answer is a look-up.
	elsewhere := []statement{mark(m, m.Own()), oifNot("lo")}
	for _, i := range p.Interfaces {
		elsewhere = append(elsewhere, oifNot(i))
	}
	post.add(append(elsewhere, notFromUs(), count(countGuard), drop())...)
	post.add(mark(m, m.Own()), ctNew(), notFromUs(), setCtMark(m, m.Own()))
	if own := t.briefly(tcp); own != nil && !p.Enclosed {
		post.add(append([]statement{mark(m, m.Own())}, own...)...)
	}
}

func (t *table) lan(p *Plan) {
	m := p.Marks
	c := t.chain("lan")
	c.add(notFirst(), socketTransparent(), setMark(m, m.Lan()), accept())
	// Errors about a flow that ends at us are for its socket, and would tell
	// others of it: "fragmentation needed" above all.
	for _, kind := range []l4{icmp, icmpv6} {
		for _, v := range []uint32{m.Own(), m.Lan()} {
			c.add(icmpType(kind, icmpErrors(kind)...), ctMark(m, v), setMark(m, m.Lan()), accept())
		}
	}
	if p.DNS {
		c.add(dport(udp, 53), going("dns"))
		c.add(dport(tcp, 53), going("dns"))
	}
	c.add(jump("decide"))
	t.noteLan(p, c)
	c.add(append([]statement{setMark(m, m.Lan()), setCtMark(m, m.Own())}, t.briefly(tcp)...)...)
	for _, d := range p.Ports.diverted() {
		divert(c, d.proto, d.port, d.counter)
	}
	c.add(going("refuse"))
}

// local writes the chain of packets that output has marked and routing has
// brought back, by lo.
func (t *table) local(p *Plan) {
	c := t.chain("local")
	c.add(notFirst(), socketTransparent(), accept())
	for _, kind := range []l4{icmp, icmpv6} {
		c.add(icmpType(kind, icmpErrors(kind)...), accept())
	}
	if p.DNS {
		for _, w := range []struct {
			proto l4
			port  uint16
		}{{udp, p.Ports.DNSUDP}, {tcp, p.Ports.DNSTCP}} {
			if w.port != 0 {
				for _, f := range []family{ip4, ip6} {
					c.add(isFamily(f), dport(w.proto, 53), tproxy(f, w.port), count(countDNS), accept())
				}
			}
			c.add(dport(w.proto, 53), going("refuse"))
		}
	}
	for _, d := range p.Ports.diverted() {
		for _, f := range []family{ip4, ip6} {
			c.add(isFamily(f), proto(d.proto), tproxy(f, d.port), accept())
		}
	}
	c.add(going("refuse"))
}

func (t *table) output(p *Plan) {
	m := p.Marks
	c := t.base("output", nftables.ChainTypeRoute, nftables.ChainHookOutput)
	// As in lan: an error about a flow that ends at us is for its socket. With
	// sysctl fwmark_reflect it has the Own mark. What NewRefuser sends is not from
	// this host.
	for _, kind := range []l4{icmp, icmpv6} {
		c.add(icmpType(kind, icmpErrors(kind)...), ctMark(m, m.Own()), fromUs(), setMark(m, m.Local()), accept())
	}
	c.add(mark(m, m.Own()), accept())
	c.add(append(foreignReply(m), accept())...)
	c.add(notFromUs(), accept())
	// A connection that was taken stays taken.
	c.add(proto(tcp), ctMark(m, m.Own()), setMark(m, m.Local()), accept())
	if t.alive {
		c.add(proto(udp), markNot(m, m.Alive()), going("unheard"))
	}
	if p.DNS {
		for _, w := range []struct {
			proto l4
			port  uint16
		}{{udp, p.Ports.DNSUDP}, {tcp, p.Ports.DNSTCP}} {
			if w.port != 0 {
				t.noteOwn(p, c, dport(w.proto, 53))
				c.add(slices.Concat([]statement{dport(w.proto, 53), setMark(m, m.Local())}, t.briefly(w.proto), []statement{accept()})...)
			} else {
				c.add(dport(w.proto, 53), going("refuse"))
			}
		}
	}
	c.add(setMark(m, m.Local()))
	c.add(jump("decide"))
	c.add(going("refuse"))
}
