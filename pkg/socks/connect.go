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
	return ask(conn, commandAssociate, origin(conn, from), o)
}

// origin is where datagrams come from as the server is told it.
func origin(conn net.Conn, from netip.AddrPort) flow.Target {
	if !from.IsValid() {
		// Some servers want zeros of the family that they are reached by.
		from = netip.AddrPortFrom(netip.IPv4Unspecified(), 0)
		if a, ok := conn.RemoteAddr().(*net.TCPAddr); ok && a.AddrPort().Addr().Unmap().Is6() {
			from = netip.AddrPortFrom(netip.IPv6Unspecified(), 0)
		}
	}
	return flow.Target{Addr: from.Addr(), Port: from.Port()}
}

// ask makes the handshake and the request.
func ask(conn net.Conn, command byte, t flow.Target, o Options) (bound netip.AddrPort, err error) {
	var buf scratch
	last := command == commandAssociate
	if o.Pipeline {
		if err := sendPipelined(conn, command, t, o.Auth, nil, &buf); err != nil {
			return bound, err
		}
		if err := readGreeting(conn, o.Auth, &buf); err != nil {
			return bound, err
		}
		return readReply(conn, &buf, last)
	}
	if err := greet(conn, o.Auth, &buf); err != nil {
		return bound, err
	}
	if _, err := conn.Write(appendRequest(buf[:0], command, t)); err != nil {
		return bound, err
	}
	return readReply(conn, &buf, last)
}

// Greet negotiates the method and authenticates (RFC 1928 section 3, RFC 1929);
// a is nil for no authentication. It is the part of a handshake that names no
// destination, so it can be done ahead of need. Errors are those of Connect;
// ErrVersion if the server speaks another version.
func Greet(conn net.Conn, a *Auth) error {
	var buf scratch
	return greet(conn, a, &buf)
}

func greet(conn net.Conn, a *Auth, buf *scratch) error {
	method, err := method(a)
	if err != nil {
		return err
	}
	if _, err := conn.Write(append(buf[:0], version5, 1, method)); err != nil {
		return err
	}
	if err := readMethod(conn, method, buf); err != nil || a == nil {
		return err
	}
	if _, err := conn.Write(appendAuth(buf[:0], a)); err != nil {
		return err
	}
	return readStatus(conn, buf)
}

// method returns the one that is offered. It is only one: a server that is
// offered both may pick none and then refuse by rule.
func method(a *Auth) (byte, error) {
	switch {
	case a == nil:
		return methodNone, nil
	case !fits(a.Username) || !fits(a.Password):
		return 0, ErrTooLong
	}
	return methodUserPass, nil
}

// AskMethod offers every method of RFC 1928 and returns in words which one the
// server picks: "none", "user name and password" or "GSSAPI". The connection is
// of no use after that. Errors are those of Greet.
func AskMethod(conn net.Conn) (string, error) {
	var buf scratch
	offer := []byte{methodNone, methodGSSAPI, methodUserPass}
	if _, err := conn.Write(append([]byte{version5, byte(len(offer))}, offer...)); err != nil {
		return "", err
	}
	b := buf[:2]
	switch err := readFull(conn, b); {
	case err != nil:
		return "", err
	case b[0] != version5:
		return "", otherVersion(b[0])
	}
	switch b[1] {
	case methodNone:
		return "none", nil
	case methodGSSAPI:
		return "GSSAPI", nil
	case methodUserPass:
		return "user name and password", nil
	}
	return "", ErrNoAcceptableMethod
}

// SendAsk sends a CONNECT request on a greeted connection, and behind it, in the
// same write, the first bytes of the flow; nil: none. ReadReply is next, and
// until then more of the flow may be written if the server takes such.
func SendAsk(conn net.Conn, t flow.Target, early []byte) error {
	if t.Name != "" && !fits(t.Name) {
		return ErrTooLong
	}
	var buf scratch
	_, err := conn.Write(append(appendRequest(buf[:0], commandConnect, t), early...))
	return err
}

// SendPipelined sends greeting, authentication and a CONNECT request, and behind
// them the first bytes of the flow, in one write. ReadGreeting and ReadReply are
// next.
func SendPipelined(conn net.Conn, t flow.Target, a *Auth, early []byte) error {
	if t.Name != "" && !fits(t.Name) {
		return ErrTooLong
	}
	var buf scratch
	return sendPipelined(conn, commandConnect, t, a, early, &buf)
}

func sendPipelined(conn net.Conn, command byte, t flow.Target, a *Auth, early []byte, buf *scratch) error {
	method, err := method(a)
	if err != nil {
		return err
	}
	msg := append(buf[:0], version5, 1, method)
	if a != nil {
		msg = appendAuth(msg, a)
	}
	msg = appendRequest(msg, command, t)
	_, err = conn.Write(append(msg, early...))
	return err
}

// ReadGreeting reads what Greet reads, after SendPipelined.
func ReadGreeting(conn net.Conn, a *Auth) error {
	var buf scratch
	return readGreeting(conn, a, &buf)
}

func readGreeting(conn net.Conn, a *Auth, buf *scratch) error {
	method, err := method(a)
	if err != nil {
		return err
	}
	if err := readMethod(conn, method, buf); err != nil || a == nil {
		return err
	}
	return readStatus(conn, buf)
}

// ReadReply reads the reply to a request; what it returns is as of Connect.
func ReadReply(conn net.Conn) (bound netip.AddrPort, err error) {
	var buf scratch
	return readReply(conn, &buf, false)
}

// AssociateGreeted is Associate on a greeted connection.
func AssociateGreeted(conn net.Conn, from netip.AddrPort) (relay netip.AddrPort, err error) {
	var buf scratch
	if _, err := conn.Write(appendRequest(buf[:0], commandAssociate, origin(conn, from))); err != nil {
		return relay, err
	}
	return readReply(conn, &buf, true)
}

// Bind asks for a connection from outside (RFC 1928 section 4, BIND) on a greeted
// connection. From is who is expected; a server that takes anybody is told so by
// an unspecified address. It returns where the server listens: an unspecified
// address is the server's own. AcceptBind is next.
func Bind(conn net.Conn, from flow.Target) (bound netip.AddrPort, err error) {
	if from.Name != "" && !fits(from.Name) {
		return bound, ErrTooLong
	}
	var buf scratch
	if _, err := conn.Write(appendRequest(buf[:0], commandBind, from)); err != nil {
		return bound, err
	}
	return readReply(conn, &buf, false)
}

// AcceptBind waits for the second reply to Bind and returns who has connected;
// the bytes of that connection follow. RFC 1928 sets no time limit.
func AcceptBind(conn net.Conn) (peer netip.AddrPort, err error) {
	var buf scratch
	return readReply(conn, &buf, false)
}
