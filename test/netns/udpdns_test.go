package netns_test

import (
	"net"
	"strings"
	"testing"

	"github.com/miekg/dns"
)

// Topology: world, with port 53 as any other (dns = false): questions are
// datagrams of flows, and go to the resolver that the client asks.
//
//	client --53--> gateway ==UDP ASSOCIATE==> danted, hpsockd --53/udp--> outside
//	                  '=====CONNECT=========> microsocks      --53/tcp--> outside

func TestUDPDNS(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name, network string // as the outside is asked
		start         func(t *testing.T, w *world)
		both          bool // families
		rules         string
	}{
		{"danted", "udp", func(t *testing.T, w *world) { w.dante(t) }, true, ""},
		{"hpsockd", "udp", func(t *testing.T, w *world) { startHpsockd(t, w.socks1, socks1At, socks1Out, "", "") }, false, ""},
		{"microsocks", "tcp", func(t *testing.T, w *world) { startMicrosocks(t, w.socks1, socks1At+":1080") }, true, ""},
		{"danted udp=off", "tcp", func(t *testing.T, w *world) { w.dante(t) }, true, " udp=off"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			test.start(t, w)
			w.outside.udpServices(t, outsideAt, outsideAt6)
			w.outsideDNS.add(t, `big.example.org. 60 IN TXT "`+strings.Repeat("x", 200)+`" "`+strings.Repeat("y", 200)+`" "`+strings.Repeat("z", 200)+`"`)
			serve(t, w.gateway, settings{noDNS: true, local: true, routes: "SERVER one 198.51.100.11" + test.rules + "\nSOCKD5 @=one *\n"})
			w.observe(t)
			servers := []string{outsideNS}
			if test.both {
				servers = append(servers, outsideNS6)
			}
			for _, h := range []*host{w.client, w.gateway} {
				for _, server := range servers {
					if got := strings.Join(h.dig(t, server, "www.example.org", "TXT"), " "); got != `"told by the outside"` {
						t.Errorf("%s: TXT from %s: %s", h.name, server, got)
					}
					if got := h.dig(t, server, "www.example.org", "A"); len(got) != 1 || got[0] != outsideAt {
						t.Errorf("%s: A from %s: %v", h.name, server, got)
					}
				}
			}
			for _, q := range w.outsideDNS.questions("www.example.org") {
				if q.Network != test.network {
					t.Errorf("the outside was asked %v, want over %s", q, test.network)
				}
				switch q.From.String() {
				case socks1Out, socks1Out6, socks1At, socks1At6:
				default:
					t.Errorf("the outside was asked %v, want by socks1", q)
				}
			}
			// What is too long for the client's datagram comes by TCP, of which
			// dig knows by itself.
			m, err := w.client.ask("udp", outsideNS, "big.example.org", dns.TypeTXT)
			if err != nil || !m.Truncated {
				t.Errorf("600 bytes of TXT in 512: %v, want a truncated answer: %v", err, m)
			}
			if got := w.client.dig(t, outsideNS, "big.example.org", "TXT"); len(got) != 3 {
				t.Errorf("600 bytes of TXT: %d of 3 strings", len(got))
			}

			// What is no question.
			for _, to := range servers {
				to = strings.Replace(to, "53", "80", 1)
				c := w.client.connected(t, net.JoinHostPort(to, "7"))
				if test.network == "udp" {
					echoed(t, c, 1200)
				} else {
					refusedAtOnce(t, test.name, c)
				}
			}
			if n, who := w.leaked(t); n != 0 {
				t.Errorf("%d packets leaked:\n%s", n, who)
			}
		})
	}
}
