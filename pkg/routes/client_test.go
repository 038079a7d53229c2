package routes

import (
	"io"
	"strings"
	"testing"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

func TestInCgroup(t *testing.T) {
	for _, tt := range []struct {
		path, cgroup string
		want         bool
	}{
		{"/machine.slice/web", "/machine.slice/web", true},
		{"/machine.slice/web/inner", "/machine.slice/web", true},
		{"/machine.slice/web2", "/machine.slice/web", false},
		{"/machine.slice", "/machine.slice/web", false},
		{"/system.slice/web.service", "web.service", true},
		{"/system.slice/web.service/app", "web.service", true},
		{"/system.slice/oldweb.service", "web.service", false},
		{"/system.slice/web.service.d", "web.service", false},
		{"/a/web.services/web.service", "web.service", true},
		{"/user.slice/user-1.slice/app", "user-1.slice/app", true},
		{"/user.slice/user-1.slice", "user-1.slice/app", false},
		{"/anything", "/", true},
		{"/", "/", true},
		{"", "/", false},
		{"", "web.service", false},
	} {
		if got := InCgroup(tt.path, tt.cgroup); got != tt.want {
			t.Errorf("%q in %q: %v", tt.path, tt.cgroup, got)
		}
	}
}

// TestMatchesClient: each condition has to be met, by one of its values; and
// what is only known of this host's own flows is met by nobody else.
func TestMatchesClient(t *testing.T) {
	own := flow.Flow{Owner: flow.Owner{Known: true, UID: 1000, GID: 100, Cgroup: "/system.slice/web.service"}}
	lan := flow.Flow{InIf: "lan0", Mark: 0x21, MAC: flow.MAC{0, 0, 0x5e, 0, 0x53, 1}}
	for _, tt := range []struct {
		options  string
		own, lan bool
	}{
		{"uid=0,1000", true, false},
		{"uid=0", false, false},
		{"uid=1000 gid=100", true, false},
		{"uid=1000 gid=101", false, false},
		{"cgroup=web.service", true, false},
		{"cgroup=/system.slice", true, false},
		{"cgroup=/", true, false},
		{"uid=nobodyatall", false, false},
		{"mark=0x21", false, true},
		{"mark=0x20/0xf0", false, true},
		{"mark=0/0xff", true, false},
		{"mac=00:00:5e:00:53:01", false, true},
		{"mac=00:00:5e:00:53:02", false, false},
		{"mac=00:00:5e:00:53:01 mark=21 if=lan0", false, true},
	} {
		table := mustParse(t, "DIRECT * "+tt.options)
		if got := table.Match(own).Action == Direct; got != tt.own {
			t.Errorf("%s: a process of this host: %v", tt.options, got)
		}
		if got := table.Match(lan).Action == Direct; got != tt.lan {
			t.Errorf("%s: a flow that is forwarded: %v", tt.options, got)
		}
	}
}

// TestNamesByClient: what differs by client is never let pass by its address,
// and each client is told what its own rules say.
func TestNamesByClient(t *testing.T) {
	root := flow.Flow{Owner: flow.Owner{Known: true}}
	user := flow.Flow{Owner: flow.Owner{Known: true, UID: 1000}}
	for rules, want := range map[string][2]NameKind{
		"DIRECT *.example uid=0\nSOCKD5 @=192.0.2.1 *": {Synthetic, Synthetic},
		"DENY * uid=0 reject=dns-refused\nDIRECT *":    {Refused, RealDirect},
		"SOCKD5 @=192.0.2.1 * uid=0\nDIRECT *":         {Synthetic, RealDirect},
		"SOCKD5 @=192.0.2.1 * uid=0\nDIRECT *.example": {Synthetic, RealDirect},
		"DIRECT *.example\nDENY * uid=0":               {RealDirect, RealDirect},
	} {
		table := mustParse(t, rules)
		if got := [2]NameKind{table.Name("www.example", root, LocalNames{}).Kind, table.Name("www.example", user, LocalNames{}).Kind}; got != want {
			t.Errorf("%q: %v, want %v", rules, got, want)
		}
		if !table.UsesWho() || !table.DependsOnClient() {
			t.Errorf("%q: it does not say that it asks who the client is", rules)
		}
	}
}

// TestNobodyIsNotAnybody: a rule for the users of a file in which there is none
// is about none, and not about all.
func TestNobodyIsNotAnybody(t *testing.T) {
	empty := func(string) (io.ReadCloser, error) { return io.NopCloser(strings.NewReader("# none yet\n\n")), nil }
	for _, asked := range []string{"*=/users", "uid=/users", "gid=/groups"} {
		rule := "DIRECT * " + asked
		if asked[0] == '*' {
			rule = "DIRECT " + asked + " *"
		}
		table, diags := Parse("socks.cnf", strings.NewReader(rule), Options{Open: empty})
		if table == nil || !strings.Contains(diags.Error(), "W08") {
			t.Fatalf("%s: %v", rule, diags)
		}
		for _, owner := range []flow.Owner{{}, {Known: true}, {Known: true, UID: 1000, GID: 1000}} {
			f := to(t, "203.0.113.1:80")
			if f.Owner = owner; table.Match(f).Action == Direct {
				t.Errorf("%s: it is about %+v", rule, owner)
			}
		}
	}
}
