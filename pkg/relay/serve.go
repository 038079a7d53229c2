package relay

import (
	"context"
	"net"
	"net/netip"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// acceptPause is how long Serve leaves clients in the listener's queue when
// the system has no descriptor even for turning them away.
const acceptPause = 10 * time.Millisecond

// Serve accepts connections on ln and calls handle for each, on a goroutine of
// its own. handle owns its Conn: it joins, closes or resets it.
//
// A client that there is no room for (MaxConns, or the process is out of
// descriptors) is accepted and reset at once, and counted, so that it does not
// hang in the queue.
//
// Serve returns nil when ctx ends, net.ErrClosed when the engine is closed,
// and an error if the listener fails. It works on a duplicate of ln's
// descriptor, so ln stays open and usable, and closing ln does not end Serve.
// It sets TCP_NODELAY on the listening socket, which accepted ones inherit.
func (e *Engine) Serve(ctx context.Context, ln *net.TCPListener, handle func(c *Conn)) error {
	if !e.enter() {
		return net.ErrClosed
	}
	defer e.handlers.Done()
	f, nodelay, err := duplicate(ln)
	if err != nil {
		return &net.OpError{Op: "accept", Net: "tcp", Addr: ln.Addr(), Err: err}
	}
	defer f.Close()
	rc, err := f.SyscallConn()
	if err != nil {
		return err
	}
	// A deadline in the past interrupts the wait for clients.
	interrupt := func() { f.SetReadDeadline(time.Unix(1, 0)) }
	defer context.AfterFunc(ctx, interrupt)()
	defer context.AfterFunc(e.ctx, interrupt)()

	a := &acceptor{e: e, ctx: ctx, nodelay: nodelay, crew: newCrew(&e.handlers, handle)}
	defer a.crew.end()
	for {
		a.err, a.pause = nil, false
		err := rc.Read(a.batch)
		switch {
		case e.closed.Load():
			return net.ErrClosed
		case ctx.Err() != nil:
			return nil
		case err == nil:
			err = a.err
		}
		if err != nil {
			return &net.OpError{Op: "accept", Net: "tcp", Addr: ln.Addr(), Err: err}
		}
		if a.pause {
			time.Sleep(acceptPause)
		}
	}
}

// duplicate returns a second descriptor of ln's socket, watched by Go's
// network poller (a net.Listener offers no way to wait for clients without
// accepting them one by one), and whether accepted sockets inherit
// TCP_NODELAY.
func duplicate(ln *net.TCPListener) (f *os.File, nodelay bool, err error) {
	rc, err := ln.SyscallConn()
	if err != nil {
		return nil, false, err
	}
	fd := -1
	cerr := rc.Control(func(orig uintptr) {
		fd, err = unix.FcntlInt(orig, unix.F_DUPFD_CLOEXEC, 0)
	})
	if cerr != nil {
		return nil, false, cerr
	}
	if err != nil {
		return nil, false, os.NewSyscallError("fcntl", err)
	}
	nodelay = rawSetInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1) == 0
	return os.NewFile(uintptr(fd), "listener"), nodelay, nil
}

type acceptor struct {
	e       *Engine
	crew    *crew[*Conn]
	ctx     context.Context // of Serve
	nodelay bool
	pause   bool  // batch stopped for want of descriptors
	err     error // batch stopped: the listener is broken
}

// batch accepts what is in the queue. It returns false when the queue is
// empty: the caller, Go's network poller, then waits for more.
func (a *acceptor) batch(lfd uintptr) (done bool) {
	for !a.e.closed.Load() && a.ctx.Err() == nil {
		fd, remote, errno := rawAccept(int(lfd))
		switch errno {
		case 0:
			a.take(fd, remote)
		case unix.EAGAIN:
			return false
		case unix.EINTR, unix.ECONNABORTED:
		case unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM:
			// accept(2) takes a descriptor before it looks at the queue: this says
			// nothing of whether a client waits.
			switch a.e.turnAway(int(lfd)) {
			case 0, unix.EINTR, unix.ECONNABORTED:
			case unix.EAGAIN:
				return false
			default:
				a.e.pipes.shed() // two descriptors for the next try
				a.pause = true
				return true
			}
		case unix.EBADF, unix.EINVAL, unix.ENOTSOCK, unix.EOPNOTSUPP, unix.EFAULT:
			a.err = os.NewSyscallError("accept4", errno)
			return true
		default:
			// accept(2): errors of the connection itself (a network that went
			// down, a firewall's EPERM) come out here and mean: try the next.
		}
	}
	return true
}

func (a *acceptor) take(fd int, remote netip.AddrPort) {
	e := a.e
	if e.spare.missing.Load() && !e.spare.restore() || fd >= maxFD || !e.admit(true) {
		e.refuse() // before the client can know
		rawReset(fd)
		e.spare.restore()
		return
	}
	c := e.newConn(fd, true)
	c.remote, c.nodelay = remote, a.nodelay
	e.accepts.Add(1)
	a.crew.do(c)
}

// turnAway accepts one client, with the spare descriptor, and resets it. It
// returns what accept(2) does, and EMFILE if there is no spare.
func (e *Engine) turnAway(lfd int) (errno unix.Errno) {
	lent := e.spare.lend(func() {
		var fd int
		if fd, _, errno = rawAccept(lfd); errno == 0 {
			e.refuse()
			rawReset(fd)
		}
	})
	if !lent {
		return unix.EMFILE
	}
	return errno
}
