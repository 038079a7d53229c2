package routes

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

// Place is where a packet filter decides a flow.
type Place struct {
	Block int      `json:"block"` // from 0, in the order of Table.Kernel
	List  string   `json:"list"`  // direct, proxy; deny, icmp, drop: how it is refused
	Rules []string `json:"rules"` // the first and the last that the block was made of
}

// String names the block as the packet filter's table does.
func (p *Place) String() string {
	return fmt.Sprintf("%d, made of %s: its set b%d_%s…, or what its other sets leave", p.Block, strings.Join(p.Rules, " to "), p.Block, p.List)
}

// Place returns the block of Kernel that decides a flow to an address. It is
// the slow way, for explanations: all blocks are made.
func (t *Table) Place(f flow.Flow) Place {
	addr := f.Dst.Addr().Unmap().WithZone("")
	for n, b := range t.Kernel() {
		if !b.meets(&f) {
			continue
		}
		for _, l := range b.lists() {
			if !slices.ContainsFunc(l.ranges, func(r Range) bool { return !addr.Less(r.From) && !r.To.Less(addr) }) {
				continue
			}
			return Place{n, l.name, b.rules()}
		}
	}
	return Place{Block: -1} // the last block has every address
}

// addresses are the ranges of a block with a word for what becomes of them.
type addresses struct {
	name   string
	ranges []Range
}

func (b *Block) lists() []addresses {
	return []addresses{{"direct", b.Direct}, {"deny", b.Deny}, {"icmp", b.ICMP}, {"drop", b.Drop}, {"proxy", b.Proxy}}
}

// rules names the first and the last rule that the block was made of.
func (b *Block) rules() []string {
	list := []string{b.Rules[0].Position()}
	if last := b.Rules[len(b.Rules)-1].Position(); last != list[0] {
		list = append(list, last)
	}
	return list
}

// String says what a packet must be for the block to be asked, how many ranges
// of addresses each of its lists has, and which rules it was made of.
func (b *Block) String() string {
	var asks, has []string
	if b.Network != AnyProtocol {
		asks = append(asks, [...]string{OnlyTCP: "proto=tcp", OnlyUDP: "proto=udp"}[b.Network])
	}
	if len(b.Ports) > 0 {
		asks = append(asks, "port "+joined(b.Ports, PortRange.String))
	}
	asks = append(asks, b.Client.words()...)
	if asks == nil {
		asks = []string{"every packet"}
	}
	for _, l := range b.lists() {
		if len(l.ranges) > 0 {
			has = append(has, fmt.Sprintf("%d %s", len(l.ranges), l.name))
		}
	}
	return strings.Join(asks, " ") + ": " + strings.Join(has, ", ") + "; of " + strings.Join(b.rules(), " to ")
}

// words are the options that ask for such a client.
func (c *Client) words() (list []string) {
	add := func(key, value string) {
		if value != "" {
			list = append(list, key+"="+value)
		}
	}
	add("src", joined(c.Src, netip.Prefix.String))
	add("if", joined(c.Ifs, strings.Clone))
	add("mark", joined(c.Marks, Mark.String))
	add("mac", joined(c.MACs, flow.MAC.String))
	add("uid", joined(c.UIDs, idText))
	add("gid", joined(c.GIDs, idText))
	add("cgroup", joined(c.Cgroups, strings.Clone))
	return list
}

// meets tells whether a flow meets a block's conditions.
func (b *Block) meets(f *flow.Flow) bool {
	r := Rule{Protocols: b.Network, Ports: b.Ports}
	return r.matchesPort(f) && b.matchesClient(f)
}
