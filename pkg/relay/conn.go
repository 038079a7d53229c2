package relay

import (
	"io"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	readEvents  = unix.EPOLLIN | unix.EPOLLRDHUP
	writeEvents = unix.EPOLLOUT
	hangup      = unix.EPOLLERR | unix.EPOLLHUP // always reported, asked for or not
)

var _ net.Conn = (*Conn)(nil)

type connState uint8

const (
	connOpen   connState = iota
	connJoined           // belongs to a Stream: the descriptor is no longer ours
	connClosed
)

// Conn is a TCP connection of an [Engine]: a net.Conn that blocks the calling
// goroutine. Its methods may be called by several goroutines.
//
// [Engine.Join] takes the socket out of it. From then on, as after Close, its
// methods return net.ErrClosed and do nothing, so a deferred Close is
// harmless; addresses stay readable.
//
// TCP_NODELAY is set when it begins to matter: at the second Write without a
// Read between.
type Conn struct {
	e      *Engine
	l      *loop // where it is registered; nil: not yet. Guarded by mu
	stream atomic.Pointer[Stream]
	gen    uint32 // tells events of this socket from those of a predecessor
	side   uint8  // in stream

	mu       sync.Mutex
	fd       int32
	events   uint32 // what it is registered for; 0: not registered
	state    connState
	accepted bool // counts as an accepted connection
	nodelay  bool // TCP_NODELAY is on
	wrote    bool // since the last Read that got bytes
	readable bool // a read may get something; false: an event will say when
	writable bool
	finSeen  bool // EPOLLRDHUP seen: a short read does not mean that nothing is left
	errSeen  bool // EPOLLERR or EPOLLHUP seen
	canceled bool // the context of Dial ended
	waitR    *waiter
	waitW    *waiter
	ended    func()     // see whenEnded; nil: nobody wants to know
	deadline *deadlines // nil: never set

	local, remote netip.AddrPort
}

// waiter is a goroutine parked in a Conn. Waiters are pooled.
type waiter struct {
	ch   chan struct{} // capacity 1
	next *waiter
}

// wakeAll wakes a list of waiters that is no longer reachable by others.
func wakeAll(w *waiter) {
	for w != nil {
		next := w.next
		w.next = nil
		w.ch <- struct{}{}
		w = next
	}
}

// event notes what the loop saw and wakes who waits for it.
func (c *Conn) event(l *loop, ev uint32) {
	c.mu.Lock()
	if s := c.stream.Load(); s != nil {
		c.mu.Unlock()
		s.event(l, int(c.side), ev)
		return // joined while the event was on its way
	}
	var r, w *waiter
	if ev&(readEvents|hangup) != 0 {
		c.readable = true
		r, c.waitR = c.waitR, nil
	}
	if ev&unix.EPOLLRDHUP != 0 {
		c.finSeen = true
	}
	if ev&hangup != 0 {
		c.errSeen = true
	}
	if ev&(writeEvents|hangup) != 0 {
		c.writable = true
		w, c.waitW = c.waitW, nil
	}
	var ended func()
	if c.ended != nil && c.spoke() {
		ended, c.ended = c.ended, nil
	}
	c.mu.Unlock()
	wakeAll(r)
	wakeAll(w)
	if ended != nil {
		ended()
	}
}

// whenEnded has f called once, by the loop or at once, when the peer has closed
// or says anything more; not after Close. F must not block.
func (c *Conn) whenEnded(f func()) {
	if !c.Quiet() {
		f()
		return
	}
	c.mu.Lock()
	now := c.state != connOpen || c.spoke()
	if !now {
		c.ended = f
	}
	c.mu.Unlock()
	if now {
		f()
	}
}

// spoke tells whether there is something to read, the end included. Of what was
// read as soon as it was there the event can come later, and says nothing.
func (c *Conn) spoke() bool {
	if !c.readable {
		return false
	}
	var b [1]byte
	if _, e := rawRecv(int(c.fd), b[:], unix.MSG_PEEK); e == unix.EAGAIN {
		c.readable = false
	}
	return c.readable
}

// wait parks until an event, a deadline or Close; it is called with mu held
// and returns with mu held. The caller looks again why it was woken.
func (c *Conn) wait(list **waiter) {
	w := c.e.waiters.Get().(*waiter)
	w.next = *list
	*list = w
	c.mu.Unlock()
	<-w.ch
	c.e.waiters.Put(w)
	c.mu.Lock()
}

// want makes sure that the socket is registered for the given events.
func (c *Conn) want(events uint32) unix.Errno {
	if c.events&events == events {
		return 0
	}
	var e unix.Errno
	if c.l == nil {
		c.l = c.e.pickLoop()
		if e = c.l.register(c.fd, c.gen, events); e != 0 {
			c.l = nil
		}
	} else {
		e = c.l.modify(c.fd, c.gen, c.events|events)
	}
	if e == 0 { // else nothing will be reported
		c.events |= events
	}
	return e
}

// Read reads what is there, and waits for it if there is nothing. It returns
// io.EOF after the peer's FIN.
func (c *Conn) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		if err := c.usable(c.deadline.readEnd()); err != nil {
			return 0, c.fail("read", err)
		}
		if c.readable || c.events == 0 {
			n, e := rawRead(int(c.fd), b)
			switch e {
			case 0:
				if n == 0 {
					return 0, io.EOF
				}
				c.wrote = false
				if n < len(b) && !c.finSeen && !c.errSeen && c.events != 0 {
					c.readable = false
				}
				return n, nil
			case unix.EINTR:
				continue
			case unix.EAGAIN:
				c.readable = false
			default:
				return 0, c.fail("read", os.NewSyscallError("read", e))
			}
		}
		if e := c.want(readEvents); e != 0 {
			return 0, c.fail("read", os.NewSyscallError("epoll_ctl", e))
		}
		c.deadline.armRead(c)
		c.wait(&c.waitR)
	}
}

// Write writes all of b, waiting for room as often as it takes.
func (c *Conn) Write(b []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	done := 0
	for done < len(b) {
		if err := c.usable(c.deadline.writeEnd()); err != nil {
			return done, c.fail("write", err)
		}
		if c.writable {
			if c.wrote && !c.nodelay {
				c.nodelay = true
				rawSetInt(int(c.fd), unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
			}
			n, e := rawSend(int(c.fd), b[done:])
			switch e {
			case 0:
				done += n
				c.wrote = true
				continue
			case unix.EINTR:
				continue
			case unix.EAGAIN:
				c.writable = false
			default:
				return done, c.fail("write", os.NewSyscallError("write", e))
			}
		}
		if e := c.want(readEvents | writeEvents); e != 0 {
			return done, c.fail("write", os.NewSyscallError("epoll_ctl", e))
		}
		c.deadline.armWrite(c)
		c.wait(&c.waitW)
	}
	return done, nil
}

// usable returns why the connection cannot be used, nil if it can.
func (c *Conn) usable(deadline time.Time) error {
	if c.state != connOpen {
		return net.ErrClosed
	}
	if !deadline.IsZero() && !time.Now().Before(deadline) {
		return os.ErrDeadlineExceeded
	}
	return nil
}

func (c *Conn) fail(op string, err error) error {
	return &net.OpError{Op: op, Net: "tcp", Addr: tcpAddr(c.remote), Err: err}
}

// Close closes the connection: what was written is still delivered, then a
// FIN. If the peer sent bytes that were not read, the kernel sends a RST
// instead. A second Close returns net.ErrClosed.
func (c *Conn) Close() error {
	return c.close(rawClose)
}

// Reset closes the connection such that the peer sees a RST; what it has not
// received is lost.
func (c *Conn) Reset() error {
	return c.close(rawReset)
}

func (c *Conn) close(how func(fd int)) error {
	c.mu.Lock()
	if c.state != connOpen {
		c.mu.Unlock()
		return c.fail("close", net.ErrClosed)
	}
	c.state = connClosed
	c.e.conns.set(int(c.fd), nil)
	how(int(c.fd))
	r, w := c.leave()
	c.mu.Unlock()
	wakeAll(r)
	wakeAll(w)
	c.e.release(c.accepted)
	return nil
}

// leave takes the descriptor and all who wait out of c.
func (c *Conn) leave() (r, w *waiter) {
	r, w = c.waitR, c.waitW
	c.fd, c.waitR, c.waitW, c.ended = -1, nil, nil, nil
	c.deadline.stop()
	c.deadline = nil
	return r, w
}

// shutdown ends the connection or the stream that it belongs to, as the engine
// closes.
func (c *Conn) shutdown() {
	if s := c.stream.Load(); s != nil {
		s.kill(EngineClosed)
		return
	}
	c.Close()
}

// CloseWrite sends a FIN after what was written; reading goes on.
func (c *Conn) CloseWrite() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state != connOpen {
		return c.fail("close", net.ErrClosed)
	}
	rawShutdownWrite(int(c.fd))
	return nil
}

// Quiet reports whether the peer has neither sent anything since the last Read
// nor closed: whether a connection kept for later is still good. It looks at
// what the loop has seen and costs no system call after the first.
func (c *Conn) Quiet() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state != connOpen {
		return false
	}
	if c.readable || c.events == 0 {
		// A read may have left something, or nobody has asked the kernel yet.
		var b [1]byte
		if _, e := rawRecv(int(c.fd), b[:], unix.MSG_PEEK); e != unix.EAGAIN {
			return false
		}
		c.readable = false
		if c.want(readEvents) != 0 {
			return false
		}
	}
	return !c.finSeen && !c.errSeen
}

// RoundTrip returns how far away the peer is, as the kernel has measured it; 0: it
// does not say.
func (c *Conn) RoundTrip() time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state != connOpen {
		return 0
	}
	info, err := unix.GetsockoptTCPInfo(int(c.fd), unix.SOL_TCP, unix.TCP_INFO)
	if err != nil {
		return 0
	}
	return time.Duration(info.Rtt) * time.Microsecond
}

// LocalAddrPort returns the socket's own address; on a transparent listener's
// connection that is the original destination. An IPv4 address is in IPv4
// form. The zero value means that it was first asked for after Close or Join.
func (c *Conn) LocalAddrPort() netip.AddrPort {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.local.IsValid() && c.state == connOpen {
		c.local = rawName(unix.SYS_GETSOCKNAME, int(c.fd))
	}
	return c.local
}

// RemoteAddrPort returns the peer's address, IPv4 in IPv4 form.
func (c *Conn) RemoteAddrPort() netip.AddrPort { return c.remote }

// LocalAddr returns [Conn.LocalAddrPort] as a *net.TCPAddr.
func (c *Conn) LocalAddr() net.Addr { return tcpAddr(c.LocalAddrPort()) }

// RemoteAddr returns [Conn.RemoteAddrPort] as a *net.TCPAddr.
func (c *Conn) RemoteAddr() net.Addr { return tcpAddr(c.remote) }

// Fd returns the descriptor, -1 after Close or Join. The Conn keeps it; the
// caller must not close it, nor use it while another goroutine may Close.
func (c *Conn) Fd() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return int(c.fd)
}

// Control calls f with the descriptor, which stays valid for the call; for
// socket options. f must not use c.
func (c *Conn) Control(f func(fd int) error) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.state != connOpen {
		return c.fail("control", net.ErrClosed)
	}
	return f(int(c.fd))
}

func tcpAddr(a netip.AddrPort) net.Addr {
	if !a.IsValid() {
		return (*net.TCPAddr)(nil)
	}
	return net.TCPAddrFromAddrPort(a)
}

// Adopt makes a Conn of a connection that was made elsewhere, in another
// network namespace for instance. It takes t over: t is closed in any case,
// the socket lives on if there is no error.
func (e *Engine) Adopt(t *net.TCPConn) (*Conn, error) {
	defer t.Close()
	rc, err := t.SyscallConn()
	if err != nil {
		return nil, err
	}
	if !e.admit(false) {
		return nil, &net.OpError{Op: "adopt", Net: "tcp", Err: syscall.EMFILE}
	}
	fd := -1
	if e := rc.Control(func(orig uintptr) {
		fd, err = unix.FcntlInt(orig, unix.F_DUPFD_CLOEXEC, 0)
	}); e != nil {
		err = e
	}
	if err == nil && fd >= maxFD {
		rawClose(fd)
		err = syscall.EMFILE
	}
	if err != nil {
		e.release(false)
		return nil, &net.OpError{Op: "adopt", Net: "tcp", Err: os.NewSyscallError("fcntl", err)}
	}
	c := e.newConn(fd, false)
	c.nodelay = true // package net sets it
	c.remote = rawName(unix.SYS_GETPEERNAME, fd)
	if e.closed.Load() {
		c.Close()
		return nil, errClosed("adopt")
	}
	return c, nil
}
