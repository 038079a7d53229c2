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
	lines := []string{"RESOLVE local a.b.c", "RESOLVE local *.b.c", "RESOLVE local $two", "RESOLVE local *.c", "RESOLVE local *", "RESOLVE local b.c", "RESOLVE local $one", "RESOLVE local a.b.c"}
	for i := range lines { // each rotation
		order := append(append([]string{}, lines[i:]...), lines[:i]...)
		table := mustParse(t, strings.Join(order, "\n"), "LIST one *.b.c x.a.b.c 10.0.0.0/8", "LIST two b.c *.a.b.c d")
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

// TestResolveList: the names of a LIST are resolved as its line says, and nothing is
// said of a rule that it may leave a name to.
func TestResolveList(t *testing.T) {
	table := mustParse(t, "LIST corp *.corp.example intern.example 10.0.0.0/8", "RESOLVE local $corp via=10.0.0.53", "RESOLVE remote *", "SOCKD4 @=192.0.2.1 *.x.corp.example", "SOCKD4 @=192.0.2.1 intern.example", "SOCKD5 @=192.0.2.1 *")
	for name, want := range map[string]string{"a.corp.example": "real", "b.a.corp.example": "real", "intern.example": "real", "corp.example": "synthetic", "a.intern.example": "synthetic"} {
		if got := table.Name(name, flow.Flow{}, LocalNames{}).Kind.String(); got != want {
			t.Errorf("%s is %s, want %s", name, got, want)
		}
	}
	if got := fmt.Sprint(table.Resolvers("a.corp.example"), table.Resolvers("corp.example")); got != "[10.0.0.53:53] []" {
		t.Error(got)
	}
	for rules, want := range map[string]string{
		"RESOLVE local $none\nDIRECT *":                                                                              "1:15 E12!",
		"LIST l 10.0.0.0/8\nRESOLVE local $l\nDIRECT *":                                                              "2:15 E22",
		"LIST l *.a.example\nRESOLVE local $l\nRESOLVE remote b.a.example\nRESOLVE local $l\nDIRECT *":               "3:1 E22 4:1 E22",
		"LIST l *.a.example\nRESOLVE local *\nRESOLVE remote $l\nDIRECT *":                                           "3:1 E22",
		"LIST l c.a.example\nRESOLVE remote $l\nRESOLVE local *.a.example\nSOCKD5 @=192.0.2.1 *.a.example\nDIRECT *": "",
		"LIST l *.a.example\nRESOLVE local $l\nSOCKD5 @=192.0.2.1 *.b.a.example\nDIRECT *":                           "3:1 E22",
	} {
		_, diags := Parse("socks.cnf", strings.NewReader(rules), Options{})
		var got []string
		for _, d := range diags {
			s := fmt.Sprintf("%d:%d %s", d.Line, d.Col, d.Code)
			if d.Severity == Error {
				s += "!"
			}
			got = append(got, s)
		}
		if s := strings.Join(got, " "); s != want {
			t.Errorf("%q: %s, want %s", rules, s, want)
		}
	}
}
