package relay

import "time"

const (
	ebbFirst = time.Millisecond       // before the first look at what the peer has not acknowledged
	ebbMost  = 250 * time.Millisecond // between two looks, at most
	ebbStall = 5 * time.Second        // no progress for this long: reset all the same
)

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
