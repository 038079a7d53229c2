package convert

import (
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/tproxyd/tproxyd/pkg/flow"
	"github.com/tproxyd/tproxyd/pkg/routes"
)

// TestNoSecrets: a user name or a password is neither in the rules nor in the
// report, in whatever place it stands, the wrong one included.
func TestNoSecrets(t *testing.T) {
	const secret = "tr0ub4dor"
	for format, files := range map[Format][]string{
		NEC:         {"set SOCKS5_PASSWD @\nsocks5 - - - - 10.0.0.1", "# set SOCKS5_PASSWD @", "SET socks5_user @", "set @", "set SOCKS5_PASSWD = @ @ @ @ @"},
		Proxychains: {"[ProxyList]\nsocks5 10.0.0.1 1080 @ @", "[ProxyList]\nsocks5 10.0.0.1 @ @ @", "[ProxyList]\n#socks5 10.0.0.1 1080 u @", "socks5 10.0.0.1 1080 u @\n", "[ProxyList]\n@ 1 2"},
		Tsocks:      {"server = 10.0.0.1\ndefault_pass = @", "path {\nserver = 10.0.0.1\nreaches = 10.0.0.0/8\ndefault_user = @\n}", "default_pass @", "server = 10.0.0.1\nserver_port = @", "server = 10.0.0.1\nserver_type = @"},
		Redsocks:    {"redsocks { ip = 10.0.0.1; port = 1; login = \"@\"; password = \"@\"; }", "redsocks {\n password @\n}", "redsocks { ip = 10.0.0.1; port = @; type = socks5; }", "redsocks { type = @; }", "password=@", "# @"},
		Dante:       {"#password: @", "socks_password: @"},
	} {
		for _, in := range files {
			r, err := Convert(format, strings.NewReader(strings.ReplaceAll(in, "@", secret)))
			if err != nil {
				t.Fatal(err)
			}
			if all := string(r.Rules) + fmt.Sprint(r.Report); strings.Contains(all, secret) {
				t.Errorf("%s: %s\n%s", format, in, all)
			}
		}
	}
}

// TestRefusedPassesNothing: what a refused line would have denied or proxied is
// not let pass by what follows it.
func TestRefusedPassesNothing(t *testing.T) {
	for _, tt := range []struct {
		format Format
		in     string
		to     string
		want   string
		rules  string // in which this stands
	}{
		{NEC, "socks5 - - 80 10.0.3.1", "203.0.113.1:80", "DENY", "DENY * eq 80 # refused: socks5 - - 80 10.0.3.1\nDEFAULT DIRECT\n"},
		{NEC, "socks5 - - 80 10.0.3.1", "203.0.113.1:443", "DIRECT", "\nDEFAULT DIRECT\n"},
		{NEC, "sox5 - - - - 10.0.3.1", "203.0.113.1:443", "DENY", "\n# refused: sox5 - - - - 10.0.3.1\nDEFAULT DENY\n"},
		{NEC, "socks5 - 10.1.2.3/s - - 10.0.3.1", "203.0.113.1:443", "DENY", "\nDEFAULT DENY\n"},
		{NEC, "noproxy- 10. -", "203.0.113.1:443", "DIRECT", "\nDEFAULT DIRECT\n"},
		{NEC, "socks5 b - - - 10.0.3.1", "203.0.113.1:443", "DIRECT", "\nDEFAULT DIRECT\n"},
		{Hummingbird, "SOCKD5 @=nowhere 10.0.0.0 255.0.0.0 eq 80\nDIRECT 0.0.0.0 0.0.0.0", "10.1.2.3:80", "DENY", "DENY 10.0.0.0 255.0.0.0 eq 80 # refused: SOCKD5 @=nowhere"},
		{Hummingbird, "SOCKD5 @=nowhere 10.0.0.0 255.0.0.0 eq 80\nDIRECT 0.0.0.0 0.0.0.0", "10.1.2.3:81", "DIRECT", ""},
		{Hummingbird, "SOCKD5 @=nowhere,neither 10.0.0.0 255.0.0.0 eq nothing", "10.1.2.3:80", "DENY", "\n# refused: SOCKD5 @=nowhere,neither 10.0.0.0 255.0.0.0 eq nothing\nDEFAULT DENY\n"},
		{CSTC, "sockd 10.0.0.0 255.0.0.0\ndirect 0.0.0.0 0.0.0.0", "10.1.2.3:80", "DENY", "DENY 10.0.0.0 255.0.0.0 # refused: sockd 10.0.0.0 255.0.0.0\n"},
		// BALANCE is for the next rule, and for no other.
		{Hummingbird, "BALANCE\nSOCKD5 @=nowhere 10.0.0.0 255.0.0.0\nSOCKD5 @=192.0.2.1,192.0.2.2 0.0.0.0 0.0.0.0", "203.0.113.1:80", "SOCKD5 192.0.2.1 192.0.2.2", "# refused: BALANCE\n"},
		{Hummingbird, "BALANCE\n# ours\nSOCKD5\nSOCKD5 @=192.0.2.1,192.0.2.2 0.0.0.0 0.0.0.0", "203.0.113.1:80", "SOCKD5 192.0.2.1 192.0.2.2", "# refused: BALANCE\n"},
		{Hummingbird, "BALANCE\nDIRECT 10.0.0.0 255.0.0.0\nSOCKD5 @=192.0.2.1,192.0.2.2 0.0.0.0 0.0.0.0\nSOCKD5 @=nowhere 0.0.0.0 0.0.0.0", "203.0.113.1:80", "SOCKD5 192.0.2.1 192.0.2.2", "\nBALANCE\n"},
	} {
		r, err := Convert(tt.format, strings.NewReader(tt.in))
		if err != nil {
			t.Fatal(err)
		}
		table, diags := routes.Parse("", strings.NewReader(string(r.Rules)), routes.Options{Open: anyFile})
		if table == nil {
			t.Fatal(diags)
		}
		rule := table.Match(flow.Flow{Dst: netip.MustParseAddrPort(tt.to)})
		got := rule.Action.String()
		for _, s := range rule.Servers {
			got += " " + s.String()
		}
		if got != tt.want || !strings.Contains(string(r.Rules), tt.rules) || !r.Refused() {
			t.Errorf("%s: %s\n%s: %s, want %s\n%s\nin which should stand\n%s", tt.format, tt.in, tt.to, got, tt.want, r.Rules, tt.rules)
		}
		if strings.Contains(string(r.Rules), "# refused: BALANCE") && rule.Balance != routes.First {
			t.Errorf("%s\nthe rule took the BALANCE of another one", tt.in)
		}
	}
}

// TestUsers: users are kept by name, whoever this host has.
func TestUsers(t *testing.T) {
	for format, in := range map[Format]string{
		Hummingbird: "SOCKD5 @=192.0.2.1 *=no-such-user,bin 0.0.0.0 0.0.0.0", CSTC: "sockd @=192.0.2.1 *=no-such-user,bin 0.0.0.0 0.0.0.0",
		NEC: "socks5 - - - no-such-user,bin 192.0.2.1",
	} {
		r, err := Convert(format, strings.NewReader(in))
		if err != nil || r.Refused() || !strings.Contains(string(r.Rules), "@=192.0.2.1 *=no-such-user,bin ") {
			t.Errorf("%s: %v\n%v", format, err, r)
			continue
		}
		if all := fmt.Sprint(r.Report); strings.Contains(all, "this host has no") || !strings.Contains(all, "never matches forwarded traffic") {
			t.Errorf("%s: %s", format, all)
		}
	}
}

// TestRedsocksOnOneLine: any number of settings stand on a line.
func TestRedsocksOnOneLine(t *testing.T) {
	r, err := Convert(Redsocks, strings.NewReader("base { daemon = on; }\nredsocks { ip = 192.0.2.1; port = 1080; type = socks4; } redudp {\nip = 192.0.2.2; port = 1080 }"))
	if err != nil || r.Refused() {
		t.Fatalf("%v\n%v", err, r)
	}
	for _, want := range []string{"SOCKD4 @=192.0.2.1:1080 * proto=tcp\n", "SOCKD5 @=192.0.2.2:1080 * proto=udp\n"} {
		if !strings.Contains(string(r.Rules), want) {
			t.Errorf("%s\nwithout %s", r.Rules, want)
		}
	}
}
