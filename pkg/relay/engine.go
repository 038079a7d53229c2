package relay

import (
	"context"
	"fmt"
	"log/slog"
	"math"
	"net"
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Options says how an [Engine] is made. The zero value is right for a gateway.
type Options struct {
	Loops    int // event loops; 0: one for each processor that Go uses (GOMAXPROCS)
	PipeSize int // bytes of a pipe, rounded up by the kernel; 0: 1 MiB
	MaxPipes int // pipes that may exist at once; 0: 128
	// KeptPipes are made by New, as far as the kernel allows, and not given back
	// while they are of no use: for a process that will soon have fewer rights, or
	// shares fs.pipe-user-pages-soft with others of its user. 0: none.
	KeptPipes int
	// MaxConns bounds the sockets of the engine, accepted and dialled. Half of
	// them at most are accepted ones, so that each can get its counterpart.
	// 0: what RLIMIT_NOFILE leaves when MaxPipes pipes, a reserve of 128 descriptors
	// for the rest of the process, and what the UDP beside it has, but a sixteenth
	// at least, are taken off.
	MaxConns int
	Log      *slog.Logger // nil: silent

	tick time.Duration // of the clock for time limits; 0: 1 s
}

// reserveFDs is left for the rest of the process when MaxConns is derived.
const reserveFDs = 128

// trimTicks is the time, in ticks, that a pipe must be of no use to be closed.
const trimTicks = 10

// Stats is a snapshot of what an [Engine] holds and has done.
type Stats struct {
	Conns     int    // sockets that exist, joined or not
	Clients   int    // of them, those that Serve accepted
	Streams   int    // joined flows that have not ended
	Pipes     int    // pipes that exist
	PipesLent int    // pipes that bytes are in
	Accepted  uint64 // connections accepted and given to a handler
	Refused   uint64 // connections reset right after accept, or not dialled: MaxConns or the descriptor limit was reached
	Shortages uint64 // times that a chunk was copied as there was no pipe
	MaxConns  int    // sockets that may exist now, see Options.MaxConns
	MaxPipes  int    // likewise, pipes
	// LastRefused is when Refused was counted last; zero: never.
	LastRefused time.Time
}

// Engine relays TCP flows on a few event loops. Make one with [New]; it is
// safe for use by many goroutines.
type Engine struct {
	log     *slog.Logger
	loops   []*loop
	next    atomic.Uint32 // round robin over loops
	gen     atomic.Uint32 // of the last Conn
	conns   connTable
	pipes   pipePool
	waiters sync.Pool

	maxConns int
	kept     int // sockets that are left to the UDP beside it in any case; maxConns is what they leave
	clock    clock[Stream]

	live      atomic.Int64 // sockets
	beside    atomic.Int64 // sockets of the UDP beside it, see UDPOptions.Beside
	spilled   atomic.Int64 // bytes; see spillMax
	accepted  atomic.Int64 // of them, those from Serve
	streams   atomic.Int64
	accepts   atomic.Uint64
	refused   atomic.Uint64
	refusedAt atomic.Int64 // nanoseconds since 1970; 0: never
	shortages atomic.Uint64

	spare spareFD

	entering sync.Mutex // makes a Serve that begins either be waited for or see closed
	closed   atomic.Bool
	ctx      context.Context // of the engine itself: ends with Close; ends the clock and Serve
	cancel   context.CancelFunc
	handlers sync.WaitGroup // and Serves, so that it never leaves zero while Close waits
	flows    sync.WaitGroup // streams whose Done has not returned
	routines sync.WaitGroup // loops and the clock
}

// New starts an engine. [Engine.Close] ends it.
func New(o Options) (*Engine, error) {
	if o.Loops <= 0 {
		o.Loops = runtime.GOMAXPROCS(0)
	}
	if o.PipeSize <= 0 {
		o.PipeSize = 1 << 20
	}
	if o.MaxPipes <= 0 {
		o.MaxPipes = 128
	}
	kept := math.MaxInt32 // what was stated is the engine's own
	if o.MaxConns <= 0 {
		var err error
		if o.MaxConns, kept, err = connsFor(o.MaxPipes); err != nil {
			return nil, err
		}
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.tick <= 0 {
		o.tick = time.Second
	}
	e := &Engine{
		log:      o.Log,
		pipes:    pipePool{max: o.MaxPipes, size: o.PipeSize, keep: min(o.KeptPipes, o.MaxPipes)},
		maxConns: o.MaxConns,
		kept:     kept,
		clock:    clock[Stream]{tick: o.tick},
	}
	e.pipes.spare = &e.spare
	e.ctx, e.cancel = context.WithCancel(context.Background())
	e.waiters.New = func() any { return &waiter{ch: make(chan struct{}, 1)} }
	var err error
	if err = e.spare.open(); err != nil {
		return nil, fmt.Errorf("relay: spare descriptor: %w", err)
	}
	for i := 0; i < o.Loops; i++ {
		l, err := newLoop(e)
		if err != nil {
			for _, l := range e.loops {
				l.release()
			}
			e.spare.close()
			return nil, fmt.Errorf("relay: event loop: %w", err)
		}
		e.loops = append(e.loops, l)
	}
	e.pipes.fill()
	for _, l := range e.loops {
		e.routines.Go(l.run)
	}
	e.routines.Go(e.runClock)
	return e, nil
}

// Close ends everything: listeners stop accepting, streams are reset on both
// sides with [EngineClosed], connections that are not joined are closed, so
// that handlers blocked on one come back. It waits for the handlers, for every
// Done and for the loops; it must not be called from one of them. Only the
// first call does anything.
func (e *Engine) Close() error {
	e.entering.Lock()
	again := e.closed.Swap(true)
	e.entering.Unlock()
	if again {
		return nil
	}
	e.cancel()
	// A Conn made by a Dial or an accept that had already passed the check of
	// closed is found in a later round, as its maker waits for the handlers.
	done := make(chan struct{})
	go e.waitHandlers(done)
	for wait := time.Millisecond; ; wait = min(2*wait, 100*time.Millisecond) {
		e.conns.each(func(c *Conn) { c.shutdown() })
		select {
		case <-done:
			e.conns.each(func(c *Conn) { c.shutdown() })
			e.flows.Wait()
			for _, l := range e.loops {
				l.stop()
			}
			e.routines.Wait()
			e.pipes.close()
			e.spare.close()
			return nil
		case <-time.After(wait):
		}
	}
}

// enter begins a Serve, which ends with handlers.Done. False: the engine is
// closed.
func (e *Engine) enter() bool {
	e.entering.Lock()
	defer e.entering.Unlock()
	if e.closed.Load() {
		return false
	}
	e.handlers.Add(1)
	return true
}

func (e *Engine) waitHandlers(done chan<- struct{}) {
	e.handlers.Wait()
	close(done)
}

// Stats returns the figures of now.
func (e *Engine) Stats() Stats {
	made, lent := e.pipes.count()
	s := Stats{
		Conns:     int(e.live.Load()),
		Clients:   int(e.accepted.Load()),
		Streams:   int(e.streams.Load()),
		Pipes:     made,
		PipesLent: lent,
		Accepted:  e.accepts.Load(),
		Refused:   e.refused.Load(),
		Shortages: e.shortages.Load(),
		MaxConns:  e.room(),
		MaxPipes:  e.pipes.max,
	}
	if at := e.refusedAt.Load(); at != 0 {
		s.LastRefused = time.Unix(0, at)
	}
	return s
}

// refuse counts a connection that there was no room for.
func (e *Engine) refuse() {
	e.refused.Add(1)
	e.refusedAt.Store(time.Now().UnixNano())
}

func (e *Engine) runClock() {
	e.clock.run(e.ctx, (*Stream).due, func(now uint32) {
		e.spillStalled(now)
		if now%trimTicks == 0 {
			e.pipes.trim()
		}
	})
}

// newConn makes a Conn of a socket that counts against MaxConns already.
func (e *Engine) newConn(fd int, accepted bool) *Conn {
	c := &Conn{e: e, fd: int32(fd), gen: e.gen.Add(1), accepted: accepted, writable: true}
	e.conns.set(fd, c)
	return c
}

// room returns how many sockets there may be now.
func (e *Engine) room() int { return e.maxConns - max(0, int(e.beside.Load())-e.kept) }

// lend counts one more socket of the UDP beside it; false if there is no room.
// Both may get a few sockets too many at the same time; the reserve has them.
func (e *Engine) lend() bool {
	if e.beside.Add(1) > int64(e.kept) && int(e.live.Load()) > e.room() {
		e.beside.Add(-1)
		return false
	}
	return true
}

// admit counts one more socket; false if there is no room.
func (e *Engine) admit(accepted bool) bool {
	room := e.room()
	if e.live.Add(1) > int64(room) {
		e.live.Add(-1)
		return false
	}
	if accepted && e.accepted.Add(1) > int64((room+1)/2) {
		e.accepted.Add(-1)
		e.live.Add(-1)
		return false
	}
	return true
}

// release takes a socket off the count.
func (e *Engine) release(accepted bool) {
	e.live.Add(-1)
	if accepted {
		e.accepted.Add(-1)
	}
}

// pickLoop spreads sockets over the loops.
func (e *Engine) pickLoop() *loop {
	return e.loops[int(e.next.Add(1))%len(e.loops)]
}

// connsFor derives MaxConns from RLIMIT_NOFILE, and what is kept for UDP.
func connsFor(pipes int) (n, kept int, err error) {
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil {
		return 0, 0, os.NewSyscallError("getrlimit", err)
	}
	limit := int(min(r.Cur, maxFD))
	kept = limit / udpKept
	n = limit - kept - 2*pipes - reserveFDs
	if n < 2 {
		return 0, 0, fmt.Errorf("relay: RLIMIT_NOFILE is %d: %d pipes, a reserve of %d and what is kept for UDP leave no descriptors for flows", r.Cur, pipes, reserveFDs)
	}
	return n, kept, nil
}

// errClosed is what methods of a closed engine or connection return.
func errClosed(op string) error {
	return &net.OpError{Op: op, Net: "tcp", Err: net.ErrClosed}
}
