package gateway_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/tproxyd/tproxyd/internal/gateway"
	"github.com/tproxyd/tproxyd/internal/socksserver"
	"github.com/tproxyd/tproxyd/pkg/fakedns"
	"github.com/tproxyd/tproxyd/pkg/flow"
	"github.com/tproxyd/tproxyd/pkg/routes"
	"github.com/tproxyd/tproxyd/pkg/socks"
	"github.com/tproxyd/tproxyd/pkg/upstream"
)

// equate lets cmp look at addresses.
var equate = cmpopts.EquateComparable(netip.Addr{}, netip.AddrPort{})

func asker(addr string, ifIndex int) fakedns.Asker {
	return fakedns.Asker{Addr: netip.MustParseAddr(addr), IfIndex: ifIndex}
}

// by is an asker with a port, which the lab takes for a user's number.
func by(a fakedns.Asker, port uint16) fakedns.Asker {
	a.Port, a.Server = port, netip.MustParseAddrPort("192.0.2.53:53")
	return a
}

// TestNobodyKnowsWho: what depends on who asks is refused if that is not known.
func TestNobodyKnowsWho(t *testing.T) {
	l := newLab(t, slog.LevelInfo, socksserver.Fault{}, "DENY * uid=1\nDIRECT *")
	l.whoError = errors.New("not noted")
	a := by(asker("192.0.2.1", 0), 2)
	if got, shared := l.Decide("www.example.org", a); got != fakedns.Refused || shared {
		t.Errorf("%v, shared %v", got, shared)
	}
	if err := l.Admit("www.example.org", a, []netip.Addr{netip.MustParseAddr("192.0.2.7")}, 0); !errors.Is(err, l.whoError) {
		t.Error(err)
	}
	if _, err := l.DialRemote(t.Context(), "www.example.org", a, a.Server); !errors.Is(err, l.whoError) {
		t.Error(err)
	}
}

func TestDecide(t *testing.T) {
	tests := []struct {
		rules  string
		name   string
		from   fakedns.Asker
		want   fakedns.Verdict
		shared bool
	}{
		{"SOCKD5 @=192.0.2.1 *", "www.example.org", asker("10.0.0.1", 1), fakedns.Synthetic, true},
		{"DENY *", "www.example.org", asker("10.0.0.1", 1), fakedns.Synthetic, true},
		{"RESOLVE local *\nSOCKD5 @=192.0.2.1 *", "www.example.org", asker("10.0.0.1", 1), fakedns.Real, true},
		{"SOCKD5 @=192.0.2.1 *", "printer.lan", asker("10.0.0.1", 1), fakedns.Real, true},
		{"DIRECT *.example.org\nSOCKD5 @=192.0.2.1 *", "www.example.org", asker("10.0.0.1", 1), fakedns.RealDirect, true},
		{"PROXY_NAME @=192.0.2.1\nSOCKD5 @=192.0.2.1 *", "www.example.org", asker("10.0.0.1", 1), fakedns.LocalFirst, true},
		{"DENY *.example.org reject=dns-refused", "www.example.org", asker("10.0.0.1", 1), fakedns.Refused, true},
		{"DENY *.example.org reject=dns-nxdomain", "www.example.org", asker("10.0.0.1", 1), fakedns.NXDomain, true},
		// By client: an address, an IPv4 one in IPv6 form, an interface, this host.
		{"DENY * src=10.7.0.0/16 reject=dns-refused\nDIRECT *", "www.example.org", asker("10.7.0.1", 1), fakedns.Refused, false},
		{"DENY * src=10.7.0.0/16 reject=dns-refused\nDIRECT *", "www.example.org", asker("::ffff:10.7.0.1", 1), fakedns.Refused, false},
		{"DENY * src=10.7.0.0/16 reject=dns-refused\nDIRECT *", "www.example.org", asker("10.8.0.1", 1), fakedns.RealDirect, false},
		{"DENY * if=guest reject=dns-refused\nDIRECT *", "www.example.org", asker("10.7.0.1", 2), fakedns.Refused, false},
		{"DENY * if=guest reject=dns-refused\nDIRECT *", "www.example.org", asker("10.7.0.1", 1), fakedns.RealDirect, false},
		{"DENY * if=guest reject=dns-refused\nDIRECT *", "www.example.org", asker("10.7.0.1", 0), fakedns.RealDirect, false},
		{"DENY * uid=5353 reject=dns-nxdomain\nDIRECT *", "www.example.org", by(asker("192.0.2.1", 0), 5353), fakedns.NXDomain, false},
		{"DENY * uid=5353 reject=dns-nxdomain\nDIRECT *", "www.example.org", by(asker("192.0.2.1", 0), 5354), fakedns.RealDirect, false},
		{"DENY * uid=5353 reject=dns-nxdomain\nDIRECT *", "www.example.org", by(asker("10.7.0.1", 1), 5353), fakedns.RealDirect, false},
	}
	for _, tt := range tests {
		l := newLab(t, slog.LevelInfo, socksserver.Fault{}, tt.rules)
		if got, shared := l.Decide(tt.name, tt.from); got != tt.want || shared != tt.shared {
			t.Errorf("%q: %s from %v: %v, shared %v, want %v, %v", tt.rules, tt.name, tt.from, got, shared, tt.want, tt.shared)
		}
	}
}

// TestDecideFollowsSwap: the verdicts are those of the plan in force.
func TestDecideFollowsSwap(t *testing.T) {
	l := newLab(t, slog.LevelInfo, socksserver.Fault{}, "DIRECT *")
	l.Swap(l.plan(socksserver.Fault{}, "DENY * reject=dns-nxdomain"))
	if v, _ := l.Decide("www.example.org", asker("10.0.0.1", 1)); v != fakedns.NXDomain {
		t.Errorf("verdict %v, want NXDOMAIN", v)
	}
}

func addr(s string) netip.Addr { return netip.MustParseAddr(s) }

func TestAdmit(t *testing.T) {
	port := func(n flow.Network, p uint16) routes.Scope {
		return routes.Scope{Network: n, Ports: routes.PortRange{From: p, To: p}}
	}
	const ttl = 5 * time.Minute
	tests := []struct {
		name, rules string
		from        fakedns.Asker
		want        []gateway.Admission
	}{
		{"all of it", "DIRECT *.example.org", asker("10.0.0.1", 1), []gateway.Admission{
			{Addr: addr("192.0.2.1"), Timeout: ttl + time.Minute}, {Addr: addr("2001:db8::1"), Timeout: ttl + time.Minute},
		}},
		{"its ports and protocol", "DIRECT *.example.org 80,443 proto=tcp", asker("10.0.0.1", 1), []gateway.Admission{
			{Addr: addr("192.0.2.1"), Scopes: []routes.Scope{port(flow.TCP, 80), port(flow.TCP, 443)}, Timeout: ttl + time.Minute},
			{Addr: addr("2001:db8::1"), Scopes: []routes.Scope{port(flow.TCP, 80), port(flow.TCP, 443)}, Timeout: ttl + time.Minute},
		}},
		{"not the address that an earlier rule has", "DIRECT *.example.net\nDENY 192.0.2.0/24\nDIRECT *.example.org", asker("10.0.0.1", 1), []gateway.Admission{
			{Addr: addr("2001:db8::1"), Timeout: ttl + time.Minute},
		}},
		{"proxied", "SOCKD5 @=192.0.2.9 *", asker("10.0.0.1", 1), nil},
		{"resolved here, the address decides", "RESOLVE local *\nDIRECT *.example.org", asker("10.0.0.1", 1), nil},
		{"not for this client", "SOCKD5 @=192.0.2.9 * if=guest\nDIRECT *.example.org", asker("10.0.0.1", 2), nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			l := newLab(t, slog.LevelInfo, socksserver.Fault{}, tt.rules)
			if err := l.Admit("www.example.org", tt.from, []netip.Addr{addr("192.0.2.1"), addr("2001:db8::1")}, ttl); err != nil {
				t.Fatal(err)
			}
			if d := cmp.Diff(tt.want, l.admitted, equate, cmpopts.EquateEmpty()); d != "" {
				t.Error(d)
			}
		})
	}
}

// TestAdmitFails: whoever asked must hear that the addresses are not in.
func TestAdmitFails(t *testing.T) {
	l := newLab(t, slog.LevelInfo, socksserver.Fault{}, "DIRECT *.example.org")
	full := errors.New("the set is full")
	l.opts.Admit = func([]gateway.Admission) error { return full }
	g := gateway.New(l.Plan(), l.opts)
	if err := g.Admit("www.example.org", asker("10.0.0.1", 1), []netip.Addr{addr("192.0.2.1")}, time.Minute); !errors.Is(err, full) {
		t.Errorf("error %v, want %v", err, full)
	}
}

// TestReadmit: what the kernel lets pass by name is judged anew under another
// plan, and nothing that is not in force comes back.
func TestReadmit(t *testing.T) {
	both := []string{"www.example.org at 192.0.2.1", "www.example.net at 192.0.2.1", "www.example.net at 192.0.2.2"}
	const left = 42 * time.Second
	tests := []struct {
		name, after string
		inForce     []string
		want        []string // ADDR[ PORT…]
	}{
		{"the same rules", "DIRECT *.example.org\nDIRECT *.example.net", []string{"192.0.2.1", "192.0.2.2"}, []string{"192.0.2.1", "192.0.2.1", "192.0.2.2"}},
		{"one name no longer", "DIRECT *.example.org", []string{"192.0.2.1", "192.0.2.2"}, []string{"192.0.2.1"}},
		{"other ports", "DIRECT *.example.org eq 80 proto=tcp", []string{"192.0.2.1"}, []string{"192.0.2.1 tcp 80-80"}},
		{"proxied now", "SOCKD5 @=192.0.2.9 *", []string{"192.0.2.1", "192.0.2.2"}, nil},
		{"the address denied before", "DIRECT *.example.com\nDENY 192.0.2.1\nDIRECT *.example.org\nDIRECT *.example.net", []string{"192.0.2.1", "192.0.2.2"}, []string{"192.0.2.2"}},
		{"one has run out", "DIRECT *.example.org\nDIRECT *.example.net", []string{"192.0.2.2"}, []string{"192.0.2.2"}},
		{"nobody knows why it is there", "DIRECT *.example.org", []string{"192.0.2.3"}, nil},
		{"nothing in force", "DIRECT *.example.org", nil, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			l := newLab(t, slog.LevelInfo, socksserver.Fault{}, "DIRECT *.example.org\nDIRECT *.example.net")
			for _, s := range both {
				name, at, _ := strings.Cut(s, " at ")
				if err := l.Admit(name, asker("10.0.0.1", 1), []netip.Addr{addr(at)}, time.Hour); err != nil {
					t.Fatal(err)
				}
			}
			var inForce []gateway.Admission
			for _, a := range tt.inForce {
				inForce = append(inForce, gateway.Admission{Addr: addr(a), Timeout: left}, gateway.Admission{Addr: addr(a), Timeout: time.Second})
			}
			list := l.Readmit(l.plan(socksserver.Fault{}, tt.after), inForce)
			if list == nil {
				t.Fatal("nil, which means to keep everything")
			}
			var got []string
			for _, a := range list {
				s := a.Addr.String()
				for _, scope := range a.Scopes {
					s += fmt.Sprintf(" %s %d-%d", scope.Network, scope.Ports.From, scope.Ports.To)
				}
				if got = append(got, s); a.Timeout != left {
					t.Errorf("%s for %v, want what is left, %v", a.Addr, a.Timeout, left)
				}
			}
			if d := cmp.Diff(tt.want, got, cmpopts.SortSlices(strings.Compare), cmpopts.EquateEmpty()); d != "" {
				t.Error(d)
			}
		})
	}
}

// TestReadmitTwice: a plan that denies for a moment and one that allows again
// find the same admissions, as long as the kernel has them.
func TestReadmitTwice(t *testing.T) {
	l := newLab(t, slog.LevelInfo, socksserver.Fault{}, "DIRECT *.example.org")
	l.Admit("www.example.org", asker("10.0.0.1", 1), []netip.Addr{addr("192.0.2.1")}, time.Hour)
	inForce := []gateway.Admission{{Addr: addr("192.0.2.1"), Timeout: time.Minute}}
	if list := l.Readmit(l.plan(socksserver.Fault{}, "DENY *"), inForce); len(list) != 0 {
		t.Errorf("denied, and let in: %v", list)
	}
	if list := l.Readmit(l.Plan(), inForce); len(list) != 1 {
		t.Errorf("the old plan after one that failed: %v, want one admission", list)
	}
	l.Readmit(l.Plan(), nil)
	if list := l.Readmit(l.Plan(), inForce); len(list) != 0 {
		t.Errorf("what was out of force came back: %v", list)
	}
}

// TestMemoryIsBounded: many names do not make the memory grow for ever, and
// the last ones are in it.
func TestMemoryIsBounded(t *testing.T) {
	const bound, n = 1 << 16, 1<<16 + 1000
	l := newLab(t, slog.LevelInfo, socksserver.Fault{}, "DIRECT *.example.org")
	var inForce []gateway.Admission
	last := addr("10.0.0.0")
	for range n {
		last = last.Next()
		if err := l.Admit("www.example.org", asker("10.0.0.1", 1), []netip.Addr{last}, time.Hour); err != nil {
			t.Fatal(err)
		}
		inForce = append(inForce, gateway.Admission{Addr: last, Timeout: time.Minute})
	}
	list := l.Readmit(l.Plan(), inForce)
	if len(list) != bound {
		t.Errorf("%d of %d are remembered, want %d", len(list), n, bound)
	}
	if list := l.Readmit(l.Plan(), inForce[n-1:]); len(list) != 1 {
		t.Error("the last one is forgotten")
	}
}

// connector notes what it is asked for and connects to nothing.
type connector struct {
	servers []string
	balance bool
	target  flow.Target
}

var errNoNetwork = errors.New("no network here")

func (c *connector) Connect(_ context.Context, g *upstream.Group, r upstream.Request) (*upstream.Carried, error) {
	for _, s := range g.Servers {
		c.servers = append(c.servers, s.Name)
	}
	c.balance, c.target = g.Order == upstream.Random, r.To
	return nil, errNoNetwork
}

func (c *connector) Associate(context.Context, *upstream.Group, upstream.Request, *upstream.Server) (*upstream.Association, error) {
	return nil, errNoNetwork
}

func TestDialRemote(t *testing.T) {
	const servers = "SERVER a 192.0.2.1\nSERVER b 192.0.2.2\nSERVER c 192.0.2.3\n"
	tests := []struct {
		name, rules string
		from        fakedns.Asker
		want        []string
		balance     bool
	}{
		{"its rule", "SOCKD5 @=a,b *.example.org eq 443\nSOCKD5 @=c *", asker("10.0.0.1", 1), []string{"a", "b"}, false},
		{"its rule, in any order", "BALANCE\nSOCKD5 @=a,b *.example.org\nSOCKD5 @=c *", asker("10.0.0.1", 1), []string{"a", "b"}, true},
		{"the rule of its client", "SOCKD5 @=a * if=guest\nSOCKD5 @=c *", asker("10.0.0.1", 2), []string{"a"}, false},
		{"the rule before PROXY_NAME", "PROXY_NAME @=b\nSOCKD5 @=c *", asker("10.0.0.1", 1), []string{"c"}, false},
		{"PROXY_NAME", "PROXY_NAME @=b,a\nSOCKD5 @=c *.example.net\nDIRECT *", asker("10.0.0.1", 1), []string{"b", "a"}, false},
		{"nobody for a denied name", "PROXY_NAME @=b,a\nSOCKD5 @=c *.example.net\nDENY *", asker("10.0.0.1", 1), nil, false},
		{"nobody for who is denied it", "DENY *.example.org if=guest\nSOCKD5 @=c *", asker("10.0.0.1", 2), nil, false},
		{"nobody", "SOCKD5 @=c *.example.net\nDENY *", asker("10.0.0.1", 1), nil, false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			l := newLab(t, slog.LevelInfo, socksserver.Fault{}, servers+tt.rules)
			c := &connector{}
			l.opts.Upstream = c
			resolver := netip.MustParseAddrPort("198.51.100.53:53")
			conn, err := gateway.New(l.Plan(), l.opts).DialRemote(t.Context(), "www.example.org", tt.from, resolver)
			if conn != nil || errors.Is(err, errNoNetwork) != (tt.want != nil) {
				t.Errorf("%v, error %v", conn, err)
			}
			if d := cmp.Diff(tt.want, c.servers); d != "" || c.balance != tt.balance {
				t.Errorf("balance %v, servers %s", c.balance, d)
			}
			if want := (flow.Target{Addr: resolver.Addr(), Port: 53}); tt.want != nil && c.target != want {
				t.Errorf("asked for %v, want %v", c.target, want)
			}
			if tt.want == nil && !strings.Contains(err.Error(), "www.example.org") {
				t.Errorf("error %v does not name the name", err)
			}
		})
	}
}

// TestNewPlan: what the rules say of a server is what is asked upstream.
func TestNewPlan(t *testing.T) {
	parse := func(text string) *routes.Table {
		table, diags := routes.Parse("socks.cnf", strings.NewReader(text), routes.Options{})
		if diags.HasErrors() {
			t.Fatal(diags)
		}
		return table
	}
	table := parse("SERVER a 192.0.2.1:1081 credential=office\nSERVER b socks.example.org pipeline=off\nSOCKD5 @=b,a *\n")
	p, err := gateway.NewPlan(table, routes.LocalNames{}, func(name string) *socks.Auth { return &socks.Auth{Username: name, Password: secret} })
	if err != nil {
		t.Fatal(err)
	}
	b, a := p.Servers()[0], p.Servers()[1]
	if a.Name != "a" || a.Addr != netip.MustParseAddrPort("192.0.2.1:1081") || a.Auth == nil || a.Auth.Username != "office" || a.Auth.Password != secret {
		t.Errorf("a is %+v", a)
	}
	if b.Name != "b" || b.Host != "socks.example.org" || b.Addr.Port() != 1080 || b.Auth != nil || b.Pipeline != upstream.PipelineOff || b.Protocol != upstream.Socks5 {
		t.Errorf("b is %+v", b)
	}
	_, err = gateway.NewPlan(table, routes.LocalNames{}, func(string) *socks.Auth { return nil })
	if err == nil || !strings.Contains(err.Error(), `"office"`) {
		t.Errorf("without the credential: error %v", err)
	}
}
