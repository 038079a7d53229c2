package relay

import "time"

const (
	ebbFirst = time.Millisecond       // first look at what the peer has not acknowledged
	ebbMost  = 250 * time.Millisecond // longest time between two looks
	ebbStall = 5 * time.Second        // no progress for this long: reset all the same
	// deadTicks is the inactivity limit of a stream with a dead side whose
	// last bytes the other side does not read.
	deadTicks = 120
)

// inactivity returns the limit that holds now, in ticks, and what it is
// called; 0: none.
func (s *Stream) inactivity() (uint32, Cause) {
	limit, cause := s.limit, IdleTimeout
	half := s.halfLimit
	switch {
	case s.side[client].err != 0 || s.side[server].err != 0:
		if half == 0 {
			half = deadTicks
		}
	case !s.half[client].ended && !s.half[server].ended:
		return limit, cause
	}
	if half != 0 && (limit == 0 || half < limit) {
		limit, cause = half, HalfClosedTimeout
	}
	return limit, cause
}

// arm puts s into the wheel for the limit that holds now.
func (s *Stream) arm() {
	limit, _ := s.inactivity()
	if limit == 0 || s.closed {
		return
	}
	// The tick under way counts for nothing, so that a limit is never short.
	s.e.wheel.add(&s.timer, s.last+limit+1)
}

// checkLimits ends s if nothing moved for too long; the clock calls it when
// the wheel says so.
func (s *Stream) checkLimits(now uint32) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	limit, cause := s.inactivity()
	if limit == 0 {
		return
	}
	if int32(now-(s.last+limit+1)) < 0 {
		s.arm()
		return
	}
	if s.errno == 0 {
		s.cause = cause
	}
	s.finish(true)
	s.post()
}

// ebb puts off the RST to side i until the peer has acknowledged what it was
// sent before: a RST discards the socket's send queue.
func (s *Stream) ebb(i int) {
	s.ebbing = true
	b := &ebb{s: s, side: i, wait: ebbFirst, since: time.Now()}
	b.timer = time.AfterFunc(b.wait, b.look)
}

type ebb struct {
	s     *Stream
	side  int
	left  int
	wait  time.Duration
	since time.Time // of the last progress
	timer *time.Timer
}

func (b *ebb) look() {
	s := b.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	left := rawUnacked(int(s.side[b.side].fd))
	if left != b.left {
		b.left, b.since = left, time.Now()
	}
	if left == 0 || time.Since(b.since) > ebbStall {
		s.finish(true)
		s.post()
		return
	}
	b.wait = min(2*b.wait, ebbMost)
	b.timer.Reset(b.wait)
}
