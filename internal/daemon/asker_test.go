package daemon

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"

	"github.com/miekg/dns"
	"github.com/tproxyd/tproxyd/internal/netns"
	"github.com/vishvananda/netlink"
)

// TestAsker: a rule for an interface decides a name that is asked for by that
// interface, over UDP and TCP alike, in both families.
func TestAsker(t *testing.T) {
	ask := startClient(t)
	r := serve(t, `interfaces = ["lan0"]`)
	r.routes("SOCKD5 @=127.0.0.1:9 direct.example if=lan0\nDIRECT *\n")
	for _, network := range []string{"udp", "tcp"} {
		for _, resolver := range []string{"203.0.113.53", "2001:db8::53"} {
			at, err := ask(network, resolver)
			if err != nil || !r.setup.Config.DNS.Pool4.Contains(at) {
				t.Errorf("%s to %s: direct.example is at %v, %v, want a synthetic address", network, resolver, at, err)
			}
		}
		c := dns.Client{Net: network, Timeout: patience}
		a, _, err := c.Exchange(new(dns.Msg).SetQuestion("direct.example.", dns.TypeA), "203.0.113.53:53")
		if err != nil || len(a.Answer) != 1 || a.Answer[0].(*dns.A).A.String() != directAt {
			t.Errorf("%s, from this host: %v, %v, want %s", network, a, err, directAt)
		}
	}
}

// startClient makes a host behind lan0 and returns what asks for direct.example
// there.
func startClient(t testing.TB) func(network, resolver string) (netip.Addr, error) {
	t.Helper()
	n, err := netns.New()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.Close)
	lan := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "lan0"}, PeerName: "eth0"}
	if err := netlink.LinkAdd(lan); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { netlink.LinkDel(lan) })
	peer, err := netlink.LinkByName("eth0")
	if err != nil {
		t.Fatal(err)
	}
	up := func(l netlink.Link, addrs ...string) (err error) {
		for _, text := range addrs {
			a, e := netlink.ParseAddr(text)
			a.Flags = 0x02 // IFA_F_NODAD
			err = errors.Join(err, e, netlink.AddrAdd(l, a))
		}
		return errors.Join(err, netlink.LinkSetUp(l))
	}
	if err := os.WriteFile("/proc/sys/net/ipv6/conf/lan0/disable_ipv6", []byte("0"), 0); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(moveTo(peer, n), up(lan, "192.0.2.129/25", "2001:db8:1::1/64")); err != nil {
		t.Fatal(err)
	}
	if err := n.Do(func() error {
		l, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		return errors.Join(up(l, "192.0.2.130/25", "2001:db8:1::2/64"),
			netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP("192.0.2.129")}), netlink.RouteAdd(&netlink.Route{Gw: net.ParseIP("2001:db8:1::1")}))
	}); err != nil {
		t.Fatal(err)
	}
	return func(network, resolver string) (at netip.Addr, err error) {
		err = n.Do(func() error {
			c := dns.Client{Net: network, Timeout: patience}
			a, _, err := c.Exchange(new(dns.Msg).SetQuestion("direct.example.", dns.TypeA), net.JoinHostPort(resolver, "53"))
			if err != nil || len(a.Answer) != 1 {
				return fmt.Errorf("%v, %w", a, err)
			}
			at, _ = netip.AddrFromSlice(a.Answer[0].(*dns.A).A.To4())
			return nil
		})
		return at, err
	}
}

func moveTo(l netlink.Link, n *netns.Namespace) error {
	f, err := os.Open(n.Path())
	if err != nil {
		return err
	}
	defer f.Close()
	return netlink.LinkSetNsFd(l, int(f.Fd()))
}
