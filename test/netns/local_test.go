package netns_test

import (
	"net"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// Topology: world. The gateway itself is the one that fetches; with a stub of
// its own on 127.0.0.53 in the second test:
//
//	curl on gateway --output--> lo --tproxy--> tproxyd --SOCKS--> socks1 --> outside
//	resolver library --53--> tproxyd --53--> stub 127.0.0.53 --53--> (taken again) --> inside

func TestLocalOutput(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one, _ := w.dante(t)
	startWeb(t, w.gateway, lanAt, lanAt6, wanAt, "127.0.0.1:8080", "[::1]:8080")
	d := serve(t, w.gateway, settings{local: true, routes: `SERVER one 198.51.100.11 udp=off
DIRECT 198.51.100.0/24
DIRECT 2001:db8:2::/64
DENY 203.0.113.80 eq 81
SOCKD5 @=one *
`})

	w.gateway.curl(t, "http://www.example.org/local").fetched(t, socks1Out, socks1Out6)
	w.gateway.curl(t, "http://www.example.org/local", "-6").fetched(t, socks1Out, socks1Out6)
	w.gateway.curl(t, "http://"+outsideAt+"/local").fetched(t, socks1Out)
	w.gateway.curl(t, "http://["+outsideAt6+"]/local").fetched(t, socks1Out6)
	w.gateway.curl(t, "http://"+insideAt+"/local").fetched(t, wanAt)
	w.gateway.curl(t, "http://["+insideAt6+"]/local").fetched(t, wanAt6)
	if n := len(one.carriedBy("", "203.0.113.80.80")); n > 4 {
		t.Errorf("a loop: danted carried %d connections for at most four\n%s", n, one.log())
	}

	// Refusals are as quick as for the LAN.
	began := time.Now()
	c, err := w.gateway.dial("tcp", outsideAt+":81", 5*time.Second)
	if err == nil {
		c.Close()
	}
	atOnce(t, "DENY", began, err)
	for _, a := range []string{outsideAt, outsideAt6} {
		began = time.Now()
		atOnce(t, "UDP to "+a, began, w.gateway.udp(net.JoinHostPort(a, "443")))
	}

	// The gateway's own services answer itself, the LAN and the uplink, and
	// the LAN is served as ever.
	w.gateway.curl(t, "http://127.0.0.1:8080/").fetched(t, "127.0.0.1")
	w.gateway.curl(t, "http://[::1]:8080/").fetched(t, "::1")
	w.gateway.curl(t, "http://"+lanAt+"/").fetched(t, lanAt)
	w.client.curl(t, "http://"+lanAt+"/").fetched(t, clientAt)
	w.client.curl(t, "http://["+lanAt6+"]/").fetched(t, clientAt6)
	w.outside.curl(t, "http://"+wanAt+"/").fetched(t, outsideAt)
	w.client.curl(t, "http://www.example.org/lan").fetched(t, socks1Out, socks1Out6)

	// Killed: the gateway's own flows are refused, too, and none leaks.
	w.observe(t)
	d.process.kill()
	for _, a := range []string{outsideAt, outsideAt6} {
		began = time.Now()
		c, err := w.gateway.dial("tcp", net.JoinHostPort(a, "80"), 5*time.Second)
		if err == nil {
			c.Close()
		}
		atOnce(t, "dead daemon, own TCP to "+a, began, err)
		began = time.Now()
		atOnce(t, "dead daemon, own UDP to "+a, began, w.gateway.udp(net.JoinHostPort(a, "443")))
	}
	if n, who := w.leaked(t); n != 0 {
		t.Errorf("%d packets leaked:\n%s", n, who)
	}
	w.gateway.curl(t, "http://"+insideAt+"/dead").fetched(t, wanAt)
}

// TestLocalStub: a stub on the gateway that re-asks is not sent in circles
// (R12).
func TestLocalStub(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.dante(t)
	stub := dns.HandlerFunc(func(rw dns.ResponseWriter, q *dns.Msg) {
		m, err := w.gateway.forward(q)
		if err != nil {
			m = new(dns.Msg).SetRcode(q, dns.RcodeServerFailure)
		}
		m.Id = q.Id
		rw.WriteMsg(m)
	})
	server := &dns.Server{PacketConn: w.gateway.listenPacket(t, "udp", "127.0.0.53:53"), Handler: stub}
	go server.ActivateAndServe()
	w.gateway.resolver(t, "127.0.0.53")
	serve(t, w.gateway, settings{local: true, resolvers: []string{"127.0.0.53"}, routes: "SERVER one 198.51.100.11\nDIRECT 198.51.100.0/24\nSOCKD5 @=one *\nRESOLVE local *.example\n"})

	for _, h := range []*host{w.gateway, w.client} {
		if got := h.dig(t, insideNS, "printer.lan", "A"); len(got) != 1 || got[0] != clientAt {
			t.Errorf("%s: printer.lan: %v", h.name, got)
		}
		if got := h.dig(t, insideNS, "direct.example", "A"); len(got) != 1 || got[0] != insideAt {
			t.Errorf("%s: direct.example: %v", h.name, got)
		}
	}
	if n := len(w.insideDNS.questions("printer.lan")); n == 0 || n > 4 {
		t.Errorf("the inside was asked for printer.lan %d times", n)
	}
	w.gateway.curl(t, "http://www.example.org/stub").fetched(t, socks1Out, socks1Out6)
}

// forward is what a stub does: it asks the inside's name server.
func (h *host) forward(q *dns.Msg) (*dns.Msg, error) {
	var m *dns.Msg
	err := h.in(func() (err error) {
		m, _, err = (&dns.Client{Timeout: 2 * time.Second}).Exchange(q.Copy(), insideNS+":53")
		return err
	})
	return m, err
}
