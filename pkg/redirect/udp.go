package redirect

import (
	"errors"
	"fmt"
	"net/netip"

	"github.com/tproxyd/tproxyd/pkg/flow"
	"golang.org/x/sys/unix"
)

// UDPListener is what takes the datagrams of flows: shards on one port, each a socket
// for IPv4 and one for IPv6. Which shard a datagram comes to depends on the
// address and port of the client alone, so that all that a client's socket
// sends comes to one.
//
// A datagram of a flow that has a socket by ConnectUDP comes to that socket and
// to none of these.
type UDPListener struct {
	shards [][]flow.PacketSource
	port   uint16
}

// ListenUDP makes the sockets in the network namespace of the calling thread,
// of one shard at least. It needs CAP_NET_RAW, as ListenDNS does: WriteBatch
// sends by raw sockets. It does not wait: what the kernel has no room for is
// dropped.
func ListenUDP(m Marks, shards int) (*UDPListener, error) {
	u := &UDPListener{}
	for i := range max(shards, 1) {
		pair, port, err := listenPair(m, u.port, i > 0)
		if err != nil {
			u.Close()
			return nil, fmt.Errorf("redirect: %w", err)
		}
		u.port = port
		u.shards = append(u.shards, nil)
		for _, c := range pair {
			u.shards[i] = append(u.shards[i], c)
			c.rush = true
			// The first had the port to itself as it was bound: with SO_REUSEPORT
			// from the start the kernel may choose one that another process shares.
			if err := c.recv.control(func(fd int) error {
				return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEPORT, 1)
			}); err != nil {
				u.Close()
				return nil, fmt.Errorf("redirect: SO_REUSEPORT: %w", err)
			}
		}
	}
	return u, nil
}

// Port is the port of all the sockets.
func (u *UDPListener) Port() uint16 { return u.port }

// Shards returns the sockets of each shard, IPv4 first; that of IPv6 is missing
// on a host without it. They are the listener's to close.
func (u *UDPListener) Shards() [][]flow.PacketSource { return u.shards }

// Close closes all sockets. From then on a plan that names their port refuses.
func (u *UDPListener) Close() error {
	var errs []error
	for _, s := range u.shards {
		for _, c := range s {
			errs = append(errs, c.Close())
		}
	}
	return errors.Join(errs...)
}

// receiveBuffer holds what comes while a batch is being handled, in bytes as
// the kernel counts them.
const receiveBuffer = 4 << 20

// listenPair makes the sockets of both families on one port; 0 is any that is
// free in both. Shared lets others have the port that have said so too. It needs CAP_NET_RAW.
func listenPair(m Marks, port uint16, shared bool) (pair []*packetConn, at uint16, err error) {
	for range portTries {
		pair, at, err = tryPair(m, port, shared)
		if port != 0 || !errors.Is(err, unix.EADDRINUSE) {
			break
		}
	}
	return pair, at, err
}

func tryPair(m Marks, port uint16, shared bool) (pair []*packetConn, at uint16, err error) {
	v4, err := listenUDP(m, netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), port), shared)
	if err != nil {
		return nil, 0, err
	}
	if port, err = v4.recv.localPort(); err != nil {
		v4.Close()
		return nil, 0, err
	}
	v6, err := listenUDP(m, netip.AddrPortFrom(netip.IPv6Loopback(), port), shared)
	switch {
	case err == nil:
		return []*packetConn{v4, v6}, port, nil
	case noFamily(err):
		return []*packetConn{v4}, port, nil
	}
	v4.Close()
	return nil, 0, err
}

func listenUDP(m Marks, address netip.AddrPort, shared bool) (*packetConn, error) {
	v6 := address.Addr().Is6()
	s, err := newSocket(v6, unix.SOCK_DGRAM, 0, func(fd int) error {
		if err := transparentUDP(fd, v6, m); err != nil {
			return err
		}
		if shared {
			if err := switchOn(fd, option{unix.SOL_SOCKET, unix.SO_REUSEPORT, "SO_REUSEPORT"}); err != nil {
				return err
			}
		}
		return unix.Bind(fd, sockaddr(address))
	})
	if err != nil {
		return nil, err
	}
	c, err := newPacketConn(s, v6, m)
	if err != nil {
		s.close()
		return nil, err
	}
	return c, nil
}

// transparentUDP has the kernel tell the original destination and the
// interface of each datagram.
func transparentUDP(fd int, v6 bool, m Marks) error {
	if err := transparent(fd, v6, m); err != nil {
		return err
	}
	if err := buffer(fd, unix.SO_RCVBUFFORCE, receiveBuffer); err != nil {
		return err
	}
	if v6 {
		return switchOn(fd, option{unix.SOL_IPV6, unix.IPV6_RECVORIGDSTADDR, "IPV6_RECVORIGDSTADDR"},
			option{unix.SOL_IPV6, unix.IPV6_RECVPKTINFO, "IPV6_RECVPKTINFO"})
	}
	return switchOn(fd, option{unix.SOL_IP, unix.IP_RECVORIGDSTADDR, "IP_RECVORIGDSTADDR"},
		option{unix.SOL_IP, unix.IP_PKTINFO, "IP_PKTINFO"})
}

// flowReceiveBuffer is that of ConnectUDP, in bytes as the kernel counts them.
const flowReceiveBuffer = 1 << 20

// ConnectUDP returns a socket that stands for one flow, in the network
// namespace of the calling thread: bound to dst, which need not be an address of
// this host, and connected to client. From then on the client's datagrams to dst
// come to it, and none of any other client do; what was there before stays where
// it is. It is non-blocking, closed on exec, has the Own mark, SO_REUSEADDR and a
// receive buffer of 1 MiB, less if the process may not have so much. The caller
// owns it.
//
// While it is open a datagram that the rules have come to let pass comes to it or
// is dropped, since the kernel finds sockets before it routes (udp_early_demux);
// one that they refuse is refused. So after Apply the sockets of flows are to be
// closed, those of flows that are DIRECT now at least.
//
// An error that is EADDRINUSE says that a socket of this host has the port on
// all of its addresses and does not share it (SO_REUSEADDR). WriteBatch of a
// UDPListener's socket sends from there all the same.
func (m Marks) ConnectUDP(client, dst netip.AddrPort) (fd int, err error) {
	v6 := !dst.Addr().Unmap().Is4()
	if !client.IsValid() || !dst.IsValid() || v6 == client.Addr().Unmap().Is4() {
		return -1, fmt.Errorf("redirect: flow of %s to %s: %w", client, dst, unix.EAFNOSUPPORT)
	}
	fd, err = openSocket(v6, unix.SOCK_DGRAM, 0, func(fd int) error {
		if err := transparent(fd, v6, m); err != nil {
			return err
		}
		if err := switchOn(fd, option{unix.SOL_SOCKET, unix.SO_REUSEADDR, "SO_REUSEADDR"}); err != nil {
			return err
		}
		if err := buffer(fd, unix.SO_RCVBUFFORCE, flowReceiveBuffer); err != nil {
			return err
		}
		if err := unix.Bind(fd, sockaddr(dst)); err != nil {
			return fmt.Errorf("bind: %w", err)
		}
		if err := unix.Connect(fd, sockaddr(client)); err != nil {
			return fmt.Errorf("connect: %w", err)
		}
		return nil
	})
	if err != nil {
		return -1, fmt.Errorf("redirect: flow of %s to %s: %w", client, dst, err)
	}
	return fd, nil
}
