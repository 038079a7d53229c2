package redirect

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"syscall"

	"golang.org/x/sys/unix"
)

// portTries is how often a port is sought that is free in both families.
const portTries = 32

// Listener is a pair of transparent TCP listeners with one port, on 127.0.0.1
// and on [::1]. What they accept has the address that the client asked for as
// its local address, and the Own mark.
type Listener struct {
	V4 *net.TCPListener
	V6 *net.TCPListener // nil on a host without IPv6
}

// ListenTCP makes the listeners for flows, or for DNS over TCP, in the network
// namespace of the calling thread.
func ListenTCP(m Marks) (*Listener, error) {
	var err error
	for range portTries {
		l := &Listener{}
		if l.V4, err = listenTCP(m, "tcp4", "127.0.0.1:0"); err != nil {
			return nil, fmt.Errorf("redirect: %w", err)
		}
		l.V6, err = listenTCP(m, "tcp6", fmt.Sprintf("[::1]:%d", l.Port()))
		if err == nil || noFamily(err) {
			return l, nil
		}
		l.Close()
		if !errors.Is(err, unix.EADDRINUSE) {
			break
		}
	}
	return nil, fmt.Errorf("redirect: %w", err)
}

func listenTCP(m Marks, network, address string) (*net.TCPListener, error) {
	lc := net.ListenConfig{Control: func(network, _ string, c syscall.RawConn) error { return control(c, network, m, transparentTCP) }}
	lc.SetMultipathTCP(false) // its sockets are not spliced, and tproxy has no use for it
	l, err := lc.Listen(context.Background(), network, address)
	if err != nil {
		return nil, err
	}
	return l.(*net.TCPListener), nil
}

// Port is the port of both listeners.
func (l *Listener) Port() uint16 { return l.V4.Addr().(*net.TCPAddr).AddrPort().Port() }

// Listeners returns those that there are, V4 first.
func (l *Listener) Listeners() []*net.TCPListener {
	if l.V6 == nil {
		return []*net.TCPListener{l.V4}
	}
	return []*net.TCPListener{l.V4, l.V6}
}

// Close closes both listeners.
func (l *Listener) Close() error {
	var errs []error
	for _, l := range l.Listeners() {
		if l != nil {
			errs = append(errs, l.Close())
		}
	}
	return errors.Join(errs...)
}

// control runs f on a socket that was not bound yet.
func control(c syscall.RawConn, network string, m Marks, f func(fd int, v6 bool, m Marks) error) error {
	var err error
	if e := c.Control(func(fd uintptr) { err = f(int(fd), network[len(network)-1] == '6', m) }); e != nil {
		return e
	}
	return err
}

// option is one of setsockopt(2) whose value is 1.
type option struct {
	level, name int
	text        string
}

func switchOn(fd int, options ...option) error {
	for _, o := range options {
		if err := setsockoptInt(fd, o.level, o.name, 1); err != nil {
			return fmt.Errorf("%s: %w", o.text, err)
		}
	}
	return nil
}

// transparent lets a socket stand for addresses that are not this host's
// (IP_TRANSPARENT, ip(7)), and gives it and what it accepts the Own mark.
func transparent(fd int, v6 bool, m Marks) error {
	o := option{unix.SOL_IP, unix.IP_TRANSPARENT, "IP_TRANSPARENT"}
	if v6 {
		o = option{unix.SOL_IPV6, unix.IPV6_TRANSPARENT, "IPV6_TRANSPARENT"}
	}
	if err := switchOn(fd, o); err != nil {
		return err
	}
	return m.MarkOwn(fd)
}

// transparentTCP also has the kernel remember the interface of each connection,
// for InboundInterface.
func transparentTCP(fd int, v6 bool, m Marks) error {
	if err := transparent(fd, v6, m); err != nil {
		return err
	}
	if v6 {
		return switchOn(fd, option{unix.SOL_IPV6, unix.IPV6_RECVPKTINFO, "IPV6_RECVPKTINFO"})
	}
	return switchOn(fd, option{unix.SOL_IP, unix.IP_PKTINFO, "IP_PKTINFO"})
}

// pktOptions6 is IPV6_2292PKTOPTIONS (linux/in6.h).
const pktOptions6 = 6

// InboundInterface returns the index of the interface that the connection of a
// socket accepted from a Listener, with these two ends, came in by; 1, which is lo, for those of this
// host itself. It is to be called once for a socket, and soon: an IPv6 socket
// keeps a copy of each segment until then.
func InboundInterface(fd int, local, remote netip.Addr) (int, error) {
	// Only this host itself connects to one of its addresses from the same one,
	// and the kernel then names the interface that has the address.
	if local == remote {
		return loIndex, nil
	}
	v6 := local.Is6()
	level, name, size := unix.SOL_IP, unix.IP_PKTOPTIONS, unix.SizeofInet4Pktinfo
	if v6 {
		level, name, size = unix.SOL_IPV6, pktOptions6, unix.SizeofInet6Pktinfo
	}
	var b [128]byte
	n := uint32(len(b))
	if err := getsockopt(fd, level, name, &b[0], &n); err != nil {
		return 0, fmt.Errorf("redirect: packet options: %w", err)
	}
	if v6 {
		if err := setsockoptInt(fd, unix.SOL_IPV6, unix.IPV6_RECVPKTINFO, 0); err != nil {
			return 0, fmt.Errorf("redirect: IPV6_RECVPKTINFO: %w", err)
		}
	}
	for rest := b[:n]; len(rest) >= unix.SizeofCmsghdr; {
		h, data, next := nextCmsg(rest)
		if h == nil {
			break
		}
		if len(data) >= size && int(h.Level) == level && (int(h.Type) == unix.IP_PKTINFO || int(h.Type) == unix.IPV6_PKTINFO) {
			if level == unix.SOL_IP {
				return int(binary.NativeEndian.Uint32(data)), nil // in_pktinfo: ipi_ifindex is first
			}
			return int(binary.NativeEndian.Uint32(data[16:])), nil // in6_pktinfo: behind the address
		}
		rest = next
	}
	// To a process of 32 bits a kernel of 64 writes a header of its own size here
	// (do_ipv6_getsockopt), and here alone.
	const wide = 16
	if v6 && unix.SizeofCmsghdr < wide && int(n) >= wide+size &&
		binary.NativeEndian.Uint32(b[8:]) == unix.SOL_IPV6 && binary.NativeEndian.Uint32(b[12:]) == unix.IPV6_PKTINFO {
		return int(binary.NativeEndian.Uint32(b[wide+16:])), nil
	}
	return 0, errors.New("redirect: the socket does not tell its interface")
}
