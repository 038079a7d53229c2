package relay

import (
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// spareFD is a descriptor that is kept so that one can be had when the process
// has none left.
//
// Between giving it up and using it another thread may be faster. So while it
// is missing, those parts of the engine that would keep a descriptor (a dialled
// socket, a pipe) look at missing after they got one, and hand it back.
type spareFD struct {
	missing atomic.Bool

	mu sync.Mutex
	fd int
}

func (s *spareFD) open() error {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		s.fd = -1
		return err
	}
	s.fd = fd
	s.missing.Store(false)
	return nil
}

// lend gives the descriptor up for the time of f, which takes one and closes
// it. It returns false, without a call of f, if there is nothing to give up.
func (s *spareFD) lend(f func()) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fd < 0 && s.open() != nil {
		return false
	}
	s.missing.Store(true)
	rawClose(s.fd)
	f()
	s.open()
	return true
}

// restore gets the spare back if it is missing and there is a descriptor.
func (s *spareFD) restore() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.fd >= 0 || s.open() == nil
}

func (s *spareFD) close() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fd >= 0 {
		rawClose(s.fd)
	}
	s.fd = -1
}
