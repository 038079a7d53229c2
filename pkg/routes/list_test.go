package routes

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/tproxyd/tproxyd/pkg/flow"
)

func TestListForms(t *testing.T) {
	tests := []struct {
		name, text string
		want       []string
		diags      string
	}{
		{"plain", "\ufeff# a comment\r\nWWW.Example.org\r\n\n  *.Example.net \t# and one\n.example.com\na.example b.example\\\n10.0.0.0/8\n2001:db8::/32 192.0.2.1-192.0.2.2\nexample.org.\n1and1.example\n_dmarc.x-y.example",
			[]string{"*.example.com", "*.example.net", "10.0.0.0/8", "192.0.2.1/32", "192.0.2.2/32", "2001:db8::/32",
				"1and1.example", "_dmarc.x-y.example", "a.example", "b.example", "example.org", "www.example.org"}, ""},
		{"hosts", "127.0.0.1 localhost\n::1\tlocalhost ip6-localhost\n255.255.255.255 broadcasthost\nff02::1 ip6-allnodes\nfe80::1%lo0 localhost\nfe00::0 ip6-localnet\n0.0.0.0 0.0.0.0\n" +
			"0.0.0.0 Ads.Example # x\n:: ads6.example two.example\n192.0.2.7 nas.lan nas localhost",
			[]string{"ads.example", "ads6.example", "localhost", "nas", "nas.lan", "two.example"}, "10:1 W06"},
		{"dnsmasq", "address=/ads.example/0.0.0.0\naddress=/a.example/b.example/#\nserver=/corp.example/10.0.0.53#53\nlocal=/lan/\nipset=/i.example/set1,set2\nnftset=/n.example/4#inet#t#s\naddress=/*.only.example/\naddress=/.dot.example/::\nserver=/not.corp.example/#\n#server=/x/\n",
			[]string{"*.a.example", "*.ads.example", "*.b.example", "*.corp.example", "*.dot.example", "*.i.example", "*.lan", "*.n.example", "*.only.example",
				"a.example", "ads.example", "b.example", "corp.example", "dot.example", "i.example", "lan", "n.example"}, "9:1 W06"},
		{"nothing", "", nil, ""},
		{"mistakes", "good.example\nbad..example x\n*foo.example\n  10.0.0.\n10.1.2.3/8\nbücher.example\naddress=/ok.example/b d.example/\nserver=1.2.3.4\nlog-queries=x\naddress=/#/0.0.0.0\nserver=//10.0.0.1\n\xff.example y.example # \xff\na\x00b\n$other\n" + strings.Repeat("l", 64) + ".example\n*\n||ads.example^",
			nil,
			"2:1 E26! 3:1 E26! 4:3 E03! 5:1 E07 6:1 E26! 7:23 E29! 8:1 E26! 9:1 E26! 10:10 E26! 11:9 E26! 12:1 E25! 13:1 E25! 14:1 E29! 15:1 E26! 17:1 E26!"},
	}
	for _, tt := range tests {
		table, ds := parse("LIST l file=l\nDENY $l", map[string]string{"l": tt.text})
		var got []string
		for _, d := range ds {
			if d.File == "l" {
				got = append(got, short(Diagnostics{d})...)
			}
		}
		if s := strings.Join(got, " "); s != tt.diags {
			t.Errorf("%s: %s, want %s\n%s", tt.name, s, tt.diags, ds.Error())
		}
		if table == nil {
			continue
		}
		d := table.rules[0].dest
		var have []string
		for _, p := range d.prefixes {
			have = append(have, p.String())
		}
		have = slices.AppendSeq(have, d.names.all())
		for s := range d.suffixes.all() {
			have = append(have, "*."+s)
		}
		slices.Sort(have)
		slices.Sort(tt.want)
		if diff := cmp.Diff(tt.want, have); diff != "" {
			t.Errorf("%s: %s", tt.name, diff)
		}
	}
}

// TestListMistakesAreBounded: a file of something else is reported, but not to
// its last line.
func TestListMistakesAreBounded(t *testing.T) {
	_, ds := parse("LIST l file=l\nDENY $l\nDENY foo..example", map[string]string{"l": strings.Repeat("<html>\n", 100_000) + "10.1.2.3/8\n" + strings.Repeat("x", 2*maxLine)})
	if n := len(ds); n != maxMistakes+2 {
		t.Fatalf("%d messages", n)
	}
	if s := ds[maxMistakes].String(); s != "l:100002:1: error E29: 99902 more mistakes in this file are not shown" {
		t.Error(s)
	}
	if ds[maxMistakes+1].Line != 3 {
		t.Error("the rules behind are not read")
	}
	table, ds := parse("LIST l file=l\nDENY $l", map[string]string{"l": strings.Repeat("10.1.2.3/8\n", 200)})
	if table == nil || len(ds) != maxMistakes+1 || ds.HasErrors() {
		t.Errorf("warnings became errors: %s", ds.Error())
	}
}

// TestSumCoversLists: tables whose lists differ have different sums, and blanks
// and comments do not count.
func TestSumCoversLists(t *testing.T) {
	sum := func(text string) [32]byte {
		table, ds := parse("LIST l file=l\nDENY $l", map[string]string{"l": text})
		if table == nil {
			t.Fatal(ds.Error())
		}
		return table.Sum()
	}
	seen := map[[32]byte]string{}
	for _, text := range []string{"", "a.example", "a.example\nb.example", "*.a.example", "address=/a.example/", "10.0.0.0/8", "10.0.0.0/9", "a.exampl", "0.0.0.0 c.example"} {
		if other, ok := seen[sum(text)]; ok {
			t.Errorf("%q and %q have the same sum", text, other)
		}
		seen[sum(text)] = text
	}
	if sum("a.example\n# x\n") != sum(" A.example\r\n\n") {
		t.Error("a comment changes the sum")
	}
}

// TestListsShareNames: names of several lists, of several rules, and spelled out.
func TestListsShareNames(t *testing.T) {
	table, ds := parse(`LIST a file=a
LIST b file=b
DENY $a eq 1
DENY both.example eq 2
DENY $b eq 3
DENY $a eq 4 by=name
DENY $b eq 5 by=address
DENY *.example eq 6
DIRECT *`, map[string]string{"a": "both.example\nboth.example\nonly.example\n10.0.0.0/8\n10.0.0.0/8", "b": "both.example\n10.0.0.0/8\n*.example\n0.0.0.0/0"})
	if ds.HasErrors() {
		t.Fatal(ds.Error())
	}
	for dest, want := range map[string][]uint16{
		"both.example": {1, 2, 3, 4, 6}, "only.example": {1, 3, 4, 6}, "other.example": {3, 6}, "elsewhere": {3}, "10.1.1.1": {1, 3, 5}, "192.0.2.1": {3, 5}, "2001:db8::1": nil,
	} {
		var got []uint16
		for port := uint16(1); port < 8; port++ {
			if table.Match(to(t, fmt.Sprintf("%s:%d", bracketed(dest), port))).Action == Deny {
				got = append(got, port)
			}
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: DENY at %v, want %v", dest, got, want)
		}
	}
}

func bracketed(host string) string {
	if strings.Contains(host, ":") {
		return "[" + host + "]"
	}
	return host
}

// TestCoveredByLists: the search for rules that can never match looks into lists.
func TestCoveredByLists(t *testing.T) {
	files := map[string]string{"a": "www.a.example\n*.b.example\n10.0.0.0/8", "some": "www.a.example\nx.b.example\n10.1.0.0/16", "more": "www.a.example\nc.example"}
	lists := "LIST a file=a\nLIST some file=some\nLIST more file=more\n"
	for rules, want := range map[string]string{
		"DENY $a\nDIRECT www.a.example":                         "5:1 E22",
		"DENY $a\nDIRECT *.x.b.example\nDIRECT 10.2.0.0/16":     "5:1 E22 6:1 E22",
		"DENY $a\nDIRECT $some":                                 "5:1 E22",
		"DENY $a\nDIRECT $some eq 25":                           "5:1 E22",
		"DENY $a eq 25\nDIRECT $some":                           "",
		"DENY $a src=10.0.0.0/8\nDIRECT $some src=10.1.0.0/16":  "5:1 E22",
		"DENY $a src=10.1.0.0/16\nDIRECT $some src=10.0.0.0/8":  "",
		"DENY $a\nDIRECT $more":                                 "",
		"DENY $a\nDIRECT $a":                                    "5:1 E22",
		"DENY $a by=name\nDIRECT $a":                            "",
		"DENY $a by=name\nDENY $a by=address\nDIRECT $a":        "6:1 E22",
		"DENY $a by=name\nDIRECT $a by=name":                    "5:1 E22",
		"DENY *\nDIRECT $a":                                     "5:1 E22",
		"DENY 10.0.0.0/8\nDENY *.example by=name\nDIRECT $some": "6:1 E22",
		"RESOLVE local *.example\nDENY $more":                   "5:1 E22",
		"RESOLVE local www.a.example\nDENY $more":               "",
	} {
		_, ds := parse(lists+rules, files)
		ds = slices.DeleteFunc(ds, func(d Diagnostic) bool { return d.Code == "W05" }) // not all are used
		if got := strings.Join(short(ds), " "); got != want {
			t.Errorf("%q:\n got %s\nwant %s\n%s", rules, got, want, ds.Error())
		}
	}
}

// TestSearchIsBounded: reading does not become quadratic by the search for rules
// that can never match.
func TestSearchIsBounded(t *testing.T) {
	many := func(n int, rule func(i int) string, head string) time.Duration {
		var b strings.Builder
		b.WriteString(head)
		for i := range n {
			b.WriteString(rule(i) + "\n")
		}
		began := time.Now()
		if table, ds := parse(b.String(), map[string]string{"l": names(2000)}); table == nil {
			t.Fatal(ds.Error())
		}
		return time.Since(began)
	}
	for what, rule := range map[string]func(i int) string{
		"names":      func(i int) string { return fmt.Sprintf("DENY h%d.example", i) },
		"catch-alls": func(i int) string { return fmt.Sprintf("DENY * eq %d src=10.%d.%d.0/24", 1+i%60000, i>>8&255, i&255) },
		"one name":   func(i int) string { return fmt.Sprintf("DENY www.example eq %d", 1+i%60000) },
		"one list":   func(i int) string { return fmt.Sprintf("DENY $l eq %d", 1+i%60000) },
		"resolved":   func(i int) string { return fmt.Sprintf("DENY $l eq %d by=name", 1+i%60000) },
	} {
		head := "LIST l file=l\n"
		if what == "resolved" {
			head += "RESOLVE local *\n"
		}
		small, large := many(5000/under, rule, head), many(50_000/under, rule, head)
		t.Logf("%s: %d rules in %v, ten times as many in %v", what, 5000/under, small, large)
		if large > 40*small+2*time.Second {
			t.Errorf("%s: %d rules take %v, ten times as many %v", what, 5000/under, small, large)
		}
	}
}

// names returns a list of n names.
func names(n int) string {
	var b strings.Builder
	for i := range n {
		fmt.Fprintf(&b, "n%d.list.example\n", i)
	}
	return b.String()
}

func FuzzListFile(f *testing.F) {
	for _, s := range []string{"a.example\n*.b.example\n", "0.0.0.0 a b\n", "address=/a/b/#\n", "10.0.0.0/8 x # y\n", "\ufeff\\\n", "=//\n", "*.\n", "server=/a/#"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		table, ds := parse("LIST l file=l\nDENY $l\nDIRECT *", map[string]string{"l": text})
		if (table == nil) != ds.HasErrors() {
			t.Fatal(ds.Error())
		}
		if table == nil {
			return
		}
		d := table.rules[0].dest
		for n := range d.names.all() {
			if err := checkName(n); err != nil {
				t.Fatalf("%q: %v", n, err)
			}
			if table.Match(flow.Flow{Name: n}).Action != Deny {
				t.Fatalf("%q is not matched", n)
			}
		}
		for n := range d.suffixes.all() {
			if table.Match(flow.Flow{Name: "x." + n}).Action != Deny {
				t.Fatalf("*.%s is not matched", n)
			}
		}
	})
}
