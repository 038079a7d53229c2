package upstream

import (
	"errors"
	"syscall"

	"github.com/tproxyd/tproxyd/pkg/socks"
)

// verdict is whose fault an error is.
type verdict uint8

const (
	well        verdict = iota // no error
	fault                      // the server's: ask the next, remember it
	incapable                  // the server cannot do this: ask the next
	unknown                    // this host's own, or nothing that tells: ask the next, nothing is known of the server
	destination                // nobody else will do better
)

// hopError is what went wrong on the way to a server, before it was reached.
// Whatever another server of its chain answered is no answer for the flow.
type hopError struct {
	via *Server
	err error
}

func (e *hopError) Error() string { return "by way of " + e.via.Name + ": " + e.err.Error() }
func (e *hopError) Unwrap() error { return e.err }

// silentEnd is a connection that was closed in place of a reply to the request.
// Some servers refuse so (ssh -D), others have just been stopped.
type silentEnd struct{ err error }

func (e *silentEnd) Error() string { return "closed in place of a reply: " + e.err.Error() }
func (e *silentEnd) Unwrap() error { return e.err }

// judge tells a server's fault from a destination's, by what each reply is
// used for in practice. General failure is ambiguous: some servers send it for
// a name that does not exist, so it moves this flow on and blames nobody.
func judge(err error) verdict {
	if err == nil {
		return well
	}
	// No descriptor, no memory, no port, no watch of epoll left.
	for _, e := range []syscall.Errno{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.EADDRNOTAVAIL, syscall.ENOSPC} {
		if errors.Is(err, e) {
			return unknown
		}
	}
	if errors.Is(err, errBusy) {
		return unknown
	}
	var none *noUDP
	if errors.As(err, &none) { // also of a server on the way
		if none.asked {
			return incapable
		}
		return unknown
	}
	var hop *hopError
	if errors.As(err, &hop) {
		if judge(hop.err) == unknown {
			return unknown
		}
		return fault
	}
	var silent *silentEnd
	var v5 socks.Reply
	var v4 socks.Reply4
	var status socks.HTTPStatus
	switch {
	case errors.Is(err, socks.ErrTooLong), errors.Is(err, socks.ErrNoIPv6), errors.Is(err, errNoIPv4):
		return incapable // nothing was said to it
	case errors.As(err, &silent):
		return unknown
	case errors.As(err, &v5):
		switch v5 {
		case socks.NotAllowed, socks.NetworkUnreachable, socks.HostUnreachable, socks.ConnectionRefused, socks.TTLExpired:
			return destination
		}
		return incapable
	case errors.As(err, &v4):
		if v4 == socks.Rejected4 {
			return destination // it gives no reason, and mostly it is that
		}
		return fault
	case errors.As(err, &status):
		switch status {
		case 403, 502, 504:
			return destination
		case 401, 407:
			return fault
		}
		return incapable
	}
	return fault
}
