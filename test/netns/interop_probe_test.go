package netns_test

import (
	"fmt"
	"strings"
	"testing"
)

// interopProbes is what check --probe finds: a letter for each ability that the
// server of a row has. They are to greet, to authenticate, to connect to a Name,
// to IPv4 (4) and IPv6 (6), what is sent ahead (P), UDP (U), and to listen (B).
// SOCKS4 has no a, and what is not asked in SOCKS5 no P nor U.
//
//   - ssh -D hangs up, and tinyproxy says 500, where it cannot connect to itself:
//     the probe has no answer by N and 6.
//   - danted takes any SOCKS4A name for the address 0.0.0.1, and answers.
//   - hpsockd says that it listens, where nobody is heard.
var interopProbes = map[string]string{
	"danted": "gaN46PUB", "danted, user": "gaN46PUB", "danted, SOCKD": "gaN46PUB", "danted, SOCKD4": "g4B", "danted, SOCKD4A": "gN4B",
	"microsocks": "gaN46", "microsocks, user": "gaN46", "microsocks, SOCKD4": "g",
	"ssh -D": "ga4P", "ssh -D, SOCKD4": "g4", "ssh -D, SOCKD4A": "g4",
	"hpsockd": "gaN4PUB", "hpsockd, SOCKD4": "g4B", "hpsockd v4, SOCKD": "g4B",
	"ss-local": "gaN46PU", "v2ray": "gaN46PU", "v2ray, user": "gaN46PU", "v2ray, SOCKD4A": "gN4", "v2ray, HTTP": "gaN46", "v2ray, HTTP, user": "gaN46",
	"v2ray, TLS": "gaN46P", "v2ray, HTTP, TLS": "gaN46", "tinyproxy": "ga4", "tinyproxy, user": "ga4",
}

// probe has the gateway ask the server what it can do, without the daemon. One
// that is given another secret does not greet, and says so.
func (r *interopRun) probe(t *testing.T, d *daemon, row interopServer) {
	out := d.cli(t, "check", "--probe", "-c", d.config)
	letters := map[string]string{
		"greeting": "g", "authentication": "a", "connect name": "N", "connect ipv4": "4", "connect ipv6": "6", "pipeline": "P", "udp": "U", "bind": "B",
	}
	got := ""
	for line := range strings.Lines(out.out) {
		for what, letter := range letters {
			if strings.HasPrefix(line, fmt.Sprintf("%-16s %-14s  yes", "s", what)) {
				got += letter
			}
		}
	}
	if got != interopProbes[row.name] {
		t.Errorf("%s, want %s:\n%s%s", got, interopProbes[row.name], out.out, out.err)
	}
	if code := map[bool]int{true: 1}[row.wrong != ""]; out.code != code {
		t.Errorf("exit status %d, want %d:\n%s%s", out.code, code, out.out, out.err)
	}
	if strings.Contains(out.out+out.err, interopPassword) {
		t.Errorf("it shows the password:\n%s%s", out.out, out.err)
	}
}
