// Package config reads tproxyd.toml, the file that says how this host
// intercepts, and the credentials that the routing rules name.
//
// It promises to report every mistake of a file in one run, each with its
// line and column, and to know every key: an unknown key is an error. It reads
// files and nothing else: no environment, no kernel.
package config

import (
	"net/netip"
	"path/filepath"
	"time"

	"github.com/tproxyd/tproxyd/pkg/redirect"
)

// DefaultPath is where the daemon looks for its file unless told otherwise.
const DefaultPath = "/etc/tproxyd/tproxyd.toml"

// Fail says what becomes of the kernel's table at a normal stop.
type Fail uint8

// What a normal stop does; a crash always leaves the table closed.
const (
	FailClosed Fail = iota // the table stays: proxied flows are refused at once
	FailOpen               // table, rules and routes are removed
)

// String returns the word used in the file.
func (f Fail) String() string {
	if f == FailOpen {
		return "open"
	}
	return "closed"
}

// Config is tproxyd.toml, complete: defaults are filled in and paths are
// absolute or relative to the working directory of the process, not to the
// file.
type Config struct {
	Path        string // the file it was read from
	Routes      string // the routing rules
	Credentials string // the credentials file; empty: none
	Sandbox     bool   // give up, once serving, what rights are not needed

	Intercept Intercept
	DNS       DNS
	State     State
	Control   Control
}

// Intercept says which flows are taken, and how they are marked.
type Intercept struct {
	Interfaces []string // flows that enter here; empty: no forwarded traffic
	Local      bool     // this host's own flows too
	DNS        bool     // port 53, UDP and TCP, to whatever resolver it is sent
	Fail       Fail
	Mark       redirect.Marks
	Table      int           // routing table
	Drain      time.Duration // how long a daemon that was taken over carries its flows on, whole seconds
}

// DNS says how names are answered.
type DNS struct {
	Resolvers []netip.AddrPort // for names resolved here; empty: those of resolv.conf
	Search    []string         // search domains, which stay local; empty: those of resolv.conf
	Pool4     netip.Prefix     // synthetic IPv4 addresses
	Pool6     netip.Prefix     // synthetic IPv6 addresses
	TTL       time.Duration    // of synthetic answers, whole seconds
}

// State says where the daemon keeps what must survive it.
type State struct {
	Directory string
}

// Control says where the daemon can be asked.
type Control struct {
	Socket  string // UNIX socket
	Metrics string // address of an HTTP listener for /metrics; empty: only on the socket
	Clash   string // address of an HTTP listener for the Clash API and a page; empty: none
	Secrets string // file of what opens it; empty: systemd's credential of that name
	UI      string // folder of a dashboard that is served there at /ui/; empty: none
}

// Default returns the configuration that an empty file means, for a file at
// path (which need not exist).
func Default(path string) *Config {
	return &Config{
		Path:    path,
		Routes:  filepath.Join(filepath.Dir(path), "socks.cnf"),
		Sandbox: true,
		Intercept: Intercept{
			DNS:   true,
			Mark:  redirect.Marks{Value: 0x7000, Mask: 0xf000},
			Table: 7470,
			Drain: 24 * time.Hour,
		},
		DNS: DNS{
			Pool4: netip.MustParsePrefix("198.18.0.0/15"),
			Pool6: netip.MustParsePrefix("fd74:7072:6f78::/96"),
			TTL:   time.Minute,
		},
		State:   State{Directory: "/var/lib/tproxyd"},
		Control: Control{Socket: "/run/tproxyd/control.sock"},
	}
}
