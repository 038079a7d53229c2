package socks

import (
	"encoding/binary"
	"errors"
	"net/netip"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

// MaxUDPHeader is the length of the longest header of a datagram.
const MaxUDPHeader = 2 + 1 + 1 + 1 + 255 + 2

// Errors of ParseUDPHeader.
var (
	ErrFragment  = errors.New("socks: the datagram is a fragment, which nobody puts together (RFC 1928 section 7)")
	ErrUDPHeader = errors.New("socks: the datagram has no SOCKS5 header")
)

// AppendUDPHeader appends the header of a datagram to t (RFC 1928 section 7),
// which is not a fragment. The error is ErrTooLong.
func AppendUDPHeader(b []byte, t flow.Target) ([]byte, error) {
	if t.Name != "" && !fits(t.Name) || t.Name == "" && !t.Addr.IsValid() {
		return b, ErrTooLong
	}
	return appendTarget(append(b, 0, 0, 0), t), nil
}

// ParseUDPHeader reads the header of a datagram from a server: who sent it, by
// address or by name and port, and the length of the header. Name is a part of
// b, and from has no address then. The error is ErrFragment or ErrUDPHeader,
// which b does not outlive; nothing is allocated.
func ParseUDPHeader(b []byte) (from netip.AddrPort, name []byte, n int, err error) {
	if len(b) < 5 {
		return from, nil, 0, ErrUDPHeader
	}
	if b[2] != 0 {
		return from, nil, 0, ErrFragment
	}
	var addr netip.Addr
	switch b[3] {
	case addrIPv4:
		if n = 4 + 4 + 2; len(b) >= n {
			addr = netip.AddrFrom4([4]byte(b[4:]))
		}
	case addrIPv6:
		if n = 4 + 16 + 2; len(b) >= n {
			addr = netip.AddrFrom16([16]byte(b[4:])).Unmap()
		}
	case addrDomain:
		if n = 4 + 1 + int(b[4]) + 2; len(b) >= n {
			name = b[5 : n-2 : n-2]
		}
	}
	if n == 0 || len(b) < n || b[3] == addrDomain && len(name) == 0 {
		return from, nil, 0, ErrUDPHeader
	}
	return netip.AddrPortFrom(addr, binary.BigEndian.Uint16(b[n-2:])), name, n, nil
}
