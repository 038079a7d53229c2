package main

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"

	"github.com/spf13/cobra"
	"github.com/tproxyd/tproxyd/internal/daemon"
	"github.com/tproxyd/tproxyd/pkg/flow"
	"github.com/tproxyd/tproxyd/pkg/relay"
	"github.com/tproxyd/tproxyd/pkg/routes"
)

// source is what a command works on: the daemon's file with all that it
// names, or a file of rules alone.
type source struct {
	conf, routes string
}

func (s *source) flags(c *cobra.Command) {
	configFlag(c, &s.conf)
	c.Flags().StringVar(&s.routes, "routes", "", "a `FILE` of rules alone, in place of the daemon's file")
	c.MarkFlagsMutuallyExclusive("config", "routes")
}

// load reads the files and says what is wrong with them. Setup.Config is nil
// for rules alone.
func (s *source) load(e *env) (*daemon.Setup, error) {
	var setup *daemon.Setup
	var diags routes.Diagnostics
	if s.routes != "" {
		var t *routes.Table
		t, diags = routes.ParseFile(s.routes, routes.Options{})
		setup = &daemon.Setup{Table: t}
	} else {
		setup, diags = daemon.Load(s.conf, e.getenv("CREDENTIALS_DIRECTORY"))
	}
	return setup, e.tell(diags)
}

func checkCommand(e *env) *cobra.Command {
	var src source
	var verbose, probe bool
	c := &cobra.Command{
		Use:   "check [-v] [--probe] [-c FILE | --routes FILE]",
		Short: "Report every mistake in the files",
		Long: `Report every error and warning of the files in one run, one a line:
FILE:LINE:COL: error E05: text. The exit status is 2 if there is an error.
Warnings alone leave it 0.

With --probe each server is also asked what it can do, over the network: to
greet, to authenticate, to connect by name, IPv4 and IPv6, to carry UDP, to listen
(BIND), and what it takes ahead of its answers. The exit status is 1 if one does not
greet, or does not let this client in.`,
		Example: "  tproxyd check -c /etc/tproxyd/tproxyd.toml\n  tproxyd check -v --routes socks.cnf\n  tproxyd check --probe",
		Args:    cobra.NoArgs,
	}
	src.flags(c)
	c.Flags().BoolVarP(&verbose, "verbose", "v", false, "also print the rules as they apply, the implicit ones first, which the kernel decides, and what UDP holds at most")
	c.Flags().BoolVar(&probe, "probe", false, "also ask the servers what they can do")
	c.RunE = func(c *cobra.Command, _ []string) error {
		setup, err := src.load(e)
		if err != nil {
			return err
		}
		if verbose {
			e.printRules(setup.Table)
			fmt.Fprintf(e.stdout, "limit     UDP          %d client sockets, %d destinations of them, %d MiB of datagrams that wait for a server: %d MiB of memory in all\n",
				relay.UDPMaxSessions, relay.UDPMaxFlows, relay.UDPMaxQueued>>20, relay.UDPMaxMemory>>20)
		}
		fmt.Fprintf(e.stdout, "ok: %d rules, %d servers\n", len(setup.Table.Rules()), len(setup.Table.Servers()))
		if probe {
			return e.probe(c.Context(), setup)
		}
		return nil
	}
	return c
}

// probe prints what the servers can do.
func (e *env) probe(ctx context.Context, setup *daemon.Setup) error {
	list, err := setup.Probe(ctx)
	if err != nil {
		return &failure{err}
	}
	var silent []string
	for _, s := range list {
		for _, a := range s.Abilities {
			has := "no"
			switch {
			case a.Has:
				has = "yes"
			case a.Unclear:
				has = "?"
			}
			fmt.Fprintf(e.stdout, "%-16s %-14s  %-3s  %s\n", s.Name, a.What, has, a.Answer)
		}
		if !s.Abilities[0].Has {
			silent = append(silent, s.Name)
		} else if a := s.Abilities[1]; a.What == "authentication" && !a.Has {
			silent = append(silent, s.Name)
		}
	}
	if silent != nil {
		return &failure{fmt.Errorf("check: no greeting, or not this client's authentication: %s", strings.Join(silent, ", "))}
	}
	return nil
}

// printRules lists the rules in the order in which they apply.
func (e *env) printRules(t *routes.Table) {
	for _, i := range t.Implicit(ownPrefixes()) {
		fmt.Fprintf(e.stdout, "implicit  kernel       %s\n", i)
	}
	inKernel := map[*routes.Rule]bool{}
	blocks := t.Kernel()
	for _, b := range blocks {
		for _, r := range b.Rules {
			inKernel[r] = true
		}
	}
	for _, r := range t.Rules() {
		where := "user space "
		switch {
		case !inKernel[r]:
		case decides(r.Action):
			where = "kernel     "
		case decides(r.ActionFor(flow.UDP)):
			where = "UDP: kernel"
		}
		fmt.Fprintf(e.stdout, "%-9s %s  %s\n", r.Position(), where, r.Text)
	}
	for n, b := range blocks {
		fmt.Fprintf(e.stdout, "block %-3d kernel       %s\n", n, &b)
	}
}

// decides tells whether the kernel decides an action alone.
func decides(a routes.Action) bool { return a == routes.Direct || a == routes.Deny }

// ownPrefixes returns this host's own addresses.
func ownPrefixes() []netip.Prefix {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil // the list is for show
	}
	var own []netip.Prefix
	for _, a := range addrs {
		if ipnet, ok := a.(*net.IPNet); ok {
			if ip, ok := netip.AddrFromSlice(ipnet.IP); ok {
				own = append(own, netip.PrefixFrom(ip.Unmap(), ip.Unmap().BitLen()))
			}
		}
	}
	return own
}
