package upstream

import (
	"context"
	"errors"
	"time"

	"github.com/tproxyd/tproxyd/pkg/flow"
	"github.com/tproxyd/tproxyd/pkg/socks"
)

const (
	learnBusy  = 50              // flows after which it is worth knowing of a server that is near
	learnPause = time.Hour       // until what was learned is asked anew
	learnLimit = 3 * time.Second // for each answer, added to four times the usual
)

var pipelineNames = [...]string{"", "off", "greeting", "data"}

// ahead is what s is sent ahead: as the rules say, else as it was learned. The
// lock is held.
func (h *health) ahead(s *Server) Pipeline {
	if s.Pipeline != PipelineAuto {
		return s.Pipeline
	}
	return h.pipeline
}

func (h *health) aheadNow(s *Server) Pipeline {
	if s.Pipeline != PipelineAuto {
		return s.Pipeline
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.pipeline
}

// knowsIPv6 notes whether the server takes IPv6 addresses, by what one was
// answered. One that does not is asked for them after all others, for BadExpire.
func (h *health) knowsIPv6(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case err == nil:
		h.noIPv6 = time.Time{}
	case errors.Is(err, socks.AddrTypeNotSupported) && !errors.As(err, new(*hopError)):
		h.noIPv6 = time.Now().Add(h.p.options.Load().BadExpire)
	}
}

func (h *health) lacksIPv6() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return time.Now().Before(h.noIPv6)
}

// halfTrip is half a round trip to s, as far as it is known.
func (h *health) halfTrip() time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	return min(h.trip.best/2, 50*time.Millisecond)
}

// learn finds out what s can be sent ahead, if that is worth knowing and not
// known yet. Where a round trip is short it saves no time, but a fifth of the
// segments and wake-ups of a flow, here and at the server.
func (h *health) learn(s *Server) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if s.Pipeline != PipelineAuto || s.Protocol != Socks5 || h.trip.best < worthwhile && h.carried+h.associated < learnBusy || time.Since(h.learned) < learnPause && !h.learned.IsZero() {
		return
	}
	h.learned = time.Now()
	limit := learnLimit + 4*h.setup
	h.p.task(func() {
		got := h.p.learn(h.p.ctx, s, limit)
		h.mu.Lock()
		defer h.mu.Unlock()
		h.pipeline = got
		h.p.options.Load().Log.Debug("what the server is sent ahead", "upstream", s.Name, "pipeline", pipelineNames[got])
	})
}

// unlearn tells whether err may come of what was learned of s, which is another now.
// That is forgotten then, and messages are to be sent one after the other.
func (h *health) unlearn(s *Server, err error) bool {
	if s.Pipeline != PipelineAuto || judge(err) != fault {
		return false
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.forget()
	return true
}

// forget forgets what was learned: who comes back may be another. The lock is held.
func (h *health) forget() { h.pipeline, h.learned = PipelineAuto, time.Time{} }

// soonest is until when a greeting of s is waited for that was learned to come.
func (h *health) soonest(s *Server) time.Time {
	limit := h.patience()
	if s.Pipeline != PipelineAuto || limit == 0 {
		limit = h.p.options.Load().ConnectTimeout
	}
	return time.Now().Add(limit)
}

// learn sends s all messages at once, for the target of probes, or else for s
// itself: whatever it replies, it has read them. If the target of probes answers
// what is sent ahead as the first bytes of a flow, those arrive too.
func (p *Pool) learn(ctx context.Context, s *Server, limit time.Duration) Pipeline {
	to := p.options.Load().Probe
	known := to != (flow.Target{})
	if !known {
		to = s.target()
	}
	if !p.takes(ctx, s, to, nil, limit) {
		return PipelineOff
	}
	if known && p.takes(ctx, s, to, []byte("HEAD / HTTP/1.0\r\n\r\n"), limit) {
		return PipelineData
	}
	return PipelineGreeting
}

// takes tells whether s replies to messages that are sent at once, and with
// early, whether an answer to that comes.
func (p *Pool) takes(ctx context.Context, s *Server, to flow.Target, early []byte, limit time.Duration) bool {
	end := time.Now().Add(limit)
	conn, err := p.reach(ctx, s, end)
	if err != nil {
		return false
	}
	t := talkOn(ctx, conn)
	defer t.done(errProbed)
	err = t.step(end, "probe", func() error {
		err := socks.SendPipelined(conn, to, s.Auth, early)
		if err == nil {
			err = socks.ReadGreeting(conn, s.Auth)
		}
		if err == nil {
			_, err = socks.ReadReply(conn)
		}
		if err == nil && early != nil {
			_, err = conn.Read(make([]byte, 1))
		}
		return err
	})
	if early == nil {
		v := judge(err)
		return v == well || v == destination || v == incapable
	}
	return err == nil
}
