package relay

import (
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// JoinOptions goes with [Engine.Join]. The zero value sets no limits.
type JoinOptions struct {
	// Idle ends a flow in which no byte has moved in either direction for this
	// long; 0: no limit.
	Idle time.Duration
	// HalfClosed takes the place of Idle once one direction has ended, if it
	// is shorter; 0: Idle goes on.
	HalfClosed time.Duration
	// Early are bytes that were already read from the server; the client gets
	// them first. EarlyUp are those already read from the client, for the
	// server. The stream keeps the slices until they are delivered. Both
	// count in Result.
	Early, EarlyUp []byte
	// Done, if not nil, is called once, after both sockets are closed. It runs
	// on the loop of the stream, never inside Join or Kill, and must not block.
	Done func(Result)
}

// Cause is why a flow ended.
type Cause uint8

// The causes. Only Ended means that both sides got all that the other sent.
const (
	Ended             Cause = iota // both sides sent their FIN
	ClientReset                    // the client's socket failed, mostly by a RST
	ServerReset                    // the server's socket failed, mostly by a RST
	IdleTimeout                    // JoinOptions.Idle
	HalfClosedTimeout              // JoinOptions.HalfClosed
	Killed                         // Stream.Kill, or the context of Copy
	EngineClosed                   // Engine.Close
)

// String returns the cause in words for a log line.
func (c Cause) String() string {
	switch c {
	case Ended:
		return "ended"
	case ClientReset:
		return "client reset"
	case ServerReset:
		return "server reset"
	case IdleTimeout:
		return "idle"
	case HalfClosedTimeout:
		return "half-closed"
	case Killed:
		return "killed"
	case EngineClosed:
		return "engine closed"
	}
	return fmt.Sprintf("cause %d", uint8(c))
}

// Result is how a flow ended.
type Result struct {
	Up, Down uint64 // bytes delivered to the server's and to the client's socket
	Err      error  // nil: Cause is Ended; wraps the errno of a reset, os.ErrDeadlineExceeded for a limit, net.ErrClosed
	Cause    Cause
}

// result makes the Result of a flow; err goes with ClientReset and ServerReset.
func result(up, down uint64, cause Cause, err error) Result {
	r := Result{Up: up, Down: down, Cause: cause}
	switch cause {
	case Ended:
	case ClientReset:
		r.Err = fmt.Errorf("client: %w", err)
	case ServerReset:
		r.Err = fmt.Errorf("server: %w", err)
	case IdleTimeout, HalfClosedTimeout:
		r.Err = fmt.Errorf("%v: %w", cause, os.ErrDeadlineExceeded)
	default:
		r.Err = fmt.Errorf("%v: %w", cause, net.ErrClosed)
	}
	return r
}

// The sides of a stream, and with them its directions: up is what comes from
// the client, down what comes from the server.
const (
	client = 0
	server = 1
)

// side is one socket of a stream.
type side struct {
	conn     *Conn // its entry in the table; its loop and generation
	fd       int32
	events   uint32 // registered for
	readable bool   // a read may get something; false: an event will say when
	writable bool
	finSeen  bool // EPOLLRDHUP seen: what can be read now is the last
	errSeen  bool // EPOLLERR seen: what can be read now is followed by an error
	nodelay  bool
	wrote    bool       // since the last bytes from here: what we write next could wait for an ACK (Nagle)
	err      unix.Errno // the socket is dead
}

// Stream is a flow: two joined sockets. Its methods may be called by any
// goroutine at any time.
type Stream struct {
	e *Engine
	l *loop // serves it, and calls done

	mu       sync.Mutex
	side     [2]side
	half     [2]half // half[i] carries what comes from side[i]
	closed   bool    // both sockets are
	reported bool    // done has been called
	queued   bool    // on a list of the loop
	ebbing   bool    // waits for a last delivery before a RST; see ebb
	cause    Cause   // of the end
	errno    unix.Errno

	limits limits
	timer  entry[Stream]
	done   func(Result)
}

// Join takes two connections over and relays between them until both
// directions have ended; it returns at once. Both must be of this engine, and
// no other goroutine may be using them. If one of them is closed already, the
// other is reset.
func (e *Engine) Join(clientConn, serverConn *Conn, o JoinOptions) *Stream {
	s := &Stream{
		e:      e,
		limits: limits{idle: e.clock.count(o.Idle), half: e.clock.count(o.HalfClosed), last: e.clock.now()},
		done:   o.Done,
	}
	s.half[client].early = o.EarlyUp
	s.half[server].early = o.Early
	s.timer.owner = s
	e.streams.Add(1)
	e.flows.Add(1)

	s.mu.Lock()
	defer s.mu.Unlock()
	okServer := serverConn.join(s, server)
	okClient := clientConn.join(s, client)
	switch {
	case serverConn.l != nil:
		s.l = serverConn.l
	case clientConn.l != nil:
		s.l = clientConn.l
	default:
		s.l = e.pickLoop()
	}
	if !okServer || !okClient {
		s.cause = Killed
		s.finish(true)
		s.post()
		return s
	}
	// A first try at once: mostly the client's first bytes are there.
	s.advance(nil, joinBudget)
	for i := range s.side {
		if !s.closed && s.side[i].events == 0 {
			s.register(i)
		}
	}
	if s.closed {
		s.post()
		return s
	}
	s.arm()
	if e.closed.Load() {
		s.cause = EngineClosed
		s.finish(true)
		s.post()
	}
	return s
}

// join moves the socket of c into side i of s.
func (c *Conn) join(s *Stream, i uint8) bool {
	d := &s.side[i]
	d.conn = c
	c.mu.Lock()
	if c.state != connOpen {
		c.mu.Unlock()
		d.fd = -1
		return false
	}
	d.fd, d.events = c.fd, c.events
	d.readable = c.readable || c.events == 0
	d.finSeen, d.errSeen = c.finSeen, c.errSeen
	d.writable, d.nodelay, d.wrote = c.writable, c.nodelay, c.wrote
	c.state, c.side = connJoined, i
	r, w := c.leave()
	c.stream.Store(s)
	c.mu.Unlock()
	wakeAll(r)
	wakeAll(w)
	return true
}

// register puts side i, which no loop watches yet, into the loop of s.
func (s *Stream) register(i int) {
	d := &s.side[i]
	d.events = readEvents
	if !d.writable {
		d.events |= writeEvents
	}
	d.conn.l = s.l
	if e := s.l.register(d.fd, d.conn.gen, d.events); e != 0 {
		s.fail(i, e)
		s.advance(nil, joinBudget)
	}
}

// Bytes returns how many bytes have been delivered so far, to the server's
// socket and to the client's.
func (s *Stream) Bytes() (up, down uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.half[client].moved, s.half[server].moved
}

// Kill resets both sides. It does nothing to a stream that has ended.
func (s *Stream) Kill() { s.kill(Killed) }

func (s *Stream) kill(why Cause) {
	s.mu.Lock()
	if !s.closed {
		s.cause = why
		s.finish(true)
		s.post()
	}
	s.mu.Unlock()
}

// event takes what the loop saw on side i.
func (s *Stream) event(l *loop, i int, ev uint32) {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return
	}
	d := &s.side[i]
	if ev&(readEvents|hangup) != 0 {
		d.readable = true
	}
	if ev&(writeEvents|hangup) != 0 {
		d.writable = true
	}
	if ev&unix.EPOLLRDHUP != 0 {
		d.finSeen = true
	}
	if ev&unix.EPOLLERR != 0 {
		d.errSeen = true
		if s.half[i].ended && d.err == 0 {
			// No read will tell: its last byte has been read.
			if e := rawError(int(d.fd)); e != 0 {
				s.fail(i, e)
			}
		}
	}
	s.advance(l, turnBudget)
	s.unlock()
}

// serve goes on with a stream that was posted or had used up its turn.
func (s *Stream) serve(l *loop) {
	s.mu.Lock()
	s.queued = false
	if !s.closed {
		s.advance(l, turnBudget)
	}
	s.unlock()
}

// unlock ends a turn on a loop. If the stream has come to its end it is
// reported, once.
func (s *Stream) unlock() {
	if !s.closed || s.reported {
		s.mu.Unlock()
		return
	}
	s.reported = true
	r := result(s.half[client].moved, s.half[server].moved, s.cause, s.errno)
	done := s.done
	s.done = nil
	s.mu.Unlock()
	s.e.streams.Add(-1)
	if done != nil {
		done(r)
	}
	s.e.flows.Done()
}

// post has the loop serve s, unless that is under way.
func (s *Stream) post() {
	if !s.queued {
		s.queued = true
		s.l.post(s)
	}
}
