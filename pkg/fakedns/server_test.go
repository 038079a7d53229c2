package fakedns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
	"github.com/tproxyd/tproxyd/pkg/flow"
	"golang.org/x/sys/unix"
)

func TestServe(t *testing.T) {
	var seen, admitted asked
	local, far := startResolver(t, "local", &seen), startResolver(t, "remote", &seen)
	var d net.Dialer
	s := newServer(t, Options{
		Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return d.DialContext(ctx, network, local)
		},
		DialRemote: func(ctx context.Context, name string, a Asker, r netip.AddrPort) (net.Conn, error) {
			if r != resolver1 || name == "" {
				t.Errorf("a resolver %v, name %q", r, name)
			}
			return d.DialContext(ctx, "tcp", far)
		},
		Admit: func(name string, a Asker, addrs []netip.Addr, ttl time.Duration) error {
			admitted.add(fmt.Sprint(name, " ", addrs))
			if strings.HasPrefix(name, "unwanted.") {
				return errors.New("no")
			}
			return nil
		},
	})
	addrs := start(t, s, plain)
	long := strings.Repeat(strings.Repeat("a", 63)+".", 3) + strings.Repeat("b", 61) + "." // 255 bytes on the wire
	tests := []struct {
		name  string
		qtype uint16
		want  string
		seen  string // what resolvers hear of it, the first time
	}{
		{"a.syn.", dns.TypeA, "NOERROR | a.syn. 60 IN A 198.18.0.1", ""},
		{"a.syn.", dns.TypeAAAA, "NOERROR | a.syn. 60 IN AAAA fd74:7072:6f78::1", ""},
		{"A.Syn.", dns.TypeA, "NOERROR | A.Syn. 60 IN A 198.18.0.1", ""},
		{"A.sYn.", dns.TypeANY, "NOERROR | A.sYn. 60 IN A 198.18.0.1 | A.sYn. 60 IN AAAA fd74:7072:6f78::1", ""},
		{"a.syn.", dns.TypeHTTPS, "NOERROR / SOA 60", ""},
		{"a.syn.", dns.TypeSVCB, "NOERROR / SOA 60", ""},
		{"1.0.18.198.in-addr.arpa.", dns.TypePTR, "NOERROR | 1.0.18.198.in-addr.arpa. 60 IN PTR a.syn.", ""},
		{"1.0.18.198.in-addr.arpa.", dns.TypeTXT, "NOERROR", ""},
		{"1.0.18.198.in-addr.arpa.", dns.TypeAXFR, "REFUSED", ""},
		{"9.0.19.198.in-addr.arpa.", dns.TypePTR, "NXDOMAIN", ""},
		{"1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.7.f.6.2.7.0.7.4.7.D.F.ip6.arpa.", dns.TypePTR,
			"NOERROR | 1.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.8.7.f.6.2.7.0.7.4.7.D.F.ip6.arpa. 60 IN PTR a.syn.", ""},
		{"1.2.0.192.in-addr.arpa.", dns.TypePTR, "NOERROR | 1.2.0.192.in-addr.arpa. 300 IN PTR host.real.", "local udp 1.2.0.192.in-addr.arpa. PTR"},
		{long, dns.TypeA, "NOERROR | " + long + " 60 IN A 198.18.0.2", ""},
		{`it\'s.syn.`, dns.TypeA, `NOERROR | it\'s.syn. 60 IN A 198.18.0.3`, ""},

		{"a.syn.", dns.TypeTXT, `NOERROR | a.syn. 300 IN TXT "hello"`, "remote tcp a.syn. TXT"},
		{"a.syn.", dns.TypeMX, "NOERROR | a.syn. 300 IN MX 10 mail.real.", "remote tcp a.syn. MX"},
		{"a.syn.", dns.TypeSRV, "NOERROR | a.syn. 300 IN SRV 1 2 443 mail.real.", "remote tcp a.syn. SRV"},
		{"missing.syn.", dns.TypeTXT, "NXDOMAIN / SOA 300", "remote tcp missing.syn. TXT"},
		{"a.syn.", dns.TypeAXFR, "REFUSED", ""},
		{"a.syn.", dns.TypeIXFR, "REFUSED", ""},

		{"a.real.", dns.TypeA, "NOERROR | a.real. 300 IN A 192.0.2.80", "local udp a.real. A"},
		{"a.real.", dns.TypeMX, "NOERROR | a.real. 300 IN MX 10 mail.real. + A + AAAA", "local udp a.real. MX"},
		{"missing.real.", dns.TypeA, "NXDOMAIN / SOA 300", "local udp missing.real. A"},
		{"broken.real.", dns.TypeA, "SERVFAIL", "local udp broken.real. A"},
		{"a.real.", dns.TypeAXFR, "NOERROR | a.real. 300 IN SOA ns. host. 1 2 3 4 120 | a.real. 300 IN A 192.0.2.80 | a.real. 300 IN SOA ns. host. 1 2 3 4 120", "local tcp a.real. AXFR"},

		{"a.direct.", dns.TypeA, "NOERROR | a.direct. 300 IN A 192.0.2.80", "local udp a.direct. A"},
		{"a.direct.", dns.TypeTXT, `NOERROR | a.direct. 300 IN TXT "hello"`, "local udp a.direct. TXT"},

		{"a.first.", dns.TypeA, "NOERROR | a.first. 300 IN A 192.0.2.80", "local udp a.first. A"},
		{"missing.first.", dns.TypeA, "NOERROR | missing.first. 60 IN A 198.18.0.4", "local udp missing.first. A"},
		{"broken.first.", dns.TypeAAAA, "NOERROR | broken.first. 60 IN AAAA fd74:7072:6f78::5", "local udp broken.first. AAAA"},
		{"unwilling.first.", dns.TypeA, "REFUSED", "local udp unwilling.first. A"},
		{"unwanted.direct.", dns.TypeA, "NOERROR | unwanted.direct. 60 IN A 198.18.0.6", "local udp unwanted.direct. A"},
		{"unwanted.direct.", dns.TypeMX, "NOERROR | unwanted.direct. 300 IN MX 10 mail.real.", "local udp unwanted.direct. MX"},

		{"a.refused.", dns.TypeA, "REFUSED", ""},
		{"a.nx.", dns.TypeTXT, "NXDOMAIN", ""},
	}
	for _, network := range []string{"udp", "tcp"} {
		for _, edns := range []bool{false, true} {
			s.Reset() // forgets answers, so that every round is the first
			for _, tt := range tests {
				req := new(dns.Msg).SetQuestion(tt.name, tt.qtype)
				if edns {
					req.SetEdns0(4096, true)
				}
				seen.take()
				got := text(ask(t, network, addrs[network], req))
				if got != tt.want {
					t.Errorf("%s edns=%v %s %s:\n got %s\nwant %s", network, edns, tt.name, dns.TypeToString[tt.qtype], got, tt.want)
				}
				var want []string
				if tt.seen != "" {
					want = []string{tt.seen}
				}
				if got := seen.take(); !slices.Equal(got, want) {
					t.Errorf("%s edns=%v %s %s: resolvers heard %q, want %q", network, edns, tt.name, dns.TypeToString[tt.qtype], got, want)
				}
			}
			want := []string{"a.direct [192.0.2.80]", "unwanted.direct [192.0.2.80]", "unwanted.direct [192.0.2.25 2001:db8::25]"}
			if got := admitted.take(); !cmp.Equal(got, want) {
				t.Errorf("admitted %q, want %q", got, want)
			}
		}
	}
	st := s.Stats()
	if st.Synthetic != 4*15 || st.Local != 4*11 || st.Remote != 4*4 || st.Refused != 4*5 || st.Failed != 0 || st.Dropped != 0 || st.Pool.Names != 6 {
		t.Errorf("%+v", st)
	}
}

func TestServeLongAnswers(t *testing.T) {
	var seen asked
	local := startResolver(t, "local", &seen)
	var d net.Dialer
	s := newServer(t, Options{Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return d.DialContext(ctx, network, local)
	}})
	addrs := start(t, s, plain)
	req := new(dns.Msg).SetQuestion("a.real.", dns.TypeNULL)
	small := ask(t, "udp", addrs["udp"], req)
	req.SetEdns0(4096, false)
	big := ask(t, "udp", addrs["udp"], req)
	whole := ask(t, "tcp", addrs["tcp"], req)
	if n := len(small.Answer); !small.Truncated || n == 0 || n > 5 {
		t.Errorf("without EDNS: %s", text(small))
	}
	big.Compress = true
	if n := len(big.Answer); !big.Truncated || n <= len(small.Answer) || big.Len() > udpSize {
		t.Errorf("with EDNS: %d bytes, %s", big.Len(), text(big))
	}
	if whole.Truncated || len(whole.Answer) != 40 {
		t.Errorf("by TCP: %s", text(whole))
	}
	if got, want := seen.take(), []string{"local udp a.real. NULL", "local tcp a.real. NULL"}; !cmp.Equal(got, want) {
		t.Error(cmp.Diff(got, want))
	}
}

// recorded notes when an answer leaves.
type recorded struct {
	packets
	events *asked
}

func (r recorded) WriteBatch(ds []flow.Datagram) (int, error) {
	r.events.add("answer")
	return r.packets.WriteBatch(ds)
}

func TestServeAdmitsFirst(t *testing.T) {
	var events, seen asked
	local := startResolver(t, "local", &seen)
	var d net.Dialer
	s := newServer(t, Options{
		Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return d.DialContext(ctx, network, local)
		},
		Admit: func(name string, a Asker, addrs []netip.Addr, ttl time.Duration) error {
			events.add(fmt.Sprint("admit ", addrs, " ", ttl, " for ", a.Addr))
			return nil
		},
	})
	addr := start(t, s, func(p packets) flow.PacketConn { return recorded{p, &events} })["udp"]
	ask(t, "udp", addr, new(dns.Msg).SetQuestion("a.direct.", dns.TypeHTTPS))
	ask(t, "udp", addr, new(dns.Msg).SetQuestion("a.direct.", dns.TypeA))
	ask(t, "udp", addr, new(dns.Msg).SetQuestion("a.direct.", dns.TypeA)) // from the cache
	want := []string{"admit [192.0.2.81 2001:db8::81] 5m0s for 127.0.0.1", "answer",
		"admit [192.0.2.80] 5m0s for 127.0.0.1", "answer", "admit [192.0.2.80] 5m0s for 127.0.0.1", "answer"}
	if got := events.take(); !cmp.Equal(got, want) {
		t.Error(cmp.Diff(got, want))
	}
}

// TestServeWithoutAdmission: where no address is let pass, as the kernel's set is
// full, a client is not given one that it cannot reach.
func TestServeWithoutAdmission(t *testing.T) {
	var seen asked
	local := startResolver(t, "local", &seen)
	var d net.Dialer
	s := newServer(t, Options{
		Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return d.DialContext(ctx, network, local)
		},
		Admit: func(string, Asker, []netip.Addr, time.Duration) error { return errors.New("full") },
	})
	addr := start(t, s, plain)["udp"]
	for _, qtype := range []uint16{dns.TypeA, dns.TypeAAAA} {
		resp := ask(t, "udp", addr, new(dns.Msg).SetQuestion("a.direct.", qtype))
		if len(resp.Answer) != 1 {
			t.Fatal(resp)
		}
		var a netip.Addr
		switch rr := resp.Answer[0].(type) {
		case *dns.A:
			a, _ = netip.AddrFromSlice(rr.A)
		case *dns.AAAA:
			a, _ = netip.AddrFromSlice(rr.AAAA)
		}
		if name, ok := s.Lookup(a.Unmap()); name != "a.direct" || !ok {
			t.Errorf("%v: not synthetic", resp.Answer)
		}
	}
	if resp := ask(t, "udp", addr, new(dns.Msg).SetQuestion("a.direct.", dns.TypeHTTPS)); len(resp.Answer) != 0 {
		t.Errorf("hints of addresses: %v", resp)
	}
}

// Many questions on one connection, and a client that leaves in the middle.
func TestServeStream(t *testing.T) {
	s := newServer(t, Options{})
	addr := start(t, s, plain)["tcp"]
	conn, err := dns.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	for i := range 20 {
		req := new(dns.Msg).SetQuestion(fmt.Sprintf("host%d.syn.", i), dns.TypeA)
		if err := conn.WriteMsg(req); err != nil {
			t.Fatal(err)
		}
		resp, err := conn.ReadMsg()
		if err != nil || resp.Id != req.Id || len(resp.Answer) != 1 {
			t.Fatalf("%v, %v", resp, err)
		}
	}
	half, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	half.Write([]byte{0, 50, 1, 2, 3})
	half.Close()
	ask(t, "tcp", addr, new(dns.Msg).SetQuestion("a.syn.", dns.TypeA))
}

// queued is packets whose queue can be read without waiting.
type queued struct{ packets }

func (q queued) Control(f func(int) error) error {
	c, err := q.SyscallConn()
	if err == nil {
		c.Control(func(fd uintptr) { err = f(int(fd)) })
	}
	return err
}

func (q queued) TryReadBatch(ds []flow.Datagram) (n int, err error) {
	err = q.Control(func(fd int) error {
		for n < len(ds) {
			d := &ds[n]
			size, from, err := unix.Recvfrom(fd, d.Data, unix.MSG_DONTWAIT)
			if err != nil {
				return nil // no more
			}
			sa := from.(*unix.SockaddrInet4)
			d.Data, d.Src, d.Dst = d.Data[:size], netip.AddrPortFrom(netip.AddrFrom4(sa.Addr), uint16(sa.Port)), q.addr()
			n++
		}
		return nil
	})
	return n, err
}

// TestServeTheRest: what has come when it ends is answered, or left for whoever
// tells the clients.
func TestServeTheRest(t *testing.T) {
	s := newServer(t, Options{Dial: func(ctx context.Context, _, _ string) (net.Conn, error) { return nil, context.Cause(ctx) }})
	pc := queued{listen(t)}
	client, err := net.Dial("udp", pc.addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	const n = 100 // more than a batch
	for i := range n {
		b, _ := new(dns.Msg).SetQuestion(fmt.Sprintf("h%d.syn.", i), dns.TypeA).Pack()
		if i%4 == 3 { // what a resolver would be asked
			b, _ = new(dns.Msg).SetQuestion("a.real.", dns.TypeA).Pack()
		}
		if _, err := client.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.ServeUDP(ctx, pc); err != nil {
		t.Fatal(err)
	}
	answers := 0
	client.SetReadDeadline(time.Now().Add(time.Second))
	for ; answers < n; answers++ {
		if _, err := client.Read(make([]byte, 1500)); err != nil {
			break
		}
	}
	left, _ := s.Left()
	if answers != n*3/4 || len(left) != n/4 {
		t.Errorf("%d answers and %d left, want %d and %d", answers, len(left), n*3/4, n/4)
	}
	if _, err := pc.ReadBatch(make([]flow.Datagram, 1)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the socket is open: %v", err)
	}
}

// TestServeTooMany: who asks when too many questions are under way hears so at
// once, and what is answered from the table is not held up.
func TestServeTooMany(t *testing.T) {
	s := newServer(t, Options{})
	for range maxSlow {
		s.slow <- struct{}{}
	}
	addr := start(t, s, plain)["udp"]
	edns := new(dns.Msg).SetQuestion("a.real.", dns.TypeA)
	edns.SetEdns0(1232, true)
	for want, req := range map[string]*dns.Msg{
		"SERVFAIL": new(dns.Msg).SetQuestion("a.REAL.", dns.TypeA), "SERVFAIL ": edns,
		"NOERROR": new(dns.Msg).SetQuestion("a.proxied.", dns.TypeA),
	} {
		if got := dns.RcodeToString[ask(t, "udp", addr, req).Rcode]; got != strings.TrimSpace(want) {
			t.Errorf("%v: %s, want %s", req.Question, got, want)
		}
	}
	st := s.Stats()
	for range 1000 { // what has left is counted after that
		if st.Synthetic != 0 {
			break
		}
		time.Sleep(time.Millisecond)
		st = s.Stats()
	}
	if st.Dropped != 2 || st.Synthetic != 1 {
		t.Errorf("%+v", st)
	}
}

// TestFit: what came by TCP goes by UDP with as much of it as the client takes,
// and says if that is not all.
func TestFit(t *testing.T) {
	answer := func(records int, edns bool) []byte {
		a := new(dns.Msg).SetQuestion("long.example.", dns.TypeTXT)
		a.Response = true
		for i := range records {
			rr, err := dns.NewRR(fmt.Sprintf("long.example. 300 IN TXT %q", strings.Repeat(fmt.Sprint(i%10), 200)))
			if err != nil {
				t.Fatal(err)
			}
			a.Answer = append(a.Answer, rr)
		}
		if edns {
			a.SetEdns0(4096, true)
		}
		return pack(t, a)
	}
	question := func(size uint16) []byte {
		q := new(dns.Msg).SetQuestion("long.example.", dns.TypeTXT)
		if size > 0 {
			q.SetEdns0(size, false)
		}
		return pack(t, q)
	}
	for _, c := range []struct {
		question, answer []byte
		most             int // bytes
		records          int
		truncated        bool
	}{
		{question(0), answer(2, false), 512, 2, false},
		{question(0), answer(3, false), 512, 2, true},
		{question(0), answer(300, false), 512, 2, true},
		{question(512), answer(3, true), 512, 2, true},
		{question(100), answer(3, true), 512, 2, true}, // RFC 6891: no less than 512
		{question(1232), answer(5, true), 1232, 5, false},
		{question(1232), answer(6, true), 1232, 5, true},
		{question(4096), answer(6, true), 4096, 6, false},
		{question(65535), answer(300, true), 65535, 300, false},
	} {
		got := Fit(c.question, c.answer)
		var m dns.Msg
		if err := m.Unpack(got); err != nil {
			t.Fatal(err)
		}
		if len(got) > c.most || len(m.Answer) != c.records || m.Truncated != c.truncated || len(m.Question) != 1 {
			t.Errorf("%d bytes of %d, %d records, truncated %v", len(got), c.most, len(m.Answer), m.Truncated)
		}
		if !m.Truncated && !slices.Equal(got, c.answer) && len(got) >= len(c.answer) {
			t.Error("what fits was changed")
		}
	}
	rubbish := []byte(strings.Repeat("rubbish", 1000))
	for _, q := range [][]byte{nil, rubbish, question(0)} {
		if got := Fit(q, rubbish); !slices.Equal(got, rubbish) {
			t.Errorf("%d bytes that are no DNS were changed", len(got))
		}
	}
	long := answer(3, false)
	if got := Fit(nil, long); !slices.Equal(got, long) {
		t.Error("the answer to what is no question was changed")
	}
}

func TestFailed(t *testing.T) {
	q := new(dns.Msg).SetQuestion("WWW.example.", dns.TypeHTTPS)
	for _, edns := range []bool{false, true} {
		if edns {
			q.SetEdns0(1232, true)
		}
		var a dns.Msg
		if err := a.Unpack(Failed(pack(t, q))); err != nil {
			t.Fatal(err)
		}
		if a.Id != q.Id || !a.Response || a.Rcode != dns.RcodeServerFailure || !cmp.Equal(a.Question, q.Question) || (a.IsEdns0() != nil) != edns || !a.RecursionDesired {
			t.Errorf("%v", &a)
		}
		if b := Failed(pack(t, &a)); b != nil {
			t.Errorf("an answer is answered: %x", b)
		}
	}
	for _, b := range []string{"", "rubbish", "rather a lot of rubbish, in fact"} {
		if a := Failed([]byte(b)); a != nil {
			t.Errorf("%q is answered: %x", b, a)
		}
	}
}

func pack(t *testing.T, m *dns.Msg) []byte {
	t.Helper()
	b, err := m.Pack()
	if err != nil {
		t.Fatal(err)
	}
	return b
}
