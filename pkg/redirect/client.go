package redirect

import (
	"encoding/binary"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/tproxyd/tproxyd/pkg/flow"
	"golang.org/x/sys/unix"
)

// Client is what a Block asks of who a packet is from, beyond its source and
// interface: all that it names, and one of what each list has. The zero value
// asks nothing.
type Client struct {
	Marks []PacketMark // as the packet has it, whatever our bits are; empty: any
	MACs  []flow.MAC   // of the neighbour that it came from; empty: any

	// Of the process that has the socket, so that only this host's own packets
	// match; empty: any.
	UIDs, GIDs []uint32
	Cgroups    []string // paths in cgroup v2 or ends of paths, see Who; and what is below
}

// PacketMark is a value of some bits of the packet mark. One with a bit of ours in
// Value is no packet's.
type PacketMark struct{ Value, Mask uint32 }

// conditions returns what each packet of the client meets, and the alternatives of
// which it meets one; none: nobody can meet them.
func (t *table) conditions(m Marks, c *Client, name func(string) string) (all []statement, alternatives [][]statement) {
	if len(c.UIDs) > 0 {
		all = append(all, ownerIn("skuid", expr.MetaKeySKUID, t.set(idSet(name("uids"), nftables.TypeUID, c.UIDs))))
	}
	if len(c.GIDs) > 0 {
		all = append(all, ownerIn("skgid", expr.MetaKeySKGID, t.set(idSet(name("gids"), nftables.TypeGID, c.GIDs))))
	}
	if len(c.MACs) > 0 {
		all = append(all, macIn(t.set(macSet(name("macs"), c.MACs))))
	}
	alternatives = [][]statement{nil}
	if len(c.Marks) > 0 {
		alternatives = nil
		for _, k := range c.Marks {
			if k.Value&m.Mask == 0 {
				alternatives = append(alternatives, []statement{packetMark(k.Value, k.Mask&^m.Mask)})
			}
		}
	}
	if len(c.Cgroups) > 0 {
		var within [][]statement
		for level, s := range t.cgroupSets(c.Cgroups, name("cg")) {
			within = append(within, []statement{cgroupIn(level, s)})
		}
		alternatives = product(alternatives, within)
	}
	return all, alternatives
}

// product returns each of a followed by each of b.
func product(a, b [][]statement) (ab [][]statement) {
	for _, x := range a {
		for _, y := range b {
			ab = append(ab, slices.Concat(x, y))
		}
	}
	return ab
}

func ownerIn(word string, key expr.MetaKey, s *set) statement {
	return statement{text: "meta " + word + " @" + s.name, exprs: []expr.Any{&expr.Meta{Key: key, Register: reg1}, s.lookup()}}
}

// macIn matches the link-layer source of a packet from an Ethernet.
func macIn(s *set) statement {
	return statement{text: "ether saddr @" + s.name, exprs: append(ethernet(), mac(reg1), s.lookup())}
}

func ethernet() []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyIIFTYPE, Register: reg1}, eq(binary.NativeEndian.AppendUint16(nil, unix.ARPHRD_ETHER))}
}

func mac(register uint32) expr.Any {
	return &expr.Payload{DestRegister: register, Base: expr.PayloadBaseLLHeader, Offset: 6, Len: 6}
}

// packetMark matches some bits of the packet mark.
func packetMark(value, mask uint32) statement {
	return statement{text: fmt.Sprintf("meta mark & 0x%08x == 0x%08x", mask, value), exprs: []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: reg1}, masked(mask, 0), eq(native32(value))}}
}

func cgroupIn(level int, s *set) statement {
	return statement{text: fmt.Sprintf("socket cgroupv2 level %d @%s", level, s.name), exprs: []expr.Any{
		&expr.Socket{Key: expr.SocketKeyCgroupv2, Level: uint32(level), Register: reg1}, s.lookup()}}
}

// idSet holds numbers of users or groups.
func idSet(name string, key nftables.SetDatatype, ids []uint32) *set {
	s := &set{name: name, key: key}
	ids = slices.Compact(slices.Sorted(slices.Values(ids)))
	for _, id := range ids {
		s.elements = append(s.elements, nftables.SetElement{Key: native32(id)})
	}
	s.list = listed(ids, func(id uint32) string { return strconv.FormatUint(uint64(id), 10) })
	return s
}

func macSet(name string, macs []flow.MAC) *set {
	s := &set{name: name, key: nftables.TypeEtherAddr}
	macs = slices.Compact(slices.SortedFunc(slices.Values(macs), func(a, b flow.MAC) int { return slices.Compare(a[:], b[:]) }))
	for _, m := range macs {
		s.elements = append(s.elements, nftables.SetElement{Key: append(m[:], 0, 0)[:6]})
	}
	s.list = listed(macs, flow.MAC.String)
	return s
}

func cgroupSet(name string, groups cgroups) *set {
	s := &set{name: name, key: nftables.TypeCGroupV2}
	for _, c := range groups {
		s.elements = append(s.elements, nftables.SetElement{Key: binary.NativeEndian.AppendUint64(nil, c.id)})
	}
	s.list = listed(groups, func(c cgroup) string { return strconv.Quote(strings.TrimPrefix(c.path, "/")) })
	return s
}

// listed gives values in their text form.
func listed[T any](values []T, text func(T) string) func(func(string) bool) {
	return func(yield func(string) bool) {
		for _, v := range values {
			if !yield(text(v)) {
				return
			}
		}
	}
}
