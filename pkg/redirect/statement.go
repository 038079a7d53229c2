package redirect

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// statement is a part of a rule in both of its forms: the text that nft(8)
// reads and prints, and the expressions that the kernel runs, which are those
// that nft itself would make of the text.
type statement struct {
	text  string
	exprs []expr.Any
	anon  *set // an anonymous set that the last expression looks into
}

// rule is a list of statements, run until one does not match.
type rule []statement

func (r rule) text() string {
	words := make([]string, 0, len(r))
	for _, s := range r {
		if s.text != "" {
			words = append(words, s.text)
		}
	}
	return strings.Join(words, " ")
}

// The registers of 32 bits that follow the first of 128 (NFT_REG_1 is
// NFT_REG32_00 to NFT_REG32_03).
const (
	reg1   = 1
	reg2   = 2
	reg32x = 9  // NFT_REG32_01
	reg32y = 10 // NFT_REG32_02
	reg32z = 13 // NFT_REG32_05, behind the first of NFT_REG_2
)

func native32(v uint32) []byte { return binary.NativeEndian.AppendUint32(nil, v) }
func big16(v uint16) []byte    { return binary.BigEndian.AppendUint16(nil, v) }

// ifname is the name of an interface as the kernel compares it: IFNAMSIZ bytes.
func ifname(name string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, name)
	return b
}

func eq(data []byte) expr.Any  { return &expr.Cmp{Op: expr.CmpOpEq, Register: reg1, Data: data} }
func neq(data []byte) expr.Any { return &expr.Cmp{Op: expr.CmpOpNeq, Register: reg1, Data: data} }

func masked(mask, xor uint32) expr.Any {
	return &expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 4, Mask: native32(mask), Xor: native32(xor)}
}

func iif(name string) statement {
	return statement{text: fmt.Sprintf("iifname %q", name), exprs: []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: reg1}, eq(ifname(name))}}
}

func iifNot(name string) statement {
	return statement{text: fmt.Sprintf("iifname != %q", name), exprs: []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: reg1}, neq(ifname(name))}}
}

func oif(name string) statement {
	return statement{text: fmt.Sprintf("oifname %q", name), exprs: []expr.Any{
		&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: reg1}, eq(ifname(name))}}
}

func oifNot(name string) statement {
	return statement{text: fmt.Sprintf("oifname != %q", name), exprs: []expr.Any{
		&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: reg1}, neq(ifname(name))}}
}

func iifIn(s *set) statement {
	return statement{text: "iifname @" + s.name, exprs: []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: reg1}, s.lookup()}}
}

// mark matches one of our values in the packet mark.
func mark(m Marks, v uint32) statement {
	return statement{text: fmt.Sprintf("meta mark & 0x%08x == 0x%08x", m.Mask, v), exprs: []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: reg1}, masked(m.Mask, 0), eq(native32(v))}}
}

func markNot(m Marks, v uint32) statement {
	return statement{text: fmt.Sprintf("meta mark & 0x%08x != 0x%08x", m.Mask, v), exprs: []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: reg1}, masked(m.Mask, 0), neq(native32(v))}}
}

// setMark puts one of our values, or zero, into the packet mark and keeps the
// other bits.
func setMark(m Marks, v uint32) statement {
	return statement{text: "meta mark set " + keepBits("meta mark", m, v), exprs: []expr.Any{
		&expr.Meta{Key: expr.MetaKeyMARK, Register: reg1}, masked(^m.Mask, v),
		&expr.Meta{Key: expr.MetaKeyMARK, Register: reg1, SourceRegister: true}}}
}

// setCtMark does the same with the connection mark.
func setCtMark(m Marks, v uint32) statement {
	return statement{text: "ct mark set " + keepBits("ct mark", m, v), exprs: []expr.Any{
		&expr.Ct{Key: expr.CtKeyMARK, Register: reg1}, masked(^m.Mask, v),
		&expr.Ct{Key: expr.CtKeyMARK, Register: reg1, SourceRegister: true}}}
}

func keepBits(what string, m Marks, v uint32) string {
	if v == 0 {
		return fmt.Sprintf("%s & 0x%08x", what, ^m.Mask)
	}
	return fmt.Sprintf("%s & 0x%08x | 0x%08x", what, ^m.Mask, v)
}

func ctMark(m Marks, v uint32) statement {
	return statement{text: fmt.Sprintf("ct mark & 0x%08x == 0x%08x", m.Mask, v), exprs: []expr.Any{
		&expr.Ct{Key: expr.CtKeyMARK, Register: reg1}, masked(m.Mask, 0), eq(native32(v))}}
}

func ctMarkNot(m Marks, v uint32) statement {
	return statement{text: fmt.Sprintf("ct mark & 0x%08x != 0x%08x", m.Mask, v), exprs: []expr.Any{
		&expr.Ct{Key: expr.CtKeyMARK, Register: reg1}, masked(m.Mask, 0), neq(native32(v))}}
}

func ctReply() statement {
	return statement{text: "ct direction reply", exprs: []expr.Any{
		&expr.Ct{Key: expr.CtKeyDIRECTION, Register: reg1}, eq([]byte{1})}}
}

// foreignReply matches the replies of flows that were opened from the other side
// and never ended at us. One of ours can be known to conntrack the wrong way
// round, if its entry was gone and the first packet after that was ours.
func foreignReply(m Marks) []statement {
	return []statement{ctReply(), ctMarkNot(m, m.Own()), ctMarkNot(m, m.Lan())}
}

func ctNew() statement {
	return statement{text: "ct state new", exprs: []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: reg1}, masked(expr.CtStateBitNEW, 0), neq(native32(0))}}
}

// ctSourceTranslated matches packets of flows whose source NAT changes.
func ctSourceTranslated() statement {
	const snat = 1 << 4 // IPS_SRC_NAT
	return statement{text: "ct status snat", exprs: []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATUS, Register: reg1}, masked(snat, 0), neq(native32(0))}}
}

func isFamily(f family) statement {
	return statement{text: "meta nfproto ipv" + f.digit(), exprs: familyExprs(f)}
}

func familyExprs(f family) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: reg1}, eq([]byte{byte(f)})}
}

// l4 is a transport protocol by its IANA number.
type l4 byte

const (
	icmp   l4 = unix.IPPROTO_ICMP
	tcp    l4 = unix.IPPROTO_TCP
	udp    l4 = unix.IPPROTO_UDP
	icmpv6 l4 = unix.IPPROTO_ICMPV6
)

func (p l4) String() string {
	switch p {
	case icmp:
		return "icmp"
	case tcp:
		return "tcp"
	case udp:
		return "udp"
	}
	return "ipv6-icmp"
}

func (p l4) exprs() []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg1}, eq([]byte{byte(p)})}
}

func proto(p l4) statement { return statement{text: "meta l4proto " + p.String(), exprs: p.exprs()} }
func protoNot(p l4) statement {
	return statement{text: "meta l4proto != " + p.String(), exprs: []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg1}, neq([]byte{byte(p)})}}
}

func transport(offset, length, register uint32) expr.Any {
	return &expr.Payload{DestRegister: register, Base: expr.PayloadBaseTransportHeader, Offset: offset, Len: length}
}

func dport(p l4, port uint16) statement {
	return statement{text: fmt.Sprintf("%s dport %d", p, port),
		exprs: append(p.exprs(), transport(2, 2, reg1), eq(big16(port)))}
}

func dportIn(p l4, s *set) statement {
	return statement{text: fmt.Sprintf("%s dport @%s", p, s.name),
		exprs: append(p.exprs(), transport(2, 2, reg1), s.lookup())}
}

// notFirst matches the TCP segments that do not open a connection. The socket
// lookup comes after it, so that no listener on a wildcard address can be taken
// for a flow of ours.
func notFirst() statement {
	return statement{text: "tcp flags & (syn | ack) != syn", exprs: append(tcp.exprs(), transport(13, 1, reg1),
		&expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: 1, Mask: []byte{0x12}, Xor: []byte{0}},
		neq([]byte{0x02}))}
}

func socketTransparent() statement {
	return statement{text: "socket transparent 1", exprs: []expr.Any{
		&expr.Socket{Key: expr.SocketKeyTransparent, Register: reg1}, eq([]byte{1})}}
}

// icmpType matches messages by their first byte; kind is icmp or icmpv6.
func icmpType(kind l4, types ...byte) statement {
	f, word, key := ip4, "icmp", nftables.TypeICMPType
	if kind == icmpv6 {
		f, word, key = ip6, "icmpv6", nftables.TypeICMP6Type
	}
	s := &set{key: key}
	names := make([]string, len(types))
	for i, t := range types {
		names[i] = fmt.Sprint(t)
		s.elements = append(s.elements, nftables.SetElement{Key: []byte{t}})
	}
	return statement{text: fmt.Sprintf("%s type { %s }", word, strings.Join(names, ", ")), anon: s,
		exprs: append(append(familyExprs(f), kind.exprs()...), transport(0, 1, reg1))}
}

// toUs matches what the routing of this host takes for its own or for nobody's
// in particular.
func toUs() statement {
	s := &set{key: nftables.TypeFIBAddr}
	for _, t := range []uint32{unix.RTN_LOCAL, unix.RTN_BROADCAST, unix.RTN_ANYCAST, unix.RTN_MULTICAST} {
		s.elements = append(s.elements, nftables.SetElement{Key: native32(t)})
	}
	return statement{text: "fib daddr type { local, broadcast, anycast, multicast }", anon: s,
		exprs: []expr.Any{&expr.Fib{Register: reg1, FlagDADDR: true, ResultADDRTYPE: true}}}
}

// notFromUs matches packets whose source is not an address of this host: those
// of transparent sockets.
func notFromUs() statement {
	return statement{text: "fib saddr type != local", exprs: []expr.Any{
		&expr.Fib{Register: reg1, FlagSADDR: true, ResultADDRTYPE: true}, neq(native32(unix.RTN_LOCAL))}}
}

// fromUs is its contrary.
func fromUs() statement {
	return statement{text: "fib saddr type local", exprs: []expr.Any{
		&expr.Fib{Register: reg1, FlagSADDR: true, ResultADDRTYPE: true}, eq(native32(unix.RTN_LOCAL))}}
}

func address(f family, source bool) expr.Any {
	p := &expr.Payload{DestRegister: reg1, Base: expr.PayloadBaseNetworkHeader, Offset: 16, Len: 4}
	if f == ip6 {
		p.Offset, p.Len = 24, 16
	}
	if source {
		p.Offset -= p.Len
	}
	return p
}

// addrIn matches an address by a set of its family. Bare leaves out the test
// for the family, where an earlier statement of the rule has made it.
func addrIn(f family, source bool, s *set, bare bool) statement {
	word := "daddr"
	if source {
		word = "saddr"
	}
	var e []expr.Any
	if !bare {
		e = familyExprs(f)
	}
	return statement{text: fmt.Sprintf("%s %s @%s", f.word(), word, s.name), exprs: append(e, address(f, source), s.lookup())}
}

// daddr matches a destination by a prefix.
func daddr(p netip.Prefix) statement {
	p = p.Masked()
	f := familyOf(p.Addr())
	b := p.Addr().AsSlice()
	at := address(f, false).(*expr.Payload)
	e := familyExprs(f)
	switch n := p.Bits(); {
	case n == 0: // nft leaves out a comparison of no bits
		return statement{text: "meta nfproto ipv" + f.digit(), exprs: e}
	case n%8 == 0: // and loads whole bytes only as many as it compares
		at.Len = uint32(n / 8)
		e = append(e, at, eq(b[:n/8]))
	default:
		mask := make([]byte, len(b))
		for i := range n {
			mask[i/8] |= 0x80 >> (i % 8)
		}
		e = append(e, at, &expr.Bitwise{SourceRegister: reg1, DestRegister: reg1, Len: uint32(len(b)), Mask: mask, Xor: make([]byte, len(b))}, eq(b))
	}
	text := p.String()
	if p.IsSingleIP() {
		text = p.Addr().String()
	}
	return statement{text: fmt.Sprintf("%s daddr %s", f.word(), text), exprs: e}
}

// part is what of a packet, behind its destination, is a key of the dynamic
// sets.
type part uint8

const (
	partAddr  part = iota // nothing
	partProto             // the protocol
	partPort              // the protocol and the destination port
)

// suffix ends the names of sets and chains of the part.
func (p part) suffix() string { return [...]string{"", "_proto", "_port"}[p] }

func (p part) text(f family) string {
	return f.word() + " daddr" + [...]string{"", " . meta l4proto", " . meta l4proto . th dport"}[p]
}

// load puts the key into the registers from the first on.
func (p part) load(f family) []expr.Any {
	e := []expr.Any{address(f, false)}
	second, third := uint32(reg32x), uint32(reg32y)
	if f == ip6 {
		second, third = reg2, reg32z
	}
	if p >= partProto {
		e = append(e, &expr.Meta{Key: expr.MetaKeyL4PROTO, Register: second})
	}
	if p >= partPort {
		e = append(e, transport(2, 2, third))
	}
	return e
}

// key returns the element for an address.
func (p part) key(a netip.Addr, proto l4, port uint16) []byte {
	b := a.AsSlice()
	if p >= partProto {
		b = append(b, byte(proto), 0, 0, 0)
	}
	if p >= partPort {
		b = append(append(b, big16(port)...), 0, 0)
	}
	return b
}

func partIn(f family, p part, s *set) statement {
	return statement{text: p.text(f) + " @" + s.name, exprs: append(append(familyExprs(f), p.load(f)...), s.lookup())}
}

// keep adds the key to a set for a time, anew if it is there.
func keep(f family, p part, s *set, d time.Duration) statement {
	return statement{text: fmt.Sprintf("update @%s { %s timeout %s }", s.name, p.text(f), nftDuration(d)),
		exprs: append(append(familyExprs(f), p.load(f)...),
			&expr.Dynset{SrcRegKey: reg1, SetName: s.name, Operation: uint32(unix.NFT_DYNSET_OP_UPDATE), Timeout: d})}
}

// serverIn matches the address and TCP port of a packet.
func serverIn(f family, s *set) statement {
	port := uint32(reg32x)
	if f == ip6 {
		port = reg2
	}
	return statement{text: fmt.Sprintf("%s daddr . tcp dport @%s", f.word(), s.name),
		exprs: append(append(familyExprs(f), tcp.exprs()...), address(f, false), transport(2, 2, port), s.lookup())}
}

// tproxy hands the packet to the socket of its flow, or to the listener. If
// there is neither, the rule ends here and the next one is tried.
func tproxy(f family, port uint16) statement {
	to := netip.AddrFrom4([4]byte{127, 0, 0, 1})
	if f == ip6 {
		to = netip.IPv6Loopback()
	}
	return statement{text: fmt.Sprintf("tproxy %s to %s", f.word(), netip.AddrPortFrom(to, port)), exprs: []expr.Any{
		&expr.Immediate{Register: reg1, Data: to.AsSlice()},
		&expr.Immediate{Register: reg2, Data: big16(port)},
		&expr.TProxy{Family: byte(f), TableFamily: unix.NFPROTO_INET, RegAddr: reg1, RegPort: reg2}}}
}

func count(counter string) statement {
	return statement{text: fmt.Sprintf("counter name %q", counter), exprs: []expr.Any{
		&expr.Objref{Type: unix.NFT_OBJECT_COUNTER, Name: counter}}}
}

func verdict(text string, kind expr.VerdictKind, chain string) statement {
	return statement{text: text, exprs: []expr.Any{&expr.Verdict{Kind: kind, Chain: chain}}}
}

func accept() statement            { return verdict("accept", expr.VerdictAccept, "") }
func drop() statement              { return verdict("drop", expr.VerdictDrop, "") }
func jump(chain string) statement  { return verdict("jump "+chain, expr.VerdictJump, chain) }
func going(chain string) statement { return verdict("goto "+chain, expr.VerdictGoto, chain) }

func rejectReset() statement {
	return statement{text: "reject with tcp reset", exprs: []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}}}
}

func rejectPort() statement {
	return statement{text: "reject with icmpx port-unreachable", exprs: []expr.Any{
		&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_PORT_UNREACH}}}
}

func rejectProhibited() statement {
	return statement{text: "reject with icmpx admin-prohibited", exprs: []expr.Any{
		&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED}}}
}

// nftDuration writes whole seconds as nft does: "2h4m".
func nftDuration(d time.Duration) string {
	var b strings.Builder
	for _, u := range []struct {
		unit time.Duration
		name string
	}{{24 * time.Hour, "d"}, {time.Hour, "h"}, {time.Minute, "m"}, {time.Second, "s"}} {
		if n := d / u.unit; n > 0 {
			fmt.Fprintf(&b, "%d%s", n, u.name)
			d -= n * u.unit
		}
	}
	return b.String()
}
