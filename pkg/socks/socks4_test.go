package socks

import (
	"encoding/hex"
	"errors"
	"io"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

func TestConnect4(t *testing.T) {
	tests := []struct {
		name   string
		target flow.Target
		user   string
		early  string
		want   string // bytes of the request
	}{
		{"IPv4", ipv4, "", "", "04 01 0050 c0000201 00"},
		{"IPv4 in IPv6, user", mapped, "alice", "", "04 01 0050 c0000201 616c69636500"},
		{"name", name, "", "", "04 01 01bb 00000001 00 6578616d706c652e6f726700"},
		{"name, user, early", name, "al", "GET", "04 01 01bb 00000001 616c00 6578616d706c652e6f726700 474554"},
	}
	for _, tt := range tests {
		for segment, how := range []string{"at once", "byte by byte"} {
			conn := &script{segment: segment, server: append(unhex(t, "00 5a 1f90 c6336407"), "220 the flow"...)}
			bound, err := Connect4(conn, tt.target, tt.user, []byte(tt.early))
			if err != nil || bound.String() != "198.51.100.7:8080" {
				t.Errorf("%s, %s: %v, %v", tt.name, how, bound, err)
			}
			if d := cmp.Diff("> "+strings.ReplaceAll(tt.want, " ", ""), conn.trace[0]); d != "" || string(conn.server) != "220 the flow" {
				t.Errorf("%s, %s: %s left %q", tt.name, how, d, conn.server)
			}
		}
	}
}

func TestConnect4Refused(t *testing.T) {
	for _, tt := range []struct {
		target flow.Target
		user   string
		server string
		want   error
	}{
		{ipv4, "", "00 5b 0000 00000000", Rejected4},
		{ipv4, "", "04 5c 0000 00000000", NoIdentd4},
		{ipv4, "", "00 5d 0000 00000000", OtherIdentd4},
		{ipv4, "", "00 00 0000 00000000", Reply4(0)},
		{ipv4, "", "05 ff 0000 00000000", ErrVersion},
		{ipv4, "", "48 54 54 50 2f 31 2e 31", ErrVersion},
		{ipv4, "", "", ErrNoReply},
		{ipv4, "", "00 5a 00", io.ErrUnexpectedEOF},
		{ipv6, "", "00 5a 0000 00000000", ErrNoIPv6},
		{ipv4, "a\x00b", "", ErrTooLong},
		{ipv4, strings.Repeat("x", 256), "", ErrTooLong},
		{flow.Target{Name: "a\x00b", Port: 1}, "", "", ErrTooLong},
		{flow.Target{Name: strings.Repeat("x", 256), Port: 1}, "", "", ErrTooLong},
	} {
		conn := &script{server: unhex(t, tt.server)}
		if _, err := Connect4(conn, tt.target, tt.user, nil); !errors.Is(err, tt.want) {
			t.Errorf("%v %q: %v, want %v", tt.target, tt.server, err, tt.want)
		}
		if local := errors.Is(tt.want, ErrTooLong) || errors.Is(tt.want, ErrNoIPv6); local && len(conn.trace) > 0 {
			t.Errorf("%v: %v was sent", tt.want, conn.trace)
		}
	}
}

// TestBind reads both replies, and no more.
func TestBind(t *testing.T) {
	conn := &script{server: append(unhex(t, "05 00 00 01 c6336407 1f90 05 00 00 01 c0000201 0050"), "220 the flow"...)}
	bound, err := Bind(conn, ipv4)
	if err != nil || bound.String() != "198.51.100.7:8080" || conn.trace[0] != "> "+hex.EncodeToString(unhex(t, "05 02 00 01 c0000201 0050")) {
		t.Errorf("%v, %v, %v", bound, err, conn.trace)
	}
	if peer, err := AcceptBind(conn); err != nil || peer.String() != "192.0.2.1:80" || string(conn.server) != "220 the flow" {
		t.Errorf("%v, %v, left %q", peer, err, conn.server)
	}
	conn = &script{server: unhex(t, "05 00 00 01 c6336407 1f90 05 02 00 01 00000000 0000")}
	Bind(conn, ipv4)
	if _, err := AcceptBind(conn); err != NotAllowed {
		t.Errorf("somebody else came: %v", err)
	}
	conn = &script{server: append(unhex(t, "00 5a 1f90 00000000 00 5a 0050 c0000201"), "220 the flow"...)}
	bound, err = Bind4(conn, ipv4, "al")
	if err != nil || bound.String() != "0.0.0.0:8080" || conn.trace[0] != "> "+hex.EncodeToString(unhex(t, "04 02 0050 c0000201 616c00")) {
		t.Errorf("%v, %v, %v", bound, err, conn.trace)
	}
	if peer, err := AcceptBind4(conn); err != nil || peer.String() != "192.0.2.1:80" || string(conn.server) != "220 the flow" {
		t.Errorf("%v, %v, left %q", peer, err, conn.server)
	}
}

// FuzzReplies reads what a server says in place of each reply: it ends, and takes
// no byte behind it.
func FuzzReplies(f *testing.F) {
	for _, s := range []string{"0500", "0502 0100", "05000001c0000201005068656c6c6f", "050000030361616100506869", "005a0050c00002016869", "05ff", "00"} {
		f.Add(unhex(f, s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		longest := map[string]int{"greeting": 2, "methods": 2, "greeting with authentication": 4, "reply": 4 + 1 + 255 + 2, "SOCKS4": 8}
		for what, read := range map[string]func(*script) error{
			"greeting":                     func(c *script) error { return ReadGreeting(c, nil) },
			"greeting with authentication": func(c *script) error { return ReadGreeting(c, alice) },
			"methods":                      func(c *script) error { _, err := AskMethod(c); return err },
			"reply":                        func(c *script) error { _, err := ReadReply(c); return err },
			"SOCKS4":                       func(c *script) error { _, err := readReply4(c); return err },
		} {
			var left []string
			for _, segment := range []int{0, 1, 3} {
				conn := &script{server: append([]byte(nil), b...), segment: segment}
				err := read(conn)
				if n := len(b) - len(conn.server); n > longest[what] {
					t.Fatalf("%s: %d bytes were read", what, n)
				}
				left = append(left, string(conn.server))
				if err == nil && left[0] != string(conn.server) {
					t.Fatalf("%s: how much is read depends on the segments", what)
				}
			}
		}
	})
}
