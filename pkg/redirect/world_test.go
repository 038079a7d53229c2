package redirect

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/tproxyd/tproxyd/pkg/flow"
	"golang.org/x/sys/unix"
)

// world is where packets are sent:
//
//	client ── lan0 gateway wan0 ── server
//	10.7.1.2   .1        192.0.2.1  .2      and everything in 203.0.113.0/24,
//	2001:db8:1::2 ::1 2001:db8:2::1 ::2     198.51.100.0/24, 2001:db8:a::/48, 2001:db8:b::/48
//
// The server answers TCP and UDP on ports 53, 80 and 7000, and counts what comes
// to it. Nothing is known to the client but that the gateway is its router.
type world struct {
	t                       testing.TB
	client, gateway, server *netns

	r   *Redirect
	tcp *Listener
	udp *UDPListener
	dns *DNS
}

// proxied, direct and the others are destinations behind the server.
var (
	proxied4 = "203.0.113.5"
	byName4  = "203.0.113.77" // proxied as long as nobody admits it
	proxied6 = "2001:db8:a::5"
	byName6  = "2001:db8:a::77"
)

// worldPlan is DIRECT for some, DENY for others, and proxied for the rest.
func worldPlan() Plan {
	return Plan{
		Interfaces: []string{"lan0"},
		DNS:        true,
		Marks:      testMarks,
		Table:      7470,
		Synthetic:  prefixes("198.18.0.0/15", "fd74:7072:6f78::/96"),
		Servers:    []netip.AddrPort{netip.MustParseAddrPort("203.0.113.9:7000"), netip.MustParseAddrPort("[2001:db8:a::9]:7000")},
		Blocks: []Block{
			{Networks: TCP, Ports: []PortRange{{7001, 7010}}, Deny: ranges("0.0.0.0/0", "::/0")},
			{Direct: ranges("198.51.100.0/25", "2001:db8:b::/64"), Deny: ranges("198.51.100.128/25", "2001:db8:b:ffff::/64")},
			{Proxy: ranges("0.0.0.0/0", "::/0")},
		},
	}
}

func newWorld(t testing.TB) *world {
	t.Helper()
	w := &world{t: t, client: newNetns(t), gateway: newNetns(t), server: newNetns(t)}
	// The indexes differ, since the kernel tells of carrier late if they do not.
	w.gateway.batch(
		"link add lan0 index 11 type veth peer name eth0 index 21 netns "+w.client.path,
		"link add wan0 index 12 type veth peer name eth0 index 22 netns "+w.server.path,
		"addr add fe80::1/64 dev lan0 nodad", "addr add fe80::1/64 dev wan0 nodad", // the kernel makes its own late
		"addr add 10.7.1.1/24 dev lan0", "addr add 2001:db8:1::1/64 dev lan0 nodad",
		"addr add 192.0.2.1/24 dev wan0", "addr add 2001:db8:2::1/64 dev wan0 nodad",
		"link set lan0 up", "link set wan0 up",
		"route add default via 192.0.2.2", "route add default via 2001:db8:2::2")
	w.gateway.run("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv4.icmp_ratelimit=0 net.ipv6.icmp.ratelimit=0")
	w.client.batch(
		"addr add fe80::2/64 dev eth0 nodad", "addr add 10.7.1.2/24 dev eth0", "addr add 2001:db8:1::2/64 dev eth0 nodad", "link set eth0 up",
		"route add default via 10.7.1.1", "route add default via 2001:db8:1::1")
	w.server.batch(
		"addr add fe80::2/64 dev eth0 nodad", "addr add 192.0.2.2/24 dev eth0", "addr add 2001:db8:2::2/64 dev eth0 nodad", "link set eth0 up",
		"route add default via 192.0.2.1", "route add default via 2001:db8:2::1",
		"route add local 203.0.113.0/24 dev lo", "route add local 198.51.100.0/24 dev lo", "route add local 198.18.0.0/15 dev lo",
		"route add local 2001:db8:a::/48 dev lo", "route add local 2001:db8:b::/48 dev lo", "route add local fd74:7072:6f78::/96 dev lo")
	w.server.run("sysctl -qw net.ipv6.ip_nonlocal_bind=1", // an address of a local route is none of an interface
		`nft -f - <<'N'
table inet seen {
	counter proxied {}
	counter other {}
	chain pre {
		type filter hook prerouting priority raw; policy accept;
		ip daddr { 203.0.113.5, 203.0.113.77, 198.51.100.200, 198.18.0.0/15 } counter name proxied
		ip6 daddr { 2001:db8:a::5, 2001:db8:a::77, 2001:db8:b:ffff::1, fd74:7072:6f78::/96 } counter name proxied
	}
}
N`)
	for _, port := range []int{53, 80, 7000} {
		w.serve(port)
	}
	return w
}

// seen is how many packets for proxied and denied destinations the server got.
func (w *world) seen() int {
	w.t.Helper()
	m := regexp.MustCompile(`packets (\d+)`).FindStringSubmatch(w.server.run("nft list counter inet seen proxied"))
	n, _ := strconv.Atoi(m[1])
	return n
}

// leaked fails the test if the server saw what it must not.
func (w *world) leaked() {
	w.t.Helper()
	if n := w.seen(); n != 0 {
		w.t.Errorf("%d packets of proxied destinations came to the server", n)
	}
}

// serve answers on a port of the server.
func (w *world) serve(port int) {
	w.t.Helper()
	var l net.Listener
	var err error
	w.server.do(func() { l, err = net.Listen("tcp", fmt.Sprintf(":%d", port)) })
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { l.Close() })
	go answer(l, func(c net.Conn) string { return "server " + c.LocalAddr().String() })
	w.serveUDP(w.server, port)
}

// serveUDP answers datagrams on a port of a host, from the address that each was
// sent to.
func (w *world) serveUDP(n *netns, port int) {
	w.t.Helper()
	var ps [2]*net.UDPConn
	var errs [4]error
	n.do(func() {
		ps[0], errs[0] = net.ListenUDP("udp4", &net.UDPAddr{Port: port})
		ps[1], errs[1] = net.ListenUDP("udp6", &net.UDPAddr{Port: port})
	})
	if err := errors.Join(errs[:]...); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { ps[0].Close(); ps[1].Close() })
	for i, o := range []option{{unix.SOL_IP, unix.IP_PKTINFO, ""}, {unix.SOL_IPV6, unix.IPV6_RECVPKTINFO, ""}} {
		if raw, err := ps[i].SyscallConn(); err == nil {
			raw.Control(func(fd uintptr) { errs[2+i] = switchOn(int(fd), o) })
		}
	}
	if err := errors.Join(errs[:]...); err != nil {
		w.t.Fatal(err)
	}
	go echo(ps[0], unix.SizeofCmsghdr) // in_pktinfo begins with the interface
	go echo(ps[1], unix.SizeofCmsghdr+16)
}

// echo sends back what comes. The packet info that came with it, but for the
// interface, says which address to send it from.
func echo(p *net.UDPConn, ifindex int) {
	b, oob := make([]byte, 2048), make([]byte, 64)
	for {
		n, m, _, from, err := p.ReadMsgUDPAddrPort(b, oob)
		if err != nil {
			return
		}
		clear(oob[ifindex : ifindex+4])
		p.WriteMsgUDPAddrPort(append([]byte("server "), b[:n]...), oob[:m], from)
	}
}

// answer says something on each connection, and then repeats what comes.
func answer(l net.Listener, say func(net.Conn) string) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() {
			defer c.Close()
			fmt.Fprintln(c, say(c))
			io.Copy(c, c)
		}()
	}
}

// listen starts the transparent listeners in the gateway.
func (w *world) listen() Ports {
	w.t.Helper()
	var err, err2, err3 error
	w.gateway.do(func() {
		w.tcp, err = ListenTCP(testMarks)
		w.udp, err2 = ListenUDP(testMarks, 1)
		w.dns, err3 = ListenDNS(testMarks)
	})
	if err = errors.Join(err, err2, err3); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(w.unlisten)
	for _, l := range w.tcp.Listeners() {
		go answer(l, func(c net.Conn) string { return "proxy " + c.LocalAddr().String() + " " + inbound(c) })
	}
	for _, l := range w.dns.TCP.Listeners() {
		go answer(l, func(c net.Conn) string { return "dns " + c.LocalAddr().String() + " " + inbound(c) })
	}
	for _, c := range w.dns.UDP {
		go answerUDP(c, "dns ")
	}
	for _, c := range w.udp.Shards()[0] {
		go answerUDP(c, "proxy ")
	}
	return PortsOf(w.tcp, w.udp, w.dns)
}

// unlisten closes all listeners.
func (w *world) unlisten() { w.tcp.Close(); w.udp.Close(); w.dns.Close() }

func inbound(c net.Conn) string {
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		return err.Error()
	}
	index := 0
	ip := func(a net.Addr) netip.Addr { return a.(*net.TCPAddr).AddrPort().Addr().Unmap() }
	raw.Control(func(fd uintptr) { index, err = InboundInterface(int(fd), ip(c.LocalAddr()), ip(c.RemoteAddr())) })
	if err != nil {
		return err.Error()
	}
	if index == 1 {
		return "lo"
	}
	return "lan"
}

func answerUDP(c flow.PacketConn, name string) {
	ds := make([]flow.Datagram, 8)
	for i := range ds {
		ds[i].Data = make([]byte, 0, 2048)
	}
	for {
		n, err := c.ReadBatch(ds)
		if err != nil {
			return
		}
		for i := range ds[:n] {
			d := &ds[i]
			from := "lan"
			if d.IfIndex == 1 {
				from = "lo"
			}
			text := name + d.Dst.String() + " " + from + " " + string(d.Data)
			d.Data = append(d.Data[:0], text...)
			if rest, ok := strings.CutPrefix(text, name+d.Dst.String()+" "+from+" long"); ok {
				size, _ := strconv.Atoi(strings.TrimSpace(rest))
				d.Data = make([]byte, size, max(size, cap(d.Data)))
			}
			d.Src, d.Dst = d.Dst, d.Src
		}
		c.WriteBatch(ds[:n])
	}
}

// start opens the Redirect of the gateway with a plan that has its listeners.
func (w *world) start(p Plan) Plan {
	w.t.Helper()
	p.Ports = w.listen()
	w.r = w.gateway.open(Options{})
	w.apply(p)
	return p
}

func (w *world) apply(p Plan) {
	w.t.Helper()
	if err := w.r.Apply(p); err != nil {
		w.t.Fatal(err)
	}
}

// wait is how long an answer may take.
const wait = 4 * time.Second

// ask connects from a namespace and returns the first line that comes, or the
// error by its name. It also says if that took long, each time: once it may be for
// a machine that is busy.
func ask(n *netns, network, addr string) (got string) {
	for range 3 {
		if got = askFor(n, network, addr, wait); !strings.Contains(got, " (after ") {
			break
		}
	}
	return got
}

func askFor(n *netns, network, addr string, wait time.Duration) string {
	var got string
	began := time.Now()
	n.do(func() {
		d := net.Dialer{Timeout: wait}
		c, err := d.DialContext(context.Background(), network, addr)
		if err != nil {
			got = errName(err)
			return
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(wait))
		if !strings.HasPrefix(network, "tcp") {
			// What a reject in output says of the call itself (EPERM) is not why.
			if _, err := c.Write([]byte("hello")); errors.Is(err, unix.ENETUNREACH) {
				got = errName(err)
				return
			}
		}
		b := make([]byte, 2048)
		k, err := c.Read(b)
		if err != nil {
			got = errName(err)
			return
		}
		got = strings.TrimSpace(string(b[:k]))
	})
	if d := time.Since(began); d > time.Second && got != "nothing" {
		got += fmt.Sprintf(" (after %v)", d.Round(time.Second))
	}
	return got
}

func errName(err error) string {
	var errno unix.Errno
	if errors.As(err, &errno) {
		return unix.ErrnoName(errno)
	}
	if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded) {
		return "nothing"
	}
	return err.Error()
}

// ping sends one echo request and returns what comes of it.
func ping(n *netns, addr string) string {
	out, err := n.try("ping -n -c1 -W1 " + addr)
	switch {
	case err == nil:
		return "answer"
	case strings.Contains(out, "filtered"), strings.Contains(out, "rohibited"):
		return "prohibited"
	}
	return "nothing: " + out
}
