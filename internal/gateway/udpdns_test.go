package gateway_test

import (
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/tproxyd/tproxyd/internal/socksserver"
	"github.com/tproxyd/tproxyd/pkg/relay"
)

// withoutUDP are servers that do not carry datagrams, each in its way.
var withoutUDP = map[string]struct {
	udp  socksserver.UDP
	rule string
}{
	"REP 7":   {socksserver.UDP{Refuse: 7}, ""},
	"EOF":     {socksserver.UDP{HangUp: true}, ""},
	"udp=off": {socksserver.UDP{}, " udp=off"},
}

// resolver is DNS over TCP: a TXT of as many bytes as the name says. For the name
// "silent" it says nothing, for "closes" it closes.
func startResolver(t testing.TB) string {
	ln := listen(t, "127.0.0.1:0")
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go resolveTXT(c)
		}
	}()
	return ln.Addr().String()
}

func resolveTXT(c net.Conn) {
	defer c.Close()
	conn := dns.Conn{Conn: c}
	for {
		q, err := conn.ReadMsg()
		if err != nil {
			return
		}
		label, _, _ := strings.Cut(q.Question[0].Name, ".")
		n := 0
		if _, err := fmt.Sscan(label, &n); err != nil {
			if label == "silent" {
				io.Copy(io.Discard, c)
			}
			return
		}
		a := new(dns.Msg).SetReply(q)
		for ; n > 0; n -= 200 {
			a.Answer = append(a.Answer, &dns.TXT{Hdr: dns.RR_Header{Name: q.Question[0].Name, Rrtype: dns.TypeTXT, Class: 1, Ttl: 60}, Txt: []string{strings.Repeat("x", min(n, 200))}})
		}
		conn.WriteMsg(a)
	}
}

// newDNSLab starts a gateway whose server carries no datagrams.
func newDNSLab(t *testing.T, kind string) *udpLab {
	t.Helper()
	s := withoutUDP[kind]
	l := newUDPLab(t, slog.LevelInfo, socksserver.Fault{}, s.udp, "SERVER far $S"+s.rule, "SOCKD5 @=far *")
	l.names.owner[netip.MustParseAddr(wwwAt)] = "resolver.example"
	l.finds(startResolver(t))
	return l
}

// finds sets where servers find whatever they are asked for by TCP, and returns
// where it was until now.
func (l *udpLab) finds(at string) (before string) {
	l.lab.mu.Lock()
	defer l.lab.mu.Unlock()
	before, l.lab.at = l.lab.at, at
	return before
}

// asks sends a question for a TXT and returns the answer.
func (l *udpLab) asks(client, resolver, name string, size uint16) *dns.Msg {
	l.t.Helper()
	q := new(dns.Msg).SetQuestion(name, dns.TypeTXT)
	if size > 0 {
		q.SetEdns0(size, false)
	}
	b, err := q.Pack()
	if err != nil {
		l.t.Fatal(err)
	}
	l.put(client, resolver, string(b))
	a := l.answer(client, resolver)
	if a.Id != q.Id || !a.Response || len(a.Question) != 1 || a.Question[0] != q.Question[0] {
		l.t.Fatalf("%v is the answer to %v", a, q)
	}
	return a
}

// answer waits for one.
func (l *udpLab) answer(client, resolver string) *dns.Msg {
	l.t.Helper()
	var line string
	select {
	case line = <-l.replies:
	case line = <-l.refused:
		l.t.Fatal(line)
	}
	text, ok := strings.CutPrefix(line, fmt.Sprintf("%s > %s: ", resolver, client))
	a := new(dns.Msg)
	if err := a.Unpack([]byte(text)); !ok || err != nil {
		l.t.Fatalf("%q: %v", line, err)
	}
	return a
}

// A question to any resolver goes as DNS over TCP where the server has no UDP;
// the answer comes from the resolver that was asked, cut to what fits. Anything
// else is refused at once.
func TestDNSOverTCP(t *testing.T) {
	for kind := range withoutUDP {
		t.Run(kind, func(t *testing.T) {
			l := newDNSLab(t, kind)
			for _, resolver := range []string{"192.0.2.53:53", wwwAt + ":53", "[2001:db8::53]:53"} {
				for _, c := range []struct {
					name      string
					size      uint16
					truncated bool
				}{{"100.example.", 0, false}, {"1000.example.", 0, true}, {"1000.example.", 4096, false}, {"30000.example.", 4096, true}, {"30000.example.", 65000, false}} {
					client := clientAt
					if strings.HasPrefix(resolver, "[") {
						client = "[2001:db8::1]:4000"
					}
					a := l.asks(client, resolver, c.name, c.size)
					if a.Truncated != c.truncated || a.Rcode != dns.RcodeSuccess || !c.truncated && len(a.Answer) == 0 {
						t.Errorf("%s from %s: %d records, truncated %v", c.name, resolver, len(a.Answer), a.Truncated)
					}
				}
			}
			l.put(clientAt, "192.0.2.53:443", "QUIC")
			l.refuses("192.0.2.53:443", relay.RefusePort)
			// The outlet that was refused ends just after the client has heard so.
			for end := time.Now().Add(patience); ; time.Sleep(time.Millisecond) {
				if s := l.packets.Stats(); s.Sessions == 2 && s.Outlets == 2 && s.Flows == 4 {
					break
				} else if time.Now().After(end) {
					t.Fatalf("%+v", s)
				}
			}
			asked := map[string]bool{}
			for len(l.requests) > 0 {
				if r := <-l.requests; r.Network == 0 {
					asked[r.Target.String()] = true
				}
			}
			for _, want := range []string{"192.0.2.53:53", "resolver.example:53", "[2001:db8::53]:53"} {
				if !asked[want] {
					t.Errorf("the server was not asked for %s: %v", want, asked)
				}
			}
			l.ends()
		})
	}
}

// Who asks hears at once that there will be no answer; what is no question is
// dropped, and disturbs nobody.
func TestDNSOverTCPFails(t *testing.T) {
	l := newDNSLab(t, "REP 7")
	const resolver = "192.0.2.53:53"
	if a := l.asks(clientAt, resolver, "closes.example.", 0); a.Rcode != dns.RcodeServerFailure {
		t.Errorf("a resolver that closes: %v", a)
	}
	at := l.finds(closedPort(t))
	if a := l.asks(clientAt, resolver, "100.example.", 1232); a.Rcode != dns.RcodeServerFailure {
		t.Errorf("no resolver: %v", a)
	}
	l.finds(at)
	l.put(clientAt, resolver, "", "rubbish", strings.Repeat("x", 5000))
	if a := l.asks(clientAt, resolver, "100.example.", 0); a.Rcode != dns.RcodeSuccess {
		t.Errorf("%v", a)
	}
	// So many at once, and then too many.
	var questions []string
	for i := range 40 {
		q := new(dns.Msg).SetQuestion("silent.example.", dns.TypeTXT)
		q.Id = uint16(i)
		b, _ := q.Pack()
		questions = append(questions, string(b))
	}
	l.put(clientAt, resolver, questions...)
	for range 40 - 16 {
		if a := l.answer(clientAt, resolver); a.Rcode != dns.RcodeServerFailure {
			t.Errorf("%v", a)
		}
	}
	if s := l.packets.Stats(); s.Sessions != 1 || s.Outlets != 1 || s.Refused != 0 {
		t.Errorf("%+v", s)
	}
	l.ends() // those that are under way end with it
}

// Where the server has UDP a question goes by that, as any datagram.
func TestDNSByUDP(t *testing.T) {
	got := make(chan string, 1)
	udp := socksserver.UDP{OnDatagram: func(r socksserver.Request) { got <- r.Target.String() }}
	l := newUDPLab(t, slog.LevelInfo, socksserver.Fault{}, udp, "SERVER far $S", "SOCKD5 @=far *")
	l.put(clientAt, "127.20.0.53:53", "a question")
	l.wants(got, "127.20.0.53:53")
	if c := l.servers[0].Counts(); c.Total != 1 {
		t.Errorf("%+v", c)
	}
	l.ends()
}
