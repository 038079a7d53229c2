package redirect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// What the kernel remembers of a flow of UDP can be older than the rules that
// decide its next datagram, and be wrong for it: of a flow that passed until
// now, that its source is translated, which would also be done on the way to a
// socket of ours; of one that was diverted until now, that nothing of it is, so
// that it would leave by its own address. So Apply has the kernel forget both.
// Connections need none of it: what is left of them is reset.

// Messages and attributes of ctnetlink (linux/netfilter/nfnetlink_conntrack.h).
const (
	subsysConntrack = 1
	conntrackGet    = 1
	conntrackDelete = 2
	conntrackStats  = 5 // of the namespace

	ctaStatsEntries = 1
	ctaStatsMax     = 2

	ctaTupleOrig  = 1
	ctaTupleReply = 2
	ctaMark       = 8
	ctaID         = 12
	ctaZone       = 18
	ctaFilter     = 25

	ctaTupleIP    = 1
	ctaTupleProto = 2

	ctaProtoNum     = 1
	ctaProtoSrcPort = 2
	ctaProtoDstPort = 3

	ctaFilterOrigFlags = 1
	filterProtoNum     = 1 << 3 // CTA_FILTER_FLAG(CTA_PROTO_NUM)
)

// tracked is a flow as the kernel remembers it.
type tracked struct {
	family     family
	src, dst   netip.AddrPort // as its first packet had them
	translated bool           // its source is
	mark       uint32

	attrs []netlink.Attribute // name it
}

func conntrackMessage(kind int, f family, attrs ...netlink.Attribute) (netlink.Message, error) {
	b, err := netlink.MarshalAttributes(attrs)
	return netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(subsysConntrack<<8 | kind)},
		Data:   append([]byte{byte(f), unix.NFNETLINK_V0, 0, 0}, b...),
	}, err
}

// Tracked is how many flows the kernel remembers of the namespace (conntrack), ours
// among them and each of those twice: as the client's and as that to the server.
// Where there are as many as may be, packets of new flows are dropped. Max is 0 on a
// kernel that does not tell, before Linux 4.18.
type Tracked struct{ Flows, Max int }

// Tracked asks the kernel.
func (r *Redirect) Tracked() (Tracked, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || r.lent {
		return Tracked{}, net.ErrClosed
	}
	t, err := r.nf.tracked()
	if err != nil {
		return Tracked{}, fmt.Errorf("redirect: connection tracking: %w", err)
	}
	return t, nil
}

func (c *nfnl) tracked() (t Tracked, err error) {
	m, err := conntrackMessage(conntrackStats, 0)
	if err != nil {
		return t, err
	}
	return t, c.query(m, false, func(ad *netlink.AttributeDecoder) error {
		for ad.Next() {
			switch ad.Type() {
			case ctaStatsEntries:
				t.Flows = int(ad.Uint32())
			case ctaStatsMax:
				t.Max = int(ad.Uint32())
			}
		}
		return nil
	})
}

// tracksNothing reports whether the kernel remembers no flow of the namespace.
// To look for one it would go through a table that all namespaces share.
func (c *nfnl) tracksNothing() bool {
	t, err := c.tracked()
	return err == nil && t.Flows == 0
}

// trackedUDP gives the flows of UDP of a family to f.
func (c *nfnl) trackedUDP(fam family, f func(*tracked)) error {
	// A kernel that cannot filter returns all; so the protocol is looked at again.
	proto, err := netlink.MarshalAttributes([]netlink.Attribute{{Type: ctaProtoNum, Data: []byte{unix.IPPROTO_UDP}}})
	if err != nil {
		return err
	}
	tuple, err := netlink.MarshalAttributes([]netlink.Attribute{{Type: netlink.Nested | ctaTupleProto, Data: proto}})
	if err != nil {
		return err
	}
	filter, err := netlink.MarshalAttributes([]netlink.Attribute{{Type: ctaFilterOrigFlags, Data: native32(filterProtoNum)}})
	if err != nil {
		return err
	}
	m, err := conntrackMessage(conntrackGet, fam,
		netlink.Attribute{Type: netlink.Nested | ctaTupleOrig, Data: tuple}, netlink.Attribute{Type: netlink.Nested | ctaFilter, Data: filter})
	if err != nil {
		return err
	}
	return c.query(m, true, func(ad *netlink.AttributeDecoder) error {
		t, reply := tracked{family: fam}, tracked{}
		isUDP := false
		for ad.Next() {
			switch ad.Type() {
			case ctaTupleOrig:
				t.attrs = append(t.attrs, netlink.Attribute{Type: netlink.Nested | ctaTupleOrig, Data: ad.Bytes()})
				ad.Nested(func(ad *netlink.AttributeDecoder) error { isUDP = t.tuple(ad); return nil })
			case ctaTupleReply:
				ad.Nested(func(ad *netlink.AttributeDecoder) error { reply.tuple(ad); return nil })
			case ctaMark:
				t.mark = ad.Uint32()
			case ctaID, ctaZone:
				t.attrs = append(t.attrs, netlink.Attribute{Type: ad.Type(), Data: ad.Bytes()})
			}
		}
		if err := ad.Err(); err != nil || !isUDP {
			return err
		}
		t.translated = t.src != reply.dst
		f(&t)
		return nil
	})
}

// tuple reads addresses and ports, and reports whether they are of UDP.
func (t *tracked) tuple(ad *netlink.AttributeDecoder) (isUDP bool) {
	var addrs [2]netip.Addr
	var ports [2]uint16
	for ad.Next() {
		switch ad.Type() {
		case ctaTupleIP:
			ad.Nested(func(ad *netlink.AttributeDecoder) error {
				for ad.Next() { // CTA_IP_V4_SRC, V4_DST, V6_SRC, V6_DST
					a, _ := netip.AddrFromSlice(ad.Bytes())
					addrs[(ad.Type()+1)%2] = a
				}
				return nil
			})
		case ctaTupleProto:
			ad.Nested(func(ad *netlink.AttributeDecoder) error {
				for ad.Next() {
					switch b := ad.Bytes(); {
					case ad.Type() == ctaProtoNum && len(b) == 1:
						isUDP = b[0] == unix.IPPROTO_UDP
					case (ad.Type() == ctaProtoSrcPort || ad.Type() == ctaProtoDstPort) && len(b) == 2:
						ports[ad.Type()-ctaProtoSrcPort] = binary.BigEndian.Uint16(b)
					}
				}
				return nil
			})
		}
	}
	t.src, t.dst = netip.AddrPortFrom(addrs[0], ports[0]), netip.AddrPortFrom(addrs[1], ports[1])
	return isUDP
}

// forgetUDP has the kernel forget the flows of UDP that it would not treat as
// the plan says; a nil plan diverts nothing.
func (r *Redirect) forgetUDP(m Marks, p *Plan) error {
	ours := func(t *tracked) bool { v := t.mark & m.Mask; return v == m.Own() || v == m.Lan() }
	if r.nf.tracksNothing() {
		return nil
	}
	var list []*tracked
	for _, f := range []family{ip4, ip6} {
		err := r.nf.trackedUDP(f, func(t *tracked) {
			if t.translated || ours(t) {
				list = append(list, t)
			}
		})
		if err != nil {
			return fmt.Errorf("redirect: conntrack: %w", err)
		}
	}
	if len(list) == 0 {
		return nil
	}
	v := newVerdicts(p, &r.admitted, time.Now())
	for _, t := range list {
		if ours(t) && !v.stale(t) || !ours(t) && !v.mayDivert(t.src, t.dst) {
			continue
		}
		msg, err := conntrackMessage(conntrackDelete, t.family, t.attrs...)
		if err == nil {
			err = r.nf.query(msg, false, func(*netlink.AttributeDecoder) error { return nil })
		}
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("redirect: conntrack: %w", err)
		}
	}
	return nil
}

// verdicts tells what a plan can make of the datagrams of a flow.
type verdicts struct {
	plan     *Plan
	blocks   []verdictBlock
	admitted map[admission]time.Time
}

// verdictBlock has the lists of a Block, each sorted.
type verdictBlock struct {
	*Block
	direct, proxy, deny [2][]Range // IPv4, IPv6
}

// newVerdicts takes what is admitted from s. A nil plan lets everything pass.
func newVerdicts(p *Plan, s *admissions, now time.Time) *verdicts {
	v := &verdicts{plan: p}
	if p == nil {
		return v
	}
	v.admitted = maps.Clone(s.until)
	maps.DeleteFunc(v.admitted, func(_ admission, until time.Time) bool { return !now.Before(until) })
	for i := range p.Blocks {
		b := verdictBlock{Block: &p.Blocks[i]}
		if b.Networks == TCP {
			continue
		}
		for i, f := range []family{ip4, ip6} {
			b.direct[i], b.deny[i], b.proxy[i] = normal(b.Direct, f), normal(b.Deny, f), normal(b.Proxy, f)
		}
		v.blocks = append(v.blocks, b)
	}
	return v
}

// mayPass and mayDivert tell of a datagram what can become of it. Both are true
// where the interface decides, which the kernel does not remember.
func (v *verdicts) mayPass(src, dst netip.AddrPort) bool { pass, _ := v.of(src, dst); return pass }
func (v *verdicts) mayDivert(src, dst netip.AddrPort) bool {
	_, divert := v.of(src, dst)
	return divert
}

// stale reports whether a flow that was diverted may pass now. If an answer of
// ours was the first packet of it that the kernel saw, it has the client as its
// destination.
func (v *verdicts) stale(t *tracked) bool {
	pass, divert := v.of(t.src, t.dst)
	return pass || !divert && v.mayPass(t.dst, t.src)
}

func (v *verdicts) of(src, dst netip.AddrPort) (pass, divert bool) {
	switch {
	case v.plan == nil:
		return true, false
	case v.plan.DNS && dst.Port() == 53:
		return false, v.plan.Ports.DNSUDP != 0
	}
	ours := v.plan.Ports.UDP != 0
	for _, s := range v.plan.Synthetic {
		if s.Contains(dst.Addr()) {
			return false, ours
		}
	}
	let := false
	for _, a := range []admission{{addr: dst.Addr()}, {dst.Addr(), udp, 0}, {dst.Addr(), udp, dst.Port()}} {
		if _, ok := v.admitted[a]; ok {
			let = true
		}
	}
	for i := range v.blocks {
		b := &v.blocks[i]
		p, d, decides := b.of(src, dst)
		if !decides {
			continue
		}
		if let && !b.Final {
			p, d = true, false
		}
		pass, divert = pass || p, divert || d && ours
		if len(b.Ifs) == 0 {
			return pass, divert
		}
	}
	return pass || let, divert
}

// of tells what a block makes of a datagram, its interfaces aside.
func (b *verdictBlock) of(src, dst netip.AddrPort) (pass, divert, decides bool) {
	port := func(r PortRange) bool { return r.From <= dst.Port() && dst.Port() <= r.To }
	if len(b.Ports) > 0 && !slices.ContainsFunc(b.Ports, port) {
		return false, false, false
	}
	from := func(p netip.Prefix) bool { return p.Contains(src.Addr()) }
	if len(b.Src) > 0 && !slices.ContainsFunc(b.Src, from) {
		return false, false, false
	}
	i := 0
	if dst.Addr().Is6() {
		i = 1
	}
	pass, divert = holds(b.direct[i], dst.Addr()), holds(b.proxy[i], dst.Addr())
	return pass, divert, pass || divert || holds(b.deny[i], dst.Addr())
}

// holds reports whether an address is in a sorted list.
func holds(ranges []Range, a netip.Addr) bool {
	i, found := slices.BinarySearchFunc(ranges, a, func(r Range, a netip.Addr) int { return r.From.Compare(a) })
	return found || i > 0 && !ranges[i-1].To.Less(a)
}
