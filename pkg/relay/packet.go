package relay

import (
	"net/netip"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// packetBuffer is the room for datagrams of a socket that a [UDP] reads: a burst
// that comes while others are served.
const packetBuffer = 1 << 20

// Packet is a UDP socket that datagrams of sessions leave by, made with
// [NewPacket] or [PacketPair]. Once it is part of an [Outlet] that a Way
// returned, the [UDP] owns it.
type Packet struct {
	fd   atomic.Int32 // -1: closed
	v6   bool
	pair bool // no UDP
	peer netip.AddrPort
}

// NewPacket makes a UDP socket bound to a local address and any port; an
// unspecified address leaves the address to the kernel as well. Control, if not
// nil, is called with the descriptor before it is bound; for SO_MARK and the
// like.
func NewPacket(local netip.Addr, control func(fd int) error) (*Packet, error) {
	family := unix.AF_INET
	if !local.Unmap().Is4() {
		family = unix.AF_INET6
	}
	fd, err := unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	if control != nil {
		err = control(fd)
	}
	if err == nil {
		if errno := rawAddr(unix.SYS_BIND, fd, netip.AddrPortFrom(local, 0)); errno != 0 {
			err = os.NewSyscallError("bind", errno)
		}
	}
	if err != nil {
		rawClose(fd)
		return nil, err
	}
	p := &Packet{v6: family == unix.AF_INET6}
	p.fd.Store(int32(fd))
	return p, nil
}

// PacketPair returns a Packet whose datagrams come out of f, each with one
// Read, and into which those written to f go: an outlet that is a goroutine.
// The caller owns f.
func PacketPair() (p *Packet, f *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, os.NewSyscallError("socketpair", err)
	}
	p = &Packet{pair: true}
	p.fd.Store(int32(fds[0]))
	return p, os.NewFile(uintptr(fds[1]), "packets"), nil
}

// preparePacket gives a socket room for bursts (as much as it may have) and
// lets the kernel hand over several datagrams as one (UDP_GRO).
func preparePacket(fd int) {
	if rawSetInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, packetBuffer) != 0 {
		rawSetInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF, packetBuffer)
	}
	rawSetInt(fd, unix.SOL_UDP, unix.UDP_GRO, 1)
}

// LocalAddrPort returns the socket's own address; the zero value after Close.
func (p *Packet) LocalAddrPort() netip.AddrPort {
	return rawName(unix.SYS_GETSOCKNAME, int(p.fd.Load()))
}

// Connect makes the socket send to an address and receive from there alone.
func (p *Packet) Connect(to netip.AddrPort) error {
	if errno := rawAddr(unix.SYS_CONNECT, int(p.fd.Load()), to); errno != 0 {
		return os.NewSyscallError("connect", errno)
	}
	p.peer = netip.AddrPortFrom(to.Addr().Unmap(), to.Port())
	return nil
}

// Close closes the socket. Only the first call does anything.
func (p *Packet) Close() error {
	if fd := p.fd.Swap(-1); fd >= 0 {
		rawClose(int(fd))
	}
	return nil
}

// mtu returns the path MTU of a connected socket, 0 if it is not known.
func (p *Packet) mtu() int {
	if p.pair {
		return 0
	}
	level, name := unix.SOL_IP, unix.IP_MTU
	if p.v6 {
		level, name = unix.SOL_IPV6, unix.IPV6_MTU
	}
	n, err := unix.GetsockoptInt(int(p.fd.Load()), level, name)
	if err != nil {
		return 0
	}
	return n
}

// headers is the length of what IP and UDP put before a datagram's data.
func headers(v6 bool) int {
	if v6 {
		return 40 + 8
	}
	return 20 + 8
}
