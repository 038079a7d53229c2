package config

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/tproxyd/tproxyd/pkg/redirect"
)

func TestParseComplete(t *testing.T) {
	const file = `
routes      = "rules/office.cnf"
credentials = "/run/secrets/c.toml"
sandbox = false

[intercept]
interfaces = ["lan0", "br-guest"]
local      = true
dns        = false
fail       = "open"
mark       = "0x10/0xf0"
table      = 99
drain      = 600

[dns]
resolvers = ["10.0.0.53", "[2001:db8::53]:5353"]
search    = ["Corp.Example."]
pool4     = "100.64.0.0/16"
pool6     = "fd00:1::/112"
ttl       = 5

[state]
directory = "state"

[control]
socket  = "/run/t.sock"
metrics = "127.0.0.1:9470"
clash   = "[::1]:9090"
secrets = "secrets.toml"
ui      = "/srv/dashboard"
`
	got, diags := Parse("/etc/t/tproxyd.toml", []byte(file))
	if len(diags) != 0 {
		t.Fatal(diags)
	}
	want := &Config{
		Path:        "/etc/t/tproxyd.toml",
		Routes:      "/etc/t/rules/office.cnf",
		Credentials: "/run/secrets/c.toml",
		Intercept:   Intercept{Interfaces: []string{"lan0", "br-guest"}, Local: true, Fail: FailOpen, Mark: redirect.Marks{Value: 0x10, Mask: 0xf0}, Table: 99, Drain: 10 * time.Minute},
		DNS: DNS{
			Resolvers: []netip.AddrPort{netip.MustParseAddrPort("10.0.0.53:53"), netip.MustParseAddrPort("[2001:db8::53]:5353")},
			Search:    []string{"corp.example"},
			Pool4:     netip.MustParsePrefix("100.64.0.0/16"), Pool6: netip.MustParsePrefix("fd00:1::/112"),
			TTL: 5 * time.Second,
		},
		State:   State{Directory: "/etc/t/state"},
		Control: Control{Socket: "/run/t.sock", Metrics: "127.0.0.1:9470", Clash: "[::1]:9090", Secrets: "/etc/t/secrets.toml", UI: "/srv/dashboard"},
	}
	if d := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{}, netip.AddrPort{}, netip.Prefix{})); d != "" {
		t.Error(d)
	}
}

func TestParseEmptyIsDefault(t *testing.T) {
	got, diags := Parse("/etc/tproxyd/tproxyd.toml", nil)
	if len(diags) != 0 {
		t.Fatal(diags)
	}
	if got.Routes != "/etc/tproxyd/socks.cnf" || !got.Intercept.DNS || got.Intercept.Local || got.Intercept.Fail != FailClosed {
		t.Errorf("defaults: %+v", got)
	}
}

// Each mistake is reported with its own line, column and code, all in one run.
func TestParseReportsAll(t *testing.T) {
	for _, tt := range []struct{ in, want string }{
		{"rutes = 1", `t.toml:1:1: error T02: unknown key "rutes"; the file has routes, credentials, [intercept], [dns], [state] and [control]`},
		{"[intercept]\ninterface = []", `t.toml:2:1: error T02: unknown key "intercept.interface"; the keys of [intercept] are dns, drain, fail, interfaces, local, mark, table`},
		{"[intercept]\n  local = 1", `t.toml:2:3: error T03: intercept.local: wrong type: want true or false`},
		{"[intercept]\ninterfaces = \"lan0\"", `t.toml:2:1: error T03: intercept.interfaces: wrong type: want a list in brackets, as in ["a", "b"]`},
		{"[intercept]\ninterfaces = [\"lan*\"]", `t.toml:2:1: error T04: intercept.interfaces: "lan*": there are no patterns of interfaces; name each one`},
		{"[intercept]\ninterfaces = [\"a b\", \"lo\"]", `t.toml:2:1: error T04: intercept.interfaces: "a b" is not an interface name; "lo" cannot be named; this host's own flows are taken with local = true`},
		{"[intercept]\nfail = \"ajar\"", `t.toml:2:1: error T04: intercept.fail: "ajar" is neither "closed" nor "open"`},
		{"[intercept]\nmark = \"7000\"", `t.toml:2:1: error T04: intercept.mark: redirect: mark "7000" is not VALUE/MASK, as "0x7000/0xf000"`},
		{"[intercept]\nmark = \"0x1/0xf0\"", `t.toml:2:1: error T04: intercept.mark: redirect: mark 0x1/0xf0: the value must be within the mask and not 0`},
		{"[intercept]\ntable = 254", `t.toml:2:1: error T04: intercept.table: 254 is one of the kernel's own tables (default, main, local)`},
		{"[intercept]\ndrain = -1", `t.toml:2:1: error T04: intercept.drain: -1 is not between 0 and 2592000`},
		{"[dns]\nttl = 0", `t.toml:2:1: error T04: dns.ttl: 0 is not between 1 and 86400`},
		{"[dns]\nttl = 1.5", `t.toml:2:1: error T03: dns.ttl: wrong type: want a whole number`},
		{"[dns]\npool4 = \"198.18.0.1/15\"", `t.toml:2:1: error T04: dns.pool4: 198.18.0.1/15 has bits outside its length; write 198.18.0.0/15`},
		{"[dns]\npool4 = \"fd00::/96\"", `t.toml:2:1: error T04: dns.pool4: "fd00::/96" is not a prefix of this family`},
		{"[dns]\npool6 = \"fd00::/8\"", `t.toml:2:1: error T04: dns.pool6: fd00::/8: the length must be between /32 and /124`},
		{"[dns]\nresolvers = [\"dns.example\"]", `t.toml:2:1: error T04: dns.resolvers: "dns.example" is not the address of a resolver, as "10.0.0.53" or "[2001:db8::53]:53"`},
		{"routes = \"a\"\nroutes = \"b\"", `t.toml:2:1: error T05: routes is given twice`},
		{"[control]\nmetrics = \"9470\"", `t.toml:2:1: error T04: control.metrics: "9470" is not HOST:PORT, as in "127.0.0.1:9470"`},
		{"[control]\nmetrics = \"127.0.0.1:99999\"", `t.toml:2:1: error T04: control.metrics: "127.0.0.1:99999" is not HOST:PORT, as in "127.0.0.1:9470"`},
		{"dns = {ttl = true, x = 1}", "t.toml:1:8: error T03: dns.ttl: wrong type: want a whole number\nt.toml:1:20: error T02: unknown key \"dns.x\"; the keys of [dns] are pool4, pool6, resolvers, search, ttl"},
	} {
		c, diags := Parse("t.toml", []byte(tt.in))
		if c != nil {
			t.Errorf("%q: a config despite of errors", tt.in)
		}
		if got := diags.Error(); got != tt.want {
			t.Errorf("%q:\n got %s\nwant %s", tt.in, got, tt.want)
		}
	}
	_, diags := Parse("t.toml", []byte("routes = \n[x"))
	if len(diags) == 0 || diags[0].Code != "T01" || diags[0].Line != 1 {
		t.Errorf("syntax error: %v", diags)
	}
}

func TestCredentials(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string, mode os.FileMode) string {
		t.Helper()
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		return file
	}
	file := write("c.toml", "[int]\nusername = \"u\"\npassword = \"geheim\"\n", 0o600)
	got, diags := LoadCredentials(file, "")
	if len(diags) != 0 || got["int"].Username != "u" || got["int"].Password != "geheim" {
		t.Fatal(diags)
	}
	for _, s := range []string{fmt.Sprint(got), fmt.Sprintf("%+v %#v", got, got["int"])} {
		if strings.Contains(s, "geheim") {
			t.Errorf("a password is printed: %s", s)
		}
	}

	open := write("open.toml", "[int]\n", 0o644)
	if _, diags := LoadCredentials(open, ""); !diags.HasErrors() || !strings.Contains(diags.Error(), "chmod 600") {
		t.Errorf("a readable file is accepted: %v", diags)
	}
	if _, diags := LoadCredentials(filepath.Join(dir, "none"), ""); !diags.HasErrors() {
		t.Error("a missing file is accepted")
	}
	half := write("half.toml", "[int]\nusername = \"u\"\n[b]\npassword=3\nx=1\n", 0o600)
	if _, diags := LoadCredentials(half, ""); len(diags) != 3 {
		t.Errorf("want 3 errors: %v", diags)
	}
	twice := write("twice.toml", "[int]\nusername = \"u\"\npassword = \"geheim\"\n[int]\npassword = \"anders\"\n", 0o600)
	if _, diags := LoadCredentials(twice, ""); len(diags) != 1 || diags[0].Code != "T05" || diags[0].Line != 5 {
		t.Errorf("a password given twice: %v", diags)
	}

	creds := filepath.Join(dir, "systemd")
	if err := os.Mkdir(creds, 0o700); err != nil {
		t.Fatal(err)
	}
	write("systemd/office", "username = \"a\"\npassword = \"b\"\n", 0o400)
	got, diags = LoadCredentials("", creds)
	if len(diags) != 0 || got["office"].Password != "b" {
		t.Errorf("systemd credential: %v %v", diags, len(got))
	}
}

func FuzzParse(f *testing.F) {
	f.Add("routes = \"x\"\n[dns]\nttl = 1\n")
	f.Add("a = {b = [1, {c = 2}]}\n[[x]]\n")
	f.Fuzz(func(t *testing.T, in string) {
		if c, diags := Parse("f", []byte(in)); (c == nil) != diags.HasErrors() {
			t.Errorf("config %v with %v", c, diags)
		}
	})
}
