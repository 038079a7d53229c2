package routes

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/tproxyd/tproxyd/pkg/flow"
)

// nearRules have something beside almost every flow.
const nearRules = `SERVER s 192.0.2.1
DIRECT 10.0.0.0/8 eq 22
SOCKD5 @=s *.example.org src=10.7.0.0/16 if=lan0,lan1
SOCKD5 @=s example.org
DENY *.www.example.org
DENY 0.0.0.0/0 80-90,443 by=address
SOCKD5 @=s ::/0 proto=udp
SOCKD5 @=s * eq 443 by=name
DENY 0.0.0.0/0
DIRECT *
`

func TestNear(t *testing.T) {
	table := mustParse(t, nearRules)
	for text, want := range map[string][]string{
		"10.1.2.3:22": {
			"9 it comes behind, and would decide without socks.cnf:2",
		},
		"10.1.2.3:443": {
			"2 port 443 is not 22",
			"9 it comes behind, and would decide without socks.cnf:6",
		},
		"[2001:db8::1]:443": {
			"6 it is about IPv4 alone", "7 it is about UDP alone", "8 by=name, and the flow has none", "9 it is about IPv4 alone",
		},
		"a.example.org:443": {
			"3 it is this host's own, and not by lan0,lan1; its source is not known, and not of 10.7.0.0/16",
			"4 it is about example.org alone, not about names below it",
			"6 by=address, and the flow has a name", "7 it is about UDP alone",
			"9 it comes behind, and would decide without socks.cnf:8",
		},
		"example.org:443": {
			"8 it comes behind, and would decide without socks.cnf:4",
		},
		"www.example.org:25 from 10.7.0.1 by lan2": {
			"3 it enters by lan2, and not by lan0,lan1",
			"4 it is about example.org alone, not about names below it",
			"5 it is about names below www.example.org, not about itself",
			"7 it is about UDP alone", "8 port 25 is not 443",
			"10 it comes behind, and would decide without socks.cnf:9",
		},
	} {
		f := to(t, text)
		list, more := table.Near(f, table.Match(f))
		var got []string
		for _, n := range list {
			got = append(got, fmt.Sprint(n.Rule.Line, " ", n.Why))
		}
		if d := cmp.Diff(want, got); d != "" || more > 0 {
			t.Errorf("%s, decided by %s, and %d more: (-want +got)\n%s", text, table.Match(f).Position(), more, d)
		}
	}
}

// TestNearClient: what is asked of the client, and who it is.
func TestNearClient(t *testing.T) {
	table := mustParse(t, `DENY * mark=0x10/0xf0,0x7 mac=00:00:5e:00:53:01
DENY * uid=1000,1001 gid=7
DENY * cgroup=/a/b,web.service
DIRECT *`)
	for _, tt := range []struct {
		f    flow.Flow
		want []string
	}{
		{flow.Flow{}, []string{
			"1 its mark is 0x0, and not 0x10/0xf0,0x7; its neighbour is not known, and not 00:00:5e:00:53:01",
			"2 it is about processes of this host, and the flow's is not known", "3 it is about processes of this host, and the flow's is not known",
		}},
		{flow.Flow{Mark: 0x1f, MAC: flow.MAC{5: 9}, Owner: flow.Owner{Known: true, UID: 1001, GID: nobody}}, []string{
			"1 its neighbour is 00:00:00:00:00:09, and not 00:00:5e:00:53:01", "2 its group is not known, and not 7", "3 its cgroup is not known, and not in /a/b,web.service",
		}},
		{flow.Flow{Mark: 7, MAC: flow.MAC{0, 0, 0x5e, 0, 0x53, 1}, Owner: flow.Owner{Known: true}}, []string{"4 it comes behind, and would decide without socks.cnf:1"}},
		{flow.Flow{Owner: flow.Owner{Known: true, UID: 5, GID: 7, Cgroup: "/a/c"}}, []string{
			"1 its mark is 0x0, and not 0x10/0xf0,0x7; its neighbour is not known, and not 00:00:5e:00:53:01",
			"2 its user is 5, and not 1000,1001", "3 its cgroup is /a/c, and not in /a/b,web.service",
		}},
	} {
		tt.f.Name = "www.example.org"
		list, _ := table.Near(tt.f, table.Match(tt.f))
		var got []string
		for _, n := range list {
			got = append(got, fmt.Sprint(n.Rule.Line, " ", n.Why))
		}
		if d := cmp.Diff(tt.want, got); d != "" {
			t.Errorf("%+v: (-want +got)\n%s", tt.f, d)
		}
	}
}

// TestNearIsBounded: of many, the nearest are told, and how many there are.
func TestNearIsBounded(t *testing.T) {
	var b strings.Builder
	for i := range 1000 {
		fmt.Fprintf(&b, "DENY * eq %d\n", 1000+i)
	}
	table := mustParse(t, b.String()+"DIRECT *")
	f := to(t, "www.example.org:80")
	list, more := table.Near(f, table.Match(f))
	if len(list) != maxNear || more != 1000-maxNear || list[0].Rule.Line != 1001-maxNear {
		t.Errorf("%d, the first at line %d, and %d more", len(list), list[0].Rule.Line, more)
	}
	x := table.Explain(f, Surroundings{})
	if !strings.Contains(x.String(), fmt.Sprintf("near: %d rules more, in front of these\n", more)) {
		t.Error(x.String())
	}
}

// TestNearAndMatch: for any rules and flows, each rule in front that is about
// the flow's destination is told with what it asks for, and no other reason; one
// behind would decide if the one that does were not there.
func TestNearAndMatch(t *testing.T) {
	rnd := rand.New(rand.NewPCG(7, 8))
	seen := 0
	for range 200 {
		table := mustParse(t, randomRules(rnd, 1+rnd.IntN(20)))
		for range 50 {
			f := randomFlow(rnd)
			decider := table.Match(f)
			list, more := table.Near(f, decider)
			if !slices.IsSortedFunc(list, func(a, b Near) int { return a.Rule.Index - b.Rule.Index }) || len(list) > maxNear+1 || more < 0 {
				t.Fatalf("%v of %v: %v", f, decider, list)
			}
			for _, n := range list {
				seen++
				switch {
				case n.Rule == decider || n.Why == "":
					t.Fatalf("%v: the rule that decides is near: %v", f, n)
				case n.Rule.Index < decider.Index && n.Rule.unmet(&f) != "" && n.Rule.unmet(&f) != n.Why:
					t.Fatalf("%v: %s, asks for %s", f, n.Why, n.Rule.unmet(&f))
				case n.Rule.Index > decider.Index && n.Rule.unmet(&f) != "":
					t.Fatalf("%v: %s would decide, but %s", f, n.Rule.Text, n.Rule.unmet(&f))
				}
			}
			if f.Name != "" {
				continue
			}
			// The place in the kernel is one of what the rule does.
			p := table.Place(f)
			want := "proxy"
			switch a := decider.ActionFor(f.Network); {
			case a == Direct:
				want = "direct"
			case a == Deny && decider.Action == Deny && decider.Reject == RejectICMP:
				want = "icmp"
			case a == Deny && decider.Action == Deny && decider.Reject == RejectDrop:
				want = "drop"
			case a == Deny:
				want = "deny"
			}
			if p.List != want || p.Block < 0 || !slices.Contains(table.Kernel()[p.Block].Rules, decider) {
				t.Fatalf("%v is decided by %s: %s, and in the kernel at %+v", f, decider.Position(), decider.Text, p)
			}
		}
	}
	if seen < 1000 {
		t.Errorf("only %d were near", seen)
	}
}

// TestUnmetIsWhatMatchAsks: a rule asks for something if and only if it does not
// match, its destination aside.
func TestUnmetIsWhatMatchAsks(t *testing.T) {
	rnd := rand.New(rand.NewPCG(9, 10))
	for range 100 {
		table := mustParse(t, randomRules(rnd, 10))
		for range 50 {
			f := randomFlow(rnd)
			for _, r := range table.Rules() {
				if matches := r.matchesPort(&f) && r.matchesClient(&f); matches != (r.unmet(&f) == "") {
					t.Fatalf("%v and %s: match %v, unmet %q", f, r.Text, matches, r.unmet(&f))
				}
			}
		}
	}
}
