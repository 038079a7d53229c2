package redirect

import (
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/tproxyd/tproxyd/pkg/flow"
)

func join(host, port string) string { return net.JoinHostPort(host, port) }

// asked is one thing that is tried and what should come of it.
type asked struct{ what, got string }

func (w *world) expect(n *netns, want ...asked) {
	w.t.Helper()
	got := make([]asked, len(want))
	for i, a := range want {
		f := strings.Fields(a.what)
		got[i].what = a.what
		if f[0] == "ping" {
			got[i].got = ping(n, f[1])
		} else {
			got[i].got = ask(n, f[0], f[1])
		}
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(asked{})); diff != "" {
		w.t.Errorf("wanted (-), got (+):\n%s", diff)
	}
}

// forwarded is what a client of the gateway finds with worldPlan.
func forwarded() []asked {
	return []asked{
		{"tcp 203.0.113.5:80", "proxy 203.0.113.5:80 lan"},
		{"tcp [2001:db8:a::5]:80", "proxy [2001:db8:a::5]:80 lan"},
		{"tcp 198.18.3.4:443", "proxy 198.18.3.4:443 lan"},
		{"tcp [fd74:7072:6f78::5]:443", "proxy [fd74:7072:6f78::5]:443 lan"},
		{"udp 203.0.113.5:7000", "proxy 203.0.113.5:7000 lan hello"},
		{"udp [2001:db8:a::5]:7000", "proxy [2001:db8:a::5]:7000 lan hello"},
		{"udp 198.18.3.4:7000", "proxy 198.18.3.4:7000 lan hello"},
		{"udp [fd74:7072:6f78::5]:7000", "proxy [fd74:7072:6f78::5]:7000 lan hello"},
		{"udp 203.0.113.9:7000", "proxy 203.0.113.9:7000 lan hello"}, // a first hop is one for TCP

		{"tcp 198.51.100.5:80", "server 198.51.100.5:80"},
		{"tcp [2001:db8:b::5]:80", "server [2001:db8:b::5]:80"},
		{"udp 198.51.100.5:7000", "server hello"},
		{"ping 198.51.100.5", "answer"},
		{"ping 2001:db8:b::5", "answer"},
		{"tcp 203.0.113.9:7000", "server 203.0.113.9:7000"}, // a first hop
		{"tcp [2001:db8:a::9]:7000", "server [2001:db8:a::9]:7000"},
		{"tcp 203.0.113.9:80", "proxy 203.0.113.9:80 lan"}, // and no other port of it
		{"ping 10.7.1.1", "answer"},
		{"ping 2001:db8:1::1", "answer"},

		{"tcp 198.51.100.200:80", "ECONNREFUSED"},
		{"tcp [2001:db8:b:ffff::1]:80", "ECONNREFUSED"},
		{"udp 198.51.100.200:7000", "EHOSTUNREACH"},
		{"ping 198.51.100.200", "prohibited"},
		{"ping 203.0.113.5", "prohibited"},
		{"ping 2001:db8:a::5", "prohibited"},
		{"ping 198.18.3.4", "prohibited"},
		{"tcp 198.51.100.5:7001", "ECONNREFUSED"}, // by the block with a port

		{"udp 198.51.100.5:53", "dns 198.51.100.5:53 lan hello"},
		{"udp [2001:db8:b::5]:53", "dns [2001:db8:b::5]:53 lan hello"},
		{"tcp 198.51.100.5:53", "dns 198.51.100.5:53 lan"},
		{"tcp [2001:db8:b::5]:53", "dns [2001:db8:b::5]:53 lan"},
		{"udp 10.7.1.1:53", "dns 10.7.1.1:53 lan hello"}, // the gateway itself
		{"udp [2001:db8:1::1]:53", "dns [2001:db8:1::1]:53 lan hello"},
		{"udp 203.0.113.5:53", "dns 203.0.113.5:53 lan hello"},
	}
}

func TestForwarded(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.start(worldPlan())
	w.expect(w.client, forwarded()...)
	w.leaked()
	n, err := w.r.Counters()
	if err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]Count{"diverted": n.Diverted, "datagrams": n.Datagrams, "dns": n.DNS, "direct": n.Direct, "denied": n.Denied, "refused": n.Refused} {
		if c.Packets == 0 || c.Bytes == 0 {
			t.Errorf("counter %s stayed at zero", what)
		}
	}
	if n.Guard.Packets != 0 {
		t.Errorf("the guard dropped %d packets", n.Guard.Packets)
	}
}

// With the strictest reverse path filter, as wg-quick sets it, the same holds.
func TestReversePathFilter(t *testing.T) {
	t.Parallel()
	for _, filter := range []string{"0", "1", "2"} {
		t.Run(filter, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.gateway.run("for i in all lo lan0 wan0; do sysctl -qw net.ipv4.conf.$i.rp_filter="+filter+"; done",
				"sysctl -qw net.ipv4.conf.all.src_valid_mark=1")
			p := worldPlan()
			p.Local = true
			w.start(p)
			w.expect(w.client,
				asked{"tcp 203.0.113.5:80", "proxy 203.0.113.5:80 lan"},
				asked{"tcp 198.51.100.5:80", "server 198.51.100.5:80"},
				asked{"udp 203.0.113.5:7000", "proxy 203.0.113.5:7000 lan hello"},
				asked{"udp 198.51.100.5:53", "dns 198.51.100.5:53 lan hello"})
			w.expect(w.gateway,
				asked{"tcp 203.0.113.5:80", "proxy 203.0.113.5:80 lo"},
				asked{"udp 203.0.113.5:7000", "proxy 203.0.113.5:7000 lo hello"},
				asked{"tcp 198.51.100.5:80", "server 198.51.100.5:80"},
				asked{"udp 198.51.100.5:53", "dns 198.51.100.5:53 lo hello"})
			w.leaked()
		})
	}
}

// local is what the gateway itself finds with worldPlan and Local.
func local() []asked {
	return []asked{
		{"tcp 203.0.113.5:80", "proxy 203.0.113.5:80 lo"},
		{"tcp [2001:db8:a::5]:80", "proxy [2001:db8:a::5]:80 lo"},
		{"tcp 198.18.3.4:443", "proxy 198.18.3.4:443 lo"},
		{"udp 203.0.113.5:7000", "proxy 203.0.113.5:7000 lo hello"},
		{"udp [2001:db8:a::5]:7000", "proxy [2001:db8:a::5]:7000 lo hello"},
		{"udp 198.18.3.4:7000", "proxy 198.18.3.4:7000 lo hello"},
		{"udp [fd74:7072:6f78::5]:7000", "proxy [fd74:7072:6f78::5]:7000 lo hello"},
		{"tcp 198.51.100.5:80", "server 198.51.100.5:80"},
		{"tcp [2001:db8:b::5]:80", "server [2001:db8:b::5]:80"},
		{"udp 198.51.100.5:7000", "server hello"},
		{"tcp 203.0.113.9:7000", "server 203.0.113.9:7000"},
		{"ping 198.51.100.5", "answer"},
		{"ping 2001:db8:b::5", "answer"},
		{"tcp 198.51.100.200:80", "ECONNREFUSED"},
		{"tcp [2001:db8:b:ffff::1]:80", "ECONNREFUSED"},
		{"ping 203.0.113.5", "prohibited"},
		{"udp 198.51.100.5:53", "dns 198.51.100.5:53 lo hello"},
		{"udp [2001:db8:b::5]:53", "dns [2001:db8:b::5]:53 lo hello"},
		{"tcp 198.51.100.5:53", "dns 198.51.100.5:53 lo"},
		{"tcp [2001:db8:b::5]:53", "dns [2001:db8:b::5]:53 lo"},
		{"udp 127.0.0.53:53", "dns 127.0.0.53:53 lo hello"},
		{"udp 127.0.0.1:53", "dns 127.0.0.1:53 lo hello"},
		{"udp [::1]:53", "dns [::1]:53 lo hello"},
		{"udp 10.7.1.1:53", "dns 10.7.1.1:53 lo hello"},
		{"tcp 127.0.0.53:53", "dns 127.0.0.53:53 lo"},
		{"tcp [::1]:53", "dns [::1]:53 lo"},
	}
}

// answerOn starts a service in the network namespace of the calling thread.
func answerOn(t *testing.T, addr string) {
	l, err := net.Listen("tcp", addr)
	if err != nil {
		t.Error(err)
		return
	}
	t.Cleanup(func() { l.Close() })
	go answer(l, func(net.Conn) string { return "service" })
}

func TestLocal(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := worldPlan()
	p.Local = true
	w.start(p)
	w.expect(w.gateway, local()...)
	w.expect(w.client, forwarded()...)
	w.leaked()
	// A service of the gateway answers, to the client and to itself.
	w.gateway.do(func() { answerOn(t, ":7777") })
	w.serveUDP(w.gateway, 7777)
	w.expect(w.client, asked{"tcp 10.7.1.1:7777", "service"}, asked{"tcp [2001:db8:1::1]:7777", "service"},
		asked{"udp 10.7.1.1:7777", "server hello"}, asked{"udp [2001:db8:1::1]:7777", "server hello"})
	w.expect(w.server, asked{"tcp 192.0.2.1:7777", "service"}, asked{"tcp [2001:db8:2::1]:7777", "service"}, asked{"ping 192.0.2.1", "answer"},
		asked{"udp 192.0.2.1:7777", "server hello"}, asked{"udp [2001:db8:2::1]:7777", "server hello"})
	w.expect(w.gateway, asked{"tcp 127.0.0.1:7777", "service"}, asked{"tcp 10.7.1.1:7777", "service"},
		asked{"udp 127.0.0.1:7777", "server hello"}, asked{"udp 10.7.1.1:7777", "server hello"})
}

// Nobody listening: refused at once, and nothing leaves.
func TestDeadListener(t *testing.T) {
	t.Parallel()
	refused := []asked{
		{"tcp 203.0.113.5:80", "ECONNREFUSED"},
		{"tcp [2001:db8:a::5]:80", "ECONNREFUSED"},
		{"tcp 198.18.3.4:443", "ECONNREFUSED"},
		{"udp [2001:db8:a::5]:7000", "ECONNREFUSED"},
		{"udp [fd74:7072:6f78::5]:7000", "ECONNREFUSED"},
		{"udp [2001:db8:a::5]:53", "ECONNREFUSED"},
		{"tcp 203.0.113.5:53", "ECONNREFUSED"},
		{"tcp [2001:db8:a::5]:53", "ECONNREFUSED"},
		{"tcp 198.51.100.5:80", "server 198.51.100.5:80"},
		{"tcp [2001:db8:b::5]:80", "server [2001:db8:b::5]:80"},
		{"ping 198.51.100.5", "answer"},
		{"ping 2001:db8:b::5", "answer"},
	}
	for _, c := range []struct {
		name  string
		kill  func(*world, Plan)
		local string // what this host's own datagram gets, over IPv4
	}{
		// The kernel has no address to send that error from: see the package comment.
		{"sockets closed", func(w *world, p Plan) { w.unlisten() }, "nothing"},
		{"killed", func(w *world, p Plan) {
			w.unlisten()
			w.r.release() // what the kernel does to the descriptors of a dead process
		}, "ECONNREFUSED"},
		{"closed plan", func(w *world, p Plan) { w.apply(p.Closed()) }, "ECONNREFUSED"},
		{"stopped", func(w *world, p Plan) { w.unlisten(); w.r.Close(true) }, "ECONNREFUSED"},
		{"reflected marks", func(w *world, p Plan) {
			w.gateway.run("sysctl -qw net.ipv4.fwmark_reflect=1 net.ipv6.fwmark_reflect=1")
			w.apply(p.Closed())
		}, "ECONNREFUSED"},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			p := worldPlan()
			p.Local = true
			c.kill(w, w.start(p))
			// A child of another test that is just being made has all of it for a
			// moment longer, or the sockets that were closed last.
			for range 100 {
				heard := false
				for _, to := range []string{"tcp 203.0.113.5:80", "tcp 203.0.113.5:53", "udp [2001:db8:a::5]:7000", "udp [2001:db8:a::5]:53"} {
					network, addr, _ := strings.Cut(to, " ")
					heard = heard || ask(w.client, network, addr) != "ECONNREFUSED"
				}
				if !heard && (c.name != "killed" || !strings.Contains(w.gateway.run("nft list tables"), aliveName)) {
					break
				}
			}
			w.expect(w.client, refused...)
			w.expect(w.gateway, refused...)
			for _, what := range []string{"udp 203.0.113.5:53", "udp 203.0.113.5:7000"} {
				w.expect(w.client, asked{what, "ECONNREFUSED"})
				w.expect(w.gateway, asked{what, c.local})
			}
			w.leaked()
		})
	}
}

// Flows that are opened from outside, to port forwards and to routed hosts, are
// none of ours, whichever way their packets go.
func TestOpenedFromOutside(t *testing.T) {
	t.Parallel()
	for _, withLocal := range []bool{false, true} {
		w := newWorld(t)
		p := worldPlan()
		p.Local = withLocal
		p.Blocks = []Block{{Proxy: ranges("0.0.0.0/0", "::/0")}} // the server's own address too
		w.start(p)
		w.gateway.run(`nft add table ip nat`, `nft add chain ip nat pre '{ type nat hook prerouting priority dstnat; }'`,
			`nft add rule ip nat pre iifname wan0 meta l4proto { tcp, udp } th dport 8080 dnat to 10.7.1.2:7777`)
		w.serveUDP(w.client, 7777)
		w.client.do(func() {
			l, err := net.Listen("tcp", ":7777")
			if err != nil {
				t.Error(err)
				return
			}
			t.Cleanup(func() { l.Close() })
			go answer(l, func(net.Conn) string { return "lan service" })
		})
		w.expect(w.server,
			asked{"tcp 192.0.2.1:8080", "lan service"},
			asked{"tcp 10.7.1.2:7777", "lan service"},
			asked{"tcp [2001:db8:1::2]:7777", "lan service"},
			asked{"udp 192.0.2.1:8080", "server hello"},
			asked{"udp 10.7.1.2:7777", "server hello"},
			asked{"udp [2001:db8:1::2]:7777", "server hello"},
			asked{"ping 10.7.1.2", "answer"},
			asked{"ping 2001:db8:1::2", "answer"})
		w.expect(w.client, asked{"tcp 192.0.2.2:80", "proxy 192.0.2.2:80 lan"}, asked{"tcp [2001:db8:2::2]:80", "proxy [2001:db8:2::2]:80 lan"})
	}
}

// Bits outside of the mask are left as others set them.
func TestForeignMarkBits(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := worldPlan()
	p.Local = true
	w.start(p)
	w.gateway.run(`nft -f - <<'N'
table inet other {
	counter kept {}
	chain pre { type filter hook prerouting priority raw; iifname lan0 meta mark set 0xffff0fff; }
	chain out { type route hook output priority raw; ip daddr 203.0.113.5 meta mark set 0x1; }
	chain in { type filter hook input priority 0; iifname lan0 meta mark & 0xffff0fff == 0xffff0fff counter name kept; iifname lo meta mark & 0xffff0fff == 0x1 counter name kept; }
	chain pass { type filter hook forward priority 0; iifname lan0 meta mark & 0xffff0fff == 0xffff0fff counter name kept; }
}
N`)
	kept := func() string { return w.gateway.run("nft list counter inet other kept") }
	for _, s := range []struct {
		from *netns
		what asked
	}{
		{w.client, asked{"tcp 203.0.113.5:80", "proxy 203.0.113.5:80 lan"}},
		{w.client, asked{"tcp 198.51.100.5:80", "server 198.51.100.5:80"}},
		{w.client, asked{"udp 203.0.113.5:53", "dns 203.0.113.5:53 lan hello"}},
		{w.gateway, asked{"tcp 203.0.113.5:80", "proxy 203.0.113.5:80 lo"}},
	} {
		before := kept()
		w.expect(s.from, s.what)
		if kept() == before {
			t.Errorf("%s: the bits of others were lost", s.what.what)
		}
	}
}

func TestAdmit(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := worldPlan()
	p.Local = true
	p = w.start(p)
	addr := func(s string) Admission { return Admission{Addr: mustAddr(s), Timeout: time.Minute} }
	before := []asked{
		{"tcp " + join(byName4, "80"), "proxy 203.0.113.77:80 lan"}, {"tcp " + join(byName6, "80"), "proxy [2001:db8:a::77]:80 lan"},
		{"ping " + byName4, "prohibited"},
	}
	w.expect(w.client, before...)
	w.leaked()
	if err := w.r.Admit([]Admission{addr(byName4), addr(byName6)}); err != nil {
		t.Fatal(err)
	}
	after := []asked{
		{"tcp " + join(byName4, "80"), "server 203.0.113.77:80"}, {"tcp " + join(byName6, "80"), "server [2001:db8:a::77]:80"},
		{"udp " + join(byName4, "7000"), "server hello"}, {"ping " + byName4, "answer"}, {"ping " + byName6, "answer"},
	}
	w.expect(w.client, after...)
	w.expect(w.gateway, after...)
	w.apply(p) // keeps it
	w.expect(w.client, after...)
	p.Readmit = []Admission{}
	w.apply(p) // does not
	w.expect(w.client, before...)

	// Scopes: a port, and a protocol.
	p.Readmit = []Admission{
		{Addr: mustAddr(byName4), Scopes: []Scope{{Network: flow.TCP, Ports: PortRange{80, 80}}}, Timeout: time.Minute},
		{Addr: mustAddr(byName6), Scopes: []Scope{{Network: flow.TCP}}, Timeout: time.Minute}}
	w.apply(p)
	w.expect(w.client,
		asked{"tcp " + join(byName4, "80"), "server 203.0.113.77:80"}, asked{"tcp " + join(byName4, "7000"), "proxy 203.0.113.77:7000 lan"},
		asked{"udp " + join(byName4, "80"), "proxy 203.0.113.77:80 lan hello"}, asked{"ping " + byName4, "prohibited"},
		asked{"tcp " + join(byName6, "80"), "server [2001:db8:a::77]:80"}, asked{"ping " + byName6, "prohibited"})

	// A block that denies a port does so for what was let in only if it is final.
	all4, all6 := Range{From: mustAddr("0.0.0.0"), To: mustAddr("255.255.255.255")}, Range{From: mustAddr("::"), To: mustAddr("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")}
	deny := Block{Networks: TCP, Ports: []PortRange{{80, 80}}, Deny: []Range{all4, all6}}
	p.Readmit = []Admission{addr(byName4), addr(byName6)}
	for _, deny.Final = range []bool{false, true} {
		q := p
		q.Blocks = slices.Insert(slices.Clone(p.Blocks), 0, deny)
		w.apply(q)
		want4, want6 := "server 203.0.113.77:80", "server [2001:db8:a::77]:80"
		if deny.Final {
			want4, want6 = "ECONNREFUSED", "ECONNREFUSED"
		}
		w.expect(w.client, asked{"tcp " + join(byName4, "80"), want4}, asked{"tcp " + join(byName6, "80"), want6},
			asked{"udp " + join(byName4, "7000"), "server hello"}, asked{"ping " + byName6, "answer"})
	}
}

// An address in use stays on after its time; one that is not goes.
func TestAdmittedAndInUse(t *testing.T) {
	t.Parallel()
	for _, refresh := range []bool{true, false} {
		w := newWorld(t)
		p := w.start(worldPlan())
		w.r.can.refresh = refresh && w.r.can.refresh
		short := time.Second
		for began := time.Now(); ; short *= 2 { // until this machine is quick enough
			admit := func(a string, d time.Duration) {
				if err := w.r.Admit([]Admission{{Addr: mustAddr(a), Timeout: d}}); err != nil {
					t.Fatal(err)
				}
			}
			admit(proxied6, short)
			admit(proxied6, time.Minute) // longer now
			admit(proxied6, short)       // and not shorter again
			admit(proxied4, short)
			admit(byName6, short)
			admit(byName4, short)
			got := ask(w.client, "tcp", join(byName4, "80"))
			if got == "server 203.0.113.77:80" && time.Since(began) < short {
				break
			}
			if short > 10*time.Second {
				t.Fatalf("within %v: %s", short, got)
			}
			began = time.Now()
		}
		time.Sleep(short * 3 / 2)
		w.expect(w.client,
			asked{"tcp " + join(byName4, "80"), "server 203.0.113.77:80"},
			asked{"tcp " + join(byName6, "80"), "proxy [2001:db8:a::77]:80 lan"},
			asked{"tcp " + join(proxied4, "80"), "proxy 203.0.113.5:80 lan"},
			asked{"tcp " + join(proxied6, "80"), "server [2001:db8:a::5]:80"})
		list, err := w.r.Admitted()
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, a := range list {
			if a.Timeout > 2*time.Hour+4*time.Minute || a.Timeout < 30*time.Second {
				t.Errorf("%s has %v left", a.Addr, a.Timeout)
			}
			got = append(got, a.Addr.String())
		}
		if len(got) != 2 {
			t.Errorf("admitted is %v", got)
		}
		p.Readmit = list
		w.apply(p)
		w.expect(w.client, asked{"tcp " + join(byName4, "80"), "server 203.0.113.77:80"})
	}
}
