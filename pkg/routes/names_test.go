package routes

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

func TestName(t *testing.T) {
	local := LocalNames{Search: []string{"corp.example"}}
	from := func(src string) flow.Flow {
		return flow.Flow{Src: netip.AddrPortFrom(netip.MustParseAddr(src), 0), InIf: "lan0"}
	}
	tests := []struct {
		rules string
		want  map[string]string // NAME[ from SRC] -> kind
	}{
		{"SOCKD5 @=192.0.2.1 *", map[string]string{
			"www.example.org": "synthetic", "printer": "real", "nas.local": "real", "local": "real", "x.lan": "real", "x.home.arpa": "real",
			"x.internal": "real", "db.corp.example": "real", "corp.example": "real", "xcorp.example": "synthetic",
			"1.0.0.10.in-addr.arpa": "real", "1.1.168.192.in-addr.arpa": "real", "172.in-addr.arpa": "synthetic", "16.172.in-addr.arpa": "real",
			"64.100.in-addr.arpa": "real", "63.100.in-addr.arpa": "synthetic", "8.8.8.8.in-addr.arpa": "synthetic", "x.10.in-addr.arpa": "synthetic",
			"1.d.f.ip6.arpa": "real", "8.e.f.ip6.arpa": "real", "7.e.f.ip6.arpa": "synthetic", "1.0.0.2.ip6.arpa": "synthetic",
			"1" + strings.Repeat(".0", 31) + ".ip6.arpa": "real",
		}},
		{"SOCKD5 @=192.0.2.1 nas.local\nDENY *.lan\nDIRECT printer\nRESOLVE remote *.internal\nSOCKD5 @=192.0.2.2 *", map[string]string{
			"nas.local": "synthetic", "x.lan": "synthetic", "printer": "real, DIRECT", "x.internal": "synthetic", "other.local": "real",
		}},
		// R1: all DIRECT or DENY, and one DIRECT.
		{"DENY *.example.org proto=udp\nDIRECT *.example.org\nSOCKD5 @=192.0.2.1 *", map[string]string{
			"www.example.org": "real, DIRECT", "example.org": "synthetic",
		}},
		{"DIRECT *.example.org eq 443\nSOCKD5 @=192.0.2.1 *", map[string]string{"www.example.org": "synthetic"}},
		{"DIRECT *.example.org eq 443", map[string]string{"www.example.org": "real, DIRECT", "www.example.net": "synthetic"}},
		{"DIRECT *.example.org neq 25", map[string]string{"www.example.org": "synthetic"}}, // too many ports for the set
		{"DEFAULT DIRECT", map[string]string{"www.example.org": "real, DIRECT"}},
		{"RESOLVE remote *\nDIRECT *", map[string]string{"www.example.org": "synthetic"}},
		{"RESOLVE local-then-remote *\nDIRECT *", map[string]string{"www.example.org": "real, DIRECT"}},
		// R4: DENY alone.
		{"DENY *.example.org\nDENY *.example.net reject=dns-nxdomain\nDENY *.example.com reject=dns-refused\nSOCKD5 @=192.0.2.1 *", map[string]string{
			"www.example.org": "synthetic", "www.example.net": "NXDOMAIN", "www.example.com": "REFUSED",
		}},
		// R5.
		{"RESOLVE local *.example.org\nRESOLVE remote www.example.net\nRESOLVE local-then-remote .example.net\nSOCKD5 @=192.0.2.1 *", map[string]string{
			"www.example.org": "real", "www.example.net": "synthetic", "ftp.example.net": "real or synthetic", "example.net": "synthetic",
		}},
		{"PROXY_NAME @=192.0.2.1\nSOCKD5 @=192.0.2.1 *.own.example\nSOCKD5 @=192.0.2.1 *", map[string]string{
			"www.own.example": "synthetic", "www.example.org": "real or synthetic",
		}},
		// udp= makes no name DIRECT whose TCP has servers, and none DENY; of a rule
		// for UDP alone it is all that there is.
		{"SOCKD5 @=192.0.2.1 *.example.org udp=direct\nSOCKD5 @=192.0.2.1 *.example.net udp=deny\nDENY *", map[string]string{
			"www.example.org": "synthetic", "www.example.net": "synthetic",
		}},
		{"SOCKD5 @=192.0.2.1 *.example.org proto=udp udp=direct\nDENY *", map[string]string{"www.example.org": "real, DIRECT"}},
		{"SOCKD5 @=192.0.2.1 *.example.org proto=udp udp=deny\nDENY * reject=dns-refused", map[string]string{"www.example.org": "REFUSED"}},
		{"SOCKD5 @=192.0.2.1 *.example.org proto=udp udp=deny\nDIRECT *.example.org\nDENY *", map[string]string{"www.example.org": "real, DIRECT"}},
		// By client.
		{"DIRECT * src=10.7.0.0/16\nSOCKD5 @=192.0.2.1 *", map[string]string{
			"www.example.org from 10.7.0.1": "real, DIRECT", "www.example.org from 10.8.0.1": "synthetic",
		}},
		{"DIRECT *.example.org src=10.7.0.0/16\nDIRECT *.example.net\nSOCKD5 @=192.0.2.1 *", map[string]string{
			"www.example.org from 10.7.0.1": "synthetic", // the kernel's set knows no client
			"www.example.org from 10.8.0.1": "synthetic", "www.example.net from 10.7.0.1": "real, DIRECT",
		}},
		// What is final the kernel asks before the set, so it may ask for anything.
		{"SOCKD5 @=192.0.2.1 * if=guest\nDENY * eq 25\nDIRECT *.example.org\nDENY *", map[string]string{"www.example.org": "real, DIRECT"}},
		{"SOCKD5 @=192.0.2.1 *.example.org if=guest\nDIRECT *.example.org\nDENY *", map[string]string{"www.example.org": "synthetic"}},
	}
	for _, tt := range tests {
		table := mustParse(t, tt.rules)
		for text, want := range tt.want {
			name, src, ok := strings.Cut(text, " from ")
			if !ok {
				src = "10.9.0.1"
			}
			v := table.Name(name, from(src), local)
			if v.Kind.String() != want || v.Why == "" || v.Rule == nil {
				t.Errorf("%q: %s: %s (%s), want %s", tt.rules, text, v.Kind, v.Why, want)
			}
		}
	}
	table := mustParse(t, "SOCKD5 @=192.0.2.1 *")
	if v := table.Name("printer", from("10.9.0.1"), LocalNames{None: true}); v.Kind != Synthetic {
		t.Error("a name is local where none is")
	}
}

func TestDirectScopes(t *testing.T) {
	tests := []struct{ rules, addr, want string }{
		{"DIRECT *.example.org", "11.0.0.1", "all"},
		{"DIRECT *.example.org", "2001:db8::1", "all"},
		{"DIRECT *.example.org 80,443", "11.0.0.1", "tcp 80-80 tcp 443-443 udp 80-80 udp 443-443"},
		{"DIRECT *.example.org proto=tcp", "11.0.0.1", "tcp 0-65535"},
		{"DENY *.example.org eq 80\nDIRECT *.example.org 80-82 proto=tcp", "11.0.0.1", "tcp 81-82"},
		// An address rule before all DIRECT names is final, the kernel asks it first;
		// one between them takes its part.
		{"SOCKD5 @=192.0.2.1 11.0.0.0/8 eq 80\nDIRECT *.example.org 80-82 proto=tcp", "11.0.0.1", "tcp 80-82"},
		{"DIRECT x.y\nSOCKD5 @=192.0.2.1 11.0.0.0/8\nDIRECT *.example.org", "11.0.0.1", "none"},
		{"DIRECT x.y\nSOCKD5 @=192.0.2.1 11.0.0.0/8\nDIRECT *.example.org", "12.0.0.1", "all"},
		{"DIRECT x.y\nSOCKD5 @=192.0.2.1 11.0.0.0/8 eq 80\nDIRECT *.example.org 80-82 proto=tcp", "11.0.0.1", "tcp 81-82"},
		{"DIRECT x.y\nSOCKD5 @=192.0.2.1 11.0.0.0/8 proto=udp\nDIRECT *.example.org", "11.0.0.1", "tcp 0-65535"},
		{"DIRECT x.y\nSOCKD5 @=192.0.2.1 11.0.0.0/8 eq 80\nDIRECT *.example.org", "11.0.0.1", "none"}, // the rest has too many ports: less, not more
		{"DIRECT *.example.org\nSOCKD5 @=192.0.2.1 11.0.0.0/8", "11.0.0.1", "all"},
		// UDP that udp= makes DIRECT passes by the blocks, TCP does not by the set.
		{"DIRECT x.y\nSOCKD5 @=192.0.2.1 11.0.0.0/8 udp=direct\nDIRECT *.example.org", "11.0.0.1", "none"},
		{"DIRECT x.y\nSOCKD5 @=192.0.2.1 11.0.0.0/8 udp=direct\nDIRECT *.example.org", "12.0.0.1", "all"},
		{"DIRECT x.y\nSOCKD5 @=192.0.2.1 11.0.0.0/8 proto=udp udp=direct src=10.7.0.0/16\nDIRECT *.example.org", "11.0.0.1", "all"},
		{"SOCKD5 @=192.0.2.1 *.example.org proto=udp udp=direct", "11.0.0.1", "udp 0-65535"},
		{"DIRECT x.y\nSOCKD5 @=192.0.2.1 11.0.0.0/8 80-82 src=10.7.0.0/16 udp=direct\nDENY 11.0.0.0/8 80-82\nDIRECT *.example.org 80-90", "11.0.0.1",
			"tcp 83-90 udp 83-90"}, // the set knows no client
		// What is DIRECT for every address needs no set; what is proxied has no place in it.
		{"DEFAULT DIRECT", "11.0.0.1", "none"},
		{"SOCKD5 @=192.0.2.1 *", "11.0.0.1", "none"},
		{"RESOLVE local *\nDIRECT *.example.org", "11.0.0.1", "none"},
	}
	for _, tt := range tests {
		table := mustParse(t, tt.rules)
		scopes, ok := table.DirectScopes("www.example.org", flow.Flow{}, netip.MustParseAddr(tt.addr), LocalNames{})
		var words []string
		for _, s := range scopes {
			words = append(words, fmt.Sprintf("%s %d-%d", s.Network, s.Ports.From, s.Ports.To))
		}
		got := strings.Join(words, " ")
		if !ok {
			got = "none"
		} else if len(scopes) == 0 {
			got = "all"
		}
		if got != tt.want {
			t.Errorf("%q for %s: %s, want %s", tt.rules, tt.addr, got, tt.want)
		}
	}
}

// TestAddressRule: an earlier rule takes addresses from a DIRECT name only for
// the network that it does something else with.
func TestAddressRule(t *testing.T) {
	for rules, want := range map[string]string{
		"DENY 11.0.0.0/8":                                         "1 1",
		"DENY 11.0.0.0/8 proto=tcp":                               "1 0",
		"DENY 11.0.0.0/8 proto=udp\nDENY 11.0.0.0/9":              "2 1",
		"SOCKD5 @=192.0.2.1 11.0.0.0/8 udp=direct":                "1 0",
		"SOCKD5 @=192.0.2.1 11.0.0.0/8 udp=deny":                  "1 1",
		"SOCKD5 @=192.0.2.1 11.0.0.0/8 proto=udp udp=direct":      "0 0",
		"SOCKD5 @=192.0.2.1 * eq 25 udp=deny\nDIRECT 11.0.0.0/24": "0 0",
	} {
		table := mustParse(t, rules+"\nDIRECT *.example.org")
		direct := table.Rules()[strings.Count(rules, "\n")+1]
		var got []string
		for _, n := range []flow.Network{flow.TCP, flow.UDP} {
			line := 0
			if r := table.AddressRule(direct, n); r != nil {
				line = r.Line
			}
			got = append(got, fmt.Sprint(line))
		}
		if got := strings.Join(got, " "); got != want {
			t.Errorf("%q: %s, want %s", rules, got, want)
		}
	}
}

func TestCarrierRule(t *testing.T) {
	table := mustParse(t, "DENY *.example.org eq 25", "SOCKD5 @=192.0.2.1 *.example.org src=10.7.0.0/16", "SOCKD5 @=192.0.2.2 *.example.org eq 80", "DIRECT *")
	from := func(src string) flow.Flow { return flow.Flow{Src: netip.AddrPortFrom(netip.MustParseAddr(src), 0)} }
	for src, want := range map[string]string{"10.7.0.1": "192.0.2.1", "10.8.0.1": "192.0.2.2"} {
		if r, denied := table.CarrierRule("www.example.org", from(src)); r == nil || r.Servers[0].String() != want || denied {
			t.Errorf("%s: %v, %v, want %s", src, r, denied, want)
		}
	}
	if r, denied := table.CarrierRule("www.example.net", from("10.7.0.1")); r != nil || denied {
		t.Error(r, denied)
	}
	// Who is denied the name has nobody asked for it, whoever else is served.
	table = mustParse(t, "DENY *.example.org src=10.7.0.0/16", "SOCKD5 @=192.0.2.1 *")
	if r, denied := table.CarrierRule("www.example.org", from("10.7.0.1")); r != nil || !denied {
		t.Error(r, denied)
	}
}

// TestAdmittedPassesAsTheRulesSay: an address that was admitted for a client's
// name passes only where the rules, asked with the address alone or with the
// name beside it, say DIRECT, for every client.
func TestAdmittedPassesAsTheRulesSay(t *testing.T) {
	rnd := rand.New(rand.NewPCG(7, 8))
	admitted, passed := 0, 0
	for range 10_000 {
		table := mustParse(t, randomRules(rnd, 1+rnd.IntN(12)))
		name := []string{"a.example", "b.a.example", "c.b.a.example", "c.example", "x.y.z"}[rnd.IntN(5)]
		asker := randomFlow(rnd)
		addr := randomFlow(rnd).Dst.Addr()
		scopes, ok := table.DirectScopes(name, asker, addr, LocalNames{})
		if !ok {
			continue
		}
		admitted++
		blocks := table.Kernel()
		for range 50 {
			f := randomFlow(rnd)
			f.Name, f.Dst = "", netip.AddrPortFrom(addr, f.Dst.Port())
			inSet := len(scopes) == 0 || slices.ContainsFunc(scopes, func(s Scope) bool {
				return s.Network == f.Network && s.Ports.From <= f.Dst.Port() && f.Dst.Port() <= s.Ports.To
			})
			action, final := kernelDecides(blocks, f)
			passes := action == Direct || inSet && !final
			byAddr := table.Match(f).ActionFor(f.Network) == Direct
			byBoth := false
			for _, r := range table.rules { // the first that the name or the address matches
				named := f
				named.Name = name
				if r.matchesPort(&f) && r.matchesClient(&f) && (onlyRule(table, r, named) || onlyRule(table, r, f)) {
					byBoth = r.ActionFor(f.Network) == Direct
					break
				}
			}
			if passes && !byAddr && !byBoth {
				t.Fatalf("%s asked for by %v, %s: %+v passes", name, asker.Src, rulesText(table), f)
			}
			if passes {
				passed++
			}
		}
	}
	if admitted < 100 || passed < 1000 {
		t.Errorf("only %d admitted, %d passed", admitted, passed)
	}
}

// onlyRule tells whether the destination of f is one of r's.
func onlyRule(t *Table, r *Rule, f flow.Flow) bool {
	one := &Table{rules: []*Rule{{dest: r.dest}, {Default: true, dest: dest{anyName: true, prefixes: []netip.Prefix{all4, all6}}}}}
	return reference(one, f) == one.rules[0]
}

func rulesText(t *Table) string {
	var b strings.Builder
	for _, r := range t.rules {
		b.WriteString("\n\t" + r.Text)
	}
	return b.String()
}
