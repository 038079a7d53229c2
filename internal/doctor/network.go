package doctor

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// setting reads a key of /proc/sys/net; empty if there is none.
func setting(key string) string {
	b, err := os.ReadFile("/proc/sys/net/" + key)
	if err != nil {
		return ""
	}
	return string(bytes.TrimSpace(b))
}

// interfaces finds named interfaces that are not there, and forwarding that is
// off.
func interfaces(names []string) (list []Finding) {
	for _, name := range names {
		i, err := net.InterfaceByName(name)
		switch {
		case err != nil:
			list = append(list, Finding{"interface", "there is no interface " + name, "its flows are taken once it is there; until then nobody is served", "correct [intercept] interfaces in tproxyd.toml; ip link lists what there is"})
		case i.Flags&net.FlagUp == 0:
			list = append(list, Finding{"interface", "interface " + name + " is down", "nobody is served", "ip link set " + name + " up"})
		}
	}
	if len(names) == 0 {
		return list
	}
	for _, s := range []struct{ key, name, family string }{
		{"ipv4/ip_forward", "net.ipv4.ip_forward", "IPv4"}, {"ipv6/conf/all/forwarding", "net.ipv6.conf.all.forwarding", "IPv6"},
	} {
		if setting(s.key) == "0" {
			list = append(list, Finding{"forwarding", s.name + " is 0", "flows that are DIRECT do not pass over " + s.family, "sysctl -w " + s.name + "=1"})
		}
	}
	return list
}

// otherRouters asks on each interface which routers there are, and finds those
// that are not this host: IPv6 of the LAN's hosts goes by them, past us.
func otherRouters(ctx context.Context, names []string) (list []Finding) {
	type answer struct {
		name string
		from []netip.Addr
	}
	answers := make(chan answer, len(names))
	for _, name := range names {
		go func() {
			from, _ := solicit(ctx, name)
			answers <- answer{name, from}
		}()
	}
	for range names {
		a := <-answers
		for _, r := range a.from {
			list = append(list, Finding{
				"router", fmt.Sprintf("another router announces itself on %s: %s", a.name, r),
				"hosts there may send IPv6 by it and not by this gateway",
				"stop its router advertisements on that network, or have the switch drop them",
			})
		}
	}
	slices.SortFunc(list, func(a, b Finding) int { return strings.Compare(a.What, b.What) })
	return list
}

// solicit sends a router solicitation (RFC 4861 section 4.1) on an interface and
// returns who else answers it in time.
func solicit(ctx context.Context, name string) ([]netip.Addr, error) {
	i, err := net.InterfaceByName(name)
	if err != nil {
		return nil, err
	}
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMPV6)
	if err != nil {
		return nil, os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	// What is solicited by an address and its scope arrives with a hop limit of 255.
	filter := unix.ICMPv6Filter{}
	for n := range filter.Data {
		filter.Data[n] = 0xffffffff
	}
	const advertisement = 134
	filter.Data[advertisement>>5] &^= 1 << (advertisement & 31)
	err = errors.Join(
		unix.SetsockoptICMPv6Filter(fd, unix.IPPROTO_ICMPV6, unix.ICMPV6_FILTER, &filter),
		unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_HOPS, 255),
		unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_IF, i.Index),
		unix.BindToDevice(fd, name),
		unix.SetsockoptIPv6Mreq(fd, unix.IPPROTO_IPV6, unix.IPV6_JOIN_GROUP, &unix.IPv6Mreq{Multiaddr: netip.MustParseAddr("ff02::1").As16(), Interface: uint32(i.Index)}),
		unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 100_000}),
	)
	if err != nil {
		return nil, err
	}
	to := &unix.SockaddrInet6{Addr: netip.MustParseAddr("ff02::2").As16(), ZoneId: uint32(i.Index)}
	if err := unix.Sendto(fd, []byte{133, 0, 0, 0, 0, 0, 0, 0}, 0, to); err != nil {
		return nil, os.NewSyscallError("sendto", err)
	}
	own := ownAddrs()
	var found []netip.Addr
	b := make([]byte, 1500)
	for end := time.Now().Add(solicited); time.Now().Before(end) && ctx.Err() == nil; {
		n, from, err := unix.Recvfrom(fd, b, 0)
		sa, ok := from.(*unix.SockaddrInet6)
		if err != nil || !ok || n < 16 || b[0] != advertisement || b[6] == 0 && b[7] == 0 { // a lifetime of 0: no default router
			continue
		}
		if a := netip.AddrFrom16(sa.Addr); !own[a] && !slices.Contains(found, a) {
			found = append(found, a)
		}
	}
	return found, nil
}

// ownAddrs are the addresses of this host.
func ownAddrs() map[netip.Addr]bool {
	own := map[netip.Addr]bool{}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return own
	}
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok {
			if ip, ok := netip.AddrFromSlice(n.IP); ok {
				own[ip.Unmap()] = true
			}
		}
	}
	return own
}
