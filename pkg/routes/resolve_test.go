package routes

import (
	"fmt"
	"strings"
	"testing"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

func TestResolvers(t *testing.T) {
	table := mustParse(t,
		"RESOLVE local www.corp.example via=10.0.0.9",
		"RESOLVE local *.corp.example via=10.0.0.53,10.0.0.54:5353,2001:db8::53,[2001:db8::54],[2001:db8::55]:5353",
		"RESOLVE local *.plain.example",
		"RESOLVE remote *.remote.example via=10.0.0.55",
		"RESOLVE local-then-remote * via=::ffff:10.0.0.56",
		"SOCKD5 @=192.0.2.1 *")
	for name, want := range map[string]string{
		"www.corp.example":   "[10.0.0.9:53]",
		"x.www.corp.example": "[10.0.0.53:53 10.0.0.54:5353 [2001:db8::53]:53 [2001:db8::54]:53 [2001:db8::55]:5353]",
		"a.plain.example":    "[]",
		"x.remote.example":   "[10.0.0.55:53]",
		"corp.example":       "[10.0.0.56:53]",
		"single":             "[10.0.0.56:53]",
	} {
		if got := fmt.Sprint(table.Resolvers(name)); got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
	for name, want := range map[string]string{
		"www.corp.example": "socks.cnf:1 says local; asked is 10.0.0.9:53 (socks.cnf:1)",
		"a.plain.example":  "socks.cnf:3 says local",
		"x.remote.example": "socks.cnf:4 says remote; if this host has to ask for it, it asks 10.0.0.55:53 (socks.cnf:4)",
		"x.example":        "socks.cnf:5 says local-then-remote; asked is 10.0.0.56:53 (socks.cnf:5)",
	} {
		if v := table.Name(name, flow.Flow{}, LocalNames{}); v.Why != want {
			t.Errorf("%s: %s, want %s", name, v.Why, want)
		}
	}
	if got := mustParse(t, "DIRECT *").Resolvers("www.example.org"); got != nil {
		t.Error(got)
	}
}

// TestFirstResolveLine: the first line that matches counts, wherever it is found.
func TestFirstResolveLine(t *testing.T) {
	lines := []string{"RESOLVE local a.b.c", "RESOLVE local *.b.c", "RESOLVE local *.c", "RESOLVE local *", "RESOLVE local b.c", "RESOLVE local a.b.c"}
	for i := range lines { // each rotation
		order := append(append([]string{}, lines[i:]...), lines[:i]...)
		table := mustParse(t, strings.Join(order, "\n"))
		for _, name := range []string{"a.b.c", "x.b.c", "b.c", "c", "x.a.b.c", "d"} {
			var want *resolveRule
			for _, r := range table.resolves.list {
				if r.matches(name) {
					want = r
					break
				}
			}
			if got := table.resolves.of(name); got != want {
				t.Errorf("%s in %q: %+v, want %+v", name, order, got, want)
			}
		}
	}
}
