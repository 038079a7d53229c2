package netns_test

import (
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// Topology: world. The rules for three ports of the outside change places with
// each reload; the sockets of the client and of the gateway stay, and each
// finds itself treated by the new rule with its next datagram:
//
//	client ---> gateway ==UDP ASSOCIATE==> danted --> outside    SOCKD5
//	client --------------------------------------> outside      DIRECT, as itself
//	client ---> gateway --x                                      DENY

// turns are the verdicts that a port goes through, forwards and backwards, so
// that each follows each.
var turns = []string{"SOCKD5 @=one", "DENY", "DIRECT"}

func TestUDPReload(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.dante(t)
	w.insideDNS.add(t, "www.example.org. 60 IN A "+outsideAt, "www.example.org. 60 IN AAAA "+outsideAt6)
	ports := []string{"1111", "2222", "3333"}
	for _, a := range []string{outsideAt, outsideAt6} {
		for _, port := range ports {
			w.outside.answerUDP(t, net.JoinHostPort(a, port), whoUDP)
		}
	}
	rules := func(step int) string {
		var b strings.Builder
		b.WriteString("SERVER one 198.51.100.11\n")
		for i, port := range ports {
			for _, to := range []string{outsideAt, outsideAt6, "www.example.org"} {
				fmt.Fprintf(&b, "%s %s eq %s proto=udp\n", turns[(i+step)%len(turns)], to, port)
			}
		}
		return b.String()
	}
	d := serve(t, w.gateway, settings{local: true, routes: rules(0)})

	type socket struct {
		conn   *net.UDPConn
		port   int
		what   string
		direct []netip.AddrPort // whom the outside may see if DIRECT; port 0: any
		via    []string         // and if not
	}
	var sockets []*socket
	for _, h := range []*host{w.client, w.gateway} {
		for port := range ports {
			open := func(to string, via ...string) *socket {
				s := &socket{conn: h.connected(t, net.JoinHostPort(to, ports[port])), port: port, via: via}
				s.what = fmt.Sprintf("%s to %v", h.name, s.conn.RemoteAddr())
				sockets = append(sockets, s)
				return s
			}
			for i, to := range []string{outsideAt, outsideAt6} {
				s := open(to, []string{socks1Out, socks1Out6}[i])
				s.direct = append(s.direct, s.conn.LocalAddr().(*net.UDPAddr).AddrPort())
			}
			for _, qtype := range []uint16{dns.TypeA, dns.TypeAAAA} { // the gateway resolves it and sends as itself
				s := open(h.mustLookup(t, insideNS, "www.example.org", qtype).String(), socks1Out, socks1Out6)
				for _, own := range []string{wanAt, wanAt6} {
					s.direct = append(s.direct, netip.AddrPortFrom(netip.MustParseAddr(own), 0))
				}
			}
		}
	}
	for _, step := range []int{0, 1, 2, 3, 2, 1, 0, 1} {
		d.routes(t, rules(step))
		d.reload(t)
		for _, verdict := range turns {
			w.observe(t)
			for _, s := range sockets {
				if turns[(s.port+step)%len(turns)] != verdict {
					continue
				}
				what := fmt.Sprintf("step %d, %s, now %s", step, s.what, verdict)
				if verdict == "DENY" {
					refusedAtOnce(t, what, s.conn)
					continue
				}
				for range 2 { // the next datagram, and the one after it
					b, err := say(s.conn, []byte("who"), time.Second)
					if err != nil {
						t.Errorf("%s: %v", what, err)
						break
					}
					saw := netip.MustParseAddrPort(string(b))
					if verdict == "DIRECT" && !slices.Contains(s.direct, saw) && !slices.Contains(s.direct, netip.AddrPortFrom(saw.Addr(), 0)) {
						t.Errorf("%s: the outside saw %v, want one of %v", what, saw, s.direct)
					}
					if verdict != "DIRECT" && !slices.Contains(s.via, saw.Addr().String()) {
						t.Errorf("%s: the outside saw %v, want one of %v", what, saw, s.via)
					}
				}
			}
			if n, who := w.leaked(t); n != 0 && verdict != "DIRECT" {
				t.Errorf("step %d, %s: %d packets leaked:\n%s", step, verdict, n, who)
			}
		}
	}
}
