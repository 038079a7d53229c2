package fakedns

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
	"github.com/tproxyd/tproxyd/pkg/flow"
)

// No answer through a server is no reason to ask another way.
func TestRemoteFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeNet{at: map[string]func(string, *dns.Msg) *dns.Msg{resolver1.String(): silence, resolver2.String(): byZone}}
		var tried asked
		o := Options{Dial: f.Dial, Resolvers: []netip.AddrPort{resolver1, resolver2}, DialRemote: func(ctx context.Context, name string, a Asker, r netip.AddrPort) (net.Conn, error) {
			tried.add(name + " " + r.String())
			if r == resolver1 {
				return nil, errors.New("host unreachable")
			}
			return f.Dial(ctx, "tcp", r.String())
		}}
		s := newServer(t, o)
		txt := new(dns.Msg).SetQuestion("A.syn.", dns.TypeTXT)
		if got := text(query(t, s, client, txt)); got != `NOERROR | A.syn. 300 IN TXT "hello"` {
			t.Error(got)
		}
		if got, want := tried.take(), []string{"a.syn 192.0.2.53:53", "a.syn 192.0.2.54:53"}; !cmp.Equal(got, want) {
			t.Error(cmp.Diff(got, want))
		}
		f.take()
		f.at[resolver2.String()] = silence
		began := time.Now()
		if got := text(query(t, s, client, txt)); got != "SERVFAIL" || time.Since(began) != 5*time.Second {
			t.Errorf("%s after %v", got, time.Since(began))
		}
		if got, want := f.take(), []string{"tcp 192.0.2.54:53 a.syn."}; !cmp.Equal(got, want) {
			t.Error(cmp.Diff(got, want))
		}
		o.DialRemote = nil
		o.Dir = ""
		s = newServer(t, o)
		if got := text(query(t, s, client, txt)); got != "SERVFAIL" || len(f.take()) != 0 {
			t.Error(got)
		}
	})
}

// A name that is synthetic because the resolvers were silent has all its time
// for a question through a server.
func TestRemoteAfterSilence(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeNet{at: map[string]func(string, *dns.Msg) *dns.Msg{resolver1.String(): silence, resolver2.String(): silence, "far": byZone}}
		s := newServer(t, Options{Dial: f.Dial, Resolvers: []netip.AddrPort{resolver1, resolver2}, DialRemote: func(ctx context.Context, _ string, _ Asker, _ netip.AddrPort) (net.Conn, error) {
			if err := ctx.Err(); err != nil {
				return nil, err
			}
			return f.Dial(ctx, "tcp", "far")
		}})
		if got := text(query(t, s, client, new(dns.Msg).SetQuestion("a.first.", dns.TypeTXT))); got != `NOERROR | a.first. 300 IN TXT "hello"` {
			t.Error(got)
		}
	})
}

func TestOpcodes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeNet{at: map[string]func(string, *dns.Msg) *dns.Msg{resolver1.String(): byZone}}
		s := newServer(t, Options{Dial: f.Dial, DialRemote: func(context.Context, string, Asker, netip.AddrPort) (net.Conn, error) {
			t.Error("asked through a server")
			return nil, errors.New("no")
		}})
		update := new(dns.Msg).SetUpdate("a.real.")
		update.Insert([]dns.RR{mustRR("host.a.real. 60 IN A 192.0.2.9")})
		with := func(opcode int, name string) *dns.Msg {
			m := new(dns.Msg).SetQuestion(name, dns.TypeSOA)
			m.Opcode = opcode
			return m
		}
		newer := new(dns.Msg).SetQuestion("a.syn.", dns.TypeA).SetEdns0(1232, false)
		newer.IsEdns0().SetVersion(1)
		chaos := new(dns.Msg).SetQuestion("version.bind.", dns.TypeTXT)
		chaos.Question[0].Qclass = dns.ClassCHAOS
		two := new(dns.Msg).SetQuestion("a.syn.", dns.TypeA)
		two.Question = append(two.Question, dns.Question{Name: "b.syn.", Qtype: dns.TypeAAAA, Qclass: dns.ClassINET})
		for _, tt := range []struct {
			name  string
			req   *dns.Msg
			want  string
			asked int
		}{
			{"update, local", update, "NOERROR", 1},
			{"update, proxied", new(dns.Msg).SetUpdate("a.syn."), "REFUSED", 0},
			{"update, our reverse zone", with(dns.OpcodeUpdate, "1.0.18.198.in-addr.arpa."), "REFUSED", 0},
			{"update, local first", with(dns.OpcodeUpdate, "missing.first."), "REFUSED", 1},
			{"notify, local", new(dns.Msg).SetNotify("a.real."), "NOERROR", 1},
			{"notify, proxied", new(dns.Msg).SetNotify("a.syn."), "REFUSED", 0},
			{"inverse query", with(dns.OpcodeIQuery, "a.real."), "NOTIMP", 0},
			{"status", with(dns.OpcodeStatus, "a.syn."), "NOTIMP", 0},
			{"unknown", with(9, "a.real."), "NOTIMP", 0},
			{"other class", chaos, "REFUSED", 0},
			{"EDNS version 1", newer, "BADVERS", 0},
			{"two questions", two, "FORMERR", 0},
			{"no question", &dns.Msg{MsgHdr: dns.MsgHdr{Id: 7}}, "FORMERR", 0},
			{"the root", new(dns.Msg).SetQuestion(".", dns.TypeA), "NOERROR | . 300 IN A 192.0.2.80", 1},
		} {
			resp := query(t, s, client, tt.req)
			if got := strings.Replace(text(resp), "BADSIG", "BADVERS", 1); got != tt.want || resp.Opcode != tt.req.Opcode {
				t.Errorf("%s: %s, opcode %d; want %s", tt.name, got, resp.Opcode, tt.want)
			}
			if got := f.take(); len(got) != tt.asked {
				t.Errorf("%s: asked %q, want %d", tt.name, got, tt.asked)
			}
		}
		if n := s.Stats().Pool.Names; n != 0 {
			t.Errorf("%d names", n)
		}
	})
}

func TestMalformed(t *testing.T) {
	s := newServer(t, Options{})
	head := func(flags, questions byte) []byte {
		return []byte{0x12, 0x34, flags, 0, 0, questions, 0, 0, 0, 0, 0, 0}
	}
	label := append([]byte{63}, strings.Repeat("a", 63)...)
	tooLong := head(0, 1) // 256 bytes of name
	for range 3 {
		tooLong = append(tooLong, label...)
	}
	tooLong = append(append(tooLong, 62), strings.Repeat("a", 62)...)
	tooLong = append(tooLong, 0, 0, 1, 0, 1)
	tests := []struct {
		name string
		msg  []byte
		want string // empty: no answer
	}{
		{"empty", nil, ""},
		{"one byte", []byte{0}, ""},
		{"eleven bytes", head(0, 1)[:11], ""},
		{"header only", head(0, 1), "FORMERR"},
		{"name that does not end", append(head(0, 1), 3, 'a', 'b', 'c'), "FORMERR"},
		{"name without type", append(head(0, 1), 1, 'a', 0), "REFUSED"},
		{"pointer to itself", append(head(0, 1), 0xc0, 12, 0, 1, 0, 1), "FORMERR"},
		{"name of 256 bytes", tooLong, "FORMERR"},
		{"a broken answer", append(head(0x80, 1), 3), ""},
		{"an answer", append(head(0x80, 1), 1, 'a', 0, 0, 1, 0, 1), ""},
	}
	addrs := start(t, s, plain)
	for _, tt := range tests {
		dropped := s.Stats().Dropped
		conn, err := net.Dial("udp", addrs["udp"])
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := conn.Write(tt.msg); err != nil {
			t.Fatal(err)
		}
		if tt.want == "" {
			for s.Stats().Dropped == dropped {
				time.Sleep(time.Millisecond)
			}
		} else {
			in := make([]byte, 512)
			n, err := conn.Read(in)
			if err != nil {
				t.Fatalf("%s: %v", tt.name, err)
			}
			resp := new(dns.Msg)
			if err := resp.Unpack(in[:n]); err != nil || resp.Id != 0x1234 || text(resp) != tt.want {
				t.Errorf("%s: %v\n%v", tt.name, err, resp)
			}
		}
		// The same by TCP, where no answer is the end of the connection.
		stream, err := net.Dial("tcp", addrs["tcp"])
		if err != nil {
			t.Fatal(err)
		}
		defer stream.Close()
		stream.SetDeadline(time.Now().Add(10 * time.Second))
		stream.Write(append(binary.BigEndian.AppendUint16(nil, uint16(len(tt.msg))), tt.msg...))
		if got, err := (&dns.Conn{Conn: stream}).ReadMsg(); tt.want == "" && !errors.Is(err, io.EOF) || tt.want != "" && (err != nil || text(got) != tt.want) {
			t.Errorf("%s by TCP: %v, %v", tt.name, got, err)
		}
	}
	if n := s.Stats().Pool.Names; n != 0 {
		t.Errorf("%d names", n)
	}
}

// askHot asks for an IPv4 address by the fast path; false: it does not answer.
func askHot(t testing.TB, s *Server, name string, a netip.Addr) bool {
	t.Helper()
	b, err := new(dns.Msg).SetQuestion(name, dns.TypeA).Pack()
	if err != nil {
		t.Fatal(err)
	}
	s.pool.mu.Lock()
	defer s.pool.mu.Unlock()
	var scratch [256]byte
	return s.hot(&flow.Datagram{Data: b, Src: netip.AddrPortFrom(a, 1)}, &scratch, nil) != nil
}

func TestQuestionIsUse(t *testing.T) {
	s := newServer(t, Options{Max: 3})
	for _, name := range []string{"a.syn.", "b.syn.", "c.syn.", "a.syn.", "d.syn."} {
		if !askHot(t, s, name, client.Addr) {
			t.Fatalf("no answer for %s", name)
		}
	}
	if got := names(s.pool.t); got["a.syn"] == 0 || got["b.syn"] != 0 {
		t.Errorf("left: %v, want all but b.syn", got)
	}
}

// The rules may give a name to one client and not to another, and change.
func TestVerdictsByClient(t *testing.T) {
	other := netip.MustParseAddr("203.0.113.8")
	shared := false
	rules := Real
	s := newServer(t, Options{
		Dial: (&fakeNet{at: map[string]func(string, *dns.Msg) *dns.Msg{resolver1.String(): byZone}}).Dial,
		Decide: func(_ string, a Asker) (Verdict, bool) {
			if a.Addr == other {
				return rules, shared
			}
			return Synthetic, shared
		},
	})
	hot := func(a netip.Addr) bool { return askHot(t, s, "a.example.", a) }
	for _, tt := range []struct {
		name                string
		shared              bool
		rules               Verdict
		reset               bool
		wantFirst, wantThen bool
	}{
		{"by client", false, Real, false, true, false},
		{"for all", true, Synthetic, true, true, true},
		{"not asked again", true, Real, false, true, true},
		{"after a reset", false, Real, true, true, false},
	} {
		shared, rules = tt.shared, tt.rules
		if tt.reset {
			s.Reset()
		}
		if a, b := hot(client.Addr), hot(other); a != tt.wantFirst || b != tt.wantThen {
			t.Errorf("%s: synthetic for one %v, for the other %v", tt.name, a, b)
		}
	}
}
