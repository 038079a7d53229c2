// Package doctor looks at a host for what keeps a gateway from doing its work,
// before users find it: filters and marks of others, settings of the kernel,
// limits, servers that do not answer, clients that ask for names elsewhere.
//
// It promises to change nothing, to send nothing but a router solicitation on
// the named interfaces and a connection to each SOCKS server, to say of each
// finding what it is, why it matters and what mends it, and to say nothing of
// what it cannot read. A daemon need not be there.
package doctor

import (
	"context"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/tproxyd/tproxyd/pkg/redirect"
)

// Finding is one thing that is wrong.
type Finding struct {
	Check string `json:"check"` // a word for its kind
	What  string `json:"what"`
	Why   string `json:"why"`
	Mend  string `json:"mend"` // a command line, or what to change
}

// Host is what is looked at. The zero value is a host on which nothing is
// intercepted.
type Host struct {
	Marks      redirect.Marks
	Interfaces []string       // those whose flows are taken
	Synthetic  []netip.Prefix // pools of addresses that stand for names
	State      string         // directory of what must survive; empty: none
	Socket     string         // of a running daemon; empty or unanswered: there is none

	// Servers asks each SOCKS server for a greeting; nil: none is asked.
	Servers func(ctx context.Context) ([]Server, error)
}

// Server is how a SOCKS server answered.
type Server struct {
	Name string        `json:"server"`
	Took time.Duration `json:"took_ns"`         // until it had greeted
	Err  string        `json:"error,omitempty"` // why it did not; empty: it did
}

// Report is all that was found.
type Report struct {
	Findings []Finding `json:"findings"`
	Servers  []Server  `json:"servers"`
}

// solicited is how long other routers have for an answer, which they may delay
// for half a second (RFC 4861 section 6.2.6), and slow what a greeting may take
// before it is a finding.
const (
	solicited = 800 * time.Millisecond
	slow      = time.Second
)

// Examine looks at everything. It takes as long as the slowest server, and at
// least a second where there are interfaces.
func Examine(ctx context.Context, h Host) Report {
	var r Report
	add := func(list ...Finding) { r.Findings = append(r.Findings, list...) }
	for _, i := range slices.Concat(redirect.Hindrances(h.Marks), redirect.DirectHindrances(h.Marks, h.Interfaces), redirect.SyntheticHindrances(h.Synthetic...)) {
		add(Finding(i))
	}
	add(abilities()...)
	add(interfaces(h.Interfaces)...)
	add(networkd("/")...)
	d := daemonAt(ctx, h.Socket)
	add(limits(d)...)
	add(conntrack("/")...)
	add(state(h.State)...)
	add(d.findings()...)
	add(resolversElsewhere(h.Interfaces, d)...)

	routers := make(chan []Finding, 1)
	go func() { routers <- otherRouters(ctx, h.Interfaces) }()
	if h.Servers != nil {
		servers, err := h.Servers(ctx)
		if err != nil {
			add(Finding{"servers", "the servers could not be asked: " + err.Error(), "whether they answer is not known", "tproxyd check --probe"})
		}
		r.Servers = servers
		for _, s := range servers {
			switch {
			case s.Err != "":
				add(Finding{"server", "server " + s.Name + " does not greet: " + s.Err, "flows go to the next server of their list, or are refused", "start the server, or correct its line; tproxyd check --probe tells more"})
			case s.Took > slow:
				add(Finding{"server", "server " + s.Name + " took " + s.Took.Round(time.Millisecond).String() + " to greet", "each flow waits for it", "look at the way there and at its load"})
			}
		}
	}
	add(<-routers...)
	return r
}

// abilities finds what the kernel lacks and cannot be done without.
func abilities() (list []Finding) {
	needed := []string{"nftables tproxy", "policy routing", "transparent sockets"}
	for _, a := range redirect.Abilities() {
		if why, unknown := strings.CutPrefix(a.State, "unknown: "); unknown {
			return []Finding{{"rights", "this host can be looked at in part only: " + why, "what would stop flows may not be seen by this user", "run this as root"}}
		}
		if slices.Contains(needed, a.Name) && a.State != "yes" {
			list = append(list, Finding{"kernel", a.Name + ": " + a.State, "without it no flow can be taken", "run this as root; on a kernel of your own switch on CONFIG_NFT_TPROXY, CONFIG_NFT_SOCKET and CONFIG_IP_MULTIPLE_TABLES"})
		}
	}
	return list
}

// known are resolvers that are asked by DNS over HTTPS or TLS, by address.
var known = func() map[netip.Addr]string {
	m := map[netip.Addr]string{}
	for name, addrs := range map[string][]string{
		"Cloudflare": {"1.1.1.1", "1.0.0.1", "2606:4700:4700::1111", "2606:4700:4700::1001", "162.159.61.4", "172.64.41.4"},
		"Google":     {"8.8.8.8", "8.8.4.4", "2001:4860:4860::8888", "2001:4860:4860::8844"},
		"Quad9":      {"9.9.9.9", "149.112.112.112", "2620:fe::fe", "2620:fe::9"},
		"OpenDNS":    {"208.67.222.222", "208.67.220.220", "146.112.41.2"},
		"AdGuard":    {"94.140.14.14", "94.140.15.15", "2a10:50c0::ad1:ff", "2a10:50c0::ad2:ff"},
	} {
		for _, a := range addrs {
			m[netip.MustParseAddr(a)] = name
		}
	}
	return m
}()

// knownNames are names of such resolvers.
var knownNames = []string{
	"cloudflare-dns.com", "one.one.one.one", "dns.google", "dns.quad9.net", "doh.opendns.com", "dns.adguard-dns.com", "dns.nextdns.io",
	"mask.icloud.com", "mask-h2.icloud.com",
}
