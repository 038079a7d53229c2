// Package socks is the client side of SOCKS5 (RFC 1928, RFC 1929), SOCKS4, SOCKS4A
// and HTTP CONNECT (RFC 9110 section 9.3.6) on a given connection, and the header
// that datagrams have. As each is a function on a net.Conn, a chain of servers is
// one after the other on the same connection.
//
// It promises to write each message with one write, since some servers take
// one read for one message; to read a reply exactly, so that the first byte of
// the flow stays in the socket; and to tell what went wrong by type: the
// server's reply, its refusal of the client, or bytes that are no SOCKS.
//
// Deadlines are the caller's: it sets them on the connection.
package socks

import (
	"errors"
	"fmt"
	"io"
)

// Reply is the REP field of a server's reply (RFC 1928 section 6). It is an
// error by itself.
type Reply uint8

// The replies that RFC 1928 assigns; 0 is success and never returned.
const (
	GeneralFailure Reply = iota + 1
	NotAllowed
	NetworkUnreachable
	HostUnreachable
	ConnectionRefused
	TTLExpired
	CommandNotSupported
	AddrTypeNotSupported
)

// Error returns the reply in words.
func (r Reply) Error() string {
	words := [...]string{
		GeneralFailure:       "general SOCKS server failure",
		NotAllowed:           "connection not allowed by ruleset",
		NetworkUnreachable:   "network unreachable",
		HostUnreachable:      "host unreachable",
		ConnectionRefused:    "connection refused by the destination",
		TTLExpired:           "TTL expired",
		CommandNotSupported:  "command not supported",
		AddrTypeNotSupported: "address type not supported",
	}
	if int(r) < len(words) && words[r] != "" {
		return "socks: " + words[r]
	}
	return fmt.Sprintf("socks: reply %d, which RFC 1928 does not assign", uint8(r))
}

// Errors of a server that does not serve this client.
var (
	ErrNoAcceptableMethod = errors.New("socks: the server accepts none of the offered authentication methods")
	ErrAuth               = errors.New("socks: the server refuses the user name or password")
	ErrTooLong            = errors.New("socks: a name, user name or password is longer than 255 bytes or empty, or has a byte that the protocol cannot carry")
	ErrNoIPv6             = errors.New("socks: SOCKS4 cannot carry IPv6")
	ErrVersion            = errors.New("socks: the server speaks another version") // of a *ProtocolError, by errors.Is
)

// ErrNoReply says that the server closed where its reply to the request should
// have begun. It is io.ErrUnexpectedEOF to errors.Is.
var ErrNoReply error = noReply{}

type noReply struct{}

func (noReply) Error() string { return "socks: the server closes in place of a reply" }
func (noReply) Unwrap() error { return io.ErrUnexpectedEOF }

// ProtocolError says that the server's bytes are not of the protocol.
type ProtocolError struct {
	What    string
	Version bool // they are of another version, or none: ErrVersion
}

// Error returns what was wrong.
func (e *ProtocolError) Error() string { return "socks: " + e.What }

// Is tells errors.Is of ErrVersion.
func (e *ProtocolError) Is(target error) bool { return target == ErrVersion && e.Version }

// Auth is a user name and a password (RFC 1929), each 1 to 255 bytes. Neither
// fmt, nor JSON, nor log/slog shows it.
type Auth struct{ Username, Password string }

const hidden = "socks.Auth(hidden)"

// Format hides the credential from every verb, %d included.
func (Auth) Format(s fmt.State, _ rune) { fmt.Fprint(s, hidden) }

// MarshalText hides the credential from encoders; slog's handlers are among
// them.
func (Auth) MarshalText() ([]byte, error) { return []byte(hidden), nil }

const (
	version5         = 5
	versionAuth      = 1 // RFC 1929: of the sub-negotiation
	methodNone       = 0
	methodGSSAPI     = 1
	methodUserPass   = 2
	methodNoneFits   = 0xff
	commandConnect   = 1
	commandBind      = 2
	commandAssociate = 3
	addrIPv4         = 1
	addrDomain       = 3
	addrIPv6         = 4
	maxGreeting      = 3         // one method is offered
	maxAuth          = 3 + 2*255 // version, two strings with their lengths
	maxRequest       = 7 + 255   // four bytes, a name with its length, a port
)
