package gateway

import (
	"errors"
	"sync/atomic"

	"github.com/tproxyd/tproxyd/pkg/routes"
	"github.com/tproxyd/tproxyd/pkg/socks"
)

// Reason is why a flow was refused.
type Reason uint8

// The reasons, in the order of Stats.Refused.
const (
	ReasonDenied   Reason = iota // a rule or DEFAULT said DENY
	ReasonUnowned                // a synthetic address that no name owns
	ReasonLoop                   // this host itself was the destination
	ReasonReply                  // the SOCKS server answered that it cannot or may not
	ReasonUpstream               // no server of the list could be used
	ReasonLeft                   // the client left before a server answered
	reasons
)

// String returns the reason as metrics and logs spell it.
func (r Reason) String() string {
	return [...]string{"denied", "unowned", "loop", "reply", "upstream", "left"}[r]
}

// counters count flows. Only proxied and DIRECT-by-us flows pass here; what
// the kernel decides is counted there.
type counters struct {
	proxied, direct atomic.Uint64 // started
	live            atomic.Int64
	up, down        atomic.Uint64 // bytes of flows that have ended
	refused         [reasons]atomic.Uint64
}

func (c *counters) started(a routes.Action) {
	if a == routes.Direct {
		c.direct.Add(1)
	} else {
		c.proxied.Add(1)
	}
	c.live.Add(1)
}

func (c *counters) ended(up, down uint64) {
	c.live.Add(-1)
	c.up.Add(up)
	c.down.Add(down)
}

func (c *counters) refuse(err error) {
	var reply socks.Reply
	var reply4 socks.Reply4
	var status socks.HTTPStatus
	reason := ReasonUpstream
	switch {
	case err == errDenied:
		reason = ReasonDenied
	case err == errUnowned:
		reason = ReasonUnowned
	case err == errLoop:
		reason = ReasonLoop
	case err == errLeft:
		reason = ReasonLeft
	case errors.As(err, &reply), errors.As(err, &reply4), errors.As(err, &status):
		reason = ReasonReply
	}
	c.refused[reason].Add(1)
}

// Stats is a reading of the gateway's counters.
type Stats struct {
	Live    int64             `json:"live"`    // flows now
	Proxied uint64            `json:"proxied"` // carried through a server since the start
	Direct  uint64            `json:"direct"`  // dialled by this host since the start
	Up      uint64            `json:"up"`      // bytes from clients since the start
	Down    uint64            `json:"down"`    // bytes to clients since the start
	Refused map[string]uint64 `json:"refused"` // by reason
}

// Stats reads the counters; the values need not be of one instant.
func (g *Gateway) Stats() Stats {
	c := &g.count
	g.mu.Lock() // what ends leaves the living and is counted at once
	s := Stats{
		Live: c.live.Load(), Proxied: c.proxied.Load(), Direct: c.direct.Load(),
		Up: c.up.Load(), Down: c.down.Load(), Refused: map[string]uint64{},
	}
	for l := range g.live {
		up, down := l.bytes()
		s.Up += up
		s.Down += down
	}
	g.mu.Unlock()
	for r := range reasons {
		s.Refused[r.String()] = c.refused[r].Load()
	}
	return s
}
