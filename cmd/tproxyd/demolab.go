package main

import (
	"errors"
	"fmt"
	"net"
	"os"

	"github.com/tproxyd/tproxyd/internal/netns"
	"github.com/vishvananda/netlink"
)

// demoLab is the demonstration's three namespaces. They vanish with it: their
// names are nowhere and their interfaces die with them.
type demoLab struct {
	client, gateway, server *netns.Namespace
}

func newDemoLab() (*demoLab, error) {
	l := &demoLab{}
	var err error
	for _, n := range []**netns.Namespace{&l.client, &l.gateway, &l.server} {
		if *n, err = netns.New(); err != nil {
			l.close()
			return nil, err
		}
	}
	if err := errors.Join(
		l.cable(l.client, "eth0", "192.0.2.2/24", "lan0", "192.0.2.1/24"),
		l.cable(l.server, "eth0", "198.51.100.2/24", "wan0", "198.51.100.1/24"),
		l.client.Do(func() error { return defaultRoute("192.0.2.1") }),
		l.gateway.Do(func() error { return errors.Join(up("lo"), defaultRoute("198.51.100.2"), forward()) }),
		l.server.Do(func() error {
			return errors.Join(up("lo"), address("lo", "203.0.113.80/32"), defaultRoute("198.51.100.1"))
		}),
	); err != nil {
		l.close()
		return nil, err
	}
	return l, nil
}

func (l *demoLab) close() {
	for _, n := range []*netns.Namespace{l.client, l.gateway, l.server} {
		if n != nil {
			n.Close()
		}
	}
}

// cable joins a host to the gateway with a veth pair, both ends addressed.
func (l *demoLab) cable(host *netns.Namespace, name, addr, gwName, gwAddr string) error {
	err := l.gateway.Do(func() error {
		peer, err := os.Open(host.Path())
		if err != nil {
			return err
		}
		defer peer.Close()
		attrs := netlink.NewLinkAttrs()
		attrs.Name = gwName
		if err := netlink.LinkAdd(&netlink.Veth{LinkAttrs: attrs, PeerName: name, PeerNamespace: netlink.NsFd(peer.Fd())}); err != nil {
			return fmt.Errorf("veth %s: %w", gwName, err)
		}
		return errors.Join(address(gwName, gwAddr), up(gwName))
	})
	if err != nil {
		return err
	}
	return host.Do(func() error { return errors.Join(address(name, addr), up(name)) })
}

func address(name, cidr string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	a, err := netlink.ParseAddr(cidr)
	if err != nil {
		return err
	}
	return netlink.AddrAdd(link, a)
}

func up(name string) error {
	link, err := netlink.LinkByName(name)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return netlink.LinkSetUp(link)
}

func defaultRoute(via string) error {
	return netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP(via)})
}

// forward makes the namespace a router, so that what the gateway does not
// take would really go out.
func forward() error {
	return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0)
}
