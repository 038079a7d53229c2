package fakedns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
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
		if err := req.Unpack(in); err != nil || len(req.Question) == 0 {
			return // what the fuzzer has the server forward can be as odd as what it sends
		}
		f.add(network + " " + addr + " " + strings.ToLower(req.Question[0].Name))
		resp := h(network, req)
		if resp == nil {
			continue
		}
		out, err := resp.Pack()
		if err != nil {
			return
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

func silence(string, *dns.Msg) *dns.Msg { return nil }

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

// packets is a PacketConn on a plain UDP socket.
type packets struct{ *net.UDPConn }

func listen(t testing.TB) packets {
	t.Helper()
	c, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	return packets{c}
}

func (p packets) addr() netip.AddrPort { return p.LocalAddr().(*net.UDPAddr).AddrPort() }

func (p packets) ReadBatch(ds []flow.Datagram) (int, error) {
	n, src, err := p.ReadFromUDPAddrPort(ds[0].Data)
	if err != nil {
		return 0, err
	}
	ds[0].Data, ds[0].Src, ds[0].Dst = ds[0].Data[:n], src, p.addr()
	return 1, nil
}

func (p packets) WriteBatch(ds []flow.Datagram) (int, error) {
	for _, d := range ds {
		p.WriteToUDPAddrPort(d.Data, d.Dst)
	}
	return len(ds), nil
}
