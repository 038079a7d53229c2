package socks

import (
	"encoding/hex"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

// peeking is a script that can be looked into.
type peeking struct{ *script }

func (p peeking) Peek(b []byte) (int, error) {
	if len(p.server) == 0 {
		return 0, io.EOF
	}
	if p.segment > 0 && len(b) > p.segment {
		b = b[:p.segment]
	}
	return copy(b, p.server), nil
}

// connectHTTP asks a server that says something, in each way to read it, and
// returns what was sent, what is left and the error.
func connectHTTP(t testing.TB, server string, to flow.Target, a *Auth, early string) (sent, left string, err error) {
	t.Helper()
	for i, segment := range []int{0, 1, 7, 0, 1, 7} {
		conn := &script{server: []byte(server), segment: segment}
		var e error
		if i < 3 {
			e = ConnectHTTP(conn, to, a, []byte(early))
		} else {
			e = ConnectHTTP(peeking{conn}, to, a, []byte(early))
		}
		if i > 0 && (e == nil) != (err == nil) {
			t.Fatalf("%.200q: %v or %v, by how it is read", server, err, e)
		}
		if i > 0 && e == nil && left != string(conn.server) {
			t.Fatalf("%.200q: %q or %q is left", server, left, conn.server)
		}
		left, err = string(conn.server), e
		if len(conn.trace) > 0 {
			b, _ := hex.DecodeString(conn.trace[0][2:])
			sent = string(b)
		}
	}
	return sent, left, err
}

func TestConnectHTTP(t *testing.T) {
	for _, tt := range []struct {
		target flow.Target
		auth   *Auth
		early  string
		want   string
	}{
		{name, nil, "", "CONNECT example.org:443 HTTP/1.1\r\nHost: example.org:443\r\n\r\n"},
		{mapped, nil, "GET /", "CONNECT 192.0.2.1:80 HTTP/1.1\r\nHost: 192.0.2.1:80\r\n\r\nGET /"},
		{ipv6, alice, "", "CONNECT [2001:db8::1]:65535 HTTP/1.1\r\nHost: [2001:db8::1]:65535\r\nProxy-Authorization: Basic YWxpY2U6aHVudGVyMg==\r\n\r\n"},
	} {
		for _, answer := range []string{
			"HTTP/1.1 200 Connection established\r\n\r\n",
			"HTTP/1.0 200 OK\r\nProxy-agent: tinyproxy/1.11.1\r\n\r\n",
			"HTTP/1.1 204\r\nX: \r\n\r\n",
			"HTTP/1.1 200 OK\nA: b\n\n",
			"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 102 Processing\r\nA: b\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
		} {
			sent, left, err := connectHTTP(t, answer+"\r\n220 the flow", tt.target, tt.auth, tt.early)
			if err != nil || sent != tt.want || left != "\r\n220 the flow" {
				t.Errorf("%q: %v\nsent %q\nleft %q", answer, err, sent, left)
			}
		}
	}
}

func TestConnectHTTPRefused(t *testing.T) {
	protocol := errors.New("a *ProtocolError")
	for answer, want := range map[string]error{
		"HTTP/1.1 403 Forbidden\r\n\r\n":            HTTPStatus(403),
		"HTTP/1.1 407 Who are you\r\nA: b\r\n\r\n":  ErrAuth,
		"HTTP/1.0 502 Bad\r\n\r\n":                  HTTPStatus(502),
		"HTTP/1.1 301 Moved\r\nLocation: /\r\n\r\n": HTTPStatus(301),
		"HTTP/1.1 101 Switching\r\n\r\n":            HTTPStatus(101),
		"":                                          ErrNoReply,
		"HTTP/1.1 200 OK\r\n":                       io.ErrUnexpectedEOF,
		"HTTP/1.1 200 OK\r\n" + strings.Repeat("A: b\r\n", 4000): protocol,
		strings.Repeat("HTTP/1.1 100 Continue\r\n\r\n", 1000):    protocol,
		"HTTP/2 200\r\n\r\n":       ErrVersion,
		"\x05\x00":                 ErrVersion,
		"SSH-2.0-OpenSSH\r\n":      ErrVersion,
		"HTTP/1.2 200 OK\r\n\r\n":  ErrVersion,
		"HTTP/1.1 2000 OK\r\n\r\n": protocol,
		"HTTP/1.1 -20 OK\r\n\r\n":  protocol,
		"HTTP/1.1 099 OK\r\n\r\n":  protocol,
		"HTTP/1.1\r\n\r\n":         ErrVersion,
	} {
		_, _, err := connectHTTP(t, answer, name, alice, "")
		var p *ProtocolError
		if want == protocol && !errors.As(err, &p) || want != protocol && !errors.Is(err, want) {
			t.Errorf("%.60q: %v, want %v", answer, err, want)
		}
		if err != nil && strings.Contains(err.Error(), "hunter2") {
			t.Errorf("a secret: %v", err)
		}
	}
	for _, bad := range []flow.Target{
		{Name: "a\r\nX: y", Port: 1}, {Name: "a b", Port: 1}, {Name: "a/b", Port: 1}, {Name: "a:1", Port: 1}, {Name: "u@a", Port: 1},
		{Name: "ä", Port: 1}, {Name: "a\x00", Port: 1}, {Name: strings.Repeat("a", 256), Port: 1},
	} {
		if sent, _, err := connectHTTP(t, "HTTP/1.1 200 OK\r\n\r\n", bad, nil, ""); !errors.Is(err, ErrTooLong) || sent != "" {
			t.Errorf("%q: %v, sent %q", bad.Name, err, sent)
		}
	}
	if sent, _, err := connectHTTP(t, "", name, &Auth{Username: "a:b", Password: "c"}, ""); !errors.Is(err, ErrTooLong) || sent != "" {
		t.Errorf("a user name with a colon: %v, sent %q", err, sent)
	}
}

// FuzzHTTP reads what a proxy says, in each way to read it: it ends, the ways
// agree, and what is behind the header is left.
func FuzzHTTP(f *testing.F) {
	for _, s := range []string{"HTTP/1.1 200 OK\r\n\r\nhello", "HTTP/1.1 100 C\n\nHTTP/1.0 407 \r\nA: b\r\n\r\n", "HTTP/1.1 200\n\r\n", "HTTP/1.", "\x05\x00"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, server string) {
		_, left, err := connectHTTP(t, server, name, alice, "early")
		if !strings.HasSuffix(server, left) || len(server)-len(left) > maxHeader {
			t.Errorf("%q is left of %q", left, server)
		}
		if head := strings.TrimSuffix(server, left); err == nil && !strings.HasSuffix(head, "\n\n") && !strings.HasSuffix(head, "\n\r\n") {
			t.Errorf("the header is %q", head)
		}
	})
}
