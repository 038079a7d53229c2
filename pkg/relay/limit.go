package relay

import (
	"context"
	"sync/atomic"
	"time"
)

// deadTicks is the inactivity limit of a stream with a dead side whose last
// bytes the other side does not read, if HalfClosed sets none.
const deadTicks = 120

// limits is what a flow may do for how long without moving a byte, in ticks of
// a clock; 0 means no limit.
type limits struct {
	idle, half uint32
	last       uint32 // tick of the last activity
}

// current returns the limit that holds in the given state, and the cause of
// the end that it brings.
func (l *limits) current(halfClosed, dead bool) (uint32, Cause) {
	half := l.half
	switch {
	case dead && half == 0:
		half = deadTicks
	case !halfClosed && !dead:
		return l.idle, IdleTimeout
	}
	if half != 0 && (l.idle == 0 || half < l.idle) {
		return half, HalfClosedTimeout
	}
	return l.idle, IdleTimeout
}

// due returns the tick at which a limit is reached if nothing more happens.
// The tick under way counts for nothing, so that a limit is never cut short.
func (l *limits) due(limit uint32) uint32 { return l.last + limit + 1 }

// reached tells whether it is.
func (l *limits) reached(limit, now uint32) bool {
	return int32(now-l.due(limit)) >= 0
}

// clock counts coarse ticks and says which entries of its wheel are due.
// Reading it costs nothing, so activity can be noted for every chunk.
type clock[T any] struct {
	tick  time.Duration
	ticks atomic.Uint32
	wheel wheel[T]
}

func (c *clock[T]) now() uint32 { return c.ticks.Load() }

// count turns a duration into ticks, rounded up; 0 and less are 0, "no limit".
func (c *clock[T]) count(d time.Duration) uint32 {
	if d <= 0 {
		return 0
	}
	return uint32(min((d+c.tick-1)/c.tick, 1<<30))
}

// run advances the clock until ctx ends. On each tick it calls due for every
// owner whose entry came up, which is out of the wheel then, and after that
// each.
func (c *clock[T]) run(ctx context.Context, due func(owner *T, now uint32), each func(now uint32)) {
	t := time.NewTicker(c.tick)
	defer t.Stop()
	var list []*T
	for {
		select {
		case <-ctx.Done():
			return
		case <-t.C:
		}
		list = c.wheel.advance(list[:0])
		now := c.ticks.Add(1)
		for _, x := range list {
			due(x, now)
		}
		clear(list)
		each(now)
	}
}

// current returns the limit that holds for s now.
func (s *Stream) current() (uint32, Cause) {
	return s.limits.current(s.half[client].ended || s.half[server].ended, s.side[client].err != 0 || s.side[server].err != 0)
}

// arm puts s into the wheel for the limit that holds now.
func (s *Stream) arm() {
	if limit, _ := s.current(); limit != 0 && !s.closed {
		s.e.clock.wheel.add(&s.timer, s.limits.due(limit))
	}
}

// due ends s if nothing moved for too long; the clock calls it.
func (s *Stream) due(now uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	limit, cause := s.current()
	switch {
	case s.closed || limit == 0:
	case !s.limits.reached(limit, now):
		s.arm()
	default:
		if s.errno == 0 {
			s.cause = cause
		}
		s.finish(true)
		s.post()
	}
}
