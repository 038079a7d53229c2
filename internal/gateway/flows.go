package gateway

import (
	"cmp"
	"context"
	"net/netip"
	"slices"
	"sync/atomic"
	"time"

	"github.com/tproxyd/tproxyd/pkg/relay"
)

// FlowStatus is a TCP flow that is being carried.
type FlowStatus struct {
	ID          uint64         `json:"id"`          // until the daemon ends
	Age         float64        `json:"age_seconds"` // since it was accepted
	Client      netip.AddrPort `json:"client"`
	Interface   string         `json:"interface,omitempty"` // that it entered by, if a rule asks for that
	Name        string         `json:"name,omitempty"`      // that the client asked for
	Destination netip.AddrPort `json:"destination"`         // that the client connected to; synthetic if there is a name
	Rule        string         `json:"rule"`
	Action      string         `json:"action"`
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
// kernel forwards alone is not among them.
func (g *Gateway) Flows() []FlowStatus {
	now := time.Now()
	g.mu.Lock()
	list := make([]FlowStatus, 0, len(g.live))
	for l := range g.live {
		up, down := l.bytes()
		f := FlowStatus{
			ID: l.id, Age: now.Sub(l.start).Seconds(), Client: l.flow.Src, Interface: l.flow.InIf, Name: l.flow.Name,
			Destination: l.flow.Dst, Rule: l.rule.Position(), Action: l.rule.Action.String(), Up: up, Down: down,
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

// Kill resets both sides of a flow. It returns false if there is none of that ID.
func (g *Gateway) Kill(id uint64) bool {
	var found *live
	var stream *relay.Stream
	g.mu.Lock()
	for l := range g.live {
		if l.id == id {
			found, stream = l, l.stream
			break
		}
	}
	g.mu.Unlock()
	switch {
	case found == nil:
		return false
	case stream != nil:
		stream.Kill()
	case found.copied != nil:
		found.copied.kill()
	}
	return true
}
