package redirect

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Kept is an interface of an enclosed namespace that stays as it is, as far as
// its own networks: what goes further is diverted. Flows that others opened by
// it are answered by it.
type Kept struct {
	Name     string
	Networks []netip.Prefix // on the link of the interface
}

// What is on lo of an enclosed namespace, for flows to have a source: the dummy
// address of RFC 7600, and one of a prefix that is local by RFC 4193.
var (
	enclosed4 = netip.MustParsePrefix("192.0.0.8/32")
	enclosed6 = netip.MustParsePrefix("fd74:7072:6f78:1::8/128")
)

func enclosedAddr(fam int) netip.Prefix {
	if fam == unix.AF_INET6 {
		return enclosed6
	}
	return enclosed4
}

// lastMetric puts a route behind all others of its table.
const lastMetric = 1<<31 - 1

// wayIn is the default route of an enclosed namespace, where nobody has one.
// Without a route a packet does not come as far as the chain output. Over IPv6
// it is of type anycast: the kernel makes every unicast route by lo an
// unreachable one, and a local one would make every address one of this host,
// for (ip6) fib expressions too.
func wayIn(fam int) *netlink.Route {
	r := &netlink.Route{LinkIndex: loIndex, Table: unix.RT_TABLE_MAIN, Type: unix.RTN_UNICAST, Family: fam, Protocol: RouteProtocol,
		Scope: netlink.SCOPE_LINK, Priority: lastMetric, Src: enclosed4.Addr().AsSlice(), Dst: allOf(fam)}
	if fam == unix.AF_INET6 {
		r.Type, r.Scope, r.Src = unix.RTN_ANYCAST, netlink.SCOPE_UNIVERSE, enclosed6.Addr().AsSlice()
	}
	return r
}

func allOf(fam int) *net.IPNet {
	if fam == unix.AF_INET6 {
		return &net.IPNet{IP: net.IPv6zero, Mask: net.CIDRMask(0, 128)}
	}
	return &net.IPNet{IP: net.IPv4zero.To4(), Mask: net.CIDRMask(0, 32)}
}

// addSource gives lo the address that an enclosed namespace's flows have.
func (p *policy) addSource(fam int) error {
	err := p.h.AddrAdd(&netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: loIndex, Name: "lo"}}, source(fam))
	if err == nil {
		err = p.awaitSource(fam)
	}
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("redirect: address %s on lo: %w", enclosedAddr(fam), err)
	}
	return nil
}

// sourceLimit is how long the kernel may take to make an address local.
const sourceLimit = 5 * time.Second

// awaitSource waits until routing knows that the address is of this host. Over
// IPv6 the kernel leaves that to a worker, and until then a flow would count as
// one that is not from this host, and be lost without a word.
func (p *policy) awaitSource(fam int) error {
	for end := time.Now().Add(sourceLimit); ; time.Sleep(time.Millisecond) {
		routes, err := p.h.RouteGet(enclosedAddr(fam).Addr().AsSlice())
		if err == nil && len(routes) > 0 && routes[0].Type == unix.RTN_LOCAL {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("not local within %v", sourceLimit)
		}
	}
}

func (p *policy) dropSource(fam int) error {
	err := p.h.AddrDel(&netlink.GenericLink{LinkAttrs: netlink.LinkAttrs{Index: loIndex, Name: "lo"}}, source(fam))
	if err != nil && !errors.Is(err, unix.EADDRNOTAVAIL) {
		return fmt.Errorf("redirect: delete address %s on lo: %w", enclosedAddr(fam), err)
	}
	return nil
}

func source(fam int) *netlink.Addr {
	a := enclosedAddr(fam)
	addr := &netlink.Addr{IPNet: &net.IPNet{IP: a.Addr().AsSlice(), Mask: net.CIDRMask(a.Bits(), a.Bits())}}
	if fam == unix.AF_INET6 {
		addr.Flags = unix.IFA_F_NODAD // in force at once
	}
	return addr
}

// enclose writes what stands in front of all else in an enclosed namespace: by
// interfaces that are not kept nothing enters or leaves.
func (t *table) enclose(p *Plan, pre, post *chain) {
	if !p.Enclosed {
		return
	}
	in, out := []statement{iifNot("lo")}, []statement{oifNot("lo")}
	for _, k := range p.Keep {
		in, out = append(in, iifNot(k.Name)), append(out, oifNot(k.Name))
	}
	pre.add(append(in, count(countGuard), drop())...)
	post.add(append(out, count(countGuard), drop())...)
}

// links writes what an enclosed namespace does with the networks of a link:
// those of kept interfaces are left alone. All others lead nowhere, so that to
// let addresses of a link pass, as in any other namespace, would be to let them
// wait for an answer.
func (t *table) links(p *Plan, implicit *chain) {
	if !p.Enclosed {
		implicit.add(daddr(netip.MustParsePrefix("169.254.0.0/16")), going("direct"))
		implicit.add(daddr(netip.MustParsePrefix("fe80::/10")), going("direct"))
		return
	}
	for _, k := range p.Keep {
		for _, n := range k.Networks {
			implicit.add(oif(k.Name), daddr(n), going("direct"))
		}
	}
}

// nowhere refuses what an enclosed namespace would send by its way in, over
// IPv4: by routing, so that the sender's call fails with ENETUNREACH. The kernel
// sends no ICMP error there, since every address behind lo counts as one of this
// host, which its source would have to be.
func (t *table) nowhere(p *Plan, c *chain) {
	if p.Enclosed {
		c.add(isFamily(ip4), oif("lo"), setMark(p.Marks, p.Marks.Direct()), accept())
	}
}

func (p *Plan) checkEnclosure() error {
	if !p.Enclosed {
		if len(p.Keep) > 0 {
			return errors.New("redirect: interfaces are kept in an enclosed namespace only")
		}
		return nil
	}
	if !p.Local || len(p.Interfaces) > 0 {
		return errors.New("redirect: an enclosed namespace has flows of its own only: Local, and no Interfaces")
	}
	for _, k := range p.Keep {
		if k.Name == "lo" {
			return errors.New("redirect: lo is always kept")
		}
		for _, n := range k.Networks {
			if !n.IsValid() {
				return fmt.Errorf("redirect: an invalid network of %s", k.Name)
			}
		}
	}
	return nil
}
