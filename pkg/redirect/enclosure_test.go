package redirect

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func enclosedPlan() Plan {
	return Plan{Local: true, DNS: true, Enclosed: true, Marks: testMarks, Table: 7470,
		Synthetic: prefixes("198.18.0.0/15", "fd74:7072:6f78::/96"), Blocks: []Block{{Proxy: ranges("0.0.0.0/0", "::/0")}}}
}

// In a namespace with nothing but lo every flow comes to us, and what cannot
// be carried is refused at once; when nobody serves it all of it is.
func TestEnclosed(t *testing.T) {
	t.Parallel()
	n := newNetns(t)
	state := func() string {
		return n.run("nft list ruleset; ip rule; ip -6 rule; ip route show table all; ip -6 route show table all; ip -o addr")
	}
	before := state()
	w := &world{t: t, gateway: n}
	p := w.start(enclosedPlan())
	w.serveUDP(n, 7777)
	w.expect(n,
		asked{"tcp 203.0.113.5:80", "proxy 203.0.113.5:80 lo"},
		asked{"tcp [2001:db8:a::5]:80", "proxy [2001:db8:a::5]:80 lo"},
		asked{"tcp 198.18.3.4:443", "proxy 198.18.3.4:443 lo"},
		asked{"tcp [fd74:7072:6f78::5]:443", "proxy [fd74:7072:6f78::5]:443 lo"},
		asked{"udp 203.0.113.5:7000", "proxy 203.0.113.5:7000 lo hello"},
		asked{"udp [2001:db8:a::5]:7000", "proxy [2001:db8:a::5]:7000 lo hello"},
		asked{"tcp 169.254.169.254:80", "proxy 169.254.169.254:80 lo"},
		asked{"udp 192.0.0.8:53", "dns 192.0.0.8:53 lo hello"},
		asked{"udp [2001:db8::53]:53", "dns [2001:db8::53]:53 lo hello"},
		asked{"udp 127.0.0.53:53", "dns 127.0.0.53:53 lo hello"},
		asked{"tcp 127.0.0.1:53", "dns 127.0.0.1:53 lo"},
		asked{"ip4:icmp 203.0.113.5", "ENETUNREACH"},
		asked{"ping 2001:db8:a::5", "prohibited"},
		asked{"ping 127.0.0.1", "answer"},
		asked{"tcp 127.0.0.1:80", "ECONNREFUSED"},
		asked{"tcp [::1]:80", "ECONNREFUSED"},
		asked{"udp 127.0.0.1:7777", "server hello"},
		asked{"udp [::1]:7777", "server hello"})
	if err := w.r.Apply(p); err != nil {
		t.Fatal(err)
	}
	if out := n.run("ip -o addr show dev lo; ip route; ip -6 route"); strings.Count(out, "192.0.0.8") != 2 || strings.Count(out, "fd74:7072:6f78:1::8") != 3 {
		t.Errorf("after a second Apply:\n%s", out)
	}
	w.r.Close(true)
	w.unlisten()
	w.expect(n,
		asked{"tcp 203.0.113.5:80", "ECONNREFUSED"},
		asked{"tcp [2001:db8:a::5]:80", "ECONNREFUSED"},
		asked{"udp 203.0.113.5:7000", "ENETUNREACH"},
		asked{"udp [2001:db8:a::5]:7000", "ECONNREFUSED"},
		asked{"udp 127.0.0.53:53", "ECONNREFUSED"},
		asked{"ip4:icmp 203.0.113.5", "ENETUNREACH"})
	if err := n.remove(); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(strings.Split(before, "\n"), strings.Split(state(), "\n")); diff != "" {
		t.Errorf("before (-) and after Remove (+):\n%s", diff)
	}
}

// The networks of a kept interface stay as they are; what goes further by it is
// taken, and another interface is closed in both directions.
func TestKeep(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	n := w.gateway
	n.do(func() { answerOn(t, ":7777") })
	w.serveUDP(n, 7777)
	p := enclosedPlan()
	p.Keep = []Kept{{"lan0", prefixes("10.7.1.0/24", "2001:db8:1::/64")}}
	w.client.do(func() { answerOn(t, ":8080") })
	w.serveUDP(w.client, 8080)
	w.start(p)
	w.expect(n,
		asked{"tcp 10.7.1.2:8080", "service"},
		asked{"tcp [2001:db8:1::2]:8080", "service"},
		asked{"udp 10.7.1.2:8080", "server hello"},
		asked{"ping 10.7.1.2", "answer"},
		asked{"udp 10.7.1.2:53", "dns 10.7.1.2:53 lo hello"},
		asked{"tcp 192.0.2.2:80", "proxy 192.0.2.2:80 lo"}, // on the link of wan0
		asked{"tcp 198.51.100.5:80", "proxy 198.51.100.5:80 lo"},
		asked{"udp [2001:db8:b::5]:7000", "proxy [2001:db8:b::5]:7000 lo hello"},
		asked{"ping 192.0.2.2", "prohibited"})
	w.expect(w.client,
		asked{"tcp 10.7.1.1:7777", "service"},
		asked{"tcp [2001:db8:1::1]:7777", "service"},
		asked{"udp 10.7.1.1:7777", "server hello"})
	if got := askFor(w.server, "tcp", "192.0.2.1:7777", wait/4); got != "nothing" {
		t.Errorf("by an interface that is not kept: %s", got)
	}
	w.leaked()
}

func TestEnclosureRefuses(t *testing.T) {
	for _, tt := range []struct {
		change func(*Plan)
		want   string
	}{
		{func(p *Plan) { p.Local = false }, "flows of its own only"},
		{func(p *Plan) { p.Interfaces = []string{"lan0"} }, "flows of its own only"},
		{func(p *Plan) { p.Keep = []Kept{{Name: "lo"}} }, "lo is always kept"},
		{func(p *Plan) { p.Keep = []Kept{{Name: "a b"}} }, "not the name of an interface"},
		{func(p *Plan) { p.Keep = []Kept{{"eth0", prefixes("10.0.0.0/8")[:0:0]}}; p.Enclosed = false }, "enclosed namespace only"},
	} {
		p := enclosedPlan()
		tt.change(&p)
		if err := p.check(); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%v, want %q", err, tt.want)
		}
	}
}

// A flow can begin as soon as Apply returns, so its source has to be of this host
// by then.
func TestSourceIsLocal(t *testing.T) {
	t.Parallel()
	n := newNetns(t)
	n.run("ip link set lo up")
	n.do(func() {
		p, err := dialPolicy()
		if err != nil {
			t.Error(err)
			return
		}
		defer p.close()
		for range 100 {
			for _, fam := range policyFamilies() {
				if err := p.addSource(fam); err != nil {
					t.Error(err)
				}
				if r, err := p.h.RouteGet(enclosedAddr(fam).Addr().AsSlice()); err != nil || r[0].Type != unix.RTN_LOCAL {
					t.Errorf("%v is routed by %v, %v", enclosedAddr(fam), r, err)
				}
				if err := p.dropSource(fam); err != nil {
					t.Error(err)
				}
			}
		}
	})
}
