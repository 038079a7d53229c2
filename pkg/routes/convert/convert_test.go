package convert

import (
	"errors"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"
	"github.com/tproxyd/tproxyd/pkg/flow"
	"github.com/tproxyd/tproxyd/pkg/routes"
)

// TestConvert: texts, the rules that are made of them (comments aside), and why
// lines were refused or changed.
func TestConvert(t *testing.T) {
	for _, tt := range []struct {
		name   string
		format Format
		in     string
		rules  string
		tells  []string
	}{
		{"hummingbird slips", Hummingbird, "sockd5 @=10.0.3.1 0.0.0.0. 0.0.0.0\ndirect WWW.Example.org 255.255.255.255\nsocks5 - - -\nDENY\nGSS 1\nBIND-MODULE ftp.exe\nSOCKD5 1.2.3.4 255.255.255.255\nDENY 10.0.0.0 0.0.0.255\nDENY 10.0.0.0/8 255.255.0.0\n",
			"SOCKD5 @=10.0.3.1 0.0.0.0 0.0.0.0\nDIRECT WWW.Example.org\nBIND-MODULE ftp.exe\nDENY 1.2.3.4 255.255.255.255 # refused: SOCKD5 1.2.3.4 255.255.255.255\nDEFAULT DENY\n",
			[]string{
				`1 changed SOCKD5 @=10.0.3.1 0.0.0.0 0.0.0.0: "0.0.0.0." has a dot too much`,
				"2 changed DIRECT WWW.Example.org: a name takes no mask",
				`3 refused "socks5" is no keyword of this format; the file looks like one of NEC: --from nec`,
				"4 refused the destination is missing", "5 refused GSSAPI is not built in",
				"7 refused SOCKD5 without @= and no DEFAULT-SERVER",
				"8 refused mask 0.0.0.255 is not contiguous", "did you mean 255.255.255.0?",
				"9 refused a prefix length and a mask that contradict each other",
			}},
		{"cstc", CSTC, "direct 10.0.0.0 255.0.0.0\nsockd @=10.0.3.1 192.168.0.0 255.255.0.0 ge 1024 : echo %A\ndeny internic.net 255.255.255.255\nsockd @=10.0.3.1 internic.net\nsockd5 @=10.0.3.1 0.0.0.0 0.0.0.0\n",
			"RESOLVE remote internic.net\nRESOLVE local *\nDIRECT 10.0.0.0 255.0.0.0\nSOCKD4 @=10.0.3.1 192.168.0.0 255.255.0.0 ge 1024\nDENY internic.net\nDEFAULT DENY\n",
			[]string{
				"2 changed SOCKD4 @=10.0.3.1 192.168.0.0 255.255.0.0 ge 1024: sockd of this format is SOCKD4; the shell command is left out, nothing is run",
				"4 refused version 4 is sent addresses alone", `5 refused "sockd5" is no keyword of this format; the file looks like one of Hummingbird`,
			}},
		{"cstc users", CSTC, "deny *=root,/etc/some.users 10.0.0.0 255.0.0.0\n", "RESOLVE local *\nDENY *=root,/etc/some.users 10.0.0.0 255.0.0.0\nDEFAULT DENY\n",
			[]string{"1 note DENY *=root,/etc/some.users 10.0.0.0 255.0.0.0: *=users matches only processes of this machine"}},
		{"nec patterns", NEC, "noproxy c 10.1. [1024,2000)\nsocks5 u,p .Example.org (79,80] - a.example:1081\nsocks4 c 172.16.0.0/255.240.0.0 telnet - 10.0.3.1\nnoproxy - 191.1.2.3/n -\nnoproxy t - -\nnoproxy - 1.2.3.4/s -\nsocks5 - - -\nsocks5 - -\nset SOCKS5_LOCALDNSONLY 1\nset SOCKS5_TIMEOUT 15\nnoproxy - - (80,81)\n",
			"RESOLVE local *\nDIRECT 10.1.0.0/16 1024-1999 proto=tcp\nSOCKD5 @=a.example:1081 *.Example.org 80-80 proto=udp\nSOCKD4 @=10.0.3.1 172.16.0.0 255.240.0.0 eq telnet proto=tcp\nDIRECT 191.1.0.0/16\nDENY * # refused: socks5 - - -\nDEFAULT DENY\n",
			[]string{
				"2 changed SOCKD5 @=a.example:1081 *.Example.org 80-80 proto=udp: ping cannot be carried", "4 changed DIRECT 191.1.0.0/16: /n is the network of its class, /16",
				`5 refused "t": traceroute cannot be carried`, "6 refused \"1.2.3.4/s\": /s was the subnet", "7 refused no server is named", "8 refused a line is KEYWORD COMMANDS HOST PORT",
				"10 left out", `11 refused "(80,81)" holds no port`, "2 note SOCKD5 @=a.example:1081 *.Example.org 80-80 proto=udp: rule can never match",
			}},
		{"nec, all names by servers", NEC, "set SOCKS5_FAKEALLHOSTS 1\nsocks5 - - - - 10.0.3.1\n", "RESOLVE remote *\nSOCKD5 @=10.0.3.1 *\nDEFAULT DIRECT\n", nil},
		{"dante, order by passes", Dante, `
route { from: 0/0 to: 0/0 via: 10.0.3.5 port = 1080 proxyprotocol: socks_v5 }
route { from: 0/0 to: 172.16.0.0/12 via: 10.0.3.4 port = 1080 proxyprotocol: socks_v4 command: connect }
route { from: 0/0 to: 172.17.0.0/16 via: direct }
`,
			"RESOLVE local *\nDIRECT 172.17.0.0/16\nSOCKD4 @=10.0.3.4 172.16.0.0/12 proto=tcp\nSOCKD5 @=10.0.3.5 * by=address\nDEFAULT DENY\n",
			[]string{"2 changed SOCKD5 @=10.0.3.5 * by=address: it stands where Dante comes to it"}},
		{"dante, failover", Dante, "route.maxfail: 2\nroute.badexpire: 60\ntimeout.connect: 5\nresolveprotocol : fake\ndebug: 1\nroute {\n from: 0/0 to: .example.org port ge 1024 via: 10.0.3.1 port = 1081\n}\nroute {\n from: 0/0 to: .example.org port >= 1024 via: 10.0.3.2 port = 1080\n}\nroute { from: 10.0.0.0/8 to: www.example.net port 80 - 90 via: 10.0.3.1 port = socks protocol: tcp proxyprotocol: http }",
			"HEALTH maxfail=2\nHEALTH badexpire=60s\nTIMEOUT connect=5s\nRESOLVE remote *\nSOCKD5 @=10.0.3.1:1081,10.0.3.2 *.example.org ge 1024\nHTTP @=10.0.3.1 www.example.net 80-90 src=10.0.0.0/8\nDEFAULT DENY\n",
			[]string{"9 note 10.0.3.2 is asked when the server of line 6 fails", "5 left out"}},
		{"dante, what it cannot say", Dante, "route { from: 0/0 to: 10.0.3.1 via: 10.0.3.2 }\nroute { from: 0/0 to: 0/0 via: eth0 }\nroute { from: 0/0 via: direct }\nroute { from: 0/0 to: 0/0 via: direct command: bind }\nroute { from: 0/0 to: . via: 10.0.3.1 port = 1080 method: gssapi }\nroute {\nhello\n",
			"RESOLVE local *\nDEFAULT DENY\n",
			[]string{
				"1 refused to: 10.0.3.1 has no mask; Dante does not take it either: write 10.0.3.1/32", "2 refused via: eth0 is an interface or UPnP", `3 refused the route has no "to:"`,
				"4 refused command: bind is for connections from outside", "5 refused GSSAPI is not built in", "6 refused a route is route {", `7 refused "hello" is not read`,
			}},
		{"dante, no route", Dante, "# nothing\n", "RESOLVE local *\nDEFAULT DIRECT\n", nil},
		{"proxychains", Proxychains, "strict_chain\nquiet_mode\nproxy_dns\ntcp_connect_time_out 8000\nlocalnet 192.168.100.0:80/24\nlocalnet 10.0.0.0/255.0.0.0\n#socks5 10.0.0.9 1080 zaphod geheim\n[ProxyList]\nhttp 10.0.0.1 8080 zaphod geheim\nsocks4 10.0.0.2 1080\n",
			"TIMEOUT connect=8000ms\nDIRECT 192.168.100.0/24 eq 80\nDIRECT 10.0.0.0 255.0.0.0\nRESOLVE remote *\nSERVER proxy1 10.0.0.1:8080 type=http credential=proxychains1\nSERVER proxy2 10.0.0.2:1080 type=socks4a\nSOCKD4A @=proxy1>proxy2 *\nDEFAULT DENY\n", nil},
		{"proxychains, a broken chain", Proxychains, "strict_chain\n[ProxyList]\nsocks4 10.0.0.2 1080\nraw 10.0.0.3 1 zaphod geheim\n", "RESOLVE local *\nDEFAULT DENY\n",
			[]string{"4 refused the type of a server is socks4, socks5 or http", "4 refused a chain is not made without one of its servers"}},
		{"proxychains, one of many", Proxychains, "random_chain\nchain_len = 1\n[ProxyList]\nsocks5 2001:db8::1 1080\nsocks5 10.0.0.2 1081\n",
			"RESOLVE local *\nSERVER proxy1 [2001:db8::1]:1080 type=socks5\nSERVER proxy2 10.0.0.2:1081 type=socks5\nSOCKD5 @=proxy1,proxy2 * balance=random\nDEFAULT DENY\n", nil},
		{"proxychains, drawn chains", Proxychains, "random_chain\nchain_len = 2\n[ProxyList]\nsocks5 10.0.0.2 1081\n", "RESOLVE local *\nDEFAULT DENY\n",
			[]string{"1 refused random_chain with chain_len = 2"}},
		{"tsocks", Tsocks, "local = 192.168.0.0/255.255.255.0\npath {\n reaches = 150.1.0.0:80-1024/255.255.0.0\n reaches = 150.2.0.0/255.255.0.0\n server = 10.1.7.25\n server_type = 5\n default_user = zaphod\n default_pass = geheim\n default_pas = geheim\n}\nserver = 192.168.0.1\nfallback = yes\n",
			"RESOLVE local *\nDIRECT 192.168.0.0 255.255.255.0\nSERVER server1 10.1.7.25:1080 credential=tsocks1\nSOCKD5 @=server1 150.1.0.0 255.255.0.0 80-1024\nSOCKD5 @=server1 150.2.0.0 255.255.0.0\nSOCKD4 @=192.168.0.1:1080 *\nDEFAULT DENY\n",
			[]string{`9 refused "default_pas" is not read`, "12 refused a flow does not go out directly"}},
		{"redsocks", Redsocks, "base {\n log = stderr;\n}\nredsocks {\n ip = 10.0.3.1;\n port = 1080;\n type = socks5;\n login = \"zaphod\"; // me\n password = \"geheim\";\n}\nredudp { ip = 10.0.3.1; }\nredudp {\n ip = 10.0.3.1;\n port = 1080;\n}\nredsocks {\n type = http-connect;\n ip = 10.0.3.2;\n port = 3128;\n}\npassword=geheim\nother {\n}\n",
			"RESOLVE remote *\nSERVER redsocks1 10.0.3.1:1080 credential=redsocks\nSOCKD5 @=redsocks1 * proto=tcp\nSOCKD5 @=10.0.3.1:1080 * proto=udp\nDEFAULT DENY\n",
			[]string{"1 left out", "16 refused one section redsocks is for all flows", "21 refused it is not read", "22 refused there is no section of this name"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r, err := Convert(tt.format, strings.NewReader(tt.in))
			if err != nil {
				t.Fatal(err)
			}
			var rules strings.Builder
			for line := range strings.Lines(string(r.Rules)) {
				if line[0] != '#' {
					rules.WriteString(line)
				}
			}
			if d := cmp.Diff(tt.rules, rules.String()); d != "" {
				t.Errorf("(-want +got)\n%s", d)
			}
			report := ""
			for _, e := range r.Report {
				report += fmt.Sprintf("%d %s %s\n", e.Line, e.Fate, e.Text)
			}
			for _, want := range tt.tells {
				if !strings.Contains(report, want) {
					t.Errorf("the report does not tell %q:\n%s", want, report)
				}
			}
			if all := report + string(r.Rules); strings.Contains(all, "geheim") || strings.Contains(all, "zaphod") {
				t.Errorf("a secret is copied:\n%s", all)
			}
		})
	}
}

// TestDanteOrder: a flow that two routes match goes where Dante's passes find
// it, not where the file has it.
func TestDanteOrder(t *testing.T) {
	r, err := Convert(Dante, strings.NewReader("route { from: 0/0 to: 10.0.0.0/8 via: 192.0.2.1 port = 1080 }\nroute { from: 0/0 to: 10.1.0.0/16 via: direct }\n"))
	if err != nil {
		t.Fatal(err)
	}
	table, diags := routes.Parse("", strings.NewReader(string(r.Rules)), routes.Options{})
	if table == nil {
		t.Fatal(diags)
	}
	for to, want := range map[string]string{"10.1.2.3:80": "DIRECT", "10.2.2.3:80": "SOCKD5 192.0.2.1:1080"} {
		if got := decision(table, flow.Flow{Dst: netip.MustParseAddrPort(to)}); got != want {
			t.Errorf("%s: %s, want %s", to, got, want)
		}
	}
}

func TestErrors(t *testing.T) {
	if _, err := Convert("aventail", strings.NewReader("")); err == nil || !strings.Contains(err.Error(), "there are cstc, dante, hummingbird, nec, proxychains, redsocks, tsocks") {
		t.Errorf("an unknown format: %v", err)
	}
	boom := errors.New("boom")
	if _, err := Convert(NEC, iotest.ErrReader(boom)); !errors.Is(err, boom) {
		t.Errorf("a reader that fails: %v", err)
	}
	if _, err := Convert(NEC, io.LimitReader(zeros{}, maxSize+1)); err == nil {
		t.Error("a file without an end is read")
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { return len(b), nil }

// FuzzConvert: whatever a file of any format holds, what is written is read
// without an error, and each line that was written has its fate told.
func FuzzConvert(f *testing.F) {
	for i := range Formats() {
		for _, seed := range []string{
			"DIRECT 10.0.0.0 255.0.0.0\nBALANCE\nSOCKD5 @=10.0.3.1,10.0.3.2 0.0.0.0 0.0.0.0 eq 80\n", "deny *=root 0.0.0.0 0.0.0.0 : x %A\n#\\\nsockd @=a #b\n",
			"NOPROXY - 10. -\nSOCKS5 c .x.org [1,2) - 10.0.4.1\n", "route { from: 0/0 to: . port = 80 via: 10.0.3.1 port = 1080\nmethod: username\n}\nresolveprotocol: fake\n",
			"strict_chain\nproxy_dns\n[ProxyList]\nsocks5 10.0.0.1 1080 a b\n", "local = 10.0.0.0/255.0.0.0\npath {\nreaches = 1.0.0.0:1-2/255.0.0.0\nserver = 1.1.1.1\n}\n",
			"redsocks {\nip = 1.2.3.4;\nport = 1080;\ntype = socks5;\n}\n",
		} {
			f.Add(i, seed)
		}
	}
	f.Fuzz(func(t *testing.T, format int, text string) {
		names := Formats()
		r, err := Convert(Format(names[uint(format)%uint(len(names))]), strings.NewReader(text))
		if err != nil {
			t.Fatal(err)
		}
		if _, diags := routes.Parse("out", strings.NewReader(string(r.Rules)), routes.Options{Open: anyFile}); diags.HasErrors() {
			t.Fatalf("%v\n%s", diags, r.Rules)
		}
		told := 0
		for _, e := range r.Report {
			if e.Fate == Kept || e.Fate == Changed || e.Fate == Added {
				told++
			}
		}
		written := 0
		for line := range strings.Lines(string(r.Rules)) {
			if line[0] != '#' && !strings.Contains(line, " # refused: ") {
				written++
			}
		}
		if told != written {
			t.Errorf("%d lines are written, the fate of %d is told\n%s\n%v", written, told, r.Rules, r.Report)
		}
	})
}
