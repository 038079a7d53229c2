package socks

import (
	"net"
	"net/netip"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

// Options is how a server wants to be spoken to. The zero value is right for
// every server without authentication.
type Options struct {
	Auth *Auth // nil: none is offered
	// Pipeline sends greeting, authentication and request in one write. Some
	// servers (microsocks) hang on it.
	Pipeline bool
}

// Connect asks the SOCKS5 server on conn to connect to t and returns the
// address that it says it uses for it (BND.ADDR; the zero value if it gives a
// name). After an error the connection is of no use; closing it is the
// caller's.
//
// Errors are a Reply, ErrAuth, ErrNoAcceptableMethod, ErrTooLong, a
// *ProtocolError, or what conn returned: io.ErrUnexpectedEOF if the server
// closed before its reply was complete.
func Connect(conn net.Conn, t flow.Target, o Options) (bound netip.AddrPort, err error) {
	var buf scratch
	method := byte(methodNone)
	if o.Auth != nil {
		// Only this one: a server that is offered both may pick none and then
		// refuse by rule.
		method = methodUserPass
		if !fits(o.Auth.Username) || !fits(o.Auth.Password) {
			return bound, ErrTooLong
		}
	}
	if t.Name != "" && !fits(t.Name) {
		return bound, ErrTooLong
	}
	msg := append(buf[:0], version5, 1, method)
	if o.Pipeline {
		if o.Auth != nil {
			msg = appendAuth(msg, o.Auth)
		}
		msg = appendRequest(msg, t)
	}
	if _, err := conn.Write(msg); err != nil {
		return bound, err
	}
	if err := readMethod(conn, method, &buf); err != nil {
		return bound, err
	}
	if o.Auth != nil {
		if !o.Pipeline {
			if _, err := conn.Write(appendAuth(buf[:0], o.Auth)); err != nil {
				return bound, err
			}
		}
		if err := readStatus(conn, &buf); err != nil {
			return bound, err
		}
	}
	if !o.Pipeline {
		if _, err := conn.Write(appendRequest(buf[:0], t)); err != nil {
			return bound, err
		}
	}
	return readReply(conn, &buf)
}
