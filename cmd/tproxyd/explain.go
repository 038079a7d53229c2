package main

import (
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/tproxyd/tproxyd/internal/daemon"
	"github.com/tproxyd/tproxyd/pkg/flow"
	"github.com/tproxyd/tproxyd/pkg/routes"
)

func explainCommand(e *env) *cobra.Command {
	var src source
	var who clientFlags
	var proto string
	var asJSON bool
	c := &cobra.Command{
		Use:   "explain [-c FILE | --routes FILE] [--proto tcp|udp] [--src ADDR] [--if IF] [--json] DEST:PORT",
		Short: "Say what becomes of a flow, and why",
		Long: `Say what becomes of a flow: the answer to the DNS question, what the kernel does,
the rule with its line, the rules that nearly decided it and why they did not, the
servers in their order. DEST is a name or an address. Nothing is sent. The last
line is the verdict: DIRECT, DENY, or an action with its servers as they are
written in the rule.

Without --if the flow is one of this host. Its process is unknown unless --uid,
--gid, --cgroup or --program say something of it.`,
		Example: "  tproxyd explain www.example.org:80\n  tproxyd explain --routes socks.cnf --src 10.1.2.3 '[2001:db8::1]:443'\n  tproxyd explain --uid www-data --cgroup /system.slice/web.service 203.0.113.1:80",
		Args:    takes("DEST:PORT"),
	}
	src.flags(c)
	who.flags(c)
	c.Flags().StringVar(&proto, "proto", "tcp", "tcp or udp")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	c.RunE = func(_ *cobra.Command, args []string) error {
		f, err := parseFlow(args[0], proto)
		if err != nil {
			return err
		}
		if err := who.apply(&f); err != nil {
			return err
		}
		setup, err := src.load(e)
		if err != nil {
			return err
		}
		x := setup.Table.Explain(f, surroundings(setup))
		if c := setup.Config; c != nil && f.InIf != "" && !slices.Contains(c.Intercept.Interfaces, f.InIf) {
			x.Kernel, x.Place = "not taken, since [intercept] interfaces has no "+f.InIf, nil
			x.Notes = append(x.Notes, "the verdict is for a flow that is taken")
		}
		if asJSON {
			enc := json.NewEncoder(e.stdout)
			enc.SetIndent("", "  ")
			enc.SetEscapeHTML(false) // a>b is a chain
			return failed(enc.Encode(x))
		}
		fmt.Fprint(e.stdout, x.String())
		return nil
	}
	return c
}

// parseFlow reads a destination and the protocol of its flow.
func parseFlow(dest, proto string) (f flow.Flow, err error) {
	switch proto {
	case "tcp":
	case "udp":
		f.Network = flow.UDP
	default:
		return f, fmt.Errorf("--proto: %q is neither tcp nor udp", proto)
	}
	host, service, err := net.SplitHostPort(dest)
	if err != nil {
		return f, fmt.Errorf("%q is not DEST:PORT, as www.example.org:80 or [2001:db8::1]:443", dest)
	}
	port, err := strconv.ParseUint(service, 10, 16)
	if err != nil || port == 0 {
		n, err := net.LookupPort(proto, service)
		if err != nil || n == 0 {
			return f, fmt.Errorf("%q is neither a port nor a service", service)
		}
		port = uint64(n)
	}
	if a, err := netip.ParseAddr(host); err == nil {
		f.Dst = netip.AddrPortFrom(a.Unmap().WithZone(""), uint16(port))
		return f, nil
	}
	f.Name = strings.ToLower(strings.TrimSuffix(host, "."))
	f.Dst = netip.AddrPortFrom(netip.Addr{}, uint16(port))
	if f.Name == "" || strings.ContainsAny(f.Name, "/*") || strings.ContainsFunc(f.Name, func(r rune) bool { return r <= ' ' || r == 0x7f }) {
		return f, fmt.Errorf("%q is neither a name nor an address", host)
	}
	return f, nil
}

// surroundings are those of a host that runs by its configuration, or of rules
// alone.
func surroundings(s *daemon.Setup) routes.Surroundings {
	if s.Config == nil {
		return routes.Surroundings{Local: s.LocalNames()}
	}
	return routes.Surroundings{
		Intercepted: true,
		DNS:         s.Config.Intercept.DNS,
		Synthetic:   []netip.Prefix{s.Config.DNS.Pool4, s.Config.DNS.Pool6},
		Own:         ownPrefixes(),
		Local:       s.LocalNames(),
	}
}
