package relay

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// DialOptions says how [Engine.Dial] makes a socket. The zero value is a plain
// one.
type DialOptions struct {
	// Control, if not nil, is called with the new socket before it is bound or
	// connected; for SO_MARK and the like. It must not keep the descriptor.
	Control func(fd int) error
	// Local is the address to connect from; the zero value leaves it to the
	// kernel.
	Local netip.Addr
	// SpeaksFirst says that something is written as soon as the connection is
	// there. The kernel then sends what it has to acknowledge along with that, and
	// no packet of its own for it.
	SpeaksFirst bool
}

// Dial connects to an address. It ends with ctx's error when ctx ends first;
// errors are *net.OpError and wrap the kernel's errno, as
// syscall.ECONNREFUSED. At the limit of MaxConns it is syscall.EMFILE.
func (e *Engine) Dial(ctx context.Context, o DialOptions, to netip.AddrPort) (*Conn, error) {
	c, err := e.dial(ctx, o, to)
	if err != nil {
		if errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE) {
			e.refuse()
		}
		return nil, &net.OpError{Op: "dial", Net: "tcp", Addr: tcpAddr(to), Err: err}
	}
	return c, nil
}

func (e *Engine) dial(ctx context.Context, o DialOptions, to netip.AddrPort) (*Conn, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if e.closed.Load() {
		return nil, net.ErrClosed
	}
	if !e.admit(false) {
		return nil, os.NewSyscallError("socket", syscall.EMFILE)
	}
	c, err := e.startDial(o, to)
	if err != nil {
		e.release(false)
		return nil, err
	}
	if err := c.finishDial(ctx); err != nil {
		c.Close()
		return nil, err
	}
	if e.closed.Load() {
		c.Close()
		return nil, net.ErrClosed
	}
	return c, nil
}

// startDial makes the socket and sends the SYN.
func (e *Engine) startDial(o DialOptions, to netip.AddrPort) (*Conn, error) {
	family := unix.AF_INET
	if !to.Addr().Unmap().Is4() {
		family = unix.AF_INET6
	}
	fd, errno := rawSocket(family)
	if errno == 0 && (fd >= maxFD || e.spare.missing.Load()) {
		rawClose(fd)
		e.spare.restore()
		errno = unix.EMFILE
	}
	if errno != 0 {
		return nil, os.NewSyscallError("socket", errno)
	}
	if err := prepare(fd, o); err != nil {
		rawClose(fd)
		return nil, err
	}
	if errno := rawAddr(unix.SYS_CONNECT, fd, to); errno != 0 && errno != unix.EINPROGRESS {
		rawClose(fd)
		return nil, os.NewSyscallError("connect", errno)
	}
	c := e.newConn(fd, false)
	c.remote = netip.AddrPortFrom(to.Addr().Unmap(), to.Port())
	return c, nil
}

func prepare(fd int, o DialOptions) error {
	if o.Control != nil {
		if err := o.Control(fd); err != nil {
			return err
		}
	}
	if o.SpeaksFirst {
		rawSetInt(fd, unix.IPPROTO_TCP, unix.TCP_QUICKACK, 0)
	}
	if !o.Local.IsValid() {
		return nil
	}
	// The port is chosen by connect(2), which knows the destination, so ports
	// may be shared among destinations.
	rawSetInt(fd, unix.IPPROTO_IP, unix.IP_BIND_ADDRESS_NO_PORT, 1)
	if errno := rawAddr(unix.SYS_BIND, fd, netip.AddrPortFrom(o.Local, 0)); errno != 0 {
		return os.NewSyscallError("bind", errno)
	}
	return nil
}

// finishDial waits for the connection to be made, or for ctx to end.
func (c *Conn) finishDial(ctx context.Context) error {
	c.mu.Lock()
	c.writable = false
	if errno := c.want(readEvents | writeEvents); errno != 0 {
		c.mu.Unlock()
		return os.NewSyscallError("epoll_ctl", errno)
	}
	if ctx.Done() != nil {
		stop := context.AfterFunc(ctx, c.cancelDial)
		defer stop()
	}
	for !c.writable && !c.canceled && c.state == connOpen {
		c.wait(&c.waitW)
	}
	defer c.mu.Unlock()
	switch {
	case c.state != connOpen:
		return net.ErrClosed
	case c.errSeen:
		if errno := rawError(int(c.fd)); errno != 0 {
			return os.NewSyscallError("connect", errno)
		}
	case !c.writable:
		return ctx.Err()
	}
	return nil
}

func (c *Conn) cancelDial() {
	c.mu.Lock()
	c.canceled = true
	w := c.waitW
	c.waitW = nil
	c.mu.Unlock()
	wakeAll(w)
}
