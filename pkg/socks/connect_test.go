package socks

import (
	"encoding/hex"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

// script is a connection whose server has said everything from the start. It
// keeps what passed over it: "> bytes" for each write, "< bytes" for the reads
// between two of them.
type script struct {
	net.Conn
	server   []byte // what the client has not read yet
	segment  int    // the most that one Read returns; 0: everything asked for
	end      error  // after the server's last byte; nil: io.EOF
	writeErr error
	trace    []string
}

func (s *script) Read(b []byte) (int, error) {
	if len(s.server) == 0 {
		if s.end != nil {
			return 0, s.end
		}
		return 0, io.EOF
	}
	if s.segment > 0 && len(b) > s.segment {
		b = b[:s.segment]
	}
	n := copy(b, s.server)
	s.server = s.server[n:]
	if last := len(s.trace) - 1; last >= 0 && s.trace[last][0] == '<' {
		s.trace[last] += hex.EncodeToString(b[:n])
	} else {
		s.trace = append(s.trace, "< "+hex.EncodeToString(b[:n]))
	}
	return n, nil
}

func (s *script) Write(b []byte) (int, error) {
	if s.writeErr != nil {
		return 0, s.writeErr
	}
	s.trace = append(s.trace, "> "+hex.EncodeToString(b))
	return len(b), nil
}

// unhex reads bytes as the tables write them: hexadecimal, blanks anywhere.
func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(strings.ReplaceAll(s, " ", ""))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

var (
	name   = flow.Target{Name: "example.org", Port: 443}
	ipv4   = flow.Target{Addr: netip.MustParseAddr("192.0.2.1"), Port: 80}
	mapped = flow.Target{Addr: netip.MustParseAddr("::ffff:192.0.2.1"), Port: 80}
	ipv6   = flow.Target{Addr: netip.MustParseAddr("2001:db8::1"), Port: 65535}
	alice  = &Auth{Username: "alice", Password: "hunter2"}
)

const (
	authBytes  = "> 01 05 616c696365 07 68756e74657232"
	nameBytes  = "05 01 00 03 0b 6578616d706c652e6f7267 01bb"
	ipv4Bytes  = "05 01 00 01 c0000201 0050"
	ipv6Bytes  = "05 01 00 04 20010db8000000000000000000000001 ffff"
	boundBytes = "< 05 00 00 01 00000000 0000"
)

func TestConnect(t *testing.T) {
	none := netip.MustParseAddrPort("0.0.0.0:0")
	tests := []struct {
		name   string
		target flow.Target
		opt    Options
		want   []string
		bound  netip.AddrPort
	}{
		{"name", name, Options{}, []string{"> 05 01 00", "< 05 00", "> " + nameBytes, boundBytes}, none},
		{"IPv4", ipv4, Options{}, []string{"> 05 01 00", "< 05 00", "> " + ipv4Bytes, boundBytes}, none},
		{"IPv4 in IPv6", mapped, Options{}, []string{"> 05 01 00", "< 05 00", "> " + ipv4Bytes, boundBytes}, none},
		{"IPv6", ipv6, Options{}, []string{"> 05 01 00", "< 05 00", "> " + ipv6Bytes, boundBytes}, none},
		{"name, auth", name, Options{Auth: alice}, []string{"> 05 01 02", "< 05 02", authBytes, "< 01 00", "> " + nameBytes, boundBytes}, none},
		{"IPv4, auth", ipv4, Options{Auth: alice}, []string{"> 05 01 02", "< 05 02", authBytes, "< 01 00", "> " + ipv4Bytes, boundBytes}, none},
		{"IPv6, auth", ipv6, Options{Auth: alice}, []string{"> 05 01 02", "< 05 02", authBytes, "< 01 00", "> " + ipv6Bytes, boundBytes}, none},
		{"pipeline", name, Options{Pipeline: true}, []string{"> 05 01 00" + nameBytes, "< 05 00" + boundBytes[2:]}, none},
		{"pipeline, auth", name, Options{Pipeline: true, Auth: alice}, []string{"> 05 01 02" + authBytes[2:] + nameBytes, "< 05 02 01 00" + boundBytes[2:]}, none},
		{
			"auth answered with version 5", name, Options{Auth: alice},
			[]string{"> 05 01 02", "< 05 02", authBytes, "< 05 00", "> " + nameBytes, boundBytes}, none,
		},
		{
			"bound to IPv4", name, Options{}, []string{"> 05 01 00", "< 05 00", "> " + nameBytes, "< 05 00 00 01 c6336407 1f90"},
			netip.MustParseAddrPort("198.51.100.7:8080"),
		},
		{
			"bound to IPv6", name, Options{},
			[]string{"> 05 01 00", "< 05 00", "> " + nameBytes, "< 05 00 00 04 20010db8000000000000000000000002 1f90"},
			netip.MustParseAddrPort("[2001:db8::2]:8080"),
		},
		{
			"bound to a name", name, Options{},
			[]string{"> 05 01 00", "< 05 00", "> " + nameBytes, "< 05 00 00 03 03 666f6f 1f90"}, netip.AddrPort{},
		},
		{
			"bound to an empty name", name, Options{},
			[]string{"> 05 01 00", "< 05 00", "> " + nameBytes, "< 05 00 00 03 00 1f90"}, netip.AddrPort{},
		},
		{
			"bound to the longest name", name, Options{},
			[]string{"> 05 01 00", "< 05 00", "> " + nameBytes, "< 05 00 00 03 ff " + strings.Repeat("61", 255) + "1f90"}, netip.AddrPort{},
		},
		{
			"reserved byte set", name, Options{},
			[]string{"> 05 01 00", "< 05 00", "> " + nameBytes, "< 05 00 7f 01 00000000 0000"}, none,
		},
	}
	for _, tt := range tests {
		for segment, how := range []string{"at once", "byte by byte"} {
			t.Run(tt.name+" "+how, func(t *testing.T) {
				conn := &script{segment: segment}
				var want []string
				for _, line := range tt.want {
					b := unhex(t, line[2:])
					want = append(want, line[:2]+hex.EncodeToString(b))
					if line[0] == '<' {
						conn.server = append(conn.server, b...)
					}
				}
				conn.server = append(conn.server, "220 the flow"...)
				bound, err := Connect(conn, tt.target, tt.opt)
				if err != nil {
					t.Fatal(err)
				}
				if bound != tt.bound && (bound.IsValid() || tt.bound.IsValid()) {
					t.Errorf("bound to %v, want %v", bound, tt.bound)
				}
				if diff := cmp.Diff(want, conn.trace); diff != "" {
					t.Errorf("messages (-want +got):\n%s", diff)
				}
				if got := string(conn.server); got != "220 the flow" {
					t.Errorf("of the flow %q is left", got)
				}
			})
		}
	}
}

func TestConnectReply(t *testing.T) {
	words := map[Reply]string{
		1: "socks: general SOCKS server failure",
		2: "socks: connection not allowed by ruleset",
		3: "socks: network unreachable",
		4: "socks: host unreachable",
		5: "socks: connection refused by the destination",
		6: "socks: TTL expired",
		7: "socks: command not supported",
		8: "socks: address type not supported",
		9: "socks: reply 9, which RFC 1928 does not assign",
	}
	addresses := []string{"01 00000000 0000", "03 03 666f6f 0000", "04 00000000000000000000000000000000 0000", "00 00000000 0000"}
	for rep := 1; rep <= 255; rep++ {
		for _, address := range addresses {
			conn := &script{server: append([]byte{5, 0, 5, byte(rep), 0}, unhex(t, address)...)}
			_, err := Connect(conn, name, Options{})
			var got Reply
			if !errors.As(err, &got) || got != Reply(rep) {
				t.Fatalf("REP %d with address %s: %v", rep, address, err)
			}
			if want, ok := words[got]; ok && err.Error() != want {
				t.Errorf("REP %d: %q, want %q", rep, err, want)
			}
		}
	}
}

// TestConnectCut ends the server's bytes after each of them.
func TestConnectCut(t *testing.T) {
	for _, reply := range []string{
		"05 00 00 01 00000000 0000",
		"05 00 00 03 00 0000",
		"05 00 00 03 03 666f6f 0000",
		"05 00 00 04 00000000000000000000000000000000 0000",
		"05 05 00 01 00000000 0000",
	} {
		for _, pipeline := range []bool{false, true} {
			server := unhex(t, "05 02 01 00"+reply)
			for n := range server {
				conn := &script{server: server[:n]}
				if _, err := Connect(conn, name, Options{Auth: alice, Pipeline: pipeline}); !errors.Is(err, io.ErrUnexpectedEOF) {
					t.Errorf("%s cut after %d bytes: %v", reply, n, err)
				}
			}
		}
	}
}

func TestConnectRefused(t *testing.T) {
	protocol := func(what string) error { return &ProtocolError{What: what} }
	tests := []struct {
		name   string
		auth   *Auth
		server string // hexadecimal
		want   error
	}{
		{"SOCKS4", nil, "00 5a", protocol("the server answers with version 0")},
		{"HTTP", nil, "48 54 54 50 2f 31", protocol("the server answers with version 72: it speaks HTTP")},
		{"no method", nil, "05 ff", ErrNoAcceptableMethod},
		{"no method, auth", alice, "05 ff", ErrNoAcceptableMethod},
		{"method not offered", nil, "05 02", protocol("the server picks method 2, which was not offered")},
		{"none although auth was offered", alice, "05 00", protocol("the server picks method 0, which was not offered")},
		{"auth refused", alice, "05 02 01 01", ErrAuth},
		{"auth refused by microsocks", alice, "05 02 01 02", ErrAuth},
		{"auth refused by v2ray", alice, "05 02 01 ff", ErrAuth},
		{"auth refused with version 5", alice, "05 02 05 01", ErrAuth},
		{"auth version", alice, "05 02 02 00", protocol("authentication is answered with version 2")},
		{"reply version", nil, "05 00 04 00 00 01 00000000 0000", protocol("the reply has version 4")},
		{"reply address type", nil, "05 00 05 00 00 02 00000000 0000", protocol("the reply has address type 2")},
	}
	for _, tt := range tests {
		for _, pipeline := range []bool{false, true} {
			conn := &script{server: unhex(t, tt.server)}
			_, err := Connect(conn, name, Options{Auth: tt.auth, Pipeline: pipeline})
			var p, want *ProtocolError
			if errors.As(tt.want, &want) {
				if !errors.As(err, &p) || p.What != want.What || p.Version != strings.HasPrefix(p.What, "the server answers") {
					t.Errorf("%s: %v, want %v", tt.name, err, want)
				}
			} else if err != tt.want {
				t.Errorf("%s: %v, want %v", tt.name, err, tt.want)
			}
			if err != nil && (strings.Contains(err.Error(), alice.Username) || strings.Contains(err.Error(), alice.Password)) {
				t.Errorf("%s: the error shows a secret: %v", tt.name, err)
			}
		}
	}
}

func TestAskMethod(t *testing.T) {
	for _, tt := range []struct {
		server, want string
		err          error
	}{
		{"05 00", "none", nil},
		{"05 01", "GSSAPI", nil},
		{"05 02", "user name and password", nil},
		{"05 ff", "", ErrNoAcceptableMethod},
		{"05 03", "", ErrNoAcceptableMethod},
		{"04 00", "", ErrVersion},
		{"05", "", io.ErrUnexpectedEOF},
	} {
		conn := &script{server: unhex(t, tt.server)}
		got, err := AskMethod(conn)
		if got != tt.want || !errors.Is(err, tt.err) || conn.trace[0] != "> 0503000102" {
			t.Errorf("%s: %q, %v, want %q, %v; %v", tt.server, got, err, tt.want, tt.err, conn.trace)
		}
	}
}

// TestConnectBroken wants the connection's own errors back.
func TestConnectBroken(t *testing.T) {
	conn := &script{server: []byte{5}, end: syscall.ECONNRESET}
	if _, err := Connect(conn, name, Options{}); err != syscall.ECONNRESET {
		t.Errorf("read: %v", err)
	}
	conn = &script{writeErr: syscall.EPIPE}
	if _, err := Connect(conn, name, Options{}); err != syscall.EPIPE {
		t.Errorf("write: %v", err)
	}
}

func TestConnectLengths(t *testing.T) {
	long := strings.Repeat("x", 255)
	tests := []struct {
		name   string
		target flow.Target
		auth   *Auth
		want   error
	}{
		{"all longest", flow.Target{Name: long}, &Auth{long, long}, nil},
		{"all shortest", flow.Target{Name: "x"}, &Auth{"x", "x"}, nil},
		{"name", flow.Target{Name: long + "x"}, nil, ErrTooLong},
		{"user name", name, &Auth{long + "x", "x"}, ErrTooLong},
		{"password", name, &Auth{"x", long + "x"}, ErrTooLong},
		{"no user name", name, &Auth{"", "x"}, ErrTooLong},
		{"no password", name, &Auth{"x", ""}, ErrTooLong},
	}
	for _, tt := range tests {
		for _, pipeline := range []bool{false, true} {
			conn := &script{server: unhex(t, "05 02 01 00 05 00 00 01 00000000 0000")}
			_, err := Connect(conn, tt.target, Options{Auth: tt.auth, Pipeline: pipeline})
			if err != tt.want {
				t.Errorf("%s: %v, want %v", tt.name, err, tt.want)
				continue
			}
			if err != nil {
				if len(conn.trace) > 0 {
					t.Errorf("%s: something was sent: %q", tt.name, conn.trace)
				}
				continue
			}
			var sent string
			for _, line := range conn.trace {
				if line[0] == '>' {
					sent += line[2:]
				}
			}
			user, password, host := tt.auth.Username, tt.auth.Password, tt.target.Name
			want := hex.EncodeToString([]byte("\x05\x01\x02" +
				"\x01" + string([]byte{byte(len(user))}) + user + string([]byte{byte(len(password))}) + password +
				"\x05\x01\x00\x03" + string([]byte{byte(len(host))}) + host + "\x00\x00"))
			if diff := cmp.Diff(want, sent); diff != "" {
				t.Errorf("%s: sent (-want +got):\n%s", tt.name, diff)
			}
		}
	}
}

// FuzzReply reads a reply from bytes of anybody, in segments of any size, and
// checks against the sizes of RFC 1928 that it reads exactly the reply.
func FuzzReply(f *testing.F) {
	for _, s := range []string{
		"05 00 00 01 c0000201 0050", "05 00 00 03 03 666f6f 0050", "05 00 00 03 00 0050",
		"05 00 00 04 20010db8000000000000000000000001 0050", "05 01 00 00 00000000 0000", "05 05 00 01", "00 5a", "",
	} {
		f.Add(unhex(f, s), byte(0))
		f.Add(append(unhex(f, s), "220 the flow"...), byte(1))
	}
	f.Fuzz(func(t *testing.T, server []byte, segment byte) {
		conn := &script{server: server, segment: int(segment)}
		bound, err := readReply(conn, new(scratch), false)
		used := server[:len(server)-len(conn.server)]
		size := 7
		if len(server) >= 7 && server[0] == 5 {
			switch server[3] {
			case 1:
				size = 10
			case 3:
				size = 7 + int(server[4])
			case 4:
				size = 22
			}
		}
		if len(used) > size {
			t.Fatalf("read %d bytes of a reply of %d", len(used), size)
		}
		if errors.Is(err, io.ErrUnexpectedEOF) {
			if len(server) >= size {
				t.Fatal("a whole reply ends early")
			}
			return
		}
		if len(used) != size {
			t.Fatalf("read %d bytes of a reply of %d: %v", len(used), size, err)
		}
		if ok := server[0] == 5 && server[1] == 0 && (server[3] == 1 || server[3] == 3 || server[3] == 4); ok != (err == nil) {
			t.Fatalf("% x: %v", used, err)
		}
		if bound.IsValid() != (err == nil && server[3] != 3) {
			t.Fatalf("% x: bound to %v", used, bound)
		}
	})
}

// memory is a server that answers at once and keeps nothing.
type memory struct {
	net.Conn
	server []byte
	at     int
}

func (m *memory) Read(b []byte) (int, error) {
	n := copy(b, m.server[m.at:])
	m.at += n
	return n, nil
}

func (m *memory) Write(b []byte) (int, error) { return len(b), nil }

func BenchmarkConnect(b *testing.B) {
	conn := &memory{server: unhex(b, "05 02 01 00 05 00 00 01 00000000 0000")}
	b.ReportAllocs()
	for b.Loop() {
		conn.at = 0
		if _, err := Connect(conn, name, Options{Auth: alice}); err != nil {
			b.Fatal(err)
		}
	}
}

// TestConnectAllocs keeps a handshake at one allocation, its buffer.
func TestConnectAllocs(t *testing.T) {
	conn := &memory{server: unhex(t, "05 02 01 00 05 00 00 01 00000000 0000")}
	long := flow.Target{Name: strings.Repeat("x", 255)}
	for _, o := range []Options{{Auth: alice}, {Auth: &Auth{long.Name, long.Name}, Pipeline: true}} {
		got := testing.AllocsPerRun(100, func() {
			conn.at = 0
			if _, err := Connect(conn, long, o); err != nil {
				t.Fatal(err)
			}
		})
		if got > 1 {
			t.Errorf("%v allocations, pipeline %v", got, o.Pipeline)
		}
	}
}
