package redirect

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// After a reload a proxied flow stays proxied, and a DIRECT flow that may not
// pass any more is reset, and sends nothing more (leak comes before loss).
func TestReloadAndFlows(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := w.start(worldPlan())
	if err := w.r.Admit([]Admission{{Addr: mustAddr(byName4), Timeout: time.Minute}}); err != nil {
		t.Fatal(err)
	}
	proxied := []*flowing{w.dial("203.0.113.5:80"), w.dial("[2001:db8:a::5]:80")}
	direct := []*flowing{w.dial("198.51.100.5:80"), w.dial("[2001:db8:b::5]:80"), w.dial("198.51.100.9:80"), w.dial(byName4 + ":80")}
	for _, f := range append(proxied, direct...) {
		f.echo(t)
	}
	w.server.run(`nft 'add chain inet seen later { type filter hook prerouting priority raw; }
add rule inet seen later ip daddr { 198.51.100.5, 198.51.100.9, 203.0.113.77 } tcp flags & psh != 0 counter name other
add rule inet seen later ip6 daddr 2001:db8:b::5 tcp flags & psh != 0 counter name other'`) // not an acknowledgement that was delayed
	p.Readmit = []Admission{}
	p.Blocks = []Block{
		{Deny: ranges("198.51.100.9/32"), Direct: ranges("203.0.113.5/32", "2001:db8:a::5/128")},
		{Proxy: ranges("0.0.0.0/0", "::/0")},
	}
	w.apply(p)
	for _, f := range proxied {
		f.echo(t)
	}
	for _, f := range direct {
		if err := f.try(); !errors.Is(err, unix.ECONNRESET) {
			t.Errorf("%s: %v, not a reset", f.c.RemoteAddr(), err)
		}
	}
	if out := w.server.run("nft list counter inet seen other"); !strings.Contains(out, "packets 0 ") {
		t.Errorf("of flows that may not pass there came still: %s", out)
	}
	w.expect(w.client, asked{"tcp 203.0.113.5:80", "server 203.0.113.5:80"}, asked{"tcp 198.51.100.5:80", "proxy 198.51.100.5:80 lan"})
}

// What a plan does not readmit is not let in again by a packet that was under way
// while the plan came into force.
func TestReadmitUnderLoad(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := w.start(worldPlan())
	ctx, stop := context.WithCancel(t.Context())
	var senders sync.WaitGroup
	defer func() { stop(); senders.Wait() }()
	for range 2 {
		senders.Go(func() {
			var c net.Conn
			var err error
			w.client.do(func() { c, err = net.Dial("udp", join(byName4, "7000")) })
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			for ctx.Err() == nil {
				c.Write([]byte("x")) // what is refused is an error of the next one
			}
		})
	}
	admitted := func() int {
		list, err := w.r.Admitted()
		if err != nil {
			t.Fatal(err)
		}
		return len(list)
	}
	p.Readmit = []Admission{}
	for i := range 30 {
		if err := w.r.Admit([]Admission{{Addr: mustAddr(byName4), Timeout: time.Minute}}); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Millisecond) // some packets
		if admitted() != 1 {
			t.Fatal("it was not admitted")
		}
		w.apply(p)
		if n := admitted(); n != 0 {
			t.Fatalf("reload %d: %d addresses are still let pass", i+1, n)
		}
	}
}

// Packets of sockets with the Own mark are never diverted, port 53 included.
func TestOwnSockets(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := worldPlan()
	p.Local = true
	w.start(p)
	for _, addr := range []string{"203.0.113.5:80", "[2001:db8:a::5]:80", "203.0.113.5:53", "[2001:db8:a::5]:53", "198.51.100.200:80"} {
		for _, network := range []string{"tcp", "udp"} {
			var got string
			w.gateway.do(func() {
				d := net.Dialer{Timeout: wait, Control: testMarks.Control}
				c, err := d.DialContext(context.Background(), network, addr)
				if err != nil {
					got = err.Error()
					return
				}
				defer c.Close()
				got = hear(c, "hello")
			})
			if !strings.HasPrefix(got, "server ") {
				t.Errorf("%s %s: %s", network, addr, got)
			}
		}
	}
}

// hear says something and returns what comes, or the error.
func hear(c net.Conn, say string) string {
	c.SetDeadline(time.Now().Add(wait))
	if _, err := c.Write([]byte(say)); err != nil {
		return errName(err)
	}
	b := make([]byte, 1<<16)
	n, err := c.Read(b)
	if err != nil {
		return errName(err)
	}
	return string(b[:n])
}

// An answer that is longer than its way allows arrives all the same, from the
// address that was asked.
func TestLongAnswer(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := worldPlan()
	p.Local = true
	w.start(p)
	for _, from := range []*netns{w.client, w.gateway} {
		for _, addr := range []string{"203.0.113.5:53", "[2001:db8:a::5]:53"} {
			for _, size := range []int{1, 1400, 1473, 4096, 60000} {
				var got string
				from.do(func() {
					c, err := net.Dial("udp", addr)
					if err != nil {
						got = err.Error()
						return
					}
					defer c.Close()
					got = hear(c, fmt.Sprintf("long%d", size))
				})
				if len(got) != size {
					t.Errorf("%s, %d bytes: got %d: %.40q", addr, size, len(got), got)
				}
			}
		}
	}
}

// Each condition of a block.
func TestBlocks(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.client.run("ip addr add 10.7.1.3/24 dev eth0", "ip addr add 2001:db8:1::3/64 dev eth0 nodad preferred_lft 0",
		"ip route add 198.51.100.3 via 10.7.1.1 src 10.7.1.3", "ip -6 route add 2001:db8:b::3 via 2001:db8:1::1 src 2001:db8:1::3")
	p := worldPlan()
	p.Local = true
	all := ranges("0.0.0.0/0", "::/0")
	p.Blocks = []Block{
		{Networks: UDP, Ports: []PortRange{{7000, 7000}}, Direct: all},
		{Networks: TCP, Ports: []PortRange{{7000, 7001}, {7005, 7005}}, Direct: ranges("198.51.100.0/24"), Deny: ranges("2001:db8:b::/48")},
		{Src: prefixes("10.7.1.3/32", "2001:db8:1::3/128"), Direct: all},
		{Ifs: []string{"lan0", "wlan0"}, Networks: TCP, Proxy: ranges("198.51.100.0/24", "2001:db8:b::/48")},
		{Networks: TCP, Direct: ranges("198.51.100.0/25", "2001:db8:b::/64")},
	}
	w.start(p)
	w.expect(w.client,
		asked{"udp 198.51.100.5:7000", "server hello"}, asked{"udp [2001:db8:b::5]:7000", "server hello"},
		asked{"udp 198.51.100.5:7001", "EHOSTUNREACH"}, // by no block
		asked{"tcp 198.51.100.5:7000", "server 198.51.100.5:7000"}, asked{"tcp [2001:db8:b::5]:7000", "ECONNREFUSED"},
		asked{"tcp 198.51.100.3:80", "server 198.51.100.3:80"}, asked{"tcp [2001:db8:b::3]:80", "server [2001:db8:b::3]:80"},
		asked{"ping 198.51.100.3", "answer"}, asked{"ping 2001:db8:b::3", "answer"},
		asked{"tcp 198.51.100.5:80", "proxy 198.51.100.5:80 lan"}, asked{"tcp [2001:db8:b::5]:80", "proxy [2001:db8:b::5]:80 lan"},
		// What a rule with a port or a protocol says is not said of a ping.
		asked{"ping 198.51.100.5", "prohibited"}, asked{"ping 2001:db8:b::5", "prohibited"},
		asked{"tcp 203.0.113.5:80", "ECONNREFUSED"})
	w.expect(w.gateway,
		asked{"tcp 198.51.100.5:80", "server 198.51.100.5:80"}, asked{"tcp [2001:db8:b::5]:80", "server [2001:db8:b::5]:80"},
		asked{"tcp 203.0.113.5:80", "ECONNREFUSED"}, asked{"ping 198.51.100.5", "prohibited"})
	// The client's own errors find their way out.
	w.expect(w.server, asked{"udp 10.7.1.2:9999", "ECONNREFUSED"}, asked{"udp [2001:db8:1::2]:9999", "ECONNREFUSED"})
	w.leaked()
}

// A hundred thousand prefixes, and again at a reload. Apply itself counts that all
// are there.
func TestLoad(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := w.start(worldPlan())
	r := rand.New(rand.NewPCG(1, 2))
	many := ranges("198.51.100.0/25", "0.0.0.0/32", "255.255.255.255/32")
	for len(many) < 100_000 {
		var b [4]byte
		binary.BigEndian.PutUint32(b[:], 11<<24+r.Uint32()>>1)
		pre := netip.PrefixFrom(netip.AddrFrom4(b), 24+r.IntN(9)).Masked()
		many = append(many, Range{From: pre.Addr(), To: lastOf(pre)})
	}
	p.Blocks = []Block{{Direct: many}, {Proxy: ranges("0.0.0.0/0", "::/0")}}
	for range 2 {
		began := time.Now()
		w.apply(p)
		t.Logf("%d prefixes took %v", len(many), time.Since(began).Round(time.Millisecond))
		w.works4()
	}
}

func (w *world) works4() {
	w.t.Helper()
	w.expect(w.client, asked{"tcp 198.51.100.5:80", "server 198.51.100.5:80"}, asked{"tcp 203.0.113.5:80", "proxy 203.0.113.5:80 lan"})
	w.leaked()
}
