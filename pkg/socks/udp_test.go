package socks

import (
	"bytes"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

func TestAssociate(t *testing.T) {
	own := netip.MustParseAddrPort("192.0.2.1:40000")
	for _, c := range []struct {
		name, server, wants string
		from                netip.AddrPort
		relay               string
		err                 error
	}{
		{"own address", "05 00 05 00 00 01 c6336401 1234", "05 01 00 05 03 00 01 c0000201 9c40", own, "198.51.100.1:4660", nil},
		{"zeros", "05 00 05 00 00 01 00000000 1234", "05 01 00 05 03 00 01 00000000 0000", netip.AddrPort{}, "0.0.0.0:4660", nil},
		{"IPv6", "05 00 05 00 00 04 20010db8000000000000000000000001 1234", "05 01 00 05 03 00 04 20010db8000000000000000000000002 9c40",
			netip.MustParseAddrPort("[2001:db8::2]:40000"), "[2001:db8::1]:4660", nil},
		{"a name as the relay", "05 00 05 00 00 03 03 666f6f 1234", "05 01 00 05 03 00 01 c0000201 9c40", own, "invalid AddrPort", nil},
		{"no UDP", "05 00 05 07 00 01 00000000 0000", "", own, "", CommandNotSupported},
		{"ssh -D", "05 00", "", own, "", ErrNoReply},
		{"half a reply", "05 00 05 00", "", own, "", io.ErrUnexpectedEOF},
		{"closed before", "", "", own, "", io.ErrUnexpectedEOF},
	} {
		t.Run(c.name, func(t *testing.T) {
			conn := &script{server: unhex(t, c.server)}
			relay, err := Associate(far{conn}, c.from, Options{})
			if !errors.Is(err, c.err) || err != nil && errors.Is(err, ErrNoReply) != (c.err == ErrNoReply) {
				t.Fatalf("error %v, want %v", err, c.err)
			}
			if err != nil {
				return
			}
			if relay.String() != c.relay || relay.Port() != 4660 {
				t.Errorf("relay %v, port %d, want %s", relay, relay.Port(), c.relay)
			}
			said := ""
			for _, line := range conn.trace {
				if m, ok := strings.CutPrefix(line, "> "); ok {
					said += m
				}
			}
			if wants := hex.EncodeToString(unhex(t, c.wants)); said != wants {
				t.Errorf("said %s, want %s", said, wants)
			}
		})
	}
}

// far is a connection to a server that is reached by IPv4.
type far struct{ net.Conn }

func (far) RemoteAddr() net.Addr { return &net.TCPAddr{IP: net.IPv4(198, 51, 100, 1), Port: 1080} }

func TestUDPHeader(t *testing.T) {
	for _, target := range []flow.Target{
		{Addr: netip.MustParseAddr("192.0.2.1"), Port: 53},
		{Addr: netip.MustParseAddr("2001:db8::1"), Port: 443},
		{Name: "www.example.org", Port: 443},
		{Name: strings.Repeat("x", 255), Port: 65535},
	} {
		b, err := AppendUDPHeader(nil, target)
		if err != nil || len(b) > MaxUDPHeader {
			t.Fatalf("%v: %d bytes, %v", target, len(b), err)
		}
		from, name, n, err := ParseUDPHeader(append(b, "data"...))
		if err != nil || n != len(b) || string(name) != target.Name || from.Addr() != target.Addr || from.Port() != target.Port {
			t.Errorf("%v: read as %v %q, %d of %d bytes, %v", target, from, name, n, len(b), err)
		}
		for i := range b {
			if _, _, _, err := ParseUDPHeader(b[:i]); err != ErrUDPHeader {
				t.Errorf("%v: %d bytes of its header: %v", target, i, err)
			}
		}
		b[2] = 1
		if _, _, _, err := ParseUDPHeader(b); err != ErrFragment {
			t.Errorf("%v: a fragment: %v", target, err)
		}
	}
	if _, err := AppendUDPHeader(nil, flow.Target{Name: strings.Repeat("x", 256)}); err != ErrTooLong {
		t.Errorf("a name of 256 bytes: %v", err)
	}
}

// FuzzUDPHeader holds the parser to what it says of its length, and its result
// to the header that the client would write for it.
func FuzzUDPHeader(f *testing.F) {
	for _, s := range []string{"0000 00 01 c0000201 0035 64617461", "0000 00 03 03 666f6f 01bb", "0000 01 01 c0000201 0035",
		"0000 00 04 00000000000000000000ffffc0000201 0035", "0000 00 03 00 0035", "0000 00 05 00 0035", ""} {
		f.Add(unhex(f, s))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		from, name, n, err := ParseUDPHeader(b)
		if err != nil {
			if n != 0 || name != nil || from.IsValid() {
				t.Fatalf("an error, and %v %q %d", from, name, n)
			}
			return
		}
		if n > len(b) || n > MaxUDPHeader || from.IsValid() == (len(name) > 0) {
			t.Fatalf("% x: %v %q %d", b, from, name, n)
		}
		again, err := AppendUDPHeader(nil, flow.Target{Name: string(name), Addr: from.Addr(), Port: from.Port()})
		if err != nil {
			t.Fatal(err)
		}
		from2, name2, _, err := ParseUDPHeader(again)
		if err != nil || from2 != from || !bytes.Equal(name, name2) {
			t.Fatalf("% x: %v %q, written anew %v %q, %v", b, from, name, from2, name2, err)
		}
	})
}

func BenchmarkParseUDPHeader(b *testing.B) {
	d, _ := AppendUDPHeader(nil, flow.Target{Addr: netip.MustParseAddr("192.0.2.1"), Port: 53})
	b.ReportAllocs()
	for b.Loop() {
		if _, _, _, err := ParseUDPHeader(d); err != nil {
			b.Fatal(err)
		}
	}
}
