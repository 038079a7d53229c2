package fakedns

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/tproxyd/tproxyd/pkg/flow"
)

// echo answers DNS on one end of a pipe with what zone says.
func echo(ctx context.Context, network, _ string) (net.Conn, error) {
	f := &fakeNet{at: map[string]func(string, *dns.Msg) *dns.Msg{"": func(_ string, req *dns.Msg) *dns.Msg {
		if len(req.Question) != 1 {
			return new(dns.Msg).SetRcode(req, dns.RcodeFormatError)
		}
		if resp := zone(req); resp != nil {
			return resp
		}
		return new(dns.Msg).SetReply(req)
	}}}
	return f.Dial(ctx, network, "")
}

// FuzzServeDNS: no packet makes the server panic; an answer is DNS and has the
// question's id; and the fast path says what the slow way would say.
func FuzzServeDNS(f *testing.F) {
	for _, name := range []string{"a.syn.", "A.b.C.real.", "a.direct.", "missing.first.", "x.refused.", "x.nx.", ".", "1.0.18.198.in-addr.arpa.",
		`it\'s\ \.\000\255.syn.`, strings.Repeat(strings.Repeat("a", 63)+".", 3) + strings.Repeat("b", 61) + "."} {
		for _, qtype := range []uint16{dns.TypeA, dns.TypeAAAA, dns.TypeHTTPS, dns.TypeANY, dns.TypeTXT, dns.TypeMX, dns.TypePTR, dns.TypeAXFR} {
			m := new(dns.Msg).SetQuestion(name, qtype)
			if qtype != dns.TypeTXT {
				m.SetEdns0(1232, qtype == dns.TypeAAAA)
			}
			b, err := m.Pack()
			if err != nil {
				f.Fatal(err)
			}
			f.Add(b)
			b = bytes.Clone(b)
			b[2] ^= dns.OpcodeUpdate << 3
			f.Add(b)
			f.Add(b[:len(b)-3])
		}
	}
	// Found once: options that are not well formed, a TSIG that is none.
	f.Add([]byte("\x1c\x1a)\x00\x00\x01\x00\x00\x00\x00\x00\x01\x01a\x06direct\x00\x00\xfc\x00\x01\x00\x00\xfa\x00\x00\xfaooo\x00\x00\x00\x00\x00\x00"))
	f.Add([]byte("\x1c\x1a\x01\x00\x00\x01\x00\x00\x00\x00\x00\x01\x01a\x03syn\x00\x00\x01\x00\x01\x00\x00\x29\x04\xd0\x00\x00\x00\x00\x00\x05\x00\x08\x00\x01\x00"))
	f.Add([]byte("\x1c\x1a\x01\x00\x00\x01\x00\x00\x00\x00\x00\x01\x01a\x03syn\x00\x00\x01\x00\x01\x00\x00\x29\x04\xd0\x00\x00\x00\x00\x00\x0c\x00\x0a\x00\x0801234567"))
	s := newServer(f, Options{
		Max: 1000, Quarantine: time.Nanosecond, Timeout: 100 * time.Millisecond, Dial: echo,
		Admit: func(string, Asker, []netip.Addr, time.Duration) error { return nil },
		DialRemote: func(ctx context.Context, _ string, _ Asker, _ netip.AddrPort) (net.Conn, error) {
			return echo(ctx, "tcp", "")
		},
	})
	f.Fuzz(func(t *testing.T, msg []byte) {
		var scratch [256]byte
		s.pool.mu.Lock()
		fast := s.hot(&flow.Datagram{Data: msg}, &scratch, nil)
		s.pool.flush()
		s.pool.mu.Unlock()
		for _, udp := range []bool{true, false} {
			slow := s.answer(t.Context(), msg, client, udp)
			if len(msg) >= headerLen && msg[2]&0x80 != 0 && slow != nil {
				t.Fatalf("an answer to an answer: %x", slow)
			}
			if slow == nil {
				continue
			}
			m := new(dns.Msg)
			if err := m.Unpack(slow); err != nil || m.Id != binary.BigEndian.Uint16(msg) || !m.Response {
				t.Fatalf("%v\n%v\n%x", err, m, slow)
			}
			if udp && len(slow) > udpSize {
				t.Fatalf("%d bytes by UDP", len(slow))
			}
		}
		if fast == nil {
			return
		}
		if len(fast) > maxHot {
			t.Fatalf("%d bytes do not fit the buffer", len(fast))
		}
		got, want := new(dns.Msg), new(dns.Msg)
		if err := errors.Join(got.Unpack(fast), want.Unpack(s.answer(t.Context(), msg, client, true))); err != nil {
			t.Fatalf("%v\n%x", err, fast)
		}
		if got.String() != want.String() {
			t.Fatalf("the fast path says\n%v\nthe slow way\n%v", got, want)
		}
	})
}

// FuzzStore: whatever stands in the file, it opens; what is made of it is
// consistent, and the same again after it was written anew. The input is once the file
// itself and once a list of records whose checksums are made right.
func FuzzStore(f *testing.F) {
	log, _ := sample()
	f.Add(log)
	f.Add(log[:len(log)-7])
	f.Add(bytes.Replace(log, []byte("host2"), []byte("host1"), 1))
	f.Add([]byte{recordGiven, 1, 3, 'a', recordGiven, 2, 3, 'b', recordEvicted, 0, 2, recordGiven, 9, 1, 'a', recordGiven, 1, 0})
	f.Add([]byte(logHeader))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, b []byte) {
		records := []byte(logHeader)
		for rest := b; len(rest) >= 3; {
			kind, index, n := rest[0]%4, uint32(rest[1]), min(int(rest[2]%8), len(rest)-3)
			records = appendRecord(records, kind, index, uint32(index)<<24, rest[3:3+n])
			rest = rest[3+n:]
		}
		for _, content := range [][]byte{b, records} {
			path := filepath.Join(dir, logName)
			os.Remove(path) // ext4 brings a file that is truncated and rewritten to the disk at once
			if err := os.WriteFile(path, content, 0o600); err != nil {
				t.Fatal(err)
			}
			s, content, err := openStore(dir) // not a whole pool: fsync would be all that this does
			if err != nil {
				t.Fatal(err)
			}
			s.close()
			const limit, at = 100, 50 << 24
			tab := newTable(limit, limit)
			if good := tab.load(content); good > len(content) {
				t.Fatalf("%d good bytes of %d", good, len(content))
			}
			tab.requeue(at)
			check(t, tab)
			for _, name := range []string{"a", "b", "host1.example"} {
				if tab.find([]byte(name)) != 0 {
					continue
				}
				if i := tab.free(at, 10<<24); i != 0 {
					tab.put(i, []byte(name))
				}
			}
			check(t, tab)
			again := newTable(limit, limit)
			again.load(tab.dump()[len(logHeader):])
			again.requeue(at)
			check(t, again)
			if got, want := again.dump(), tab.dump(); !bytes.Equal(got, want) {
				t.Fatalf("written anew:\n%q\nwas\n%q", got, want)
			}
		}
	})
}
