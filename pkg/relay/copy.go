package relay

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// CopyOptions goes with [Copy]; the fields mean what they mean in
// [JoinOptions]. The zero value sets no limits.
type CopyOptions struct {
	Idle, HalfClosed time.Duration
	Early, EarlyUp   []byte
	Up, Down         *atomic.Uint64 // bytes delivered so far are added to them; nil: nobody looks
}

// copyBuffer is the size of the buffer of each direction of Copy.
const copyBuffer = 32 << 10

// Copy relays between two connections of any kind, such as one under TLS, with
// a goroutine and a buffer for each direction. It takes both over, returns when
// the flow has ended and both are closed, and keeps the same rules as
// [Engine.Join]; if ctx ends the flow is Killed.
//
// A FIN is passed on with CloseWrite if the connection has it. One that has
// not cannot be told that its peer is done, so the flow ends there.
func Copy(ctx context.Context, clientConn, serverConn net.Conn, o CopyOptions) Result {
	c := &copier{conn: [2]net.Conn{clientConn, serverConn}, seen: [2]*atomic.Uint64{o.Up, o.Down}, idle: o.Idle, half: o.HalfClosed, began: time.Now()}
	stop := context.AfterFunc(ctx, func() { c.end(Killed, nil) })
	defer stop()
	c.mu.Lock()
	c.watch()
	c.mu.Unlock()

	var wg sync.WaitGroup
	wg.Go(func() { c.copyFrom(client, o.EarlyUp) })
	c.copyFrom(server, o.Early)
	wg.Wait()

	c.mu.Lock()
	defer c.mu.Unlock()
	if c.timer != nil {
		c.timer.Stop()
	}
	c.close(false)
	return result(c.moved[client].Load(), c.moved[server].Load(), c.cause, c.err)
}

// copier is a flow of Copy. Directions are numbered by their source.
type copier struct {
	conn  [2]net.Conn
	moved [2]atomic.Uint64
	seen  [2]*atomic.Uint64 // CopyOptions.Up and Down
	began time.Time
	last  atomic.Int64 // the last activity, nanoseconds after began: the clock of the host may be set

	idle, half time.Duration

	mu     sync.Mutex
	ended  [2]bool // directions
	closed bool
	cause  Cause
	err    error
	timer  *time.Timer // for the limit that holds now; nil: none
}

func (c *copier) touch() { c.last.Store(int64(time.Since(c.began))) }

// quiet is how long nothing has moved.
func (c *copier) quiet() time.Duration { return time.Since(c.began) - time.Duration(c.last.Load()) }

func (c *copier) copyFrom(i int, early []byte) {
	err, writing := c.write(i, early)
	buf := make([]byte, copyBuffer)
	for err == nil {
		var n int
		n, err = c.conn[i].Read(buf)
		if n > 0 {
			c.touch()
			if werr, _ := c.write(i, buf[:n]); werr != nil {
				err, writing = werr, true
			}
		}
	}
	switch {
	case writing:
		c.end(dead(1-i), err)
	case errors.Is(err, io.EOF):
		c.finished(i)
	default:
		c.end(dead(i), err)
	}
}

func (c *copier) write(i int, b []byte) (err error, failed bool) {
	if len(b) == 0 {
		return nil, false
	}
	n, err := c.conn[1-i].Write(b)
	c.moved[i].Add(uint64(n))
	if c.seen[i] != nil {
		c.seen[i].Add(uint64(n))
	}
	c.touch()
	return err, err != nil
}

// finished passes on the end of direction i.
func (c *copier) finished(i int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended[i] = true; c.closed || c.ended[1-i] {
		return
	}
	w, ok := c.conn[1-i].(interface{ CloseWrite() error })
	if !ok {
		c.ended[1-i] = true
		c.close(false)
		return
	}
	if err := w.CloseWrite(); err != nil {
		c.fail(dead(1-i), err)
		return
	}
	c.touch()
	c.watch()
}

// end ends the flow before its time.
func (c *copier) end(why Cause, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fail(why, err)
}

func (c *copier) fail(why Cause, err error) {
	if c.closed {
		return // the error is only that we closed it
	}
	c.cause, c.err = why, err
	c.close(true)
}

// close closes both connections, with a RST if so asked and possible.
func (c *copier) close(reset bool) {
	if c.closed {
		return
	}
	c.closed = true
	for _, k := range c.conn {
		if reset {
			resetConn(k)
		} else {
			k.Close()
		}
	}
}

// watch starts the timer for the limit that holds now.
func (c *copier) watch() {
	limit := c.idle
	if (c.ended[0] || c.ended[1]) && c.half > 0 && (limit == 0 || c.half < limit) {
		limit = c.half
	}
	if limit <= 0 {
		return
	}
	left := limit - c.quiet()
	if c.timer == nil {
		c.timer = time.AfterFunc(left, c.expire)
		return
	}
	c.timer.Reset(left)
}

// expire ends the flow if nothing has moved since watch.
func (c *copier) expire() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return
	}
	limit, why := c.idle, IdleTimeout
	if (c.ended[0] || c.ended[1]) && c.half > 0 && (limit == 0 || c.half < limit) {
		limit, why = c.half, HalfClosedTimeout
	}
	if c.quiet() < limit {
		c.watch()
		return
	}
	c.fail(why, os.ErrDeadlineExceeded)
}

// dead is the cause that names a side.
func dead(side int) Cause {
	if side == client {
		return ClientReset
	}
	return ServerReset
}

// resetConn closes k with a RST if there is a TCP socket below.
func resetConn(k net.Conn) {
	below := k
	if u, ok := k.(interface{ NetConn() net.Conn }); ok {
		below = u.NetConn()
	}
	switch t := below.(type) {
	case interface{ Reset() error }:
		t.Reset()
	case interface{ SetLinger(sec int) error }:
		t.SetLinger(0)
	}
	k.Close()
}
