package control

import (
	"errors"
	"net"
	"net/http"
	"os"
	"sync"
	"syscall"
	"time"
)

// reserve is a listener that keeps a descriptor back, so that one client can be
// answered when the process has none left: that is when an operator asks.
type reserve struct {
	net.Listener
	mu    sync.Mutex
	spare *os.File // nil: lent, or none is to be had
}

// newReserve wraps a listener, which stays the caller's; end gives the descriptor
// back.
func newReserve(ln net.Listener) *reserve {
	r := &reserve{Listener: ln}
	r.restore()
	return r
}

// restore takes a descriptor back as soon as there is one.
func (r *reserve) restore() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.spare == nil {
		r.spare, _ = os.Open(os.DevNull)
	}
}

// end gives the descriptor up; false: there was none.
func (r *reserve) end() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.spare == nil {
		return false
	}
	r.spare.Close()
	r.spare = nil
	return true
}

// Accept lends the descriptor if there is no other. What the kernel has no memory or
// no watch of epoll for is turned away, and is no end.
func (r *reserve) Accept() (net.Conn, error) {
	for {
		c, err := r.Listener.Accept()
		if (errors.Is(err, syscall.EMFILE) || errors.Is(err, syscall.ENFILE)) && r.end() {
			c, err = r.Listener.Accept()
		}
		if !errors.Is(err, syscall.ENOSPC) && !errors.Is(err, syscall.ENOMEM) && !errors.Is(err, syscall.ENOBUFS) {
			return c, err
		}
		time.Sleep(acceptPause)
	}
}

const acceptPause = 10 * time.Millisecond

// closed is told by http.Server of what becomes of connections.
func (r *reserve) closed(_ net.Conn, s http.ConnState) {
	if s == http.StateClosed || s == http.StateHijacked {
		r.restore()
	}
}
