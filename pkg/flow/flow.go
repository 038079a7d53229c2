// Package flow is the vocabulary that the rooms of the house share: what a
// flow is, where it wants to go, and what a datagram looks like between the
// kernel and whoever answers it. It imports nothing of the project and holds
// no behaviour beyond spelling its own values.
package flow

import (
	"net/netip"
	"strconv"
)

// Network is the transport protocol of a flow. The zero value is TCP.
type Network uint8

// The transport protocols that can be intercepted.
const (
	TCP Network = iota
	UDP
)

// String returns "tcp" or "udp", as Go's package net spells them.
func (n Network) String() string {
	if n == UDP {
		return "udp"
	}
	return "tcp"
}

// Flow is one intercepted flow as the front of the house sees it. It is a
// plain value: whoever receives one may keep it.
type Flow struct {
	Network Network
	Src     netip.AddrPort // the client; the zero value means unknown
	Dst     netip.AddrPort // the address that the client asked for, synthetic ones included
	Name    string         // the name behind a synthetic Dst, lower case, no final dot; empty: none
	InIf    string         // interface that the flow entered by; empty: this host's own flow
	Mark    uint32         // packet mark that the flow came with, without the bits that are ours
	MAC     MAC            // of the neighbour that it came from; zero: unknown, or the link has none
	Owner   Owner          // of a flow of this host's own; the zero value: unknown, or it is not
	Program string         // likewise: what its process executes, as rules name it; empty: unknown, or none that they name
}

// Owner is the process that opened a flow of this host.
type Owner struct {
	Known    bool   // else the rest means nothing
	UID, GID uint32 // as the kernel gives them: of the file system, of the socket's opener
	Cgroup   string // path below the mount of cgroup v2, "/" for its root; it can be an outer one of the real one, see redirect.Who
}

// MAC is an Ethernet address. The zero value is none.
type MAC [6]byte

// String returns the address as "00:00:5e:00:53:01".
func (m MAC) String() string {
	const hex = "0123456789abcdef"
	b := make([]byte, 0, 17)
	for i, v := range m {
		if i > 0 {
			b = append(b, ':')
		}
		b = append(b, hex[v>>4], hex[v&15])
	}
	return string(b)
}

// Target is what is asked of a SOCKS server or of a dialer: a name or an
// address, and a port. If Name is not empty it is used and Addr is ignored.
type Target struct {
	Name string
	Addr netip.Addr
	Port uint16
}

// Target returns where the flow wants to go: by its name if it has one.
func (f Flow) Target() Target {
	if f.Name != "" {
		return Target{Name: f.Name, Port: f.Dst.Port()}
	}
	return Target{Addr: f.Dst.Addr().Unmap(), Port: f.Dst.Port()}
}

// Host returns the name, or the address in its text form.
func (t Target) Host() string {
	if t.Name != "" {
		return t.Name
	}
	return t.Addr.String()
}

// String returns "host:port", an IPv6 address in brackets.
func (t Target) String() string {
	if t.Name != "" {
		return t.Name + ":" + strconv.Itoa(int(t.Port))
	}
	return netip.AddrPortFrom(t.Addr, t.Port).String()
}

// Datagram is one UDP datagram with both of its addresses, as a transparent
// socket receives it (IP_RECVORIGDSTADDR) or sends it (from an address that
// need not be this host's).
//
// On receive Src is the client, Dst the address that the client asked for and
// Data the payload, valid until the next receive into the same buffer. On send
// Src is the address that the datagram leaves from and Dst the client.
type Datagram struct {
	Data    []byte
	Src     netip.AddrPort
	Dst     netip.AddrPort
	IfIndex int // interface it came in by (receive only); 0: unknown
}

// PacketConn moves datagrams in batches. Implementations are safe for one
// reader and one writer at a time.
type PacketConn interface {
	// ReadBatch blocks until at least one datagram is there and fills up to
	// len(ds) of them. Each Data must come with the capacity for a whole
	// datagram; it is set to the length received. It returns net.ErrClosed
	// after Close.
	ReadBatch(ds []Datagram) (int, error)
	// WriteBatch sends each datagram from its Src to its Dst and returns how
	// many were handed to the kernel. One that cannot be sent is dropped, as
	// UDP allows, and does not stop the others.
	WriteBatch(ds []Datagram) (int, error)
	Close() error
}

// PacketSource is a PacketConn that an event loop can watch.
type PacketSource interface {
	PacketConn
	// Control calls f with the descriptor that datagrams are received by, valid
	// for the call; for epoll_ctl(2).
	Control(f func(fd int) error) error
	// TryReadBatch is ReadBatch that does not wait: 0 and no error if nothing is
	// there.
	TryReadBatch(ds []Datagram) (int, error)
}
