package daemon

import (
	"errors"
	"log/slog"
	"net"
	"net/netip"

	"github.com/tproxyd/tproxyd/internal/config"
	"github.com/tproxyd/tproxyd/pkg/redirect"
	"github.com/tproxyd/tproxyd/pkg/routes"
)

// Enclosure is a network namespace that shall lead nowhere but to us: that of a
// command or of a container. What is taken there is carried from here, the
// namespace of this process; a flow that is DIRECT is dialled here too (R16).
type Enclosure struct {
	// Inside runs a function on a thread in the namespace and returns its
	// error. It stays that of the Daemon until this has ended.
	Inside func(func() error) error

	// Load reads the rules, and is asked again at each reload.
	Load func() (*routes.Table, config.Credentials, routes.Diagnostics)

	Resolvers []netip.AddrPort // for names that are resolved here; empty: those of resolv.conf

	Keep []string // interfaces whose own networks stay as they are
	Ends bool     // the namespace ends with this process
	Open bool     // at a normal stop everything of ours is removed; else the namespace stays closed
}

// NewEnclosed brings up everything for a namespace but the serving itself, as
// New does for this host. The diagnostics are those of Load; the Daemon is nil
// if there is an error among them.
func NewEnclosed(e Enclosure, log *slog.Logger) (*Daemon, routes.Diagnostics, error) {
	s, diags := e.setup()
	if diags.HasErrors() {
		return nil, diags, nil
	}
	d, err := New(s, log)
	return d, diags, err
}

// setup reads the rules into a Setup whose configuration is that of every
// enclosed namespace.
func (e *Enclosure) setup() (*Setup, routes.Diagnostics) {
	t, creds, diags := e.Load()
	if diags.HasErrors() {
		return nil, diags
	}
	diags = append(diags, missingCredentials(t, creds)...)
	if diags.HasErrors() {
		return nil, diags
	}
	c := config.Default("")
	c.Intercept.Local = true
	if e.Open {
		c.Intercept.Fail = config.FailOpen
	}
	if len(e.Resolvers) > 0 {
		c.DNS.Resolvers = e.Resolvers
	}
	c.State.Directory, c.Control.Socket = "", "" // names are kept in memory, nobody asks
	return &Setup{Config: c, Table: t, credentials: creds, host: readHostDNS(resolvConf), enclosure: e, lists: newOpened("", nil).lists(t)}, diags
}

// inside runs f where flows are taken: in this namespace, or in the enclosed one.
func (d *Daemon) inside(f func() error) error {
	if d.enclosure == nil {
		return f()
	}
	return d.enclosure.Inside(f)
}

// enclose makes the kernel's plan that of an enclosed namespace: whatever the
// rules say, nothing passes there but by us.
func (s *Setup) enclose(p *redirect.Plan) error {
	p.Enclosed = true
	p.Servers = nil
	all := []redirect.Range{
		{From: netip.IPv4Unspecified(), To: netip.AddrFrom4([4]byte{255, 255, 255, 255})},
		{From: netip.IPv6Unspecified(), To: netip.MustParseAddr("ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")},
	}
	p.Blocks = []redirect.Block{{Proxy: all}}
	return s.enclosure.Inside(func() error {
		for _, name := range s.enclosure.Keep {
			k := redirect.Kept{Name: name}
			i, err := net.InterfaceByName(name)
			if err != nil {
				return errors.New("daemon: --keep: there is no interface " + name)
			}
			addrs, err := i.Addrs()
			if err != nil {
				return err
			}
			for _, a := range addrs {
				if n, ok := a.(*net.IPNet); ok {
					if ip, ok := netip.AddrFromSlice(n.IP); ok {
						ones, _ := n.Mask.Size()
						k.Networks = append(k.Networks, netip.PrefixFrom(ip.Unmap(), ones).Masked())
					}
				}
			}
			p.Keep = append(p.Keep, k)
		}
		return nil
	})
}
