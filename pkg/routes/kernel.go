package routes

import (
	"cmp"
	"math/bits"
	"net/netip"
	"slices"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

// Range is a range of addresses of one family, both ends included.
type Range struct {
	From, To netip.Addr
	Rule     *Rule // that decides it; nil: several, which are too many to be told apart
}

// String returns the range as "{10.0.0.0 10.0.0.255}".
func (r Range) String() string { return "{" + r.From.String() + " " + r.To.String() + "}" }

// maxApart is how many ranges of a list are kept apart by their rules, for
// counting; of more, those side by side are one.
const maxApart = 1024

// Block is a run of consecutive rules with the same conditions, as far as a
// packet shows what they ask for. A packet that meets the conditions and whose
// destination is in one of the lists is decided by it; the lists share no
// address. Rules that ask for a name are not in any Block.
type Block struct {
	Network Protocols
	Ports   []PortRange // empty: any
	Client              // who the packet is from

	// Final: it decides about addresses of DirectScopes too, for it stands
	// before every name that is DIRECT.
	Final bool

	Direct, Proxy    []Range
	Deny, ICMP, Drop []Range // by how they are refused, see Reject

	Rules []*Rule // those that it was made of
}

// Kernel returns what a packet filter can decide: for every flow without a
// name the first Block that decides gives the action that the rule of Match has
// for the flow's network. The last Block is the DEFAULT's, so one always does.
func (t *Table) Kernel() []Block {
	var blocks []Block
	for i := 0; i < len(t.rules); {
		first := t.rules[i]
		var run []*Rule
		for ; i < len(t.rules) && (len(t.rules[i].dest.prefixes) == 0 || t.sameConditions(first, t.rules[i])); i++ {
			if len(run) == 0 {
				first = t.rules[i]
			}
			if len(t.rules[i].dest.prefixes) > 0 {
				run = append(run, t.rules[i])
			}
		}
		if len(run) > 0 {
			blocks = append(blocks, t.makeBlocks(run)...)
		}
	}
	return blocks
}

// final tells whether a rule stands before every rule that makes a name DIRECT.
func (t *Table) final(r *Rule) bool { return r.Index < t.firstDirectName }

func (t *Table) sameConditions(a, b *Rule) bool {
	return t.final(a) == t.final(b) && a.Protocols == b.Protocols && slices.Equal(a.Ports, b.Ports) && a.Client.equal(&b.Client)
}

// makeBlocks makes the Block of a run of rules. If udp= has one of them do
// otherwise with UDP, a Block for UDP alone stands in front: it decides every
// address that the run does, so that the other one is left with all else.
func (t *Table) makeBlocks(run []*Rule) []Block {
	b := makeBlock(run, flow.TCP)
	b.Final = t.final(run[0])
	if b.Network == OnlyTCP || !slices.ContainsFunc(run, func(r *Rule) bool { return r.ActionFor(flow.UDP) != r.Action }) {
		return []Block{b}
	}
	udp := makeBlock(run, flow.UDP)
	udp.Network, udp.Final = OnlyUDP, b.Final
	return []Block{udp, b}
}

// makeBlock lays the prefixes of the rules on the line of addresses and gives
// each piece to the first rule that has it, for what it does with a network.
func makeBlock(rules []*Rule, network flow.Network) Block {
	r := rules[0]
	b := Block{Network: r.Protocols, Ports: r.Ports, Client: r.Client, Rules: rules}
	for _, is4 := range []bool{true, false} {
		n := 0
		for _, r := range rules {
			n += len(r.dest.prefixes)
		}
		spans := make([]span, 0, n)
		for _, r := range rules {
			for _, p := range r.dest.prefixes {
				if p.Addr().Is4() == is4 {
					spans = append(spans, span{p.Addr(), lastOf(p), r})
				}
			}
		}
		sweep(spans, func(from, to netip.Addr, r *Rule) {
			list := b.list(r, network)
			if last := len(*list) - 1; last >= 0 && (*list)[last].To.Next() == from && ((*list)[last].Rule == r || list == &b.Proxy) {
				(*list)[last].To = to
				return
			}
			if *list == nil {
				*list = make([]Range, 0, n) // there can be more, but seldom are
			}
			*list = append(*list, Range{from, to, r})
		})
	}
	for _, list := range []*[]Range{&b.Direct, &b.Deny, &b.ICMP, &b.Drop} {
		if len(*list) > maxApart {
			*list = together(*list)
		}
	}
	return b
}

// list returns where what a rule decides of a network belongs.
func (b *Block) list(r *Rule, network flow.Network) *[]Range {
	switch a := r.ActionFor(network); {
	case a == Direct:
		return &b.Direct
	case a != Deny:
		return &b.Proxy
	case r.Action == Deny && r.Reject == RejectICMP:
		return &b.ICMP
	case r.Action == Deny && r.Reject == RejectDrop:
		return &b.Drop
	}
	return &b.Deny
}

// together makes one range of those that are side by side, whoever decides them, but
// for rules that say log.
func together(list []Range) []Range {
	one := true
	for _, r := range list {
		one = one && r.Rule == list[0].Rule
	}
	out := list[:0]
	for _, r := range list {
		apart := r.Rule.Log
		if last := len(out) - 1; last >= 0 && out[last].To.Next() == r.From && (out[last].Rule == r.Rule || !apart && (out[last].Rule == nil || !out[last].Rule.Log)) {
			out[last].To = r.To
			continue
		}
		if !one && !apart {
			r.Rule = nil
		}
		out = append(out, r)
	}
	return out
}

// span is a rule's claim to the addresses of a prefix.
type span struct {
	from, to netip.Addr
	rule     *Rule
}

// sweep calls emit for each piece of the line with the first rule that claims
// it, in order. Of two prefixes one is in the other, or they have nothing in
// common; so those that are open at an address are a stack.
func sweep(spans []span, emit func(from, to netip.Addr, r *Rule)) {
	slices.SortFunc(spans, func(a, b span) int {
		return cmp.Or(a.from.Compare(b.from), b.to.Compare(a.to))
	})
	var open []span     // each with the first rule of those below it and its own
	var from netip.Addr // where the next piece begins; only valid while something is open
	closeUntil := func(to netip.Addr) {
		for len(open) > 0 && (!to.IsValid() || open[len(open)-1].to.Less(to)) {
			top := open[len(open)-1]
			open = open[:len(open)-1]
			if from.IsValid() && !top.to.Less(from) {
				emit(from, top.to, top.rule)
				from = top.to.Next() // invalid at the end of the line, where all that is open ends
			}
		}
	}
	for _, s := range spans {
		closeUntil(s.from)
		if n := len(open); n > 0 {
			top := open[n-1]
			if from.Less(s.from) {
				emit(from, s.from.Prev(), top.rule)
			}
			if top.rule.Index < s.rule.Index {
				s.rule = top.rule
			}
		}
		from = s.from
		open = append(open, s)
	}
	closeUntil(netip.Addr{})
}

// lastOf returns the last address of a prefix.
func lastOf(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// prefixesOf returns the prefixes that a range consists of: at most two for
// each bit of an address.
func prefixesOf(r Range) (list []netip.Prefix) {
	for from := r.From; ; {
		n := from.BitLen() - trailingZeros(from)
		p := netip.PrefixFrom(from, n)
		for r.To.Less(lastOf(p)) {
			n++
			p = netip.PrefixFrom(from, n)
		}
		list = append(list, p)
		last := lastOf(p)
		if last == r.To {
			return list
		}
		from = last.Next()
	}
}

// trailingZeros counts the zero bits at the end of an address.
func trailingZeros(a netip.Addr) int {
	n := 0
	b := a.AsSlice()
	for i := len(b) - 1; i >= 0; i-- {
		if b[i] != 0 {
			return n + bits.TrailingZeros8(b[i])
		}
		n += 8
	}
	return n
}
