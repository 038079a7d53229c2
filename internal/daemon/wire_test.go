package daemon

import (
	"math/rand/v2"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/tproxyd/tproxyd/internal/gateway"
	"github.com/tproxyd/tproxyd/pkg/flow"
	"github.com/tproxyd/tproxyd/pkg/redirect"
	"github.com/tproxyd/tproxyd/pkg/routes"
)

func TestKernelPlan(t *testing.T) {
	s := load(t, map[string]string{
		"tproxyd.toml": "[intercept]\ninterfaces = [\"lan0\"]\nlocal = true\nmark = \"0x10/0xf0\"\ntable = 99\n[dns]\npool4 = \"100.64.0.0/16\"\n",
		"socks.cnf":    "SERVER a 10.0.3.1:1081\nSERVER b socks.example.org\nPROXY_NAME @=10.0.3.2\nSOCKD5 @=a,b,[2001:db8::1] *",
	})
	p := kernelPlan(s, redirect.Ports{TCP: 7})
	p.Blocks = nil
	same(t, "plan", redirect.Plan{
		Interfaces: []string{"lan0"}, Local: true, DNS: true, Ports: redirect.Ports{TCP: 7},
		Marks: redirect.Marks{Value: 0x10, Mask: 0xf0}, Table: 99,
		Synthetic: []netip.Prefix{netip.MustParsePrefix("100.64.0.0/16"), netip.MustParsePrefix("fd74:7072:6f78::/96")},
		Servers: []netip.AddrPort{
			netip.MustParseAddrPort("10.0.3.1:1081"), netip.MustParseAddrPort("10.0.3.2:1080"), netip.MustParseAddrPort("[2001:db8::1]:1080"),
		},
	}, sortServers(p))
}

func sortServers(p redirect.Plan) redirect.Plan {
	slices.SortFunc(p.Servers, netip.AddrPort.Compare)
	return p
}

// TestKernelDecidesAsTheRules: for any flow without a name the blocks of the
// kernel's plan come to the action that Table.Match comes to.
func TestKernelDecidesAsTheRules(t *testing.T) {
	seen := map[routes.Action]int{}
	for _, rules := range []string{
		"",
		"DEFAULT DIRECT",
		"DIRECT 10.0.0.0/8\nDENY 10.1.0.0/16\nSOCKD5 @=192.0.2.9 *",
		"DENY 10.1.0.0/16\nSOCKD5 @=192.0.2.9 10.1.1.0/24\nDIRECT 10.0.0.0/8\nDEFAULT DENY",
		"SOCKD5 @=192.0.2.9 10.0.0.0/8 80-90\nDIRECT 10.0.0.0/8 proto=udp\nDENY * eq 25\nDIRECT * gt 1023 proto=tcp\nSOCKD5 @=192.0.2.9 *",
		"DENY * src=10.2.0.0/15\nDIRECT 10.0.0.0/8 if=lan0,guest\nSOCKD5 @=192.0.2.9 2001:db8::/32\nDENY ::/0\nDIRECT * eq 443 if=guest src=10.0.0.0/8",
		"DIRECT *.example.org\nDENY 10.1.0.0-10.1.0.9\nDENY * by=name\nSOCKD5 @=192.0.2.9 10.1.0.0/16 by=address\nDIRECT 0.0.0.0/0",
	} {
		s := load(t, map[string]string{"tproxyd.toml": "", "socks.cnf": rules})
		blocks := kernelPlan(s, redirect.Ports{}).Blocks
		random := rand.New(rand.NewPCG(1, 2))
		for range 5000 {
			f := randomFlow(random)
			want := s.Table.Match(f).Action
			seen[want]++
			if got := decide(blocks, f); got != want {
				t.Fatalf("%q: %+v: the kernel comes to %v, the rules to %v", rules, f, got, want)
			}
		}
	}
	for _, a := range []routes.Action{routes.Deny, routes.Direct, routes.Socks5} {
		if seen[a] < 1000 {
			t.Errorf("%d flows alone were %v", seen[a], a)
		}
	}
}

// randomFlow returns a flow between places that the rules of the test name.
func randomFlow(r *rand.Rand) flow.Flow {
	place := func() netip.Addr {
		a := [4]byte{10, byte(r.IntN(4)), byte(r.IntN(3)), byte(r.IntN(12))}
		if r.IntN(5) == 0 {
			a[0] = 11
		}
		return netip.AddrFrom4(a)
	}
	dst := place()
	if r.IntN(4) == 0 {
		dst = netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8 + byte(r.IntN(2)), 15: 1})
	}
	ports := []uint16{25, 79, 80, 85, 90, 91, 443, 1023, 1024, 65535}
	return flow.Flow{
		Network: flow.Network(r.IntN(2)),
		Src:     netip.AddrPortFrom(place(), 40000),
		Dst:     netip.AddrPortFrom(dst, ports[r.IntN(len(ports))]),
		InIf:    []string{"", "lan0", "guest", "wan0"}[r.IntN(4)],
	}
}

// decide is what redirect.Block promises that the kernel does.
func decide(blocks []redirect.Block, f flow.Flow) routes.Action {
	in := func(list []redirect.Range) bool {
		a := f.Dst.Addr()
		return slices.ContainsFunc(list, func(r redirect.Range) bool {
			return r.From.Is4() == a.Is4() && r.From.Compare(a) <= 0 && a.Compare(r.To) <= 0
		})
	}
	for _, b := range blocks {
		switch {
		case b.Networks == redirect.TCP && f.Network != flow.TCP, b.Networks == redirect.UDP && f.Network != flow.UDP,
			b.Ports != nil && !slices.ContainsFunc(b.Ports, func(p redirect.PortRange) bool { return p.From <= f.Dst.Port() && f.Dst.Port() <= p.To }),
			b.Src != nil && !slices.ContainsFunc(b.Src, func(p netip.Prefix) bool { return p.Contains(f.Src.Addr()) }),
			b.Ifs != nil && !slices.Contains(b.Ifs, f.InIf):
		case in(b.Direct):
			return routes.Direct
		case in(b.Deny):
			return routes.Deny
		case in(b.Proxy):
			return routes.Socks5
		}
	}
	return routes.Deny
}

func TestToKernel(t *testing.T) {
	a := netip.MustParseAddr("192.0.2.1")
	got := toKernel([]gateway.Admission{
		{Addr: a, Timeout: time.Minute},
		{Addr: a, Timeout: time.Second, Scopes: []routes.Scope{
			{Network: flow.UDP, Ports: routes.PortRange{From: 0, To: 65535}}, {Network: flow.TCP, Ports: routes.PortRange{From: 80, To: 90}},
		}},
	})
	same(t, "admissions", []redirect.Admission{
		{Addr: a, Timeout: time.Minute},
		{Addr: a, Timeout: time.Second, Scopes: []redirect.Scope{
			{Network: flow.UDP}, {Network: flow.TCP, Ports: redirect.PortRange{From: 80, To: 90}},
		}},
	}, got)
	if toKernel(nil) == nil {
		t.Error("no admissions are nil, which means to keep everything")
	}
}
