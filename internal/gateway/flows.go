package gateway

import (
	"cmp"
	"context"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/tproxyd/tproxyd/pkg/flow"
	"github.com/tproxyd/tproxyd/pkg/relay"
	"github.com/tproxyd/tproxyd/pkg/routes"
	"github.com/tproxyd/tproxyd/pkg/upstream"
)

// FlowStatus is a flow that is being carried: a TCP connection, or what a UDP
// socket says to one destination.
type FlowStatus struct {
	ID          uint64         `json:"id"`                // until the daemon ends
	Process     int            `json:"process,omitempty"` // that carries it, of those that were taken over; 0: the one that serves
	Network     string         `json:"network"`           // tcp or udp
	Start       time.Time      `json:"start"`             // when it was accepted
	Age         float64        `json:"age_seconds"`       // since then
	Client      netip.AddrPort `json:"client"`
	Interface   string         `json:"interface,omitempty"` // that it entered by; of TCP only if a rule asks for that
	Name        string         `json:"name,omitempty"`      // that the client asked for
	Destination netip.AddrPort `json:"destination"`         // that the client connected to; synthetic if there is a name
	Rule        string         `json:"rule"`
	By          *routes.Rule   `json:"-"` // the rule, or what Bare makes of it; nil: none is known
	Action      string         `json:"action"`
	List        string         `json:"list,omitempty"`   // that the server is of; empty: the rule has but one, or none
	Server      string         `json:"server,omitempty"` // empty: this host dialled it
	Up          uint64         `json:"up"`               // bytes delivered to the server
	Down        uint64         `json:"down"`             // bytes delivered to the client
}

// copied is a flow whose bytes pass through this process.
type copied struct {
	ctx      context.Context
	kill     context.CancelFunc
	up, down atomic.Uint64
}

func newCopied() *copied {
	c := &copied{}
	c.ctx, c.kill = context.WithCancel(context.Background())
	return c
}

// bytes returns what has been delivered. Gateway.mu is held.
func (l *live) bytes() (up, down uint64) {
	switch {
	case l.stream != nil:
		up, down = l.stream.Bytes()
	case l.copied != nil:
		up, down = l.copied.up.Load(), l.copied.down.Load()
	}
	if l.up != nil {
		up += uint64(l.up.Sent)
	}
	return up, down
}

// Flows returns the TCP flows that are being carried, the oldest first. What the
// kernel forwards alone is not among them, and UDP is told by UDPFlows.
func (g *Gateway) Flows() []FlowStatus {
	now := time.Now()
	g.mu.Lock()
	list := make([]FlowStatus, 0, len(g.live))
	for l := range g.live {
		up, down := l.bytes()
		f := FlowStatus{
			ID: l.id, Network: l.flow.Network.String(), Start: l.start, Age: now.Sub(l.start).Seconds(), Client: l.flow.Src, Interface: l.flow.InIf, Name: l.flow.Name,
			Destination: l.flow.Dst, Rule: l.rule.Position(), By: l.rule, Action: l.rule.Action.String(), List: listName(l.rule), Up: up, Down: down,
		}
		if l.via != nil {
			f.Server = l.via.Name
		}
		list = append(list, f)
	}
	g.mu.Unlock()
	slices.SortFunc(list, func(a, b FlowStatus) int { return cmp.Compare(a.ID, b.ID) })
	return list
}

// Kill resets both sides of flows. It returns how many of these there were.
func (g *Gateway) Kill(ids ...uint64) int {
	var streams []*relay.Stream
	var copies []*copied
	want := make(map[uint64]bool, len(ids))
	for _, id := range ids {
		want[id] = true
	}
	g.mu.Lock()
	for l := range g.live {
		switch {
		case !want[l.id]:
		case l.stream != nil:
			streams = append(streams, l.stream)
		case l.copied != nil:
			copies = append(copies, l.copied)
		}
	}
	g.mu.Unlock()
	for _, s := range streams {
		s.Kill()
	}
	for _, c := range copies {
		c.kill()
	}
	return len(streams) + len(copies)
}

// UDPFlows tells of flows of UDP in the words of this package, the oldest first.
func (g *Gateway) UDPFlows(flows []relay.UDPFlow) []FlowStatus {
	now := time.Now()
	list := make([]FlowStatus, 0, len(flows))
	for _, u := range flows {
		f := FlowStatus{
			ID: u.ID, Network: flow.UDP.String(), Start: u.Start, Age: now.Sub(u.Start).Seconds(), Client: unmap(u.Client),
			Destination: unmap(u.Dst), Interface: g.o.Index(u.IfIndex), Up: u.Up, Down: u.Down,
		}
		if g.o.Names.Contains(f.Destination.Addr()) {
			f.Name, _ = g.o.Names.Lookup(f.Destination.Addr())
		}
		if r, ok := u.Why.(*routes.Rule); ok {
			f.By, f.Rule, f.Action, f.List = r, r.Position(), r.ActionFor(flow.UDP).String(), listName(r)
		}
		if s, ok := u.Via.(*upstream.Server); ok {
			f.Server = s.Name
		}
		list = append(list, f)
	}
	slices.SortFunc(list, func(a, b FlowStatus) int { return cmp.Compare(a.ID, b.ID) })
	return list
}
