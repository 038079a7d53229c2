package redirect

import (
	"context"
	"errors"
	"fmt"
	"net"
	"syscall"

	"github.com/tproxyd/tproxyd/pkg/flow"
	"golang.org/x/sys/unix"
)

// DNS is what takes the questions that are sent to any resolver: sockets for
// datagrams, one for each family, and listeners for connections.
type DNS struct {
	UDP []flow.PacketConn // on one port; IPv4 first
	TCP *Listener

	port uint16
}

// ListenDNS makes the sockets in the network namespace of the calling thread.
// It needs CAP_NET_RAW: answers leave from the address that was asked, and
// are sent by raw sockets, so that no port is bound that a resolver of the host
// could be listening on.
func ListenDNS(m Marks) (*DNS, error) {
	tcp, err := ListenTCP(m)
	if err != nil {
		return nil, err
	}
	d := &DNS{TCP: tcp}
	for range portTries {
		if err = d.listenUDP(m); !errors.Is(err, unix.EADDRINUSE) {
			break
		}
	}
	if err != nil {
		tcp.Close()
		return nil, fmt.Errorf("redirect: %w", err)
	}
	return d, nil
}

func (d *DNS) listenUDP(m Marks) error {
	v4, err := listenUDP(m, "udp4", "127.0.0.1:0")
	if err != nil {
		return err
	}
	port := v4.udp.LocalAddr().(*net.UDPAddr).AddrPort().Port()
	v6, err := listenUDP(m, "udp6", fmt.Sprintf("[::1]:%d", port))
	switch {
	case err == nil:
		d.UDP = []flow.PacketConn{v4, v6}
	case noFamily(err):
		d.UDP = []flow.PacketConn{v4}
	default:
		v4.Close()
		return err
	}
	d.port = port
	return nil
}

// UDPPort is the port of the sockets for datagrams.
func (d *DNS) UDPPort() uint16 { return d.port }

// Close closes all sockets.
func (d *DNS) Close() error {
	errs := []error{d.TCP.Close()}
	for _, c := range d.UDP {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

// PortsOf returns the ports of the listeners; nil stands for none.
func PortsOf(tcp *Listener, dns *DNS) (p Ports) {
	if tcp != nil {
		p.TCP = tcp.Port()
	}
	if dns != nil {
		p.DNSTCP, p.DNSUDP = dns.TCP.Port(), dns.UDPPort()
	}
	return p
}

// dnsReceiveBuffer holds what comes while a batch is being answered.
const dnsReceiveBuffer = 4 << 20

func listenUDP(m Marks, network, address string) (*packetConn, error) {
	lc := net.ListenConfig{Control: func(network, _ string, c syscall.RawConn) error { return control(c, network, m, transparentUDP) }}
	c, err := lc.ListenPacket(context.Background(), network, address)
	if err != nil {
		return nil, err
	}
	pc, err := newPacketConn(c.(*net.UDPConn), network == "udp6", m)
	if err != nil {
		c.Close()
		return nil, err
	}
	return pc, nil
}

// transparentUDP has the kernel tell the original destination and the
// interface of each datagram.
func transparentUDP(fd int, v6 bool, m Marks) error {
	if err := transparent(fd, v6, m); err != nil {
		return err
	}
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, dnsReceiveBuffer); err != nil {
		return fmt.Errorf("SO_RCVBUFFORCE: %w", err)
	}
	if v6 {
		return switchOn(fd, option{unix.SOL_IPV6, unix.IPV6_RECVORIGDSTADDR, "IPV6_RECVORIGDSTADDR"},
			option{unix.SOL_IPV6, unix.IPV6_RECVPKTINFO, "IPV6_RECVPKTINFO"})
	}
	return switchOn(fd, option{unix.SOL_IP, unix.IP_RECVORIGDSTADDR, "IP_RECVORIGDSTADDR"},
		option{unix.SOL_IP, unix.IP_PKTINFO, "IP_PKTINFO"})
}
