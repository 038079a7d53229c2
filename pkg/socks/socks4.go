package socks

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

// Reply4 is the CD field of a SOCKS4 server's reply. It is an error by itself.
type Reply4 uint8

// The replies of SOCKS4; 90 is success and never returned.
const (
	Rejected4    Reply4 = 91 // or failed: the protocol gives no reason
	NoIdentd4    Reply4 = 92 // the server could not ask this host's identd
	OtherIdentd4 Reply4 = 93 // which named another user
)

const (
	version4    = 4
	granted4    = 90
	markOf4A    = 1 // the address 0.0.0.1 says that a name follows
	maxUser4    = 255
	maxRequest4 = 8 + maxUser4 + 1 + 255 + 1 // the name by custom
)

// Error returns the reply in words.
func (r Reply4) Error() string {
	switch r {
	case Rejected4:
		return "socks: request rejected or failed"
	case NoIdentd4:
		return "socks: request rejected: the server cannot reach identd on this host"
	case OtherIdentd4:
		return "socks: request rejected: identd names another user"
	}
	return fmt.Sprintf("socks: reply %d, which SOCKS4 does not have", uint8(r))
}

// Connect4 asks the SOCKS4 server on conn to connect to t, and behind that, in
// the same write, sends the first bytes of the flow; nil: none. A target with a
// name is sent in the form of SOCKS4A. User is sent as USERID and may be empty.
//
// Errors are a Reply4, ErrNoIPv6, ErrTooLong, a *ProtocolError, ErrNoReply or
// what conn returned.
func Connect4(conn net.Conn, t flow.Target, user string, early []byte) (bound netip.AddrPort, err error) {
	return ask4(conn, commandConnect, t, user, early)
}

// Bind4 asks for a connection from outside, of t, as Bind does. AcceptBind4 is
// next.
func Bind4(conn net.Conn, t flow.Target, user string) (bound netip.AddrPort, err error) {
	return ask4(conn, commandBind, t, user, nil)
}

// AcceptBind4 waits for the second reply to Bind4 and returns who has connected;
// the bytes of that connection follow.
func AcceptBind4(conn net.Conn) (peer netip.AddrPort, err error) { return readReply4(conn) }

func ask4(conn net.Conn, command byte, t flow.Target, user string, early []byte) (bound netip.AddrPort, err error) {
	addr := t.Addr.Unmap()
	switch {
	case len(user) > maxUser4 || strings.IndexByte(user, 0) >= 0, t.Name != "" && (!fits(t.Name) || strings.IndexByte(t.Name, 0) >= 0):
		return bound, ErrTooLong
	case t.Name == "" && !addr.Is4():
		return bound, ErrNoIPv6
	}
	var buf [maxRequest4]byte
	msg := append(buf[:0], version4, command, byte(t.Port>>8), byte(t.Port))
	if t.Name != "" {
		msg = append(msg, 0, 0, 0, markOf4A)
	} else {
		msg = append(msg, addr.AsSlice()...)
	}
	msg = append(append(msg, user...), 0)
	if t.Name != "" {
		msg = append(append(msg, t.Name...), 0)
	}
	if _, err := conn.Write(append(msg, early...)); err != nil {
		return bound, err
	}
	return readReply4(conn)
}

// readReply4 reads a reply and not a byte more.
func readReply4(conn net.Conn) (bound netip.AddrPort, err error) {
	var b [8]byte
	if n, err := io.ReadFull(conn, b[:]); err != nil {
		return bound, endOf(err, n)
	}
	if b[0] != 0 && b[0] != version4 /* of some servers */ {
		return bound, &ProtocolError{fmt.Sprintf("the reply has version %d, which is not that of SOCKS4", b[0]), true}
	}
	if b[1] != granted4 {
		return bound, Reply4(b[1])
	}
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), uint16(b[2])<<8|uint16(b[3])), nil
}
