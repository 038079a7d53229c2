package socks

import (
	"errors"
	"fmt"
	"io"
	"net/netip"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

// scratch holds all messages of a handshake at once, as Pipeline sends them.
type scratch = [maxGreeting + maxAuth + maxRequest]byte

func fits(s string) bool { return len(s) >= 1 && len(s) <= 255 }

// appendAuth appends the user name and password (RFC 1929 section 2).
func appendAuth(b []byte, a *Auth) []byte {
	b = append(b, versionAuth, byte(len(a.Username)))
	b = append(b, a.Username...)
	b = append(b, byte(len(a.Password)))
	return append(b, a.Password...)
}

// appendRequest appends a request (RFC 1928 section 4).
func appendRequest(b []byte, command byte, t flow.Target) []byte {
	return appendTarget(append(b, version5, command, 0), t)
}

// appendTarget appends an address type, an address and a port (RFC 1928 section
// 5).
func appendTarget(b []byte, t flow.Target) []byte {
	switch a := t.Addr.Unmap(); {
	case t.Name != "":
		b = append(b, addrDomain, byte(len(t.Name)))
		b = append(b, t.Name...)
	case a.Is4():
		b = append(b, addrIPv4)
		b = append(b, a.AsSlice()...)
	default:
		b = append(b, addrIPv6)
		b = append(b, a.AsSlice()...)
	}
	return append(b, byte(t.Port>>8), byte(t.Port))
}

// readMethod reads the server's choice (RFC 1928 section 3), which must be
// the one that was offered.
func readMethod(r io.Reader, offered byte, buf *scratch) error {
	b := buf[:2]
	if err := readFull(r, b); err != nil {
		return err
	}
	switch {
	case b[0] != version5:
		return otherVersion(b[0])
	case b[1] == methodNoneFits:
		return ErrNoAcceptableMethod
	case b[1] != offered:
		return &ProtocolError{What: fmt.Sprintf("the server picks method %d, which was not offered", b[1])}
	}
	return nil
}

func otherVersion(v byte) error {
	what := fmt.Sprintf("the server answers with version %d", v)
	if v == 'H' {
		what += ": it speaks HTTP"
	}
	return &ProtocolError{what, true}
}

// readStatus reads the answer to a user name and password. Some servers (early
// versions of microsocks) put the version of SOCKS where RFC 1929 has its own.
func readStatus(r io.Reader, buf *scratch) error {
	b := buf[:2]
	if err := readFull(r, b); err != nil {
		return err
	}
	switch {
	case b[0] != versionAuth && b[0] != version5:
		return &ProtocolError{What: fmt.Sprintf("authentication is answered with version %d", b[0])}
	case b[1] != 0:
		return ErrAuth
	}
	return nil
}

// readReply reads the answer to a request (RFC 1928 section 6) and not a byte
// more, unless it is the last that the server says. The shortest one has 7
// bytes (an empty name), so that many can be asked for at once.
func readReply(r io.Reader, buf *scratch, last bool) (bound netip.AddrPort, err error) {
	head := 7
	b := buf[:head]
	if last {
		b = buf[:]
	}
	if n, err := io.ReadAtLeast(r, b, head); err != nil {
		return bound, endOf(err, n)
	} else {
		head = n
	}
	if b[0] != version5 {
		return bound, &ProtocolError{What: fmt.Sprintf("the reply has version %d", b[0])}
	}
	size := 0
	switch b[3] {
	case addrIPv4:
		size = 4 + 4 + 2
	case addrIPv6:
		size = 4 + 16 + 2
	case addrDomain:
		size = 4 + 1 + int(b[4]) + 2
	default:
		if b[1] != 0 {
			return bound, Reply(b[1]) // of no use to read on; the reply is clear
		}
		return bound, &ProtocolError{What: fmt.Sprintf("the reply has address type %d", b[3])}
	}
	if err := readFull(r, buf[min(head, size):size]); err != nil {
		return bound, err
	}
	if b[1] != 0 {
		return bound, Reply(b[1])
	}
	port := uint16(buf[size-2])<<8 | uint16(buf[size-1])
	var addr netip.Addr
	if b[3] != addrDomain {
		addr, _ = netip.AddrFromSlice(buf[4 : size-2])
	}
	return netip.AddrPortFrom(addr, port), nil
}

// readFull is io.ReadFull for which an end is always unexpected.
func readFull(r io.Reader, b []byte) error {
	_, err := io.ReadFull(r, b)
	return unexpected(err)
}

// endOf is unexpected for a reply of which n bytes have come.
func endOf(err error, n int) error {
	if n == 0 && errors.Is(err, io.EOF) {
		return ErrNoReply
	}
	return unexpected(err)
}

func unexpected(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
