package netns_test

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// Topology: one machine with an address, no daemon. What is asserted is what
// the commands print and how they exit.

// machine is a host with an interface for the commands that look at the host.
func machine(t *testing.T) *host {
	t.Helper()
	h := newHost(t, "machine")
	h.ip(t, "link add lan0 type veth peer name far0", "link set lan0 up", "link set far0 up",
		"addr add "+lanAt+"/24 dev lan0", "addr add "+lanAt6+"/64 dev lan0 nodad")
	return h
}

// verdict is the last line of explain.
func (r result) verdict(t testing.TB) string {
	t.Helper()
	r.ok(t)
	lines := strings.Split(strings.TrimSuffix(r.out, "\n"), "\n")
	return lines[len(lines)-1]
}

func TestExplain(t *testing.T) {
	t.Parallel()
	h := machine(t)
	paper := abs(t, "testdata/hummingbird/socks.cnf")
	d := newDaemon(t, h, settings{routes: `SERVER int1 10.0.3.1:1080
SERVER int2 10.0.3.2:1080
DENY * 25
DIRECT 10.0.0.0/8
SOCKD5 @=int1 * src=192.168.7.0/24
DIRECT * if=br-guest
SOCKD5 @=int1 2001:db8::/32 443
DENY *.ads.example
BALANCE
SOCKD5 @=int1,int2 * http,https
DEFAULT DENY
`})
	for _, test := range []struct {
		args []string
		want string
	}{
		{[]string{"--routes", paper, "10.1.2.3:22"}, "verdict: DIRECT"},
		{[]string{"--routes", paper, "www.example.org:80"}, "verdict: SOCKD5 10.0.3.1,10.0.3.2"},
		{[]string{"--routes", paper, "www.example.org:443"}, "verdict: DENY"},
		{[]string{"--routes", paper, "192.168.100.7:443"}, "verdict: SOCKD5 10.0.4.1"},
		{[]string{"--routes", paper, "www.private-net.org:443"}, "verdict: SOCKD5 10.0.4.1"},
		{[]string{"--routes", paper, "private-net.org:443"}, "verdict: DENY"},
		{[]string{"--routes", paper, "203.0.113.5:80"}, "verdict: SOCKD5 10.0.3.1,10.0.3.2"},
		{[]string{"--routes", paper, "[2001:db8::1]:80"}, "verdict: DENY"},
		{[]string{"-c", d.config, "10.1.2.3:22"}, "verdict: DIRECT"},
		{[]string{"-c", d.config, "10.1.2.3:25"}, "verdict: DENY"},
		{[]string{"-c", d.config, "10.0.3.1:1080"}, "verdict: DIRECT"},
		{[]string{"-c", d.config, "127.0.0.1:25"}, "verdict: DIRECT"},
		{[]string{"-c", d.config, "[fe80::1]:25"}, "verdict: DIRECT"},
		{[]string{"-c", d.config, lanAt + ":25"}, "verdict: DIRECT"},
		{[]string{"-c", d.config, "www.example.org:https"}, "verdict: SOCKD5 int1,int2"},
		{[]string{"-c", d.config, "www.example.org:22"}, "verdict: DENY"},
		{[]string{"-c", d.config, "x.ads.example:80"}, "verdict: DENY"},
		{[]string{"-c", d.config, "--src", "192.168.7.9", "www.example.org:22"}, "verdict: SOCKD5 int1"},
		{[]string{"-c", d.config, "--if", "br-guest", "203.0.113.9:22"}, "verdict: DIRECT"},
		{[]string{"-c", d.config, "[2001:db8::1]:443"}, "verdict: SOCKD5 int1"},
		{[]string{"-c", d.config, "--proto", "udp", "203.0.113.9:9"}, "verdict: DENY"},
	} {
		got := h.run(t, command{args: append([]string{d.bin, "explain"}, test.args...)}).verdict(t)
		if got != test.want {
			t.Errorf("explain %s: %q, want %q", strings.Join(test.args, " "), got, test.want)
		}
	}
	// The rule comes with its file and line.
	r := d.cli(t, "explain", "--routes", paper, "www.example.org:80").ok(t)
	if !strings.Contains(r.out, "socks.cnf:7") {
		t.Errorf("no rule with its line:\n%s", r.out)
	}
	for _, args := range [][]string{{"explain"}, {"explain", "nonsense"}, {"explain", "--proto", "sctp", "a.example:1"}, {"explain", "a.example:no-such-service"}} {
		d.cli(t, args...).exit(t, 2)
	}
}

// fiftyMistakes are rules of which every second line has a mistake.
func fiftyMistakes() string {
	var bad strings.Builder
	kinds := []string{"SOCKS5 @=10.0.3.1 *", "DIRECT 10.0.0.", "DIRECT 10.0.0.0 0.0.0.255", "DENY 10.0.0.1 eq", "DENY 10.0.0.1 70000",
		"SOCKD5 @=nobody *", "DENY *foo.org", "DENY", "DENY 10.0.0.1 wrong=1", "DENY 10.0.0.1 htpp"}
	for i := range 50 {
		bad.WriteString("# line\n" + strings.Repeat(" ", i%3) + kinds[i%len(kinds)] + "\n")
	}
	return bad.String()
}

var mistake = regexp.MustCompile(`(?m)^\S+/socks\.cnf:(\d+):\d+: error E\d\d: .+$`)

// allFifty fails the test unless the program refused fiftyMistakes with a
// message for each of them, in one run.
func (r result) allFifty(t testing.TB) {
	t.Helper()
	r.exit(t, 2)
	lines := map[string]bool{}
	for _, m := range mistake.FindAllStringSubmatch(r.out+r.err, -1) {
		lines[m[1]] = true
	}
	for i := range 50 {
		if n := fmt.Sprint(2*i + 2); !lines[n] {
			t.Errorf("nothing about line %s", n)
		}
	}
	if len(lines) != 50 {
		t.Errorf("messages for %d of 50 lines:\n%s%s", len(lines), r.out, r.err)
	}
}

func TestCheck(t *testing.T) {
	t.Parallel()
	h := machine(t)
	// Everything is well.
	d := newDaemon(t, h, settings{routes: "DIRECT 10.0.0.0/8\nSOCKD5 @=10.0.3.1 *\n"})
	d.cli(t, "check", "-c", d.config).ok(t)
	if v := d.cli(t, "check", "-v", "-c", d.config).ok(t); !strings.Contains(v.out, "127.0.0.0/8") || !strings.Contains(v.out, "10.0.3.1") {
		t.Errorf("check -v does not show the implicit rules:\n%s", v.out)
	}

	// Fifty mistakes, fifty messages, in one run.
	d.routes(t, fiftyMistakes())
	d.cli(t, "check", "-c", d.config).allFifty(t)
	// The daemon does not start with it, and says the same.
	d.cli(t, "serve", "-c", d.config).allFifty(t)

	// Mistakes of both files in one run; unknown keys are errors.
	h.file(t, "tproxyd.toml", "routes = \"socks.cnf\"\nroute = \"typo\"\n[intercept]\ninterfaces = [\"lan0\"]\nfail = \"ajar\"\nmark = \"0x1\"\n[no-such-table]\nx = 1\n[dns]\npool4 = \"198.18.0.0/15\"\nttl = -1\n", 0o644)
	r := d.cli(t, "check", "-c", d.config).exit(t, 2)
	for _, want := range []string{"tproxyd.toml:2:", "tproxyd.toml:5:", "tproxyd.toml:6:", "tproxyd.toml:8:", "tproxyd.toml:11:"} {
		if !strings.Contains(r.out+r.err, want) {
			t.Errorf("nothing about %s\n%s%s", want, r.out, r.err)
		}
	}
	h.file(t, "tproxyd.toml", "routes = \"socks.cnf\n", 0o644)
	d.cli(t, "check", "-c", d.config).exit(t, 2)

	// Files that are not there, or that everybody may read.
	d.cli(t, "check", "-c", filepath.Join(h.dir, "none.toml")).exit(t, 2)
	d.cli(t, "check", "--routes", filepath.Join(h.dir, "none.cnf")).exit(t, 2)
	d = newDaemon(t, h, settings{routes: "SERVER a 10.0.3.1 auth=userpass credential=a\nSOCKD5 @=a *\n", credentials: "[a]\nusername = \"u\"\npassword = \"hush-hush\"\n"})
	if r := d.cli(t, "check", "-v", "-c", d.config).ok(t); strings.Contains(r.out+r.err, "hush-hush") {
		t.Error("check prints a password")
	}
	if err := os.Chmod(filepath.Join(h.dir, "credentials.toml"), 0o644); err != nil {
		t.Fatal(err)
	}
	if r := d.cli(t, "check", "-c", d.config).exit(t, 2); strings.Contains(r.out+r.err, "hush-hush") {
		t.Error("check prints a password")
	}
	h.file(t, "credentials.toml", "[b]\nusername = \"u\"\npassword = \"p\"\n", 0o600)
	d.cli(t, "check", "-c", d.config).exit(t, 2)
}

func TestVersionAndUsage(t *testing.T) {
	t.Parallel()
	h := machine(t)
	bin := program(t)
	if r := h.run(t, command{args: []string{bin, "version"}}).ok(t); !strings.Contains(r.out, "tproxyd") || !strings.Contains(r.out, "go1.") {
		t.Errorf("version: %q", r.out)
	}
	h.run(t, command{args: []string{bin, "--help"}}).ok(t)
	for _, c := range []string{"serve", "check", "explain", "reload", "close", "cleanup", "demo", "version"} {
		if r := h.run(t, command{args: []string{bin, c, "--help"}}).ok(t); !strings.Contains(r.out, "tproxyd "+c) {
			t.Errorf("%s --help: %q", c, r.out)
		}
		h.run(t, command{args: []string{bin, c, "--no-such-flag"}}).exit(t, 2)
	}
	h.run(t, command{args: []string{bin, "frobnicate"}}).exit(t, 2)
	// Nobody to reload.
	d := newDaemon(t, h, settings{routes: "DEFAULT DENY\n"})
	d.cli(t, "reload", "-c", d.config).exit(t, 1)
}
