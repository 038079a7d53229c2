package relay

import "golang.org/x/sys/unix"

const (
	// spillMax bounds the memory of all flows whose bytes were moved from a
	// pipe into memory.
	spillMax = 64 << 20
	// spillTicks is how long a reader has to have stopped for that.
	spillTicks = 2
)

// spillStalled makes those give their pipe back who hold one for a reader that
// has stopped, if there is a shortage: what is in the pipe is read into memory.
// Pages that the kernel held for the flow become as many of ours. Where
// spillMax forbids it the pipes stay away, and others go on copying.
func (e *Engine) spillStalled(now uint32) {
	for _, s := range e.pipes.holders() {
		s.mu.Lock()
		if now-s.limits.last >= spillTicks {
			s.spill(client)
			s.spill(server)
		}
		s.mu.Unlock()
	}
}

func (s *Stream) spill(i int) {
	h := &s.half[i]
	n := h.inPipe
	if n == 0 || len(h.early) > 0 || s.side[1-i].writable {
		return
	}
	if s.e.spilled.Add(int64(n)) > spillMax {
		s.e.spilled.Add(-int64(n))
		return
	}
	h.spilled = n
	b := make([]byte, n)
	for done := 0; done < n; {
		k, e := rawRead(h.pipe.r, b[done:])
		if e == unix.EINTR {
			continue
		}
		if e != 0 || k == 0 {
			s.fail(1-i, unix.EIO) // cannot be: the bytes are there
			s.settle()
			if s.closed {
				s.post()
			}
			return
		}
		done += k
	}
	h.early, h.inPipe = b, 0
	s.returnPipe(h)
}

// unspill forgets the bytes in memory: they are delivered or void.
func (s *Stream) unspill(h *half) {
	s.e.spilled.Add(-int64(h.spilled))
	h.early, h.spilled = nil, 0
}
