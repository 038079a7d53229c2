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
// address that it says it uses for it (BND.ADDR; without an address, the port
// alone, if it gives a name). After an error the connection is of no use;
// closing it is the caller's.
//
// Errors are a Reply, ErrAuth, ErrNoAcceptableMethod, ErrTooLong, a
// *ProtocolError, or what conn returned: io.ErrUnexpectedEOF if the server
// closed before its reply was complete.
func Connect(conn net.Conn, t flow.Target, o Options) (bound netip.AddrPort, err error) {
	if t.Name != "" && !fits(t.Name) {
		return bound, ErrTooLong
	}
	return ask(conn, commandConnect, t, o)
}

// Associate asks for a UDP association (RFC 1928 section 7), which lasts as long
// as the connection. From is where the datagrams will come from; the zero
// value does not tell. It returns where the server wants them: as it says,
// which can be an unspecified address, and without an address if it gives a
// name. Errors are those of Connect; ErrNoReply where the server closed in
// place of its reply to the request, which some do that have no UDP.
func Associate(conn net.Conn, from netip.AddrPort, o Options) (relay netip.AddrPort, err error) {
	if !from.IsValid() {
		// Some servers want zeros of the family that they are reached by.
		from = netip.AddrPortFrom(netip.IPv4Unspecified(), 0)
		if a, ok := conn.RemoteAddr().(*net.TCPAddr); ok && a.AddrPort().Addr().Unmap().Is6() {
			from = netip.AddrPortFrom(netip.IPv6Unspecified(), 0)
		}
	}
	return ask(conn, commandAssociate, flow.Target{Addr: from.Addr(), Port: from.Port()}, o)
}

// ask makes the handshake and the request.
func ask(conn net.Conn, command byte, t flow.Target, o Options) (bound netip.AddrPort, err error) {
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
	msg := append(buf[:0], version5, 1, method)
	if o.Pipeline {
		if o.Auth != nil {
			msg = appendAuth(msg, o.Auth)
		}
		msg = appendRequest(msg, command, t)
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
		if _, err := conn.Write(appendRequest(buf[:0], command, t)); err != nil {
			return bound, err
		}
	}
	return readReply(conn, &buf, command == commandAssociate)
}
