package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"

	"github.com/tproxyd/tproxyd/internal/netns"
	"github.com/vishvananda/netlink"
)

// The ways from the client to the server, each through a gateway of its own,
// so that they can be measured in turn without anything being started or
// stopped between:
//
//	             .-- plain ---.
//	             +-- splice --+
//	 client -----+-- tproxyd -+----- server
//	             +-- direct --+
//	             +-- udp -----+
//	             '-- tracked -'
//
//	192.0.2.(16i)/28   198.51.100.(16i)/28   gateway .1, client and server .2
//	203.0.113.(10+i)   the server as it is reached by way i
type way int

const (
	plain   way = iota // the kernel forwards
	splice             // a bare relay: accept, dial, splice
	proxied            // tproxyd, through the SOCKS server
	direct             // tproxyd, by a DIRECT rule among many
	udp                // tproxyd, through the SOCKS server; for datagrams alone, started anew for each table
	tracked            // the kernel forwards and tracks connections, as it does for NAT
	ways
)

// String returns the name of the column.
func (w way) String() string {
	return [...]string{"plain", "splice", "tproxyd", "direct", "udp", "tracked"}[w]
}

func (w way) lan(host int) string { return fmt.Sprintf("192.0.2.%d", 16*int(w)+host) }
func (w way) wan(host int) string { return fmt.Sprintf("198.51.100.%d", 16*int(w)+host) }

// target is the server as it is reached by way w.
func (w way) target(port uint16) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(10 + w)}), port)
}

// lab is the namespaces. They have no names and vanish with this process.
type lab struct {
	client, server *netns.Namespace
	gateways       [ways]*netns.Namespace
}

// newLab builds the topology.
func newLab() (l *lab, err error) {
	l = &lab{}
	defer func() {
		if err != nil {
			l.close()
		}
	}()
	make := func() (*netns.Namespace, error) {
		n, err := netns.New()
		if err != nil {
			return nil, err
		}
		return n, n.Do(prepare)
	}
	if l.client, err = make(); err != nil {
		return l, err
	}
	if l.server, err = make(); err != nil {
		return l, err
	}
	for w := range ways {
		if l.gateways[w], err = make(); err != nil {
			return l, err
		}
		if err := l.lay(w); err != nil {
			return l, fmt.Errorf("way %v: %w", w, err)
		}
	}
	return l, nil
}

// lay joins a gateway to the client and the server and sets the routes.
func (l *lab) lay(w way) error {
	g := l.gateways[w]
	here := fmt.Sprintf("eth%d", w)
	if err := cable(g, "lan0", w.lan(1), l.client, here, w.lan(2)); err != nil {
		return err
	}
	if err := cable(g, "wan0", w.wan(1), l.server, here, w.wan(2)); err != nil {
		return err
	}
	return errors.Join(
		l.client.Do(func() error { return route(w.target(0).Addr().String()+"/32", w.lan(1)) }),
		g.Do(func() error { return route("203.0.113.0/24", w.wan(2)) }),
		l.server.Do(func() error {
			return errors.Join(address("lo", w.target(0).Addr().String()+"/32"), route(w.lan(0)+"/28", w.wan(1)))
		}),
	)
}

// prepare brings loopback up and makes the namespace fit for many connections.
func prepare() error {
	errs := []error{up("lo")}
	for key, value := range map[string]string{
		"net.ipv4.ip_forward":                "1",
		"net.ipv4.ip_local_port_range":       "10240 65535",
		"net.ipv4.tcp_tw_reuse":              "1",
		"net.core.somaxconn":                 "4096",
		"net.ipv4.tcp_max_syn_backlog":       "8192",
		"net.ipv6.conf.default.disable_ipv6": "1", // no neighbour discovery in between
	} {
		errs = append(errs, os.WriteFile("/proc/sys/"+strings.ReplaceAll(key, ".", "/"), []byte(value), 0))
	}
	return errors.Join(errs...)
}

func (l *lab) close() {
	for _, n := range append(l.gateways[:], l.client, l.server) {
		if n != nil {
			n.Close()
		}
	}
}

// cable joins two namespaces with a veth pair, both ends addressed and up.
func cable(a *netns.Namespace, aName, aAddr string, b *netns.Namespace, bName, bAddr string) error {
	err := a.Do(func() error {
		peer, err := os.Open(b.Path())
		if err != nil {
			return err
		}
		defer peer.Close()
		attrs := netlink.NewLinkAttrs()
		attrs.Name = aName
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: bName, PeerNamespace: netlink.NsFd(peer.Fd())}); err != nil {
			return fmt.Errorf("veth %s: %w", aName, err)
		}
		return errors.Join(address(aName, aAddr+"/28"), up(aName))
	})
	if err != nil {
		return err
	}
	return b.Do(func() error { return errors.Join(address(bName, bAddr+"/28"), up(bName)) })
}

func address(name, cidr string) error { return addressed(name, cidr, netlink.AddrAdd) }

// forget takes an address away.
func forget(name, cidr string) error { return addressed(name, cidr, netlink.AddrDel) }

func addressed(name, cidr string, do func(netlink.Link, *netlink.Addr) error) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	a, err := netlink.ParseAddr(cidr)
	if err != nil {
		return err
	}
	return do(link, a)
}

func up(name string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return netlink.LinkSetUp(link)
}

func route(dst, via string) error {
	_, prefix, err := net.ParseCIDR(dst)
	if err != nil {
		return err
	}
	return netlink.RouteAdd(&netlink.Route{Dst: prefix, Gw: net.ParseIP(via)})
}
