package redirect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"github.com/tproxyd/tproxyd/pkg/flow"
	"golang.org/x/sys/unix"
)

// What user space decides it must decide by what the kernel saw of the client:
// the mark of the packet and the neighbour that it came from, or the user, group
// and cgroup of the process. All of that is gone when a flow is accepted. So where
// a plan asks for it, the table notes it on the way, in a map with the flow's
// addresses as the key, and Who looks it up.

// Who says that the table notes who a diverted flow or question is from.
type Who struct {
	// Cgroups are those that matter, as in Client: absolute paths, or ends of
	// paths, as "web.service". Of a process the innermost of them is noted.
	Cgroups []string
}

const (
	whoTime = 10 * time.Second // how long a note stays: as long as a flow can wait to be accepted
	whoSize = 1 << 17          // notes at most
	noID    = 1<<32 - 1        // of a socket that no process has
)

// set is the map of a family. Its data are a user, a group, the mark, and the
// number of a cgroup or a link-layer address. What a cgroup that was noted says
// depends on which are named, so for others it is another map.
func (w *Who) set(f family) *set {
	h := fnv.New32a()
	for _, c := range w.Cgroups {
		fmt.Fprintln(h, c)
	}
	return &set{name: fmt.Sprintf("who%s_%08x", f.digit(), h.Sum32()), timeout: true, dynamic: true, size: whoSize,
		key:  concat(addrType(f), addrType(f), nftables.TypeInetProto, nftables.TypeInetService, nftables.TypeInetService),
		data: concat(nftables.TypeUID, nftables.TypeGID, nftables.TypeMark, nftables.TypeCGroupV2)}
}

// Registers of 32 bits are numbered from here on.
const reg32 = 8

// noteKey loads the key of a packet into the registers from the first on, and
// returns the first one behind it.
func noteKey(f family) (e []expr.Any, next uint32) {
	src, dst := address(f, true).(*expr.Payload), address(f, false).(*expr.Payload)
	words := src.Len / 4
	src.DestRegister, dst.DestRegister = reg32, reg32+words
	next = reg32 + 2*words
	return []expr.Any{src, dst, &expr.Meta{Key: expr.MetaKeyL4PROTO, Register: next},
		transport(0, 2, next+1), transport(2, 2, next+2)}, next + 3
}

// note is the rule that writes a note, with what loads its data, from the first
// register behind the key on.
func (w *Who) note(f family, first []statement, load func(data uint32) []expr.Any, text string) rule {
	key, data := noteKey(f)
	name := w.set(f).name
	e := slices.Concat(familyExprs(f), key, load(data),
		[]expr.Any{&expr.Dynset{SrcRegKey: reg32, SrcRegData: data, SetName: name, Operation: uint32(unix.NFT_DYNSET_OP_UPDATE), Timeout: whoTime}})
	update := statement{exprs: e, text: fmt.Sprintf("update @%s { %s timeout %s : %s }", name, noteText(f), nftDuration(whoTime), text)}
	return append(slices.Clone(first), update, verdict("return", expr.VerdictReturn, ""))
}

// forget is the rule that takes away what is noted of an earlier connection with
// the same addresses and ports, as an update would not. (Datagrams that have both
// alike are of one flow, whoever sends them.)
func (w *Who) forget(f family) rule {
	key, _ := noteKey(f)
	name := w.set(f).name
	const dynsetDelete = 2 // NFT_DYNSET_OP_DELETE; of a map it wants a register for data, too
	e := slices.Concat(familyExprs(f), key, []expr.Any{&expr.Dynset{SrcRegKey: reg32, SrcRegData: reg32, SetName: name, Operation: dynsetDelete}})
	return rule{proto(tcp), {exprs: e, text: fmt.Sprintf("delete @%s { %s }", name, noteText(f))}}
}

func noteText(f family) string {
	return f.word() + " saddr . " + f.word() + " daddr . meta l4proto . th sport . th dport"
}

// notes writes the chains that note who a packet is from: this host's own, and one
// that came by an interface. If the map is full there is no note.
func (t *table) notes(p *Plan) {
	if p.Who == nil {
		return
	}
	ids := func(data uint32) []expr.Any {
		return []expr.Any{&expr.Meta{Key: expr.MetaKeySKUID, Register: data}, &expr.Meta{Key: expr.MetaKeySKGID, Register: data + 1},
			&expr.Meta{Key: expr.MetaKeyMARK, Register: data + 2}}
	}
	noIDs := func(data uint32) []expr.Any {
		return []expr.Any{&expr.Immediate{Register: data, Data: native32(noID)}, &expr.Immediate{Register: data + 1, Data: native32(noID)},
			&expr.Meta{Key: expr.MetaKeyMARK, Register: data + 2}}
	}
	nothing := func(data uint32) expr.Any { return &expr.Immediate{Register: data + 3, Data: make([]byte, 8)} }
	fs := []family{ip4, ip6}
	for _, f := range fs {
		t.sets = append(t.sets, p.Who.set(f))
	}
	if p.Local {
		c := t.chain("who_own")
		c.rules = append(c.rules, p.Who.forget(ip4), p.Who.forget(ip6))
		for level, s := range t.cgroupSets(p.Who.Cgroups, "who_cg") {
			for _, f := range fs {
				c.rules = append(c.rules, p.Who.note(f, []statement{cgroupIn(level, s)}, func(data uint32) []expr.Any {
					return append(ids(data), &expr.Socket{Key: expr.SocketKeyCgroupv2, Level: uint32(level), Register: data + 3})
				}, fmt.Sprintf("meta skuid . meta skgid . meta mark . socket cgroupv2 level %d", level)))
			}
		}
		for _, f := range fs {
			c.rules = append(c.rules, p.Who.note(f, nil, func(data uint32) []expr.Any { return append(ids(data), nothing(data)) }, "meta skuid . meta skgid . meta mark . 0"))
		}
		for _, f := range fs {
			c.rules = append(c.rules, p.Who.note(f, nil, func(data uint32) []expr.Any { return append(noIDs(data), nothing(data)) }, fmt.Sprintf("%d . %[1]d . meta mark . 0", uint32(noID))))
		}
	}
	if len(p.Interfaces) > 0 {
		c := t.chain("who_lan")
		c.rules = append(c.rules, p.Who.forget(ip4), p.Who.forget(ip6))
		for _, f := range fs {
			c.rules = append(c.rules, p.Who.note(f, []statement{{text: "meta iiftype ether", exprs: ethernet()}}, func(data uint32) []expr.Any {
				return append(noIDs(data), nothing(data), mac(data+3))
			}, fmt.Sprintf("%d . %[1]d . meta mark . ether saddr", uint32(noID))))
		}
		for _, f := range fs {
			c.rules = append(c.rules, p.Who.note(f, nil, func(data uint32) []expr.Any { return append(noIDs(data), nothing(data)) }, fmt.Sprintf("%d . %[1]d . meta mark . 0", uint32(noID))))
		}
	}
}

// noteOwn and noteLan have a packet noted that is on its way to us.
func (t *table) noteOwn(p *Plan, c *chain, which ...statement) {
	if p.Who != nil && p.Local {
		c.add(append(which, jump("who_own"))...)
	}
}

func (t *table) noteLan(p *Plan, c *chain) {
	if p.Who != nil && len(p.Interfaces) > 0 {
		c.add(jump("who_lan"))
	}
}

// ErrNotNoted says that nobody knows who a flow is from: the kernel has not seen
// it since it was told to take notes, or has no room for more.
var ErrNotNoted = errors.New("redirect: who the flow is from was not noted")

// notebook reads what the table has noted, by a socket of its own, so that no flow
// waits for a change of the rules.
type notebook struct {
	mu     sync.Mutex
	nf     *nfnl // nil: closed
	who    *Who  // of the plan in force
	marks  Marks
	groups cgroups
}

// Who completes a flow that was diverted, or the client of a question, by what the
// kernel has seen of it: Mark, MAC and Owner. Network, Src, Dst and InIf have to be
// there; an empty InIf is this host. The plan in force must have a Who.
func (r *Redirect) Who(f *flow.Flow) error {
	proto := tcp
	if f.Network == flow.UDP {
		proto = udp
	}
	src, dst := f.Src.Addr().Unmap().WithZone(""), f.Dst.Addr().Unmap().WithZone("")
	if !src.IsValid() || src.Is4() != dst.Is4() {
		return ErrNotNoted
	}
	b := r.notebook
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.nf == nil || b.who == nil {
		return ErrNotNoted
	}
	data, err := b.nf.lookup(b.who.set(familyOf(src)).name, noteKeyOf(src, dst, proto, f.Src.Port(), f.Dst.Port()))
	if err != nil {
		return err
	}
	if len(data) != 20 {
		return ErrNotNoted
	}
	f.Mark = binary.NativeEndian.Uint32(data[8:]) &^ b.marks.Mask
	if f.InIf != "" {
		copy(f.MAC[:], data[12:18])
		return nil
	}
	f.Owner = flow.Owner{Known: true, UID: binary.NativeEndian.Uint32(data), GID: binary.NativeEndian.Uint32(data[4:])}
	f.Owner.Cgroup = b.groups.pathOf(binary.NativeEndian.Uint64(data[12:]))
	return nil
}

// noteKeyOf is the key of a flow, as noteKey loads it.
func noteKeyOf(src, dst netip.Addr, proto l4, sport, dport uint16) []byte {
	b := append(src.AsSlice(), dst.AsSlice()...)
	b = append(b, byte(proto), 0, 0, 0)
	b = append(append(b, big16(sport)...), 0, 0)
	return append(append(b, big16(dport)...), 0, 0)
}

// set says what the notes mean from now on.
func (b *notebook) set(p *Plan, groups cgroups) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.who, b.marks, b.groups = p.Who, p.Marks, groups
}

func (b *notebook) close() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.nf != nil {
		b.nf.close()
		b.nf = nil
	}
}

// lookup returns the data of an element of a map of ours.
func (c *nfnl) lookup(set string, key []byte) (data []byte, err error) {
	list, err := elementList(nftables.SetElement{Key: key})
	if err != nil {
		return nil, err
	}
	err = c.query(elementsMessage(set, list), false, elementsOf(func(e element) { data = slices.Clone(e.data) }))
	if errors.Is(err, unix.ENOENT) {
		return nil, ErrNotNoted
	}
	return data, err
}

// elementsMessage asks for some elements of a set.
func elementsMessage(set string, list []byte) netlink.Message {
	return nfMessage(unix.NFT_MSG_GETSETELEM, 0, stringAttr(unix.NFTA_SET_ELEM_LIST_TABLE, tableName), stringAttr(unix.NFTA_SET_ELEM_LIST_SET, set),
		netlink.Attribute{Type: unix.NFTA_SET_ELEM_LIST_ELEMENTS | unix.NLA_F_NESTED, Data: list})
}

// elementList is a list of one element.
func elementList(e nftables.SetElement) ([]byte, error) {
	ae := netlink.NewAttributeEncoder()
	ae.ByteOrder = binary.BigEndian
	ae.Nested(unix.NFTA_LIST_ELEM, func(ae *netlink.AttributeEncoder) error {
		ae.Nested(unix.NFTA_SET_ELEM_KEY, func(ae *netlink.AttributeEncoder) error {
			ae.Bytes(unix.NFTA_DATA_VALUE, e.Key)
			return nil
		})
		if e.IntervalEnd {
			ae.Uint32(unix.NFTA_SET_ELEM_FLAGS, unix.NFT_SET_ELEM_INTERVAL_END)
		}
		return nil
	})
	return ae.Encode()
}
