package fakedns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
	"github.com/tproxyd/tproxyd/pkg/flow"
)

// Where the servers of the tests ask; dial leads them elsewhere.
var (
	resolver1 = netip.MustParseAddrPort("192.0.2.53:53")
	resolver2 = netip.MustParseAddrPort("192.0.2.54:53")
	resolver3 = netip.MustParseAddrPort("192.0.2.55:53")
	client    = Asker{Addr: netip.MustParseAddr("203.0.113.7"), Server: resolver3}
)

// decide goes by the last label of a name.
func decide(name string, _ Asker) (Verdict, bool) {
	switch name[strings.LastIndexByte(name, '.')+1:] {
	case "real", "arpa":
		return Real, true
	case "direct":
		return RealDirect, true
	case "first":
		return LocalFirst, true
	case "refused":
		return Refused, true
	case "nx":
		return NXDomain, true
	}
	return Synthetic, true
}

func mustRR(s string) dns.RR {
	rr, err := dns.NewRR(s)
	if err != nil {
		panic(err)
	}
	return rr
}

// zone is what a resolver of the tests says. Where the first label is not a
// word of its own, every name has the same records.
func zone(req *dns.Msg) *dns.Msg {
	q := req.Question[0]
	resp := new(dns.Msg).SetReply(req)
	if opt := req.IsEdns0(); opt != nil {
		resp.SetEdns0(4096, opt.Do())
	}
	answer := func(rrs ...string) {
		for _, s := range rrs {
			resp.Answer = append(resp.Answer, mustRR(q.Name+" 300 IN "+s))
		}
	}
	soa := mustRR(q.Name + " 300 IN SOA ns. host. 1 2 3 4 120")
	switch word, _, _ := strings.Cut(strings.ToLower(q.Name), "."); word {
	case "missing":
		resp.Rcode, resp.Ns = dns.RcodeNameError, []dns.RR{soa}
		return resp
	case "broken":
		resp.Rcode = dns.RcodeServerFailure
		return resp
	case "silent":
		return nil
	case "unwilling":
		resp.Rcode = dns.RcodeRefused
		return resp
	}
	if req.Opcode != dns.OpcodeQuery {
		return resp
	}
	switch q.Qtype {
	case dns.TypeA:
		answer("A 192.0.2.80")
	case dns.TypeAAAA:
		answer("AAAA 2001:db8::80")
	case dns.TypeTXT:
		answer("TXT hello")
	case dns.TypeMX:
		answer("MX 10 mail.real.")
		resp.Extra = append(resp.Extra, mustRR("mail.real. 300 IN A 192.0.2.25"), mustRR("mail.real. 300 IN AAAA 2001:db8::25"))
	case dns.TypeSRV:
		answer("SRV 1 2 443 mail.real.")
	case dns.TypePTR:
		answer("PTR host.real.")
	case dns.TypeHTTPS:
		answer("HTTPS 1 . alpn=h3 ipv4hint=192.0.2.81 ipv6hint=2001:db8::81")
	case dns.TypeAXFR:
		answer("SOA ns. host. 1 2 3 4 120", "A 192.0.2.80", "SOA ns. host. 1 2 3 4 120")
	case dns.TypeNULL: // something long
		for i := range 40 {
			answer(fmt.Sprintf("TXT %d%s", i, strings.Repeat("x", 90)))
		}
	default:
		resp.Ns = []dns.RR{soa}
	}
	return resp
}

// asked is a list of what resolvers were asked.
type asked struct {
	mu   sync.Mutex
	list []string
}

func (a *asked) add(s string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.list = append(a.list, s)
}

// take returns the list and begins a new one.
func (a *asked) take() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	list := a.list
	a.list = nil
	return list
}

// startResolver serves zone by UDP and TCP on loopback.
func startResolver(t testing.TB, way string, seen *asked) (addr string) {
	t.Helper()
	h := dns.HandlerFunc(func(w dns.ResponseWriter, req *dns.Msg) {
		network := w.RemoteAddr().Network()
		q := req.Question[0]
		seen.add(fmt.Sprint(way, " ", network, " ", strings.ToLower(q.Name), " ", dns.TypeToString[q.Qtype]))
		resp := zone(req)
		if resp == nil {
			return
		}
		if network == "udp" {
			size := dns.MinMsgSize
			if opt := req.IsEdns0(); opt != nil {
				size = int(opt.UDPSize())
			}
			resp.Truncate(size)
		}
		w.WriteMsg(resp)
	})
	pc, ln := listenBoth(t)
	for _, srv := range []*dns.Server{{PacketConn: pc.UDPConn, Handler: h}, {Listener: ln, Handler: h, MsgAcceptFunc: acceptAll}} {
		srv.MsgAcceptFunc = acceptAll
		ready, done := make(chan struct{}), make(chan error, 1)
		srv.NotifyStartedFunc = func() { close(ready) }
		go func() { done <- srv.ActivateAndServe() }()
		<-ready
		t.Cleanup(func() {
			srv.Shutdown()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}
	return pc.addr().String()
}

// listenBoth finds a port that is free for both.
func listenBoth(t testing.TB) (packets, net.Listener) {
	t.Helper()
	var err error
	for range 100 {
		pc := listen(t)
		var ln net.Listener
		if ln, err = net.Listen("tcp", pc.addr().String()); err == nil {
			return pc, ln
		}
		pc.Close()
	}
	t.Fatal(err)
	return packets{}, nil
}

func acceptAll(dns.Header) dns.MsgAcceptAction { return dns.MsgAccept }

// newServer makes a server that serves nothing yet.
func newServer(t testing.TB, o Options) *Server {
	t.Helper()
	if o.Dir == "" {
		o.Dir = t.TempDir()
	}
	o.Pool4, o.Pool6 = pool4, pool6
	if o.Decide == nil {
		o.Decide = decide
	}
	if o.Resolvers == nil {
		o.Resolvers = []netip.AddrPort{resolver1}
	}
	s, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// start serves by UDP and TCP on loopback; the addresses are those to ask.
func start(t testing.TB, s *Server, wrap func(packets) flow.PacketConn) map[string]string {
	t.Helper()
	pc := listen(t)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 2)
	go func() { done <- s.ServeUDP(ctx, wrap(pc)) }()
	go func() { done <- s.ServeTCP(ctx, ln) }()
	t.Cleanup(func() {
		cancel()
		if err := errors.Join(<-done, <-done); err != nil {
			t.Error(err)
		}
	})
	return map[string]string{"udp": pc.addr().String(), "tcp": ln.Addr().String()}
}

func plain(p packets) flow.PacketConn { return p }

// ask sends a question and checks what every answer must be like.
func ask(t testing.TB, network, addr string, req *dns.Msg) *dns.Msg {
	t.Helper()
	c := &dns.Client{Net: network, Timeout: 10 * time.Second}
	resp, _, err := c.Exchange(req, addr)
	if err != nil {
		t.Fatalf("%s %v: %v", network, req.Question, err)
	}
	if !cmp.Equal(resp.Question, req.Question) || !resp.Response || !resp.RecursionAvailable || resp.Opcode != req.Opcode {
		t.Errorf("%s: an answer to\n%v\nis\n%v", network, req, resp)
	}
	if (req.IsEdns0() == nil) != (resp.IsEdns0() == nil) {
		t.Errorf("%s %v: EDNS in the question %v, in the answer %v", network, req.Question, req.IsEdns0(), resp.IsEdns0())
	}
	return resp
}

// text is an answer in one line.
func text(m *dns.Msg) string {
	var b strings.Builder
	b.WriteString(dns.RcodeToString[m.Rcode])
	if m.Truncated {
		b.WriteString(" TC")
	}
	for _, rr := range m.Answer {
		fmt.Fprintf(&b, " | %s", strings.ReplaceAll(rr.String(), "\t", " "))
	}
	for _, rr := range m.Ns {
		fmt.Fprintf(&b, " / %s %d", dns.TypeToString[rr.Header().Rrtype], rr.Header().Ttl)
	}
	for _, rr := range m.Extra {
		if rr.Header().Rrtype != dns.TypeOPT {
			fmt.Fprintf(&b, " + %s", dns.TypeToString[rr.Header().Rrtype])
		}
	}
	return b.String()
}

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
		{"unwanted.direct.", dns.TypeA, "SERVFAIL", "local udp unwanted.direct. A"},

		{"a.first.", dns.TypeA, "NOERROR | a.first. 300 IN A 192.0.2.80", "local udp a.first. A"},
		{"missing.first.", dns.TypeA, "NOERROR | missing.first. 60 IN A 198.18.0.4", "local udp missing.first. A"},
		{"broken.first.", dns.TypeAAAA, "NOERROR | broken.first. 60 IN AAAA fd74:7072:6f78::5", "local udp broken.first. AAAA"},
		{"unwilling.first.", dns.TypeA, "REFUSED", "local udp unwilling.first. A"},

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
			want := []string{"a.direct [192.0.2.80]", "unwanted.direct [192.0.2.80]"}
			if got := admitted.take(); !cmp.Equal(got, want) {
				t.Errorf("admitted %q, want %q", got, want)
			}
		}
	}
	st := s.Stats()
	if st.Synthetic != 4*14 || st.Local != 4*10 || st.Remote != 4*4 || st.Refused != 4*5 || st.Failed != 4 || st.Dropped != 0 || st.Pool.Names != 5 {
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

// fakeNet is a network of resolvers without sockets, for tests in a bubble.
type fakeNet struct {
	asked
	at map[string]func(network string, req *dns.Msg) *dns.Msg // by address; nil: silence
}

func (f *fakeNet) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	h := f.at[addr]
	if h == nil {
		f.add(network + " " + addr + " refused")
		return nil, errors.New("connection refused")
	}
	a, b := net.Pipe()
	go f.serve(b, network, addr, h)
	return a, nil
}

func (f *fakeNet) serve(c net.Conn, network, addr string, h func(string, *dns.Msg) *dns.Msg) {
	defer c.Close()
	for {
		in := make([]byte, 65535)
		n, err := c.Read(in)
		if err != nil {
			return
		}
		in = in[:n]
		if network == "tcp" {
			in = in[2:] // the writer sends it in one piece
		}
		req := new(dns.Msg)
		if err := req.Unpack(in); err != nil {
			panic(err)
		}
		f.add(network + " " + addr + " " + strings.ToLower(req.Question[0].Name))
		resp := h(network, req)
		if resp == nil {
			continue
		}
		out, err := resp.Pack()
		if err != nil {
			panic(err)
		}
		if network == "tcp" {
			out = append(binary.BigEndian.AppendUint16(nil, uint16(len(out))), out...)
		}
		if _, err := c.Write(out); err != nil {
			return
		}
	}
}

func byZone(_ string, req *dns.Msg) *dns.Msg { return zone(req) }
func silence(string, *dns.Msg) *dns.Msg      { return nil }
func failing(_ string, req *dns.Msg) *dns.Msg {
	return new(dns.Msg).SetRcode(req, dns.RcodeServerFailure)
}

// query asks a server without a socket.
func query(t testing.TB, s *Server, a Asker, req *dns.Msg) *dns.Msg {
	t.Helper()
	b, err := req.Pack()
	if err != nil {
		t.Fatal(err)
	}
	resp := new(dns.Msg)
	if err := resp.Unpack(s.answer(t.Context(), b, a, true)); err != nil {
		t.Fatal(err)
	}
	if resp.Id != req.Id {
		t.Errorf("id %d, want %d", resp.Id, req.Id)
	}
	return resp
}

func TestForwardFailover(t *testing.T) {
	const real, first, syn = "NOERROR | a.real. 300 IN A 192.0.2.80", "NOERROR | a.first. 300 IN A 192.0.2.80", "NOERROR | a.first. 60 IN A 198.18.0.1"
	type handler = func(string, *dns.Msg) *dns.Msg
	tests := []struct {
		name     string
		question string
		h        []handler // of the resolvers; nil refuses connections
		want     string
		took     time.Duration
	}{
		{"good", "a.real.", []handler{byZone, silence}, real, 0},
		{"silent, good", "a.real.", []handler{silence, byZone}, real, tryTimeout},
		{"closed, good", "a.real.", []handler{nil, byZone}, real, 0},
		{"failing, good", "a.real.", []handler{failing, byZone}, real, 0},
		{"failing, silent", "a.real.", []handler{failing, silence}, "SERVFAIL", tryTimeout},
		{"all closed", "a.real.", []handler{nil, nil}, "SERVFAIL", 0},
		{"all silent", "a.real.", []handler{silence, silence}, "SERVFAIL", 5 * time.Second},
		{"one, silent", "a.real.", []handler{silence}, "SERVFAIL", 2 * tryTimeout},
		{"none", "a.real.", []handler{}, "SERVFAIL", 0},
		{"answers to other questions", "a.real.", []handler{func(_ string, req *dns.Msg) *dns.Msg {
			r := zone(req)
			r.Id++
			return r
		}, func(_ string, req *dns.Msg) *dns.Msg {
			r := zone(req)
			r.Question[0].Name = "b.real."
			return r
		}, byZone}, real, 2 * tryTimeout},
		{"cut by UDP, good by TCP", "a.real.", []handler{func(network string, req *dns.Msg) *dns.Msg {
			r := zone(req)
			if network == "udp" {
				r.Truncated, r.Answer = true, nil
			}
			return r
		}}, real, 0},
		{"cut by UDP, silent by TCP", "a.real.", []handler{func(network string, req *dns.Msg) *dns.Msg {
			if network == "tcp" {
				return nil
			}
			r := zone(req)
			r.Truncated = true
			return r
		}}, "SERVFAIL", 5 * time.Second},
		{"local first, good", "a.first.", []handler{byZone}, first, 0},
		{"local first, silent", "a.first.", []handler{silence}, syn, 2 * tryTimeout},
		{"local first, all silent", "a.first.", []handler{silence, silence}, syn, 5 * time.Second},
		{"local first, failing", "a.first.", []handler{failing}, syn, 0},
		{"local first, none", "a.first.", []handler{}, syn, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := &fakeNet{at: map[string]func(string, *dns.Msg) *dns.Msg{}}
				list := []netip.AddrPort{}
				for i, h := range tt.h {
					list = append(list, []netip.AddrPort{resolver1, resolver2, resolver3}[i])
					f.at[list[i].String()] = h
				}
				s := newServer(t, Options{Dial: f.Dial, Resolvers: list})
				began := time.Now()
				if got := text(query(t, s, client, new(dns.Msg).SetQuestion(tt.question, dns.TypeA))); got != tt.want {
					t.Errorf("got %s, want %s; asked %q", got, tt.want, f.take())
				}
				if took := time.Since(began); took != tt.took {
					t.Errorf("took %v, want %v", took, tt.took)
				}
			})
		})
	}
}

func TestForwardCache(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeNet{at: map[string]func(string, *dns.Msg) *dns.Msg{resolver1.String(): byZone}}
		s := newServer(t, Options{Dial: f.Dial})
		do := new(dns.Msg).SetQuestion("a.real.", dns.TypeA).SetEdns0(1232, true)
		steps := []struct {
			after time.Duration
			req   *dns.Msg
			want  string
			asked int
		}{
			{0, new(dns.Msg).SetQuestion("a.real.", dns.TypeA), "NOERROR | a.real. 300 IN A 192.0.2.80", 1},
			{100 * time.Second, new(dns.Msg).SetQuestion("a.real.", dns.TypeA), "NOERROR | a.real. 200 IN A 192.0.2.80", 0},
			{0, new(dns.Msg).SetQuestion("A.Real.", dns.TypeA), "NOERROR | a.real. 200 IN A 192.0.2.80", 0},
			{0, do, "NOERROR | a.real. 300 IN A 192.0.2.80", 1}, // may be another answer
			{199 * time.Second, new(dns.Msg).SetQuestion("a.real.", dns.TypeA), "NOERROR | a.real. 1 IN A 192.0.2.80", 0},
			{time.Second, new(dns.Msg).SetQuestion("a.real.", dns.TypeA), "NOERROR | a.real. 300 IN A 192.0.2.80", 1},
			// "No" for the time of the SOA's minimum, failures not at all.
			{0, new(dns.Msg).SetQuestion("missing.real.", dns.TypeA), "NXDOMAIN / SOA 300", 1},
			{119 * time.Second, new(dns.Msg).SetQuestion("missing.real.", dns.TypeA), "NXDOMAIN / SOA 181", 0},
			{time.Second, new(dns.Msg).SetQuestion("missing.real.", dns.TypeA), "NXDOMAIN / SOA 300", 1},
			{0, new(dns.Msg).SetQuestion("broken.real.", dns.TypeA), "SERVFAIL", 1},
			{0, new(dns.Msg).SetQuestion("broken.real.", dns.TypeA), "SERVFAIL", 1},
			{0, new(dns.Msg).SetQuestion("a.real.", dns.TypeAXFR), "NOERROR | a.real. 300 IN SOA ns. host. 1 2 3 4 120 | a.real. 300 IN A 192.0.2.80 | a.real. 300 IN SOA ns. host. 1 2 3 4 120", 1},
			{0, new(dns.Msg).SetQuestion("a.real.", dns.TypeAXFR), "NOERROR | a.real. 300 IN SOA ns. host. 1 2 3 4 120 | a.real. 300 IN A 192.0.2.80 | a.real. 300 IN SOA ns. host. 1 2 3 4 120", 1},
		}
		for i, st := range steps {
			time.Sleep(st.after)
			if got := text(query(t, s, client, st.req)); got != st.want {
				t.Errorf("step %d: got %s, want %s", i, got, st.want)
			}
			if got := f.take(); len(got) != st.asked {
				t.Errorf("step %d: asked %q, want %d", i, got, st.asked)
			}
		}
	})
}

func TestForwardCoalesces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeNet{at: map[string]func(string, *dns.Msg) *dns.Msg{resolver1.String(): func(_ string, req *dns.Msg) *dns.Msg {
			time.Sleep(time.Second)
			return zone(req)
		}}}
		s := newServer(t, Options{Dial: f.Dial})
		var wg sync.WaitGroup
		for i := range 100 {
			wg.Go(func() {
				time.Sleep(time.Duration(i) * time.Millisecond)
				name := []string{"a.real.", "A.REAL."}[i%2]
				resp := query(t, s, client, new(dns.Msg).SetQuestion(name, dns.TypeA))
				if len(resp.Answer) != 1 || resp.Question[0].Name != name {
					t.Errorf("question %d: %v", i, resp)
				}
			})
		}
		wg.Wait()
		if got := f.take(); len(got) != 1 {
			t.Errorf("%d questions to the resolver, want 1", len(got))
		}
	})
}

// A stub on this host whom we asked asks in turn, and we take its question: it
// must reach the server that the stub meant, not the stub again (R12).
func TestForwardComesBack(t *testing.T) {
	own := netip.MustParseAddr("192.0.2.1")
	stub, behind := netip.MustParseAddrPort("127.0.0.53:53"), netip.MustParseAddrPort("198.51.100.53:53")
	for _, tt := range []struct {
		name      string
		resolvers []netip.AddrPort
		do        bool // the stub asks for more than it was asked
		want      []string
	}{
		{"stub", []netip.AddrPort{stub}, false, []string{"udp 127.0.0.53:53 a.real.", "udp 198.51.100.53:53 a.real."}},
		{"stub, and its own server", []netip.AddrPort{stub, behind}, false, []string{"udp 127.0.0.53:53 a.real.", "udp 198.51.100.53:53 a.real."}},
		// The changed question is another one; it makes one round more.
		{"stub that changes the question", []netip.AddrPort{stub}, true, []string{"udp 127.0.0.53:53 a.real.", "udp 127.0.0.53:53 a.real.", "udp 198.51.100.53:53 a.real."}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var s *Server
				f := &fakeNet{at: map[string]func(string, *dns.Msg) *dns.Msg{
					stub.String(): func(_ string, req *dns.Msg) *dns.Msg {
						again := new(dns.Msg).SetQuestion(req.Question[0].Name, req.Question[0].Qtype)
						if tt.do {
							again.SetEdns0(1232, true)
						}
						resp := query(t, s, Asker{Addr: own, Server: behind}, again)
						resp.Id = req.Id
						return resp
					},
					behind.String(): byZone,
				}}
				s = newServer(t, Options{Dial: f.Dial, Resolvers: tt.resolvers, Own: func(a netip.Addr) bool { return a == own }})
				began := time.Now()
				if got := text(query(t, s, client, new(dns.Msg).SetQuestion("a.real.", dns.TypeA))); got != "NOERROR | a.real. 300 IN A 192.0.2.80" {
					t.Error(got)
				}
				if got := f.take(); !cmp.Equal(got, tt.want) || time.Since(began) != 0 {
					t.Errorf("asked %q in %v, want %q at once", got, time.Since(began), tt.want)
				}
			})
		})
	}
}

func TestSetResolvers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		slow := func(_ string, req *dns.Msg) *dns.Msg {
			time.Sleep(time.Second)
			return zone(req)
		}
		f := &fakeNet{at: map[string]func(string, *dns.Msg) *dns.Msg{resolver1.String(): slow, resolver2.String(): byZone}}
		remote := make(chan netip.AddrPort, 1)
		s := newServer(t, Options{Dial: f.Dial, DialRemote: func(ctx context.Context, _ string, _ Asker, r netip.AddrPort) (net.Conn, error) {
			remote <- r
			return f.Dial(ctx, "tcp", r.String())
		}})
		asks := func(name string, want ...string) {
			t.Helper()
			query(t, s, client, new(dns.Msg).SetQuestion(name, dns.TypeA))
			if got := f.take(); !slices.Equal(got, want) {
				t.Errorf("%s: asked %q, want %q", name, got, want)
			}
		}
		asks("a.real.", "udp 192.0.2.53:53 a.real.")
		asks("a.real.")
		var wg sync.WaitGroup
		wg.Go(func() { asks("b.real.", "udp 192.0.2.53:53 b.real.") })
		synctest.Wait() // the question is under way
		list := []netip.AddrPort{resolver2}
		s.SetResolvers(list)
		list[0] = resolver3 // the list is the caller's
		wg.Wait()
		asks("a.real.", "udp 192.0.2.54:53 a.real.")
		asks("b.real.", "udp 192.0.2.54:53 b.real.") // what the old one said afterwards is not kept either
		query(t, s, client, new(dns.Msg).SetQuestion("a.syn.", dns.TypeTXT))
		if r := <-remote; r != resolver2 {
			t.Errorf("remote resolver %v", r)
		}
		s.SetResolvers(nil)
		if got := text(query(t, s, client, new(dns.Msg).SetQuestion("c.real.", dns.TypeA))); got != "SERVFAIL" {
			t.Error(got)
		}
	})
}

func TestRemoteResolvers(t *testing.T) {
	own := netip.MustParseAddr("192.0.2.54")
	tests := []struct {
		list []string
		a    string // whom the client asked
		want string
	}{
		{[]string{"192.0.2.53:53"}, "192.0.2.55:53", "[192.0.2.53:53]"},
		{[]string{"127.0.0.53:53", "192.0.2.54:53", "[::1]:53", "192.0.2.53:53"}, "192.0.2.55:53", "[192.0.2.53:53]"},
		{[]string{"127.0.0.53:53"}, "192.0.2.55:53", "[192.0.2.55:53]"},
		{nil, "192.0.2.54:53", "[]"},
		{nil, "127.0.0.1:53", "[]"},
		{nil, "", "[]"},
	}
	for _, tt := range tests {
		var list []netip.AddrPort
		for _, r := range tt.list {
			list = append(list, netip.MustParseAddrPort(r))
		}
		s := newServer(t, Options{Own: func(a netip.Addr) bool { return a == own }})
		s.SetResolvers(list)
		server, _ := netip.ParseAddrPort(tt.a)
		if got := fmt.Sprint(s.remoteResolvers(Asker{Server: server})); got != tt.want {
			t.Errorf("%v, asked %s: %s, want %s", tt.list, tt.a, got, tt.want)
		}
	}
}

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

func TestResolve(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeNet{at: map[string]func(string, *dns.Msg) *dns.Msg{resolver1.String(): byZone}}
		s := newServer(t, Options{Dial: f.Dial})
		got, err := s.Resolve(t.Context(), "a.syn")
		if fmt.Sprint(got) != "[192.0.2.80 2001:db8::80]" || err != nil {
			t.Errorf("%v, %v", got, err)
		}
		var e *net.DNSError
		if got, err := s.Resolve(t.Context(), "missing.syn"); !errors.As(err, &e) || !e.IsNotFound || len(got) != 0 {
			t.Errorf("%v, %v", got, err)
		}
		if _, err := s.Resolve(t.Context(), "silent.syn"); err == nil {
			t.Error("no error")
		}
		if s.Stats().Pool.Names != 0 {
			t.Error("made a name synthetic")
		}
	})
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
