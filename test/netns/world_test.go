package netns_test

import (
	"fmt"
	"strings"
	"testing"
)

// world is the standard topology. Every machine can reach every other one by
// plain routing: what does not leak is kept back by the gateway alone.
//
//	client ---- gateway ---- net --+-- socks1   198.51.100.11 -> 203.0.113.11
//	 .10   LAN        uplink       +-- socks2   198.51.100.12 -> 203.0.113.12
//	                               +-- inside   198.51.100.53 DNS, .20 web
//	                               +-- outside  203.0.113.53 DNS, .80 web
//
//	LAN     192.0.2.0/24     2001:db8:1::/64   gateway .1, client .10
//	uplink  198.51.100.1     2001:db8:2::1     gateway's own address
//	IPv6    the last number and the network alike: 2001:db8:2::11, 2001:db8:3::80
//
// The SOCKS servers ask the outside's name server, and are seen by the outside
// with their 203.0.113.x address. The gateway asks the inside's.
type world struct {
	client, gateway, net, socks1, socks2, inside, outside *host

	insideDNS, outsideDNS *nameServer
	insideWeb, outsideWeb *webServer
}

const (
	socks1At, socks2At   = "198.51.100.11", "198.51.100.12"
	socks1At6, socks2At6 = "2001:db8:2::11", "2001:db8:2::12"
	socks1Out, socks2Out = "203.0.113.11", "203.0.113.12"
	socks1Out6           = "2001:db8:3::11"
	socks2Out6           = "2001:db8:3::12"
	clientAt, clientAt6  = "192.0.2.10", "2001:db8:1::10"
	lanAt, lanAt6        = "192.0.2.1", "2001:db8:1::1"
	wanAt, wanAt6        = "198.51.100.1", "2001:db8:2::1"
	insideNS, insideNS6  = "198.51.100.53", "2001:db8:2::53"
	insideAt, insideAt6  = "198.51.100.20", "2001:db8:2::20"
	outsideNS            = "203.0.113.53"
	outsideNS6           = "2001:db8:3::53"
	outsideAt            = "203.0.113.80"
	outsideAt6           = "2001:db8:3::80"
)

// newWorld builds the topology with its name servers and web servers. SOCKS
// servers are for the test to start.
func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{
		client:  newHost(t, "client"),
		gateway: newHost(t, "gateway"),
		net:     newHost(t, "net"),
		socks1:  newHost(t, "socks1"),
		socks2:  newHost(t, "socks2"),
		inside:  newHost(t, "inside"),
		outside: newHost(t, "outside"),
	}
	for _, router := range []*host{w.gateway, w.net} {
		router.sysctl(t, "net.ipv4.ip_forward", "1")
		router.sysctl(t, "net.ipv6.conf.all.forwarding", "1")
	}
	// The kernel sends about one ICMP error a second to each host. Lift that,
	// so that every refusal can be told from a hang.
	w.gateway.sysctl(t, "net.ipv4.icmp_ratelimit", "0")
	w.gateway.sysctl(t, "net.ipv4.icmp_msgs_per_sec", "100000")
	w.gateway.sysctl(t, "net.ipv6.icmp.ratelimit", "0")
	w.plugLAN(t)
	w.net.ip(t, "addr add 198.51.100.254/32 dev lo")
	w.uplink(t, w.gateway, "wan0", wanAt, wanAt6)
	w.net.ip(t,
		"route add 192.0.2.0/24 via "+wanAt+" dev wan0 onlink",
		"route add 2001:db8:1::/64 via "+wanAt6+" dev wan0 onlink")
	w.uplink(t, w.socks1, "socks1", socks1Out, socks1Out6, socks1At, socks1At6)
	w.uplink(t, w.socks2, "socks2", socks2Out, socks2Out6, socks2At, socks2At6)
	w.uplink(t, w.inside, "inside", insideAt, insideAt6, insideNS, insideNS6)
	w.uplink(t, w.outside, "outside", outsideAt, outsideAt6, outsideNS, outsideNS6)

	w.client.resolver(t, insideNS)
	w.gateway.resolver(t, insideNS)
	w.socks1.resolver(t, outsideNS)
	w.socks2.resolver(t, outsideNS)
	w.insideDNS = startNameServer(t, w.inside, []string{insideNS, insideNS6},
		"direct.example. 60 IN A "+insideAt, "direct.example. 60 IN AAAA "+insideAt6,
		"printer.lan. 60 IN A "+clientAt, "printer. 60 IN A "+clientAt,
		"2.2.0.10.in-addr.arpa. 60 IN PTR two.lan.")
	w.outsideDNS = startNameServer(t, w.outside, []string{outsideNS, outsideNS6},
		"*.example.org. 60 IN A "+outsideAt, "*.example.org. 60 IN AAAA "+outsideAt6,
		"*.example.org. 60 IN TXT \"told by the outside\"", "*.example.org. 60 IN MX 10 mail.example.org.",
		"*.example.net. 60 IN A "+outsideAt, "*.example.net. 60 IN AAAA "+outsideAt6)
	w.insideWeb = startWeb(t, w.inside, insideAt, insideAt6)
	w.outsideWeb = startWeb(t, w.outside, outsideAt, outsideAt6)
	return w
}

// plugLAN joins the client and the gateway; again after the cable was pulled.
func (w *world) plugLAN(t testing.TB) {
	t.Helper()
	connect(t, w.client, "eth0", w.gateway, "lan0")
	w.client.ip(t,
		"addr add "+clientAt+"/24 dev eth0",
		"addr add "+clientAt6+"/64 dev eth0 nodad",
		"route add default via "+lanAt,
		"route add default via "+lanAt6)
	w.gateway.ip(t,
		"addr add "+lanAt+"/24 dev lan0",
		"addr add "+lanAt6+"/64 dev lan0 nodad")
}

// uplink joins a machine to net with host routes, its first address of each
// family being the one that it speaks from; an address may state the length of
// the network that its machine believes to be in. The machine's side is called
// wan0, net's side name.
func (w *world) uplink(t testing.TB, h *host, name string, addrs ...string) {
	t.Helper()
	connect(t, h, "wan0", w.net, name)
	w.address(t, h, name, addrs...)
}

// address is uplink where the cable is there.
func (w *world) address(t testing.TB, h *host, name string, addrs ...string) {
	t.Helper()
	w.net.ip(t, "addr add fe80::1/64 dev "+name+" nodad")
	own6 := ""
	for _, a := range addrs {
		a, length, stated := strings.Cut(a, "/")
		v6 := strings.Contains(a, ":")
		if !stated {
			length = map[bool]string{false: "32", true: "128"}[v6]
		}
		if v6 && own6 == "" {
			own6 = " src " + a // which of several the kernel would take is not said
		}
		h.ip(t, "addr add "+a+"/"+length+" dev wan0 noprefixroute nodad")
		w.net.ip(t, "route add "+a+" dev "+name)
	}
	h.ip(t,
		"route add default via 198.51.100.254 dev wan0 onlink",
		"route add default via fe80::1 dev wan0"+own6)
}

// dante starts danted on both SOCKS servers, open to all, both families.
func (w *world) dante(t testing.TB) (one, two *danted) {
	t.Helper()
	one = startDanted(t, w.socks1, socks1At+":1080",
		openDante([]string{socks1At, socks1At6}, []string{socks1Out, socks1Out6}))
	two = startDanted(t, w.socks2, socks2At+":1080",
		openDante([]string{socks2At, socks2At6}, []string{socks2Out, socks2Out6}))
	return one, two
}

// observe counts at net what comes from the gateway for anybody but a SOCKS
// server: its SOCKS port, or from the gateway itself any UDP port of either of
// its addresses, since an association has one of its own, and errors about what
// came from there. It sees packets as they arrive, whatever the gateway
// says of itself.
func (w *world) observe(t testing.TB) {
	t.Helper()
	w.net.nft(t, fmt.Sprintf(`
table inet observer
delete table inet observer
table inet observer {
	counter socks { }
	counter leaked { }
	set offenders4 { type ipv4_addr . ipv4_addr . inet_proto . inet_service; size 64; flags dynamic; }
	set offenders6 { type ipv6_addr . ipv6_addr . inet_proto . inet_service; size 64; flags dynamic; }
	chain arrive {
		type filter hook prerouting priority raw; policy accept;
		iifname != "wan0" accept
		ip daddr { %s, %s } tcp dport 1080 counter name socks accept
		ip6 daddr { %s, %s } tcp dport 1080 counter name socks accept
		ip saddr %s ip daddr { %s, %s, %s, %s } meta l4proto { udp, icmp } counter name socks accept
		ip6 saddr %s ip6 daddr { %s, %s, %s, %s } meta l4proto { udp, icmpv6 } counter name socks accept
		icmpv6 type { nd-router-solicit, nd-neighbor-solicit, nd-neighbor-advert, mld-listener-report, mld2-listener-report } accept
		meta l4proto igmp accept
		counter name leaked
		meta nfproto ipv4 meta l4proto { tcp, udp } add @offenders4 { ip saddr . ip daddr . meta l4proto . th dport }
		meta nfproto ipv6 meta l4proto { tcp, udp } add @offenders6 { ip6 saddr . ip6 daddr . meta l4proto . th dport }
	}
}`, socks1At, socks2At, socks1At6, socks2At6,
		wanAt, socks1At, socks2At, socks1Out, socks2Out, wanAt6, socks1At6, socks2At6, socks1Out6, socks2Out6))
}

// leaked returns how many packets the observer saw that it should not have,
// and who sent them where.
func (w *world) leaked(t testing.TB) (int, string) {
	t.Helper()
	count := func(name string) (n int) {
		out := w.net.run(t, command{args: []string{tool(t, "nft"), "list", "counter", "inet", "observer", name}}).ok(t).out
		if _, rest, ok := strings.Cut(out, "packets "); ok {
			fmt.Sscan(rest, &n)
		}
		return n
	}
	n := count("leaked")
	if n == 0 {
		return 0, ""
	}
	var who string
	for _, set := range []string{"offenders4", "offenders6"} {
		who += w.net.run(t, command{args: []string{tool(t, "nft"), "list", "set", "inet", "observer", set}}).ok(t).out
	}
	return n, who
}

// carried returns how many packets the observer saw on their way to a SOCKS
// server.
func (w *world) carried(t testing.TB) (n int) {
	t.Helper()
	out := w.net.run(t, command{args: []string{tool(t, "nft"), "list", "counter", "inet", "observer", "socks"}}).ok(t).out
	if _, rest, ok := strings.Cut(out, "packets "); ok {
		fmt.Sscan(rest, &n)
	}
	return n
}
