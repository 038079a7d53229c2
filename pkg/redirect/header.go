package redirect

import (
	"encoding/binary"
	"math/bits"
	"net/netip"

	"golang.org/x/sys/unix"
)

// Lengths of headers without options (RFC 791, RFC 8200, RFC 768).
const (
	header4    = 20
	header6    = 40
	headerUDP  = 8
	headerICMP = 8
	maxHeader  = header6 + headerUDP

	maxPayload = 65535 - header4 - headerUDP // what IPv4 can name; IPv6 has 20 more
	hopLimit   = 64
)

// putIP writes an IP header for so many bytes of a protocol behind it, and
// returns its length. The addresses are of one family.
func putIP(b *[header6]byte, src, dst netip.Addr, proto byte, length int) int {
	if src.Is4() {
		s, d := src.As4(), dst.As4()
		*(*[header4]byte)(b[:]) = [header4]byte{0: 0x45, 8: hopLimit, 9: proto}
		binary.BigEndian.PutUint16(b[2:], uint16(header4+length))
		copy(b[12:], s[:])
		copy(b[16:], d[:])
		// The identification and the header's checksum are the kernel's (raw(7)).
		return header4
	}
	s, d := src.As16(), dst.As16()
	*(*[8]byte)(b[:]) = [8]byte{0: 0x60, 6: proto, 7: hopLimit}
	binary.BigEndian.PutUint16(b[4:], uint16(length))
	copy(b[8:], s[:])
	copy(b[24:], d[:])
	return header6
}

// addresses returns the two addresses of an IP header.
func addresses(b []byte) []byte {
	if b[0]>>4 == 4 {
		return b[12:header4]
	}
	return b[8:header6]
}

// putHeader writes the IP and UDP headers of a datagram, checksums included,
// and returns their length. The addresses are of one family.
func putHeader(b *[maxHeader]byte, src, dst netip.Addr, sport, dport uint16, payload []byte) int {
	length := headerUDP + len(payload)
	n := putIP((*[header6]byte)(b[:]), src, dst, unix.IPPROTO_UDP, length)
	u := b[n : n+headerUDP]
	binary.BigEndian.PutUint16(u[0:], sport)
	binary.BigEndian.PutUint16(u[2:], dport)
	binary.BigEndian.PutUint16(u[4:], uint16(length))
	u[6], u[7] = 0, 0
	// The pseudo header: the addresses, which stand in front of the UDP header in
	// both families, the protocol and the length.
	sum := add16(uint64(unix.IPPROTO_UDP)+uint64(length), addresses(b[:]))
	sum = add16(sum, u)
	sum = add16(sum, payload)
	check := ^fold(sum)
	if check == 0 {
		check = 0xffff // 0 says that there is none
	}
	binary.BigEndian.PutUint16(u[6:], check)
	return n + headerUDP
}

// add16 adds the big-endian 16-bit words of b to a sum of the Internet checksum
// (RFC 1071). It adds four at once, since a carry goes round to where it came
// from in any grouping.
func add16(sum uint64, b []byte) uint64 {
	var carry uint64
	for len(b) >= 8 {
		sum, carry = bits.Add64(sum, binary.BigEndian.Uint64(b), carry)
		b = b[8:]
	}
	sum, carry = bits.Add64(sum, carry, 0)
	sum += carry
	var last [8]byte
	copy(last[:], b)
	sum, carry = bits.Add64(sum, binary.BigEndian.Uint64(last[:]), 0)
	return sum + carry
}

func fold(sum uint64) uint16 {
	for sum > 0xffff {
		sum = sum>>16 + sum&0xffff
	}
	return uint16(sum)
}
