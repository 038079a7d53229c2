package relay

import (
	"slices"

	"golang.org/x/sys/unix"
)

const (
	turnBudget = 2 << 20  // bytes that one direction moves before others get their turn
	joinBudget = 64 << 10 // the same inside Join
)

// half is one direction of a stream.
//
//	open --EOF or error read--> eof --all delivered--> ended
//	  \______________destination dead________________/
type half struct {
	pipe    *pipe  // borrowed while bytes are under way; nil otherwise
	inPipe  int    // bytes in it
	early   []byte // to be delivered before what is in the pipe
	spilled int    // bytes of early that count against spillMax
	moved   uint64 // bytes delivered
	eof     bool   // nothing more comes from the source
	ended   bool   // and nothing more goes to the destination
}

// advance moves what can be moved in both directions. l is nil when the caller
// is not the loop.
func (s *Stream) advance(l *loop, budget int) {
	more := s.pump(client, l, budget)
	more = s.pump(server, l, budget) || more
	if s.side[client].err != 0 && !s.half[client].ended {
		// Found dead by writing to it, after its turn to be read.
		more = s.pump(client, l, budget) || more
	}
	s.settle()
	if !more || s.closed || s.queued {
		return
	}
	if l == nil || l != s.l {
		s.post()
		return
	}
	s.queued = true
	l.again = append(l.again, s)
}

// pump moves what comes from side i until one of the sockets would block, the
// direction ends, or the budget is used up: then it returns true.
func (s *Stream) pump(i int, l *loop, budget int) (more bool) {
	h, src, dst := &s.half[i], &s.side[i], &s.side[1-i]
	for !h.ended {
		switch {
		case h.inPipe > 0 || len(h.early) > 0:
			if !dst.writable {
				return false
			}
			s.deliver(i)
		case h.eof:
			s.end(i)
		case !src.readable:
			s.returnPipe(h)
			return false
		case budget <= 0:
			return true
		default:
			if h.pipe == nil {
				h.pipe = s.e.pipes.get(s)
			}
			if h.pipe != nil {
				budget -= s.fill(i)
				continue
			}
			if l == nil {
				return true // copying needs the loop's buffer
			}
			if !dst.writable {
				return false
			}
			budget -= s.copyChunk(i, l.buffer())
		}
	}
	return false
}

// deliver writes to the destination what is under way.
func (s *Stream) deliver(i int) {
	h, dst := &s.half[i], &s.side[1-i]
	s.noDelay(dst)
	var n int
	var e unix.Errno
	if len(h.early) > 0 {
		n, e = rawSend(int(dst.fd), h.early)
	} else {
		n, e = rawSplice(h.pipe.r, int(dst.fd), h.inPipe)
	}
	switch {
	case e == 0 && n == 0:
		s.fail(1-i, unix.EIO) // cannot be; never spin
	case e == 0:
		if len(h.early) > 0 {
			if h.early = h.early[n:]; len(h.early) == 0 {
				s.unspill(h)
			}
		} else {
			h.inPipe -= n
		}
		s.delivered(i, n)
	case e == unix.EAGAIN:
		s.blocked(1 - i)
	case e == unix.EINTR:
	default:
		s.fail(1-i, e)
	}
}

// fill reads from the source into the pipe, which is empty, and returns how
// much it read.
func (s *Stream) fill(i int) int {
	h, src := &s.half[i], &s.side[i]
	n, e := rawSplice(int(src.fd), h.pipe.w, h.pipe.size)
	if e == 0 && n > 0 {
		h.inPipe = n
		src.wrote = false
		// The kernel stops when the socket is empty or the pipe has no free
		// buffer. Each buffer holds a byte at least, so fewer bytes than
		// buffers mean that the socket is empty: no need to ask again.
		if n < h.pipe.slots && !src.errSeen {
			src.readable = false
			h.eof = src.last()
		}
		return n
	}
	s.nothing(i, e)
	return 0
}

// last tells whether nothing comes after what could be read until now. A socket that
// failed for want of memory, not by its peer, reports no end.
func (d *side) last() bool { return d.finSeen || d.err != 0 }

// nothing notes why reading from side i gave no bytes; no error: it has ended.
func (s *Stream) nothing(i int, e unix.Errno) {
	switch e {
	case unix.EAGAIN:
		s.side[i].readable = false
		s.half[i].eof = s.side[i].err != 0
	case unix.EINTR:
	case 0:
		s.half[i].eof = true
	default:
		s.half[i].eof = true
		s.fail(i, e)
	}
}

// copyChunk carries bytes through user space, for want of a pipe. What the
// destination does not take at once is kept, as long as all that is kept is
// less than spillMax.
func (s *Stream) copyChunk(i int, buf []byte) int {
	if s.e.spilled.Load() >= spillMax {
		return s.peekChunk(i, buf)
	}
	h, src := &s.half[i], &s.side[i]
	n := s.receive(i, buf, 0)
	if n == 0 {
		return 0
	}
	if n < len(buf) && !src.errSeen { // the socket is empty
		src.readable = false
		h.eof = src.last()
	}
	sent, e := s.send(1-i, buf[:n])
	if e != 0 {
		return n
	}
	if sent < n {
		h.early, h.spilled = slices.Clone(buf[sent:n]), n-sent
		s.e.spilled.Add(int64(n - sent))
	}
	s.delivered(i, sent)
	return n
}

// peekChunk is copyChunk that keeps nothing: it removes from the source only
// what the destination has taken.
func (s *Stream) peekChunk(i int, buf []byte) int {
	h, src := &s.half[i], &s.side[i]
	n := s.receive(i, buf, unix.MSG_PEEK)
	if n == 0 {
		return 0
	}
	n, e := s.send(1-i, buf[:n])
	if e != 0 || n == 0 {
		return 0
	}
	s.delivered(i, n)
	for left := n; left > 0; {
		k, e := rawRecv(int(src.fd), buf[:left], unix.MSG_TRUNC)
		if e == unix.EINTR {
			continue
		}
		if e != 0 || k == 0 {
			// Cannot be: the bytes are there. Going on would send them twice.
			h.eof = true
			s.fail(i, unix.EIO)
			break
		}
		left -= k
	}
	return n
}

// receive reads from side i into buf; 0: there is nothing now, or never again.
func (s *Stream) receive(i int, buf []byte, flags int) int {
	src := &s.side[i]
	n, e := rawRecv(int(src.fd), buf, flags)
	if e == 0 && n > 0 {
		src.wrote = false
		s.e.shortages.Add(1)
		return n
	}
	s.nothing(i, e)
	return 0
}

// send writes to side i and returns how much it took. An error is one that
// ended the side.
func (s *Stream) send(i int, b []byte) (int, unix.Errno) {
	dst := &s.side[i]
	s.noDelay(dst)
	n, e := rawSend(int(dst.fd), b)
	switch e {
	case 0:
		return n, 0
	case unix.EAGAIN:
		s.blocked(i)
	case unix.EINTR:
	default:
		s.fail(i, e)
		return 0, e
	}
	return 0, 0
}

// delivered counts n bytes as they reach the destination's socket.
func (s *Stream) delivered(i, n int) {
	s.half[i].moved += uint64(n)
	s.side[1-i].wrote = true
	s.limits.last = s.e.clock.now()
}

// noDelay sets TCP_NODELAY where it matters: we write again with nothing heard
// from there since, so Nagle's algorithm could hold the bytes back. When to
// send was decided by who sent them to us.
func (s *Stream) noDelay(d *side) {
	if d.wrote && !d.nodelay {
		d.nodelay = true
		rawSetInt(int(d.fd), unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	}
}

// blocked notes that side i takes nothing more for now.
func (s *Stream) blocked(i int) {
	d := &s.side[i]
	d.writable = false
	if d.events == 0 || d.events&writeEvents != 0 {
		return // Join registers it, or it is
	}
	d.events |= writeEvents
	if e := d.conn.l.modify(d.fd, d.conn.gen, d.events); e != 0 {
		s.fail(i, e)
	}
}

// end finishes direction i, all of which has been delivered.
func (s *Stream) end(i int) {
	h := &s.half[i]
	h.ended = true
	s.returnPipe(h)
	if s.side[i].err != 0 || s.side[1-i].err != 0 || s.half[1-i].ended {
		return // settle closes both
	}
	rawShutdownWrite(int(s.side[1-i].fd))
	s.limits.last = s.e.clock.now()
	s.arm()
}

// fail marks side i as dead. Nothing can be delivered to it any more; what it
// had sent before is still to be read.
func (s *Stream) fail(i int, e unix.Errno) {
	d, to := &s.side[i], &s.half[1-i]
	if d.err == 0 {
		d.err = e
	}
	if s.errno == 0 {
		s.errno = e
		s.cause = ClientReset
		if i == server {
			s.cause = ServerReset
		}
	}
	d.readable = true
	to.ended = true
	s.drop(to)
}

// settle closes the stream if both directions have ended.
func (s *Stream) settle() {
	if s.closed || !s.half[client].ended || !s.half[server].ended {
		return
	}
	for i := range s.side {
		if s.side[i].err == 0 && s.side[1-i].err != 0 && rawUnacked(int(s.side[i].fd)) > 0 {
			if !s.ebbing {
				s.ebb(i)
			}
			return
		}
	}
	s.finish(s.errno != 0)
}

// finish closes both sockets, with a RST if so asked.
func (s *Stream) finish(reset bool) {
	s.closed = true
	s.e.clock.wheel.remove(&s.timer)
	for i := range s.side {
		d := &s.side[i]
		if d.fd < 0 {
			continue
		}
		s.e.conns.set(int(d.fd), nil)
		if reset {
			rawReset(int(d.fd))
		} else {
			rawClose(int(d.fd))
		}
		s.e.release(d.conn.accepted)
		d.fd = -1
	}
	for i := range s.half {
		s.drop(&s.half[i])
	}
}

// returnPipe gives an empty pipe back.
func (s *Stream) returnPipe(h *half) {
	if h.pipe != nil {
		s.e.pipes.put(h.pipe)
		h.pipe = nil
	}
}

// drop lets go of what is under way in a direction.
func (s *Stream) drop(h *half) {
	s.unspill(h)
	if h.pipe == nil {
		return
	}
	if h.inPipe > 0 {
		s.e.pipes.drop(h.pipe)
	} else {
		s.e.pipes.put(h.pipe)
	}
	h.pipe, h.inPipe = nil, 0
}
