package redirect

import (
	"net/netip"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

// Flows whose source was translated by this host's own rules until now come to
// us with their own, and those that were diverted until now are translated.
func TestTranslatedFlows(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := w.start(worldPlan())
	came := w.gather(&p, 1)
	w.gateway.run(`nft -f - <<'N'
table inet nat { chain post { type nat hook postrouting priority srcnat; oifname wan0 masquerade; }; }
N`)
	w.server.run("nft 'add rule inet seen pre ip saddr 10.7.1.0/24 counter name other; add rule inet seen pre ip6 saddr 2001:db8:1::/64 counter name other'")
	direct := p
	direct.Blocks = []Block{{Direct: ranges("0.0.0.0/0", "::/0")}}
	proxied := p
	proxied.Blocks = []Block{{Ifs: []string{"wlan0"}, Deny: ranges("0.0.0.0/0")}, {Proxy: ranges("0.0.0.0/0", "::/0")}}
	w.apply(direct)
	for _, to := range udpDestinations[:2] {
		c, kept := w.dialUDP(w.client, to), w.dialUDP(w.client, to)
		for range 2 {
			c.say("direct")
			c.hear("server direct")
			w.apply(proxied)
			c.say("proxied")
			a := w.expectText(came, "proxied")
			if a.d.Src != c.addr() {
				t.Errorf("%s: it came from %s, not from %s", to, a.d.Src, c.addr())
			}
			w.reply(a.d, "answer")
			c.hear("answer")
			w.apply(direct)
		}
		// Where the kernel has not forgotten it is refused.
		kept.say("direct")
		kept.hear("server direct")
		w.r.mu.Lock()
		err := w.r.apply(&proxied)
		w.r.mu.Unlock()
		if err != nil {
			t.Fatal(err)
		}
		kept.say("proxied")
		kept.hear("ECONNREFUSED")
		w.apply(direct)
		c.say("direct")
		c.hear("server direct")
	}
	// An address that is let in lets no flow out that was diverted until then.
	w.apply(proxied)
	for _, to := range []string{join(byName4, "7000"), join(byName6, "7000")} {
		c, next := w.dialUDP(w.client, to), w.dialUDP(w.client, to)
		c.say("one")
		a := w.expectText(came, "one")
		if err := w.r.Admit([]Admission{{Addr: a.d.Dst.Addr(), Timeout: time.Minute}}); err != nil {
			t.Fatal(err)
		}
		c.say("two")
		w.expectText(came, "two")
		next.say("one")
		next.hear("server one")
		w.apply(proxied)
		c.say("three")
		c.hear("server three")
	}
	if len(came) > 0 {
		t.Errorf("%q came too", (<-came).text())
	}
	if err := w.r.Close(false); err != nil {
		t.Fatal(err)
	}
	if out := w.server.run("nft list counter inet seen other"); !strings.Contains(out, "packets 0 ") {
		t.Errorf("packets came with the client's own source: %s", out)
	}
}

func TestVerdicts(t *testing.T) {
	p := Plan{DNS: true, Synthetic: prefixes("198.18.0.0/15"), Ports: Ports{UDP: 7, DNSUDP: 8}, Blocks: []Block{
		{Networks: TCP, Direct: ranges("0.0.0.0/0")},
		{Networks: UDP, Ports: []PortRange{{123, 123}}, Direct: ranges("0.0.0.0/0", "::/0")},
		{Src: prefixes("10.0.0.0/8"), Final: true, Deny: ranges("203.0.113.9/32")},
		{Ifs: []string{"lan0"}, Deny: ranges("203.0.113.128/25"), Direct: ranges("203.0.113.0/27")},
		{Direct: ranges("198.51.100.0/25", "198.51.100.200-198.51.100.209"), Proxy: ranges("203.0.113.0/24", "2001:db8::/32")},
	}}
	var s admissions
	s.clear()
	if _, err := s.add([]Admission{{Addr: mustAddr("203.0.113.9"), Timeout: time.Hour}, {Addr: mustAddr("203.0.113.99"), Timeout: time.Hour},
		{Addr: mustAddr("203.0.113.98"), Scopes: []Scope{{Network: flow.UDP, Ports: PortRange{9, 9}}}, Timeout: time.Hour}}, time.Now()); err != nil {
		t.Fatal(err)
	}
	v := newVerdicts(&p, &s, time.Now())
	closed := p.Closed()
	none := newVerdicts(&closed, &s, time.Now())
	for _, c := range []struct {
		src, dst     string
		pass, divert bool
	}{
		{"10.0.0.1:1", "198.51.100.1:7", true, false},
		{"10.0.0.1:1", "198.51.100.205:7", true, false},
		{"10.0.0.1:1", "198.51.100.210:7", false, false},
		{"10.0.0.1:1", "198.51.100.1:53", false, true},
		{"10.0.0.1:1", "203.0.113.100:7", false, true},
		{"10.0.0.1:1", "203.0.113.100:123", true, false},
		{"10.0.0.1:1", "203.0.113.30:7", true, true}, // the interface decides
		{"10.0.0.1:1", "203.0.113.200:7", false, true},
		{"10.0.0.1:1", "203.0.113.9:7", false, false}, // though admitted: final
		{"11.0.0.1:1", "203.0.113.9:7", true, false},
		{"10.0.0.1:1", "203.0.113.99:7", true, false},
		{"10.0.0.1:1", "203.0.113.98:7", false, true},
		{"10.0.0.1:1", "203.0.113.98:9", true, false},
		{"10.0.0.1:1", "198.18.0.1:7", false, true},
		{"[2001:db8:1::1]:1", "[2001:db8::1]:7", false, true},
		{"[2001:db8:1::1]:1", "[2001:db9::1]:7", false, false},
	} {
		src, dst := netip.MustParseAddrPort(c.src), netip.MustParseAddrPort(c.dst)
		if pass, divert := v.of(src, dst); pass != c.pass || divert != c.divert {
			t.Errorf("%s to %s: %v, %v", src, dst, pass, divert)
		}
		if pass, divert := none.of(src, dst); pass != c.pass || divert {
			t.Errorf("%s to %s, closed: %v, %v", src, dst, pass, divert)
		}
	}
}

// A namespace without a flow is told from one with flows: TestTranslatedFlows
// would find nothing if it were not.
func TestTracksNothing(t *testing.T) {
	t.Parallel()
	n := newNetns(t)
	n.run("nft add table inet x '{ chain o { type filter hook output priority 0; ct state new accept; }; }'")
	var c *nfnl
	var err error
	n.do(func() { c, err = dialNfnl() })
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	if !c.tracksNothing() {
		t.Error("of nothing something is remembered")
	}
	n.try("ping -c1 -W1 127.0.0.1")
	if c.tracksNothing() {
		t.Error("nothing is remembered of a ping")
	}
	most, err := strconv.Atoi(strings.TrimSpace(n.run("cat /proc/sys/net/netfilter/nf_conntrack_max")))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := c.tracked(); err != nil || got.Flows < 1 || got.Max != most {
		t.Errorf("%+v, %v, want %d at most", got, err, most)
	}
}
