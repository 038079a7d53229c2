package socks

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"strings"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

const (
	maxHeader = 16 << 10 // bytes of a proxy's header, all of its interim responses included
	chunk     = 512      // is looked at at once
)

// HTTPStatus is the status of a proxy's answer to CONNECT, if it is not 2xx (RFC
// 9110 section 15). It is an error by itself; 407 is also ErrAuth, and 401, which
// some proxies say of a wrong password.
type HTTPStatus int

// Error returns the status in words.
func (s HTTPStatus) Error() string {
	if text := http.StatusText(int(s)); text != "" {
		return fmt.Sprintf("socks: the proxy answers %d %s", int(s), text)
	}
	return fmt.Sprintf("socks: the proxy answers with status %d", int(s))
}

// Is tells errors.Is of ErrAuth.
func (s HTTPStatus) Is(target error) bool {
	return target == ErrAuth && (s == http.StatusProxyAuthRequired || s == http.StatusUnauthorized)
}

// ConnectHTTP asks the HTTP proxy on conn to connect to t (RFC 9110 section
// 9.3.6), with Basic authentication (RFC 7617) if a is not nil, and behind that,
// in the same write, sends the first bytes of the flow; nil: none.
//
// Of what the proxy sends it takes its header and not a byte more. If conn can
// Peek, as *relay.Conn can, that costs a few reads, else one for each byte.
//
// Errors are an HTTPStatus, ErrTooLong (of a name that no header may hold, too),
// a *ProtocolError, ErrNoReply or what conn returned.
func ConnectHTTP(conn net.Conn, t flow.Target, a *Auth, early []byte) error {
	host := t.Addr.Unmap().WithZone("").String()
	if t.Name != "" {
		if !fits(t.Name) || strings.ContainsFunc(t.Name, func(r rune) bool { return r <= ' ' || r >= 0x7f || strings.ContainsRune(`/?#@[]:\"<>`, r) }) {
			return ErrTooLong
		}
		host = t.Name
	}
	to := net.JoinHostPort(host, strconv.Itoa(int(t.Port)))
	msg := []byte("CONNECT " + to + " HTTP/1.1\r\nHost: " + to + "\r\n")
	if a != nil {
		if !fits(a.Username) || !fits(a.Password) || strings.Contains(a.Username, ":") {
			return ErrTooLong
		}
		msg = append(msg, "Proxy-Authorization: Basic "...)
		msg = base64.StdEncoding.AppendEncode(msg, []byte(a.Username+":"+a.Password))
		msg = append(msg, "\r\n"...)
	}
	if _, err := conn.Write(append(append(msg, "\r\n"...), early...)); err != nil {
		return err
	}
	left := maxHeader
	for {
		status, err := readStatusOf(conn, &left)
		switch {
		case err != nil:
			return err
		case status >= 200 && status <= 299:
			return nil
		case status < 100 || status > 199 || status == http.StatusSwitchingProtocols:
			return HTTPStatus(status)
		}
	}
}

// readStatusOf reads a header and returns its status. Left is how long it, and
// those after it, may be.
func readStatusOf(conn net.Conn, left *int) (status int, err error) {
	var header []byte
	for {
		n := len(header)
		if header, err = more(conn, header, *left); err != nil {
			return 0, endOf(err, n)
		}
		*left -= len(header) - n
		if headerEnd(header) >= 0 {
			break
		}
		if *left <= 0 {
			return 0, &ProtocolError{What: fmt.Sprintf("the proxy's header is longer than %d bytes", maxHeader)}
		}
		if !bytes.HasPrefix(header, []byte("HTTP/1.")[:min(len(header), 7)]) {
			return 0, &ProtocolError{"the server does not answer in HTTP/1", true} // garbage without an end is not waited for
		}
	}
	line, _, _ := bytes.Cut(header, []byte("\n"))
	words := strings.SplitN(strings.TrimSuffix(string(line), "\r"), " ", 3)
	if len(words) < 2 || words[0] != "HTTP/1.1" && words[0] != "HTTP/1.0" {
		return 0, &ProtocolError{"the server does not answer in HTTP/1", true}
	}
	if status, err = strconv.Atoi(words[1]); err != nil || len(words[1]) != 3 || status < 100 {
		return 0, &ProtocolError{What: fmt.Sprintf("the proxy's status is %.8q", words[1])}
	}
	return status, nil
}

// headerEnd returns the length of a header with the empty line that ends it, -1
// if there is none yet. A line may end without a carriage return (RFC 9112
// section 2.2).
func headerEnd(b []byte) int {
	for i := 0; ; i++ {
		n := bytes.IndexByte(b[i:], '\n')
		if n < 0 {
			return -1
		}
		i += n
		switch rest := b[i+1:]; {
		case bytes.HasPrefix(rest, []byte("\n")):
			return i + 2
		case bytes.HasPrefix(rest, []byte("\r\n")):
			return i + 3
		}
	}
}

// peeker is a connection that can be looked into: Peek is Read that leaves the
// bytes where they are.
type peeker interface{ Peek(b []byte) (int, error) }

// more reads more of a header, to its end at most.
func more(conn net.Conn, header []byte, most int) ([]byte, error) {
	n := 1
	if p, ok := conn.(peeker); ok {
		var b [chunk]byte
		seen, err := p.Peek(b[:min(most, chunk)])
		if err != nil {
			return header, err
		}
		if seen == 0 {
			return header, io.EOF
		}
		n = seen
		if end := headerEnd(append(header[:len(header):len(header)], b[:seen]...)); end >= 0 {
			n = end - len(header)
		}
	}
	header = append(header, make([]byte, n)...)
	_, err := io.ReadFull(conn, header[len(header)-n:])
	return header, err
}
