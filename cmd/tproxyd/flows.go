package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/tproxyd/tproxyd/internal/control"
	"github.com/tproxyd/tproxyd/internal/daemon"
)

// flowFilter says which flows are shown; what is empty shows all.
type flowFilter struct {
	client, server, to, rule, network string
	clients                           netip.Prefix // of client
}

func (f *flowFilter) parse() (err error) {
	if n := f.network; n != "" && n != "tcp" && n != "udp" {
		return fmt.Errorf("--proto: %q is neither tcp nor udp", n)
	}
	if f.client == "" {
		return nil
	}
	if f.clients, err = netip.ParsePrefix(f.client); err != nil {
		var a netip.Addr
		if a, err = netip.ParseAddr(f.client); err == nil {
			f.clients = netip.PrefixFrom(a, a.BitLen())
		}
	}
	if err != nil {
		return fmt.Errorf("--client: %q is neither an address nor a network, as 192.0.2.7 or 192.0.2.0/24", f.client)
	}
	return nil
}

func (f *flowFilter) shows(s daemon.FlowStatus) bool {
	return (!f.clients.IsValid() || f.clients.Contains(s.Client.Addr())) &&
		(f.server == "" || s.Server == f.server) &&
		(f.network == "" || s.Network == f.network) &&
		(f.rule == "" || s.Rule == f.rule || strings.HasSuffix(s.Rule, "/"+f.rule)) &&
		(f.to == "" || strings.Contains(target(s), f.to))
}

// target is where the client wanted to go, in its words.
func target(s daemon.FlowStatus) string {
	if s.Name != "" {
		return fmt.Sprintf("%s:%d", s.Name, s.Destination.Port())
	}
	return s.Destination.String()
}

func flowsCommand(e *env) *cobra.Command {
	var f flowFilter
	var asJSON, watch bool
	var kill []uint
	c := &cobra.Command{
		Use:   "flows [--watch] [--json] [--client NET] [--to TEXT] [--server NAME] [--rule FILE:LINE] [--proto tcp|udp] [--kill ID,...] [-c FILE | --socket PATH]",
		Short: "Print the flows that the running daemon carries",
		Long: `Print the flows that the running daemon carries, TCP connections and what UDP
sockets say to each destination, the oldest first. What is DIRECT by address is the
kernel's and not among them; what processes still carry that were taken over is. With
--watch a terminal shows them until interrupted, with what moves. With --kill flows
are ended instead: TCP is reset on both sides, UDP begins anew with the next datagram.`,
		Example: "  tproxyd flows --watch --client 192.0.2.0/24\n  tproxyd flows --json --to example.org\n  tproxyd flows --kill 17",
		Args:    cobra.NoArgs,
	}
	find := controlFlags(e, c)
	c.Flags().StringVar(&f.client, "client", "", "only flows of an address or a `NETWORK`")
	c.Flags().StringVar(&f.to, "to", "", "only flows whose destination, NAME:PORT or ADDRESS:PORT, holds a `TEXT`")
	c.Flags().StringVar(&f.server, "server", "", "only flows by the server of this `NAME`")
	c.Flags().StringVar(&f.rule, "rule", "", "only flows that the rule at `FILE:LINE` decided")
	c.Flags().StringVar(&f.network, "proto", "", "only flows of a `PROTOCOL`, tcp or udp")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	c.Flags().BoolVar(&watch, "watch", false, "print them again every second, until interrupted")
	c.Flags().UintSliceVar(&kill, "kill", nil, "end the flows of these `ID`s")
	c.MarkFlagsMutuallyExclusive("kill", "watch")
	c.RunE = func(c *cobra.Command, _ []string) error {
		if err := f.parse(); err != nil {
			return err
		}
		client, err := find()
		if err != nil {
			return err
		}
		if kill != nil {
			return failed(killFlows(c.Context(), client, kill))
		}
		v := view{out: e.stdout, json: asJSON}
		for {
			list, err := listFlows(c.Context(), client, &f)
			if err != nil {
				return failed(err)
			}
			if watch {
				err = v.next(list, time.Now())
			} else {
				err = v.print(list)
			}
			if err != nil || !watch {
				return failed(err)
			}
			select {
			case <-c.Context().Done():
				return nil
			case <-time.After(time.Second):
			}
		}
	}
	return c
}

func killFlows(ctx context.Context, client *control.Client, ids []uint) error {
	var errs []error
	for _, id := range ids {
		errs = append(errs, client.Kill(ctx, uint64(id)))
	}
	return errors.Join(errs...)
}

func listFlows(ctx context.Context, client *control.Client, f *flowFilter) ([]daemon.FlowStatus, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	b, err := client.Flows(ctx)
	if err != nil {
		return nil, err
	}
	var all []daemon.FlowStatus
	if err := json.Unmarshal(b, &all); err != nil {
		return nil, fmt.Errorf("flows: the daemon's answer: %w", err)
	}
	shown := []daemon.FlowStatus{}
	for _, s := range all {
		if f.shows(s) {
			shown = append(shown, s)
		}
	}
	return shown, nil
}
