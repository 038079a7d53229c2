package gateway

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/tproxyd/tproxyd/pkg/flow"
	"github.com/tproxyd/tproxyd/pkg/relay"
	"github.com/tproxyd/tproxyd/pkg/routes"
	"github.com/tproxyd/tproxyd/pkg/socks"
	"github.com/tproxyd/tproxyd/pkg/upstream"
)

// dnsPort is where a question goes as DNS over TCP if the server has no UDP.
const dnsPort = 53

// DecideUDP says what becomes of the datagrams from a client socket to one
// destination, which entered by the interface given. It does not block.
func (g *Gateway) DecideUDP(client, dst netip.AddrPort, ifIndex int) relay.Verdict {
	p := g.plan.Load()
	l := &live{g: g, plan: p}
	l.flow = flow.Flow{Network: flow.UDP, Src: unmap(client), Dst: unmap(dst)}
	v, err := g.decideUDP(l, ifIndex)
	if err == nil {
		return v
	}
	g.count.refuse(err)
	if l.pinned {
		g.o.Names.Unpin(l.flow.Dst.Addr())
	}
	// What a rule denies is refused here as the kernel refuses it.
	refusal := relay.RefusePort
	if err == errDenied {
		refusal = relay.RefuseProhibited
		if l.rule.Action == routes.Deny && l.rule.Reject == routes.RejectDrop {
			refusal = relay.RefuseSilently
		}
	}
	return relay.Verdict{Refusal: refusal, Why: l.why()}
}

func (g *Gateway) decideUDP(l *live, ifIndex int) (v relay.Verdict, err error) {
	f := &l.flow
	if g.o.Own(f.Dst) {
		return v, errLoop
	}
	if l.plan.table.UsesInterfaces() {
		if f.InIf, err = g.o.Entered(ifIndex); err != nil {
			return v, err
		}
	}
	if err := g.client(l); err != nil {
		return v, err
	}
	if err := g.name(l); err != nil {
		return v, err
	}
	l.rule = l.plan.table.Match(*f)
	t := l.plan.tallies[l.rule.Index]
	t.flows.Add(1)
	v.Up, v.Down = &t.up, &t.down
	switch l.rule.ActionFor(flow.UDP) {
	case routes.Deny:
		return v, errDenied
	case routes.Direct:
		v.Way = g.directWay(l)
	default:
		if v.Header, err = socks.AppendUDPHeader(nil, f.Target()); err != nil {
			return v, err
		}
		v.Way = g.serverWay(l)
		v.Named = f.Name != ""
	}
	v.Short, v.Idle = f.Dst.Port() == dnsPort, l.rule.Idle
	v.Why = l.why()
	if l.pinned {
		addr := f.Dst.Addr() // and not l, which has the plan
		v.Release = func() { g.o.Names.Unpin(addr) }
	}
	return v, nil
}

// why is what the log says of the decision.
func (l *live) why() any {
	if l.rule == nil {
		return nil
	}
	return l.rule.Bare()
}

// serverWay leads through an association with a server of the rule's list.
func (g *Gateway) serverWay(l *live) *relay.Way {
	i := l.rule.Index
	group := l.plan.groups[i]
	r := upstream.Request{To: l.flow.Target(), Src: l.flow.Src.Addr()}
	w := &relay.Way{Key: l.plan.keys[i], Refusal: refusalOf}
	w.Open = func(ctx context.Context, first any) (relay.Outlet, error) {
		last, _ := first.(*upstream.Server)
		a, err := g.o.Upstream.Associate(ctx, group, r, same(group.Servers, last))
		if err != nil {
			return relay.Outlet{}, err
		}
		return outletOf(a)
	}
	if l.flow.Dst.Port() == dnsPort {
		associate := w.Open
		w.Key += " dns"
		w.Open = func(ctx context.Context, first any) (relay.Outlet, error) {
			o, err := associate(ctx, first)
			if errors.Is(err, upstream.ErrNoUDP) {
				return g.dnsOutlet(group, r.Src)
			}
			return o, err
		}
	}
	return w
}

// outletOf is an association as the relay has it: before a datagram's own header
// stand those for the relays of a chain, the nearest first.
func outletOf(a *upstream.Association) (o relay.Outlet, err error) {
	o = relay.Outlet{Socket: a.Socket.(*relay.Packet), Via: a.Server}
	for _, c := range a.Control {
		o.Control = append(o.Control, c.(*relay.Conn))
	}
	for _, hop := range a.Hops {
		if o.Outer, err = socks.AppendUDPHeader(o.Outer, hop); err != nil {
			a.Close()
			return relay.Outlet{}, err
		}
	}
	if len(a.Hops) > 0 {
		o.Inner = func(b []byte) (int, bool) { return fromHops(b, a.Hops) }
	}
	return o, nil
}

// fromHops returns the length of the headers that a datagram has of the relays of
// a chain, false if it is not from them: whoever may send to a relay could else
// pretend to be anybody.
func fromHops(b []byte, hops []flow.Target) (n int, ok bool) {
	for _, hop := range hops {
		from, name, m, err := socks.ParseUDPHeader(b[n:])
		switch {
		case err != nil, from.Port() != hop.Port:
			return 0, false
		case hop.Name == "" && len(name) == 0 && from.Addr() != hop.Addr.Unmap():
			return 0, false
		case hop.Name == "" && len(name) > 0, hop.Name != "" && len(name) > 0 && string(name) != hop.Name:
			return 0, false
		}
		n += m
	}
	return n, true
}

// same finds a server of an earlier plan in a list of this one.
func same(servers []*upstream.Server, s *upstream.Server) *upstream.Server {
	if i := slices.IndexFunc(servers, s.Same); i >= 0 {
		return servers[i]
	}
	return nil
}

// listKey is equal for lists of the same servers, also in different plans.
func listKey(servers []*upstream.Server, r *routes.Rule) string {
	var b strings.Builder
	for _, s := range servers {
		fmt.Fprintf(&b, "%s=%s/%v,", s.Name, s.Host, s.Addr)
	}
	if r.Balance != routes.First {
		fmt.Fprintf(&b, " %d", r.Balance)
	}
	return b.String()
}

// directWay leads from this host to the destination, or to the first of the
// name's addresses that no earlier rule takes. A later plan may take that, so the
// way to a name is this plan's alone.
func (g *Gateway) directWay(l *live) *relay.Way {
	key := fmt.Sprintf("direct %v", l.flow.Dst)
	if l.flow.Name != "" {
		key += fmt.Sprintf(" %p", l.plan)
	}
	return &relay.Way{
		Key:     key,
		Refusal: refusalOf,
		Open: func(ctx context.Context, _ any) (relay.Outlet, error) {
			to := l.flow.Dst
			if l.flow.Name != "" {
				ctx, cancel := context.WithTimeout(ctx, orDefault(l.plan.table.Limits().Connect, defaultConnect))
				defer cancel()
				addrs, err := g.o.Resolve(ctx, l.flow.Name)
				if err != nil {
					return relay.Outlet{}, err
				}
				if to, err = g.leads(l, addrs); err != nil {
					return relay.Outlet{}, err
				}
			}
			socket, err := g.o.DialUDP(to)
			return relay.Outlet{Socket: socket}, err
		},
	}
}

// leads returns the first of a DIRECT name's addresses that the flow may go to.
func (g *Gateway) leads(l *live, addrs []netip.Addr) (to netip.AddrPort, err error) {
	err = fmt.Errorf("gateway: %s has no address", l.flow.Name)
	for _, a := range addrs {
		if err = g.mayDial(l, a); err == nil {
			return l.at, nil
		}
	}
	return to, err
}

// refusalOf says what a client is told whose datagram could not be carried. By
// default its socket sees at once that there is nobody: a server at fault, and
// one that has no UDP, are as good as that.
func refusalOf(err error) relay.Refusal {
	var r socks.Reply
	if errors.As(err, &r) && !errors.Is(err, upstream.ErrNoUDP) {
		switch r {
		case socks.NotAllowed:
			return relay.RefuseProhibited
		case socks.NetworkUnreachable:
			return relay.RefuseNet
		case socks.HostUnreachable, socks.TTLExpired:
			return relay.RefuseHost
		}
	}
	return relay.RefusePort
}

// SessionDone writes the line of a UDP session, at its end: at debug, or at info
// where one of its rules says log.
func (g *Gateway) SessionDone(r relay.SessionResult) {
	level := slog.LevelDebug
	var rules []string
	for _, why := range r.Why {
		if rule, ok := why.(*routes.Rule); ok {
			rules = append(rules, rule.Position())
			if rule.Log {
				level = slog.LevelInfo
			}
		}
	}
	ctx := context.Background()
	if !g.o.Log.Enabled(ctx, level) {
		return
	}
	attrs := []slog.Attr{slog.Any("src", r.Client), slog.Any("dst", r.Dst)}
	if name, ok := g.o.Names.Lookup(r.Dst.Addr()); ok && g.o.Names.Contains(r.Dst.Addr()) {
		attrs = append(attrs, slog.String("host", name))
	}
	attrs = append(attrs, slog.Int("destinations", r.Flows), slog.String("rules", strings.Join(rules, " ")))
	var via []string
	for _, v := range r.Via {
		if s, ok := v.(*upstream.Server); ok {
			via = append(via, s.Name)
		}
	}
	if via != nil {
		attrs = append(attrs, slog.String("upstream", strings.Join(via, " ")))
	}
	attrs = append(attrs, slog.Uint64("up", r.Up), slog.Uint64("down", r.Down),
		slog.Uint64("datagrams_up", r.UpDatagrams), slog.Uint64("datagrams_down", r.DownDatagrams),
		slog.Duration("dur", r.Duration.Round(time.Millisecond)))
	g.o.Log.LogAttrs(ctx, level, "session", attrs...)
}
