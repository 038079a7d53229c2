package redirect

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// socket is a non-blocking socket that Go's poller does not know before
// somebody has to wait for it: to whoever watches it by an epoll descriptor of
// his own, each datagram would mean a second wake-up, and to whoever sends,
// each one that has left.
type socket struct {
	mu     sync.Mutex // held for what does not block
	fd     int        // -1: closed
	waiter *os.File   // the same socket for Go's poller; nil: nobody has waited yet
	poller syscall.RawConn
}

// newSocket makes a socket of a family in the network namespace of the calling
// thread and lets setup see its descriptor; if that fails it is closed.
func newSocket(v6 bool, kind, protocol int, setup func(fd int) error) (*socket, error) {
	fd, err := openSocket(v6, kind, protocol, setup)
	if err != nil {
		return nil, err
	}
	return &socket{fd: fd}, nil
}

func openSocket(v6 bool, kind, protocol int, setup func(fd int) error) (int, error) {
	domain := unix.AF_INET
	if v6 {
		domain = unix.AF_INET6
	}
	fd, err := unix.Socket(domain, kind|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, protocol)
	if err != nil {
		return -1, fmt.Errorf("socket: %w", err)
	}
	if err := setup(fd); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// control calls f with the descriptor, which is valid during the call.
func (s *socket) control(f func(fd int) error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fd < 0 {
		return net.ErrClosed
	}
	return f(s.fd)
}

// try calls f with the descriptor and returns what f does: false means that it
// would have had to wait.
func (s *socket) try(f func(fd uintptr) bool) (bool, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fd < 0 {
		return false, net.ErrClosed
	}
	return f(uintptr(s.fd)), nil
}

// read calls f until it returns true, whenever there is something to read.
func (s *socket) read(f func(fd uintptr) bool) error {
	c, err := s.polled()
	if err != nil {
		return err
	}
	return s.outcome(c.Read(f))
}

// write calls f until it returns true, whenever there is room to write.
func (s *socket) write(f func(fd uintptr) bool) error {
	if done, err := s.try(f); done || err != nil {
		return err
	}
	c, err := s.polled()
	if err != nil {
		return err
	}
	return s.outcome(c.Write(f))
}

// outcome gives the error of a wait that Close has ended the name that the
// world knows.
func (s *socket) outcome(err error) error {
	if err == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fd < 0 {
		return net.ErrClosed
	}
	return err
}

func (s *socket) polled() (syscall.RawConn, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fd < 0 {
		return nil, net.ErrClosed
	}
	if s.poller == nil {
		fd, err := unix.FcntlInt(uintptr(s.fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return nil, fmt.Errorf("redirect: dup: %w", err)
		}
		f := os.NewFile(uintptr(fd), "socket")
		c, err := f.SyscallConn()
		if err == nil {
			err = f.SetDeadline(time.Time{}) // fails if the poller could not take it
		}
		if err != nil {
			f.Close()
			return nil, fmt.Errorf("redirect: socket: %w", err)
		}
		s.waiter, s.poller = f, c
	}
	return s.poller, nil
}

func (s *socket) close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fd < 0 {
		return net.ErrClosed
	}
	err := unix.Close(s.fd)
	s.fd = -1
	if s.waiter != nil {
		err = errors.Join(err, s.waiter.Close())
	}
	return err
}

// localPort is the port that a socket is bound to.
func (s *socket) localPort() (port uint16, err error) {
	err = s.control(func(fd int) error {
		name, err := unix.Getsockname(fd)
		switch name := name.(type) {
		case *unix.SockaddrInet4:
			port = uint16(name.Port)
		case *unix.SockaddrInet6:
			port = uint16(name.Port)
		}
		return err
	})
	return port, err
}

// sockaddr returns an address, which is of one family with the socket, as the
// kernel takes it.
func sockaddr(a netip.AddrPort) unix.Sockaddr {
	addr := a.Addr().Unmap()
	if addr.Is4() {
		return &unix.SockaddrInet4{Addr: addr.As4(), Port: int(a.Port())}
	}
	return &unix.SockaddrInet6{Addr: addr.As16(), Port: int(a.Port()), ZoneId: scope(addr)}
}

// buffer gives a socket room of size bytes: by force, an option that takes
// CAP_NET_ADMIN of the host, else as much as net.core.rmem_max or wmem_max
// allows.
func buffer(fd, force, size int) error {
	err := setsockoptInt(fd, unix.SOL_SOCKET, force, size)
	if err == unix.EPERM {
		plain := unix.SO_RCVBUF
		if force == unix.SO_SNDBUFFORCE {
			plain = unix.SO_SNDBUF
		}
		err = setsockoptInt(fd, unix.SOL_SOCKET, plain, size)
	}
	return os.NewSyscallError("setsockopt SO_RCVBUF, SO_SNDBUF", err)
}
