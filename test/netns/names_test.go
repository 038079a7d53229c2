package netns_test

import (
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// Topology: world. Every question of the client is taken by the gateway,
// whichever resolver it is meant for:
//
//	client --53--> gateway --53--> inside            names that stay local
//	                  '--SOCKS--> socks1 --53--> inside   other types of proxied names
//	                              socks1 --53--> outside  addresses, when it connects

var (
	pool4 = netip.MustParsePrefix("198.18.0.0/15")
	pool6 = netip.MustParsePrefix("fd74:7072:6f78::/96")
)

// dig asks with Debian's dig, which accepts an answer only from the address
// that it asked, and returns the answer section's data.
func (h *host) dig(t testing.TB, server, name string, args ...string) []string {
	t.Helper()
	all := append([]string{tool(t, "dig"), "@" + server, "+short", "+tries=1", "+time=3"}, args...)
	return strings.Fields(h.run(t, command{args: append(all, name)}).ok(t).out)
}

func TestDNS(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.dante(t)
	w.insideDNS.add(t,
		"www.example.org. 60 IN TXT \"known inside\"", "www.example.org. 60 IN MX 10 mail.example.org.",
		"www.example.org. 60 IN A 192.0.2.99", "www.example.org. 60 IN AAAA 2001:db8:bad::1",
		"www.example.org. 60 IN HTTPS 1 . alpn=h2 ipv4hint=192.0.2.99 ipv6hint=2001:db8:bad::1",
		"www.example.org. 60 IN SVCB 1 . alpn=h2 ipv4hint=192.0.2.99",
		"secret.denied.example. 60 IN A 192.0.2.99")
	serve(t, w.gateway, settings{routes: `SERVER one 198.51.100.11
SOCKD5 @=one *.example.org
DENY *.denied.example
DIRECT direct.example
DIRECT 198.51.100.0/24
DEFAULT DENY
`})

	a := w.client.mustLookup(t, insideNS, "www.example.org", dns.TypeA)
	aaaa := w.client.mustLookup(t, insideNS, "www.example.org", dns.TypeAAAA)
	if !pool4.Contains(a) || !pool6.Contains(aaaa) {
		t.Fatalf("www.example.org is %v and %v, want synthetic addresses", a, aaaa)
	}

	// Any resolver, any transport, any family; always the same address.
	for _, server := range []string{insideNS, insideNS6, lanAt, lanAt6, "203.0.113.99", "2001:db8:dead::1"} {
		for _, transport := range []string{"+notcp", "+tcp"} {
			if got := w.client.dig(t, server, "www.example.org", transport, "A"); len(got) != 1 || got[0] != a.String() {
				t.Errorf("A from %s %s: %v, want %v", server, transport, got, a)
			}
		}
		if got := w.client.dig(t, server, "WwW.eXample.org", "AAAA"); len(got) != 1 || got[0] != aaaa.String() {
			t.Errorf("AAAA from %s: %v, want %v", server, got, aaaa)
		}
	}

	// HTTPS and SVCB must not lead around the synthetic address.
	for _, qtype := range []uint16{dns.TypeHTTPS, dns.TypeSVCB} {
		m, err := w.client.ask("udp", insideNS, "www.example.org", qtype)
		if err != nil || m.Rcode != dns.RcodeSuccess || strings.Contains(m.String(), "hint") {
			t.Errorf("%s: %v %v", dns.TypeToString[qtype], err, m)
		}
	}

	// PTR of the pool.
	for _, addr := range []netip.Addr{a, aaaa} {
		reverse, _ := dns.ReverseAddr(addr.String())
		if got := w.client.dig(t, insideNS, reverse, "PTR"); len(got) != 1 || got[0] != "www.example.org." {
			t.Errorf("PTR of %v: %v", addr, got)
		}
	}
	if m, err := w.client.ask("udp", insideNS, "7.7.19.198.in-addr.arpa", dns.TypePTR); err != nil || m.Rcode != dns.RcodeNameError {
		t.Errorf("PTR of an address that no name owns: %v %v", err, m)
	}

	// Other types of a proxied name go to the resolver through SOCKS, by TCP.
	if got := strings.Join(w.client.dig(t, outsideNS, "www.example.org", "TXT"), " "); got != `"known inside"` {
		t.Errorf("TXT: %s", got)
	}
	if got := w.client.dig(t, outsideNS6, "www.example.org", "+tcp", "MX"); len(got) != 2 || got[1] != "mail.example.org." {
		t.Errorf("MX: %v", got)
	}
	asked := w.insideDNS.questions("www.example.org")
	if len(asked) < 2 {
		t.Errorf("TXT and MX were not asked of the inside: %v", asked)
	}
	for _, q := range asked {
		if s := q.From.String(); s != socks1Out && s != socks1Out6 {
			t.Errorf("%v was asked by %v, not through SOCKS", q, s)
		}
		if q.Network != "tcp" || q.Type == "A" || q.Type == "AAAA" {
			t.Errorf("%v: want other types only, over TCP", q)
		}
	}

	// Names that stay here: asked of the resolver, answered as they are.
	if got := w.client.dig(t, outsideNS, "printer.lan", "A"); len(got) != 1 || got[0] != clientAt {
		t.Errorf("printer.lan: %v", got)
	}
	if got := w.client.dig(t, outsideNS, "printer", "A"); len(got) != 1 || got[0] != clientAt {
		t.Errorf("printer: %v", got)
	}
	if got := w.client.dig(t, outsideNS, "2.2.0.10.in-addr.arpa", "PTR"); len(got) != 1 || got[0] != "two.lan." {
		t.Errorf("PTR of a LAN address: %v", got)
	}
	for _, name := range []string{"nas.local", "nowhere", "a.home.arpa"} {
		if m, err := w.client.ask("udp", insideNS, name, dns.TypeA); err != nil || m.Rcode != dns.RcodeNameError {
			t.Errorf("%s: want NXDOMAIN from the resolver: %v %v", name, err, m)
		}
	}
	if got := w.client.dig(t, outsideNS, "direct.example", "A"); len(got) != 1 || got[0] != insideAt {
		t.Errorf("direct.example: %v", got)
	}
	for _, q := range w.insideDNS.questions("direct.example") {
		if s := q.From.String(); s != wanAt && s != wanAt6 {
			t.Errorf("direct.example was asked by %v, want by the gateway", s)
		}
	}

	// A name that only DENY can match is asked of nobody, and refused.
	if denied := w.client.mustLookup(t, insideNS, "secret.denied.example", dns.TypeA); !pool4.Contains(denied) {
		t.Errorf("secret.denied.example is %v", denied)
	}
	w.client.curl(t, "http://secret.denied.example/").refused(t)
	if q := w.insideDNS.questions("secret.denied.example"); len(q) != 0 {
		t.Errorf("a denied name was asked for: %v", q)
	}

	// A synthetic address that no name owns is refused at once.
	for _, u := range []string{"http://198.19.255.1/", "http://[fd74:7072:6f78::fff1]/"} {
		w.client.curl(t, u).refused(t)
	}
	// And the whole way, for good measure.
	w.client.curl(t, "http://www.example.org/dns").fetched(t, socks1Out, socks1Out6)
	if got := w.outsideDNS.questions("www.example.org"); len(got) == 0 {
		t.Errorf("the outside was not asked for the name by the SOCKS server")
	}

	// Large and odd questions are answered, too.
	for i := range 20 {
		w.insideDNS.add(t, fmt.Sprintf("big.lan. 60 IN TXT %q", strings.Repeat(fmt.Sprint(i%10), 200)))
	}
	if got := w.client.dig(t, insideNS, "big.lan", "TXT"); len(got) != 20 {
		t.Errorf("an answer of 4 KB: %d of 20 records", len(got))
	}
	w.insideDNS.mu.Lock()
	w.insideDNS.silent["silent.lan"] = true
	w.insideDNS.mu.Unlock()
	if m, err := w.client.ask("tcp", insideNS, "silent.lan", dns.TypeA); err == nil && m.Rcode != dns.RcodeServerFailure {
		t.Errorf("a resolver that says nothing: %v", m)
	}
}

// TestDNSBurst: a burst from one socket is answered to the last question.
func TestDNSBurst(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	serve(t, w.gateway, settings{routes: "SOCKD5 @=198.51.100.11 *\n"})
	var c net.Conn
	w.client.must(t, w.client.in(func() (err error) {
		c, err = net.Dial("udp", outsideNS+":53")
		return err
	}))
	defer c.Close()
	w.client.must(t, c.(*net.UDPConn).SetReadBuffer(1<<20)) // nobody reads during the burst
	const n = 500
	for i := range n {
		b, err := new(dns.Msg).SetQuestion(fmt.Sprintf("b%d.example.org.", i), dns.TypeA).Pack()
		if err != nil {
			t.Fatal(err)
		}
		c.Write(b)
		if i%50 == 49 {
			time.Sleep(5 * time.Millisecond)
		}
	}
	got := map[string]bool{}
	buf := make([]byte, 1500)
	c.SetReadDeadline(time.Now().Add(5 * time.Second))
	for len(got) < n {
		k, err := c.Read(buf)
		if err != nil {
			t.Fatalf("%d of %d answers: %v", len(got), n, err)
		}
		m := new(dns.Msg)
		if err := m.Unpack(buf[:k]); err != nil || len(m.Answer) != 1 {
			t.Fatalf("%v %v", err, m)
		}
		got[m.Question[0].Name] = true
	}
}
