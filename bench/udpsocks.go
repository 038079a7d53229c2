package main

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

// socksUDPPort is that of the SOCKS server for datagrams.
const socksUDPPort = 1082

// associations is a SOCKS server that does nothing but carry datagrams of IPv4:
// one loop over all control connections, and over all associations, each of
// which is one socket for both sides.
type associations struct {
	epoll, listener int
	ends            map[int]*association // by the descriptor of either
	batch           *batch
}

// association is a control connection and, once it has asked for it, what it
// asked for.
type association struct {
	control, relay int // relay 0: not yet
	client         unix.RawSockaddrInet4
	in             []byte // of a greeting or a request that is not whole yet
	greeted        bool
}

// newAssociations listens at an address. Run serves it.
func newAssociations(at netip.AddrPort) (s *associations, err error) {
	s = &associations{ends: map[int]*association{}, batch: newBatch(true)}
	if s.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, err
	}
	if s.listener, err = unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0); err != nil {
		return nil, err
	}
	if err := unix.Bind(s.listener, &unix.SockaddrInet4{Port: int(at.Port()), Addr: at.Addr().As4()}); err != nil {
		return nil, err
	}
	if err := unix.Listen(s.listener, 4096); err != nil {
		return nil, err
	}
	return s, s.watch(s.listener)
}

func (s *associations) watch(fd int) error {
	return unix.EpollCtl(s.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)})
}

// run serves as long as the process lives. Whatever is reported may have been
// closed meanwhile, and its number be another's: nothing is read that is not
// there.
func (s *associations) run() error {
	events := make([]unix.EpollEvent, 256)
	for {
		n, err := unix.EpollWait(s.epoll, events, -1)
		if err != nil && err != unix.EINTR {
			return fmt.Errorf("socks: %w", err)
		}
		for _, e := range events[:max(n, 0)] {
			fd := int(e.Fd)
			switch a := s.ends[fd]; {
			case fd == s.listener:
				s.accept()
			case a == nil:
			case fd == a.relay:
				s.carry(a)
			case !s.control(a):
				s.end(a)
			}
		}
	}
}

func (s *associations) accept() {
	for {
		fd, _, err := unix.Accept4(s.listener, unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC)
		if err != nil {
			return
		}
		a := &association{control: fd}
		s.ends[fd] = a
		if unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1) != nil || s.watch(fd) != nil {
			s.end(a)
		}
	}
}

// end closes the control connection last, so that who sees it end knows that all
// has.
func (s *associations) end(a *association) {
	for _, fd := range []int{a.relay, a.control} {
		if fd != 0 {
			delete(s.ends, fd)
			unix.Close(fd)
		}
	}
}

// control reads a control connection and answers it (RFC 1928, without
// authentication). It reports whether the connection goes on.
func (s *associations) control(a *association) bool {
	var b [512]byte
	n, err := unix.Read(a.control, b[:])
	if err == unix.EAGAIN || err == unix.EINTR {
		return true
	}
	if n <= 0 || a.relay != 0 {
		return n > 0
	}
	a.in = append(a.in, b[:n]...)
	if !a.greeted {
		if len(a.in) < 2 || len(a.in) < 2+int(a.in[1]) {
			return true
		}
		a.in = a.in[2+int(a.in[1]):]
		a.greeted = true
		if _, err := unix.Write(a.control, []byte{5, 0}); err != nil {
			return false
		}
	}
	const size = 4 + 4 + 2
	if len(a.in) < size {
		return true
	}
	if a.in[0] != 5 || a.in[1] != 3 || a.in[3] != 1 {
		return false // not UDP ASSOCIATE, or not IPv4
	}
	reply, err := s.associate(a, netip.AddrPortFrom(netip.AddrFrom4([4]byte(a.in[4:])), binary.BigEndian.Uint16(a.in[8:])))
	a.in = nil
	if err != nil {
		return false
	}
	_, err = unix.Write(a.control, reply)
	return err == nil
}

// associate opens the socket of an association, for the datagrams of client,
// at the address that the control connection came to, and returns the reply.
func (s *associations) associate(a *association, client netip.AddrPort) (reply []byte, err error) {
	name, err := unix.Getsockname(a.control)
	if err != nil {
		return nil, err
	}
	here := name.(*unix.SockaddrInet4).Addr
	fd, err := bindUDP(netip.AddrPortFrom(netip.AddrFrom4(here), 0), unix.SOCK_NONBLOCK)
	if err != nil {
		return nil, err
	}
	a.relay, a.client = fd, sockaddr(client)
	s.ends[fd] = a
	if err := s.watch(fd); err != nil {
		return nil, err
	}
	if name, err = unix.Getsockname(fd); err != nil {
		return nil, err
	}
	reply = append([]byte{5, 0, 0, 1}, here[:]...)
	return binary.BigEndian.AppendUint16(reply, uint16(name.(*unix.SockaddrInet4).Port)), nil
}

// carry takes datagrams from an association's socket and sends them on: those
// of the client without their header, all others with one, to the client.
func (s *associations) carry(a *association) {
	b := s.batch
	n, err := b.receive(a.relay, unix.MSG_DONTWAIT)
	if err != nil {
		return
	}
	for i := range n {
		d, name := b.data(i), &b.names[i]
		port := (*[2]byte)(unsafe.Pointer(&name.Port)) // in network byte order
		switch {
		case name.Addr != a.client.Addr || name.Port != a.client.Port:
			whole := b.room[i][:socksHeader+len(d)]
			copy(whole, []byte{0, 0, 0, 1})
			copy(whole[4:], name.Addr[:])
			copy(whole[8:], port[:])
			*name = a.client
			b.put(i, whole)
		case len(d) < socksHeader || d[2] != 0 || d[3] != 1:
			b.put(i, nil) // nothing else is measured; back at the client it is an error
		default:
			copy(name.Addr[:], d[4:])
			copy(port[:], d[8:])
			b.put(i, d[socksHeader:])
		}
	}
	b.send(a.relay, n)
}
