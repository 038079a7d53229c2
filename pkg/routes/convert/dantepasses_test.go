package convert

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/tproxyd/tproxyd/pkg/flow"
	"github.com/tproxyd/tproxyd/pkg/routes"
)

// simRoute is a route as a simulation of Dante's client sees it.
type simRoute struct {
	to, command, method string
	protocols           []string // of proxyprotocol; nil: not stated
	direct              bool
	server              int
}

func (r simRoute) String() string {
	via := "direct"
	if !r.direct {
		via = fmt.Sprintf("192.0.2.%d port = 1080", r.server)
	}
	s := fmt.Sprintf("route { from: 0/0 to: %s via: %s", r.to, via)
	if r.command != "" {
		s += " command: " + r.command
	}
	if r.method != "" {
		s += " method: " + r.method
	}
	if r.protocols != nil {
		s += " proxyprotocol: " + strings.Join(r.protocols, " ")
	}
	return s + " }"
}

// about tells whether the destination and the command of a route are those of a
// flow.
func (r simRoute) about(f flow.Flow) bool {
	if r.command == "connect" && f.Network == flow.UDP || r.command == "udpassociate" && f.Network == flow.TCP {
		return false
	}
	switch {
	case r.to == ".":
		return f.Name != ""
	case r.to[0] == '.':
		return strings.HasSuffix(f.Name, r.to)
	case f.Name != "":
		return false
	case r.to == "0/0":
		return true
	}
	return netip.MustParsePrefix(r.to).Contains(f.Dst.Addr())
}

// in tells whether a pass can take the route for a flow.
func (r simRoute) in(pass string, f flow.Flow) bool {
	if r.direct || pass == "direct" {
		return r.direct && pass == "direct"
	}
	list := r.protocols
	if list == nil {
		list = []string{"socks_v4", "socks_v5"}
	}
	switch pass {
	case "socks_v4":
		if f.Network == flow.UDP || f.Name != "" || f.Dst.Addr().Is6() || r.method == "username" {
			return false
		}
	case "http":
		if f.Network == flow.UDP {
			return false
		}
	}
	return slices.Contains(list, pass)
}

// simulate returns where Dante's client sends a flow.
func simulate(list []simRoute, f flow.Flow) string {
	if len(list) == 0 {
		return "DIRECT"
	}
	for _, pass := range []string{"direct", "socks_v4", "socks_v5", "http"} {
		for _, r := range list {
			if r.in(pass, f) && r.about(f) {
				if r.direct {
					return "DIRECT"
				}
				return fmt.Sprintf("192.0.2.%d", r.server)
			}
		}
	}
	return "DENY"
}

// TestDantePasses: for any routes and flows, the rules decide as Dante's client
// does, which goes through its routes once for each protocol.
func TestDantePasses(t *testing.T) {
	rnd := rand.New(rand.NewPCG(11, 12))
	pick := func(words ...string) string { return words[rnd.IntN(len(words))] }
	var flows []flow.Flow
	for _, n := range []flow.Network{flow.TCP, flow.UDP} {
		for _, to := range []string{"10.1.2.3", "10.9.9.9", "203.0.113.1", "2001:db8::1", "www.example.org", "www.example.net"} {
			f := flow.Flow{Network: n, Dst: netip.MustParseAddrPort("198.18.0.1:80"), Src: netip.MustParseAddrPort("10.0.0.1:9")}
			if a, err := netip.ParseAddr(to); err == nil {
				f.Dst = netip.AddrPortFrom(a, 80)
			} else {
				f.Name = to
			}
			flows = append(flows, f)
		}
	}
	for range 1000 {
		var list []simRoute
		text := "resolveprotocol: fake\n"
		for i := range rnd.IntN(6) {
			r := simRoute{
				to: pick("10.0.0.0/8", "10.1.0.0/16", "0.0.0.0/0", "0/0", ".", ".example.org", "2001:db8::/32"), command: pick("", "", "connect", "udpassociate"),
				method: pick("", "", "none", "username"), direct: rnd.IntN(5) == 0, server: i + 1,
			}
			switch rnd.IntN(6) {
			case 0:
				r.protocols = []string{"socks_v4"}
			case 1:
				r.protocols = []string{"socks_v5"}
			case 2:
				r.protocols = []string{"http"}
			case 3:
				r.protocols = []string{"socks_v4", "socks_v5"}
			}
			list = append(list, r)
			text += r.String() + "\n"
		}
		res, err := Convert(Dante, strings.NewReader(text))
		if err != nil {
			t.Fatal(err)
		}
		table, diags := routes.Parse("", strings.NewReader(string(res.Rules)), routes.Options{})
		if table == nil {
			t.Fatal(diags)
		}
		for _, f := range flows {
			rule := table.Match(f)
			got := rule.Action.String()
			if len(rule.Servers) > 0 {
				got, _, _ = strings.Cut(rule.Servers[0].String(), ":")
			}
			if rule.Action == routes.HTTP && f.Network == flow.UDP {
				got = "DENY"
			}
			if want := simulate(list, f); got != want {
				t.Fatalf("%s to %s: %s, want %s\n%s\n%s", f.Network, f.Target(), got, want, text, res.Rules)
			}
		}
	}
}
