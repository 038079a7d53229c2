package upstream

import (
	"math"
	"net"
	"time"
)

const (
	warmMost  = 32               // connections of a server
	warmAge   = 10 * time.Second // servers end what says nothing for long
	warmIdle  = time.Minute      // without a flow for this long, none is kept
	warmHalf  = 20 * time.Second // in which demand is forgotten by half
	warmLeast = 50 * time.Millisecond

	// worthwhile is how far away a server must be for connections ahead of need,
	// and for a probe of what can be sent ahead.
	worthwhile = 2 * time.Millisecond
)

// warm are connections to a server that are ready for a request. There are as
// many as flows came of late in the time that it takes to make one.
type warm struct {
	idle   []ready // the newest last
	making int
	expiry *time.Timer // of the oldest
	window time.Time   // flows are counted from here on
	count  int
	peak   float64   // most flows in a window, fading
	last   time.Time // a flow came
}

type ready struct {
	conn  net.Conn
	proto Protocol
	until time.Time
}

// takeWarm counts a flow, and returns a connection for it, nil if there is
// none.
func (h *health) takeWarm(s *Server) (net.Conn, Protocol) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if s.Cold || h.trip.best < worthwhile {
		return nil, 0
	}
	w := &h.warm
	w.demand(time.Now(), max(h.setup, warmLeast))
	defer h.fill(s)
	for n := len(w.idle); n > 0; n = len(w.idle) {
		r := w.idle[n-1]
		w.idle = w.idle[:n-1]
		if quiet(r.conn) && time.Now().Before(r.until) {
			return r.conn, r.proto
		}
		r.conn.Close()
	}
	return nil, 0
}

// quiet tells whether a connection is as it was left, as far as it can be
// known. A server that has closed it shows when it is asked.
func quiet(c net.Conn) bool {
	q, ok := c.(interface{ Quiet() bool })
	return !ok || q.Quiet()
}

// demand counts a flow.
func (w *warm) demand(now time.Time, window time.Duration) {
	w.last = now
	if past := now.Sub(w.window); past > window {
		w.peak = max(float64(w.count), w.peak*math.Exp2(-past.Seconds()/warmHalf.Seconds()))
		w.window, w.count = now, 0
	}
	w.count++
}

// want is how many connections there should be.
func (w *warm) want(now time.Time) int {
	if now.Sub(w.last) > warmIdle {
		return 0
	}
	return min(1+int(math.Ceil(max(w.peak, float64(w.count)))), warmMost)
}

// fill begins to make what is missing. The lock is held.
func (h *health) fill(s *Server) {
	w := &h.warm
	if h.bad || h.retired.Load() {
		return
	}
	for n := w.want(time.Now()) - len(w.idle) - w.making; n > 0; n-- {
		w.making++
		h.p.task(func() { h.make(s) })
	}
}

// make makes one connection.
func (h *health) make(s *Server) {
	t, proto, err := h.p.ready(h.p.ctx, s, time.Now().Add(h.p.options.Load().ConnectTimeout))
	if err == nil {
		err = t.done(nil)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	w := &h.warm
	w.making--
	switch {
	case err != nil:
		if h.p.ctx.Err() == nil {
			h.note(judge(err), err)
		}
	case h.bad || h.retired.Load() || h.p.ctx.Err() != nil || len(w.idle) >= warmMost:
		t.conn.Close()
	default:
		w.idle = append(w.idle, ready{t.conn, proto, time.Now().Add(warmAge)})
		if w.expiry == nil {
			w.expiry = time.AfterFunc(warmAge, func() { h.expire(s) })
		}
	}
}

// expire closes what is too old, and makes as many anew as are wanted still.
func (h *health) expire(s *Server) {
	h.mu.Lock()
	defer h.mu.Unlock()
	w := &h.warm
	if w.expiry == nil {
		return // dropWarm was quicker
	}
	w.expiry = nil
	now := time.Now()
	n := 0
	for n < len(w.idle) && !now.Before(w.idle[n].until) {
		w.idle[n].conn.Close()
		n++
	}
	w.idle = append(w.idle[:0], w.idle[n:]...)
	h.fill(s)
	if len(w.idle) > 0 {
		w.expiry = time.AfterFunc(w.idle[0].until.Sub(now), func() { h.expire(s) })
	}
}

// dropWarm closes all of them. The lock is held.
func (h *health) dropWarm() {
	for _, r := range h.warm.idle {
		r.conn.Close()
	}
	h.warm.idle = nil
	if h.warm.expiry != nil {
		h.warm.expiry.Stop()
		h.warm.expiry = nil
	}
}
