package routes

import (
	"fmt"
	"net/netip"
	"testing"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

// TestExcludeModule: what a unit or a cgroup of this host sends is DIRECT before
// all rules, wherever the line stands, and of nobody else.
func TestExcludeModule(t *testing.T) {
	table := mustParse(t, "DENY * eq 25", "SOCKD5 @=192.0.2.1 *.example.org", "EXCLUDE-MODULE ssh.service", "EXCLUDE-MODULE /sys/fs/cgroup/machine.slice/web/", "SOCKD5 @=192.0.2.1 *")
	for cgroup, want := range map[string]Action{
		"/system.slice/ssh.service": Direct, "/system.slice/ssh.service/inner": Direct, "/machine.slice/web": Direct, "/machine.slice/web/a": Direct,
		"/system.slice/openssh.service": Socks5, "/machine.slice/web2": Socks5, "/": Socks5, "": Socks5,
	} {
		for _, f := range []flow.Flow{
			{Name: "www.example.org", Dst: netip.MustParseAddrPort("198.18.0.1:443")}, {Dst: netip.MustParseAddrPort("192.0.2.7:443")}, {Dst: netip.MustParseAddrPort("[2001:db8::7]:443")},
		} {
			f.Owner = flow.Owner{Known: cgroup != "", Cgroup: cgroup}
			if got := table.Match(f); got.Action != want {
				t.Errorf("%s to %s: %v by %s, want %v", cgroup, f.Target(), got.Action, got.Position(), want)
			}
		}
	}
	if got := fmt.Sprint(table.Cgroups()); got != "[/machine.slice/web ssh.service]" {
		t.Error(got)
	}
	first := table.Kernel()[0]
	if fmt.Sprint(first.Cgroups) != "[ssh.service]" || len(first.Direct) != 2 || !first.Final {
		t.Errorf("the kernel does not decide it first: %+v", first)
	}
	if p := table.Rules()[1].Position(); p != "socks.cnf:4" {
		t.Errorf("it stands at %s", p)
	}
}

// TestLoops: a server on this host is given what it sends itself.
func TestLoops(t *testing.T) {
	own := func(a netip.Addr) bool { return a == netip.MustParseAddr("192.0.2.1") }
	for rules, want := range map[string]string{
		"SOCKD5 @=127.0.0.1:1081 *": "127.0.0.1:1081 by socks.cnf:1",
		"SERVER a localhost:1081\nSOCKD5 @=192.0.2.1,a *\nSOCKD5 @=a * eq 1": "192.0.2.1 by socks.cnf:2 a by socks.cnf:2",
		"SOCKD5 @=192.0.2.1>10.0.0.1 *":                                      "192.0.2.1 by socks.cnf:1",
		"SOCKD5 @=10.0.0.1>127.0.0.1 *":                                      "",
		"SOCKD5 @=127.0.0.1 *.example.org":                                   "",
		"SOCKD5 @=127.0.0.1 * if=lan0":                                       "",
		"DIRECT * uid=0\nSOCKD5 @=127.0.0.1 *":                               "",
		"SOCKD5 @=127.0.0.1 *\nEXCLUDE-MODULE ssh.service":                   "",
		"SOCKD5 @=127.0.0.1 *\nDIRECT * uid=0":                               "127.0.0.1 by socks.cnf:1",
		"SOCKD5 @=192.0.2.9 *":                                               "",
	} {
		got := ""
		for _, l := range mustParse(t, rules).Loops(own) {
			got += fmt.Sprintf(" %s by %s", l.Server.Name, l.Rule.Position())
		}
		if got != want && got != " "+want {
			t.Errorf("%q: %s, want %s", rules, got, want)
		}
	}
}

// TestExcludeProgram: what a program of this host sends is DIRECT before all rules,
// and nothing else of what is decided changes.
func TestExcludeProgram(t *testing.T) {
	rules := []string{"DENY * eq 25", "DENY *.deny.example reject=dns-refused", "DIRECT *.direct.example", "SOCKD5 @=192.0.2.1 *", "EXCLUDE-MODULE a.service"}
	plain := mustParse(t, rules...)
	table := mustParse(t, append(rules, "EXCLUDE-MODULE ssh", "EXCLUDE-MODULE /opt/vpn")...)
	if got := fmt.Sprint(table.Programs(), table.UsesWho(), table.UsesInterfaces()); got != "[ssh /opt/vpn] true true" {
		t.Error(got)
	}
	for program, want := range map[string]Action{"/usr/bin/ssh": Direct, "ssh": Direct, "/opt/vpn": Direct, "/usr/bin/openssh": Deny, "/usr/opt/vpn": Deny, "vpn": Deny, "": Deny} {
		for _, f := range []flow.Flow{{Name: "www.example.org", Dst: netip.MustParseAddrPort("198.18.0.1:25")}, {Network: flow.UDP, Dst: netip.MustParseAddrPort("[2001:db8::7]:25")}} {
			f.Program = program
			if got := table.Match(f); got.Action != want {
				t.Errorf("%s to %s: %v by %s, want %v", program, f.Target(), got.Action, got.Position(), want)
			}
		}
	}
	for _, name := range []string{"www.example.org", "a.deny.example", "a.direct.example"} {
		client := flow.Flow{Program: "/usr/bin/ssh"}
		if got, want := table.Name(name, client, LocalNames{}), plain.Name(name, client, LocalNames{}); got.Kind != want.Kind {
			t.Errorf("%s is %v, want %v", name, got.Kind, want.Kind)
		}
	}
	if got, want := len(table.Kernel()), len(plain.Kernel()); got != want {
		t.Errorf("%d blocks, want %d", got, want)
	}
}
