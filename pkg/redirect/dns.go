package redirect

import (
	"errors"
	"fmt"

	"github.com/tproxyd/tproxyd/pkg/flow"
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
	pair, port, err := listenPair(m, 0, false)
	if err != nil {
		tcp.Close()
		return nil, fmt.Errorf("redirect: %w", err)
	}
	return newDNS(tcp, pair, port)
}

// newDNS owns the sockets, which are ready to be waited for: what that takes is not
// missed only when somebody serves.
func newDNS(tcp *Listener, udp []*packetConn, port uint16) (*DNS, error) {
	d := &DNS{TCP: tcp, port: port}
	var errs []error
	for _, c := range udp {
		d.UDP = append(d.UDP, c)
		_, err := c.recv.polled()
		errs = append(errs, err)
	}
	if err := errors.Join(errs...); err != nil {
		d.Close()
		return nil, err
	}
	return d, nil
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
func PortsOf(tcp *Listener, udp *UDPListener, dns *DNS) (p Ports) {
	if tcp != nil {
		p.TCP = tcp.Port()
	}
	if udp != nil {
		p.UDP = udp.Port()
	}
	if dns != nil {
		p.DNSTCP, p.DNSUDP = dns.TCP.Port(), dns.UDPPort()
	}
	return p
}
