package gateway

import (
	"context"
	"log/slog"
	"net/netip"

	"github.com/tproxyd/tproxyd/pkg/flow"
	"github.com/tproxyd/tproxyd/pkg/routes"
)

// KernelFlow is a flow that the kernel decided, as its first packet shows it.
type KernelFlow struct {
	Src, Dst netip.AddrPort // without ports if Protocol has none
	Protocol string
	InIf     string // empty: this host's own
}

// ReportKernel writes the one line of a flow that the kernel decided by a rule, at
// info.
func (g *Gateway) ReportKernel(k KernelFlow, r *routes.Rule) { g.reportKernel(k, r, "") }

// ReportAdmitted is ReportKernel for a flow to an address that Admit let in: the line
// is that of a rule that says log, if the address was one of a name that it decides.
func (g *Gateway) ReportAdmitted(k KernelFlow) {
	f := flow.Flow{Src: k.Src, Dst: k.Dst, InIf: k.InIf}
	if k.Protocol == "udp" {
		f.Network = flow.UDP
	}
	g.mu.Lock()
	names := g.admitted.names[k.Dst.Addr()]
	g.mu.Unlock()
	for _, n := range names {
		f.Name = n.name
		if r := g.plan.Load().table.Match(f); r.Log && r.Action == routes.Direct {
			g.reportKernel(k, r, n.name)
			return
		}
	}
}

func (g *Gateway) reportKernel(k KernelFlow, r *routes.Rule, name string) {
	attrs := []slog.Attr{slog.String("proto", k.Protocol)}
	for _, a := range []struct {
		key string
		at  netip.AddrPort
	}{{"src", k.Src}, {"dst", k.Dst}} {
		if a.at.Port() == 0 {
			attrs = append(attrs, slog.Any(a.key, a.at.Addr()))
		} else {
			attrs = append(attrs, slog.Any(a.key, a.at))
		}
	}
	if name != "" {
		attrs = append(attrs, slog.String("host", name))
	}
	action := r.Action
	if k.Protocol == "udp" {
		action = r.ActionFor(flow.UDP)
	}
	attrs = append(attrs, slog.String("rule", r.Position()), slog.String("action", action.String()))
	if r.Tag != "" {
		attrs = append(attrs, slog.String("tag", r.Tag))
	}
	g.o.Log.LogAttrs(context.Background(), slog.LevelInfo, "flow", append(attrs, slog.String("by", "kernel"))...)
}
