package daemon

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/tproxyd/tproxyd/internal/config"
)

const secret = "tr0ub4dor&3"

// equate lets cmp look at addresses.
var equate = cmpopts.EquateComparable(netip.Addr{}, netip.AddrPort{}, netip.Prefix{})

// write writes files, readable by the owner alone, and returns their folder.
func write(t testing.TB, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// load reads files without an error.
func load(t testing.TB, files map[string]string) *Setup {
	t.Helper()
	s, diags := Load(filepath.Join(write(t, files), "tproxyd.toml"), "")
	if diags.HasErrors() {
		t.Fatal(diags)
	}
	return s
}

func TestLoad(t *testing.T) {
	const credentials = "[office]\nusername = \"operator\"\npassword = \"" + secret + "\"\n"
	const named = "credentials = \"credentials.toml\"\n"
	tests := []struct {
		name  string
		files map[string]string
		want  []string // FILE:LINE CODE, in order
	}{
		{"all well", map[string]string{
			"tproxyd.toml": named + "[intercept]\nlocal = true\n", "credentials.toml": credentials, "socks.cnf": "SERVER a 10.0.3.1 credential=office\nSOCKD5 @=a *",
		}, nil},
		{"a list that is a directory", map[string]string{
			"tproxyd.toml": "[intercept]\nlocal = true\n", "socks.cnf": "LIST l file=dir\nDENY $l", "dir/file": "",
		}, []string{"socks.cnf:1 E24"}},
		{"a server of this host itself", map[string]string{
			"tproxyd.toml": "[intercept]\nlocal = true\n", "socks.cnf": "DENY * eq 25\nSERVER ssh 127.0.0.1:1081 udp=off\nSOCKD5 @=ssh *",
		}, []string{"socks.cnf:2 E14"}},
		{"a server of this host itself, excluded", map[string]string{
			"tproxyd.toml": "[intercept]\nlocal = true\n", "socks.cnf": "EXCLUDE-MODULE tunnel.service\nSERVER ssh 127.0.0.1:1081 udp=off\nSOCKD5 @=ssh *",
		}, nil},
		{"rules for interfaces that are not taken", map[string]string{
			"tproxyd.toml": "[intercept]\ninterfaces = [\"lan0\", \"lan1\"]\n", "socks.cnf": "DENY * eq 1 if=lan0\nDENY * eq 2 if=lan2,lan3\nDENY * eq 3 if=lan2,lan1",
		}, []string{"socks.cnf:2 E22"}},
		{"a resolver that stands for a name", map[string]string{
			"tproxyd.toml": "[intercept]\nlocal = true\n", "socks.cnf": "DIRECT *\nRESOLVE local *.a.example via=10.0.0.53,198.18.0.53\nRESOLVE local * via=[fd74:7072:6f78::53]",
		}, []string{"socks.cnf:2 E14", "socks.cnf:3 E14"}},
		{"rules and credentials", map[string]string{
			"tproxyd.toml": named, "credentials.toml": "[office]\nuser = 1\n", "socks.cnf": "DIRCET *\nDENY *\nDENY * eq 0",
		}, []string{"socks.cnf:1 E01", "socks.cnf:3 E09", "credentials.toml:"}},
		{"only warnings", map[string]string{"tproxyd.toml": "", "socks.cnf": "DIRECT 10.0.0.0"}, []string{"socks.cnf:1 E06", "tproxyd.toml:1 W03"}},
		{"no such credential, twice", map[string]string{
			"tproxyd.toml": named, "credentials.toml": credentials,
			"socks.cnf": "SERVER a 10.0.3.1 credential=home\nSERVER b 10.0.3.2 credential=office\nINCLUDE more.cnf\nSOCKD5 @=a,b,c *", "more.cnf": "\nSERVER c 10.0.3.3 credential=none",
		}, []string{"socks.cnf:1 E20", "more.cnf:2 E20"}},
		{"no credentials file", map[string]string{"tproxyd.toml": "", "socks.cnf": "SERVER a 10.0.3.1 credential=office\nSOCKD5 @=a *"}, []string{"socks.cnf:1 E20"}},
		{"files that are not there", map[string]string{"tproxyd.toml": named}, []string{"socks.cnf:1 E24", "credentials.toml:1 T0"}},
		{"all three", map[string]string{"tproxyd.toml": "rutes = 1\n[dns]\nttl = -1\n" + named, "credentials.toml": "x", "socks.cnf": "DIRCET *"}, []string{"tproxyd.toml:1 T02", "tproxyd.toml:3 T04", "socks.cnf:1 E01"}},
		{"a file that is no TOML", map[string]string{"tproxyd.toml": "routes = \n"}, []string{"tproxyd.toml:1 T01"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s, diags := Load(filepath.Join(write(t, tt.files), "tproxyd.toml"), "")
			var got []string
			for _, d := range diags {
				if strings.Contains(d.Msg, secret) {
					t.Errorf("a secret: %s", d)
				}
				got = append(got, fmt.Sprintf("%s:%d %s", filepath.Base(d.File), d.Line, d.Code))
			}
			for _, want := range tt.want {
				if !slices.ContainsFunc(got, func(s string) bool { return strings.HasPrefix(s, want) }) {
					t.Errorf("no %q in\n%s", want, diags.Error())
				}
			}
			if len(tt.want) == 0 && len(diags) > 0 {
				t.Error(diags)
			}
			if (s == nil) != diags.HasErrors() {
				t.Errorf("setup %v with %q", s, diags)
			}
		})
	}
}

// TestLoadCredentials: what the plan hands to a server is what the file says.
func TestLoadCredentials(t *testing.T) {
	s := load(t, map[string]string{
		"tproxyd.toml":     "credentials = \"credentials.toml\"\n",
		"credentials.toml": "[office]\nusername = \"operator\"\npassword = \"" + secret + "\"\n",
		"socks.cnf":        "SERVER a 10.0.3.1 credential=office\nSOCKD5 @=a *",
	})
	p, err := s.plan()
	if err != nil {
		t.Fatal(err)
	}
	if a := p.Servers()[0].Auth; a == nil || a.Username != "operator" || a.Password != secret {
		t.Error("the credential did not arrive")
	}
	if a := s.auth("none"); a != nil {
		t.Error("a credential that nobody wrote")
	}
	if text := fmt.Sprintf("%v %+v %#v", s.credentials, s.auth("office"), s.auth("office")); strings.Contains(text, secret) {
		t.Errorf("a secret is printed: %s", text)
	}
}

func TestReadHostDNS(t *testing.T) {
	at := func(s ...string) (list []netip.AddrPort) {
		for _, s := range s {
			list = append(list, netip.MustParseAddrPort(s))
		}
		return list
	}
	tests := []struct {
		text      string
		resolvers []netip.AddrPort
		search    []string
	}{
		{"", nil, nil},
		{"nameserver 10.0.0.53\nnameserver 2001:db8::53\n", at("10.0.0.53:53", "[2001:db8::53]:53"), nil},
		{"# nameserver 10.0.0.1\n;nameserver 10.0.0.2\n  nameserver\t10.0.0.53  # ours\nnameserver\nnameserver nobody", at("10.0.0.53:53"), nil},
		{"nameserver fe80::1%eth0", at("[fe80::1%eth0]:53"), nil},
		{"search Corp.Example. .lab.example\noptions ndots:5", nil, []string{"corp.example", "lab.example"}},
		{"search a.example\ndomain b.example", nil, []string{"b.example"}},
		{"domain b.example\nsearch a.example .", nil, []string{"a.example"}},
	}
	for _, tt := range tests {
		path := filepath.Join(t.TempDir(), "resolv.conf")
		if err := os.WriteFile(path, []byte(tt.text), 0o600); err != nil {
			t.Fatal(err)
		}
		h := readHostDNS(path)
		if !slices.Equal(h.resolvers, tt.resolvers) || !slices.Equal(h.search, tt.search) {
			t.Errorf("%q: %v, %v", tt.text, h.resolvers, h.search)
		}
	}
	if h := readHostDNS(filepath.Join(t.TempDir(), "none")); h.resolvers != nil || h.search != nil {
		t.Errorf("a file that is not there says %v", h)
	}
}

// TestHostDNS: what tproxyd.toml says counts, else what resolv.conf says.
func TestHostDNS(t *testing.T) {
	host := hostDNS{resolvers: []netip.AddrPort{netip.MustParseAddrPort("10.0.0.53:53")}, search: []string{"host.example"}}
	ours := config.Config{DNS: config.DNS{Resolvers: []netip.AddrPort{netip.MustParseAddrPort("10.0.0.54:53")}, Search: []string{"ours.example"}}}
	tests := []struct {
		name      string
		config    *config.Config
		resolvers string
		search    string
	}{
		{"resolv.conf", &config.Config{}, "10.0.0.53:53", "host.example"},
		{"tproxyd.toml", &ours, "10.0.0.54:53", "ours.example"},
		{"no search list, and said so", &config.Config{DNS: config.DNS{Search: []string{}}}, "10.0.0.53:53", ""},
	}
	for _, tt := range tests {
		s := &Setup{Config: tt.config, host: host}
		if got := strings.Join(s.LocalNames().Search, " "); got != tt.search || s.resolvers()[0].String() != tt.resolvers {
			t.Errorf("%s: search %q, resolvers %v", tt.name, got, s.resolvers())
		}
	}
	if got := (&Setup{}).LocalNames(); got.Search != nil || got.None {
		t.Errorf("rules alone: %+v", got)
	}
}

// TestChangeable: keys that the running daemon cannot follow are named, all of
// them; those that it can follow are not.
func TestChangeable(t *testing.T) {
	const base = "[dns]\nresolvers = [\"10.0.0.53\"]\n"
	tests := []struct{ toml, routes, want string }{
		{"", "DENY *", ""},
		{"[intercept]\ninterfaces = [\"lan0\", \"lan1\"]\nlocal = true\nfail = \"open\"\n[dns]\nresolvers = [\"10.0.0.54\"]\nsearch = [\"corp.example\"]\n", "TIMEOUT connect=1s idle=1h\nDIRECT *", ""},
		{"[intercept]\ndns = false\n" + base, "DENY *", "[intercept] dns"},
		{"[intercept]\nmark = \"0x10/0xf0\"\n" + base, "DENY *", "[intercept] mark"},
		{"[intercept]\ntable = 99\n" + base, "DENY *", "[intercept] table"},
		{"[dns]\npool4 = \"100.64.0.0/16\"\n", "DENY *", "[dns] pool4"},
		{"[dns]\npool6 = \"fd00:1::/112\"\n", "DENY *", "[dns] pool6"},
		{"[dns]\nttl = 5\n", "DENY *", "[dns] ttl"},
		{"[state]\ndirectory = \"/elsewhere\"\n", "DENY *", "[state] directory"},
		{"[control]\nsocket = \"/elsewhere.sock\"\n", "DENY *", "[control] socket"},
		{"[control]\nmetrics = \"127.0.0.1:9\"\n", "DENY *", "[control] metrics"},
		{base, "TIMEOUT dns=9s\nDENY *", "TIMEOUT dns="},
		{"[intercept]\ntable = 99\n[dns]\nttl = 5\n", "TIMEOUT dns=9s", "[intercept] table, [dns] ttl, TIMEOUT dns="},
	}
	old := load(t, map[string]string{"tproxyd.toml": base, "socks.cnf": "DENY *"})
	for _, tt := range tests {
		err := old.changeable(load(t, map[string]string{"tproxyd.toml": tt.toml, "socks.cnf": tt.routes}))
		if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), ": changed: "+tt.want+"; restart") {
			t.Errorf("%q with %q: error %v, want %q", tt.toml, tt.routes, err, tt.want)
		}
	}
}

func TestReadyLine(t *testing.T) {
	tests := []struct{ toml, routes, want string }{
		{"[intercept]\ninterfaces = [\"lan0\", \"lan1\"]\n", "SOCKD5 @=10.0.3.1,10.0.3.2 *", "interfaces [lan0 lan1], 2 rules, 2 servers"},
		{"[intercept]\nlocal = true\n", "DEFAULT DIRECT", "interfaces [], this host's own flows, 1 rules, 0 servers"},
	}
	for _, tt := range tests {
		d := &Daemon{setup: load(t, map[string]string{"tproxyd.toml": tt.toml, "socks.cnf": tt.routes})}
		if got := d.readyLine(); got != tt.want {
			t.Errorf("%q, want %q", got, tt.want)
		}
	}
}

// TestDecided: only a start with the same rules, and the same local names, may
// keep what the one before let pass by name.
func TestDecided(t *testing.T) {
	state := t.TempDir()
	with := func(search, routes string) *Setup {
		return load(t, map[string]string{
			"tproxyd.toml": fmt.Sprintf("[dns]\nsearch = [%q]\n[state]\ndirectory = %q\n", search, state), "socks.cnf": routes,
		})
	}
	kept := func(s *Setup) bool { return s.readmitAtStart() == nil }
	one := with("corp.example", "DIRECT *.example.org")
	if kept(one) {
		t.Error("kept by the first start of all")
	}
	if err := one.noteDecided(); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		search, routes string
		want           bool
	}{
		{"corp.example", "DIRECT *.example.org", true},
		{"corp.example", "DIRECT *.example.net", false},
		{"corp.example", "DENY *.example.org", false},
		{"other.example", "DIRECT *.example.org", false},
	} {
		if got := kept(with(tt.search, tt.routes)); got != tt.want {
			t.Errorf("%+v: kept %v", tt, got)
		}
	}
	one.forgetDecided()
	if kept(one) {
		t.Error("kept what was forgotten")
	}
	if err := os.RemoveAll(state); err != nil {
		t.Fatal(err)
	}
	if err := one.noteDecided(); err == nil || kept(one) {
		t.Errorf("without the folder: error %v", err)
	}
}

func TestHostAddrs(t *testing.T) {
	var h hostAddrs
	for addr, want := range map[string]bool{
		"127.0.0.1": true, "127.9.9.9": true, "::1": true, "192.0.2.1": true, "::ffff:192.0.2.1": true, "192.0.2.2": false, "2001:db8::1": false,
	} {
		if got := h.has(netip.MustParseAddr(addr)); got != want {
			t.Errorf("%s: %v, want %v", addr, got, want)
		}
	}
	// What is new is known when the list is old.
	h.set = nil
	if h.has(netip.MustParseAddr("192.0.2.1")) {
		t.Error("the list was read again too soon")
	}
	h.read = h.read.Add(-hostAddrsAge - time.Second)
	if !h.has(netip.MustParseAddr("192.0.2.1")) {
		t.Error("the list was not read again")
	}
}

// same fails the test unless a and b are alike.
func same(t testing.TB, what string, want, got any) {
	t.Helper()
	if d := cmp.Diff(want, got, equate, cmpopts.EquateEmpty()); d != "" {
		t.Errorf("%s:\n%s", what, d)
	}
}
