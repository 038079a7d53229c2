package netns_test

import (
	"bytes"
	"io"
	"net"
	"net/netip"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// TestChainReference is requirement 6 of the reference scenario with servers that
// know nothing of one another: the gateway asks d1 for p1, and p1 for the name.
//
//	client --> gateway --> d1 10.0.4.1 | 192.168.100.1 --> p1 192.168.100.2 | 172.31.0.1 --> private
func TestChainReference(t *testing.T) {
	t.Parallel()
	o := newOffice(t)
	o.d1Dante.kill()
	o.d1Dante = startDanted(t, o.d1, "10.0.4.1:1080", danteConf([]string{"10.0.4.1"}, []string{"192.168.100.1"}, "none", `
client pass { from: 10.0.0.0/8 to: 10.0.4.1/32 log: connect error }
socks pass { from: 10.0.0.0/8 to: 192.168.100.0/24 log: connect error }`))
	routes := strings.Replace(paperRoutes(t), "SOCKD5 @=10.0.4.1 *.private-net.org",
		"SERVER d1 10.0.4.1\nSERVER p1 192.168.100.2\nSOCKD5 @=d1>p1 *.private-net.org", 1)
	serve(t, o.gateway, settings{routes: routes, credentials: paperCredentials, resolvers: []string{"10.0.5.53"}})

	for range 5 {
		o.client.curl(t, "http://www.private-net.org/six").fetched(t, "172.31.0.1")
	}
	// The name is nobody's business but p1's.
	if q := o.corpDNS.questions("www.private-net.org"); len(q) != 0 {
		t.Errorf("the office's name server was asked for a private name: %v", q)
	}
	if q := o.decoyDNS.questions("www.private-net.org"); len(q) != 0 {
		t.Errorf("d1's name server was asked for a private name: %v", q)
	}
	q := o.privateDNS.questions("www.private-net.org")
	if len(q) == 0 {
		t.Error("p1's name server was not asked")
	}
	for _, q := range q {
		if q.From.String() != "172.31.0.1" {
			t.Errorf("p1's name server was asked by %v", q.From)
		}
	}
	if log := o.d1Dante.log(); len(o.d1Dante.carriedBy("", "192.168.100.2.1080")) == 0 || strings.Contains(log, "private-net") {
		t.Errorf("d1 did something else than to connect to p1:\n%s", log)
	}
	if len(o.p1Dante.carriedBy("", "172.31.0.80.80")) == 0 {
		t.Errorf("p1 did not carry it:\n%s", o.p1Dante.log())
	}
	// d1 alone carries what is its own still.
	o.client.curl(t, "http://192.168.100.50/five").fetched(t, "192.168.100.1")
	// What p1 does not have is refused at once, and so is everything without it.
	o.client.curl(t, "http://nowhere.private-net.org/").refused(t)
	o.client.curl(t, "http://www.private-net.org:8080/").refused(t)
	o.p1Dante.kill()
	o.client.curl(t, "http://www.private-net.org/").refused(t)
	o.client.curl(t, "http://192.168.100.50/five").fetched(t, "192.168.100.1")
}

// TestChainMix: chains of servers that are asked in different protocols, the first
// with a user, one of them behind TLS or none.
//
//	client --> gateway --> socks1 --> socks2 --> outside
func TestChainMix(t *testing.T) {
	t.Parallel()
	dante, tiny := interopDante("none"), interopTinyproxy("")
	for _, test := range []struct {
		name     string
		one, two func(testing.TB, *site) *process
		how      string // of the SERVER line of one
		action   string // for two
		last     string // of the SERVER line of two
		patient  bool   // one says nothing of a two that is gone: it tries again for a second, and keeps a dead connection for two
	}{
		{"HTTP > SOCKD5", interopTinyproxy("BasicAuth int " + interopPassword), dante, "type=http", "SOCKD5", "", false},
		{"SOCKD5 > HTTP", interopDante("username"), tiny, "type=socks5", "HTTP", "", false},
		{"SOCKD5 > SOCKD4A", interopDante("username"), interopSSH, "type=socks5", "SOCKD4A", "", false},
		{"HTTP > HTTP", interopV2ray("http", interopAccounts), tiny, "type=http", "HTTP", "", true},
		{"TLS > SOCKD5", interopV2rayTLS("socks", `"auth": "password", `+interopAccounts), dante, "tls sni=proxy.example", "SOCKD5", "", true},
		{"HTTP > TLS", interopTinyproxy("BasicAuth int " + interopPassword), interopV2rayTLS("socks", ""), "type=http", "SOCKD5", "tls sni=proxy.example", false},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.outside.answerTCP(t, outsideAt+":7", func(c *net.TCPConn) { io.Copy(c, c) })
			one, two := w.sites()
			var servers [2]*process
			servers[0], servers[1] = test.one(t, one), test.two(t, two)
			trust := ""
			switch {
			case strings.HasPrefix(test.how, "tls"):
				trust = one.dir + "/tls.crt"
			case test.last != "":
				trust = two.dir + "/tls.crt"
			}
			serve(t, w.gateway, settings{
				routes: "SERVER one 198.51.100.11:1080 credential=int " + test.how + "\n" +
					"SERVER two 198.51.100.12:1080 " + test.last + "\n" + test.action + " @=one>two *\n",
				credentials: "[int]\nusername = \"int\"\npassword = \"" + interopPassword + "\"\n",
				trust:       trust,
			})
			w.observe(t)

			// By name, which only the last server looks up, and by address.
			w.client.curl(t, "http://www.example.org/").fetched(t, two.out...)
			for _, q := range append(w.insideDNS.questions("www.example.org"), w.outsideDNS.questions("www.example.org")...) {
				if from := q.From.String(); from != two.out[0] && from != two.out[1] {
					t.Errorf("the name was looked up by %s", from)
				}
			}
			w.client.curl(t, "http://"+outsideAt+"/").fetched(t, two.out[0])
			if test.action != "SOCKD4A" {
				w.client.curl(t, "http://["+outsideAt6+"]/").fetched(t, two.out[1])
			}
			// A flow of some size, in both directions.
			block := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
			c, err := w.client.dial("tcp", outsideAt+":7", 5*time.Second)
			w.client.must(t, err)
			defer c.Close()
			c.SetDeadline(time.Now().Add(10 * time.Second))
			go c.Write(block)
			back := make([]byte, len(block))
			if n, err := io.ReadFull(c, back); err != nil || !bytes.Equal(back, block) {
				t.Errorf("%d of %d bytes came back: %v", n, len(block), err)
			}

			atOnce(t, "a closed port", time.Now(), w.wait(outsideAt+":9"))
			named := w.client.mustLookup(t, insideNS, "nowhere.example.com", dns.TypeA).String()
			atOnce(t, "a name that does not exist", time.Now(), w.wait(named+":80"))

			// Without the last server, and without the first.
			for _, p := range []*process{servers[1], servers[0]} {
				p.kill()
				for range 2 {
					began := time.Now()
					err := w.wait(outsideAt + ":80")
					if p == servers[1] && test.patient {
						began = began.Add(4 * time.Second)
					}
					atOnce(t, "a server is gone", began, err)
				}
			}
			if n, who := w.leaked(t); n != 0 {
				t.Errorf("%d packets leaked:\n%s", n, who)
			}
		})
	}
}

// TestChainUDP: datagrams of a client go through the relays of both servers of a
// chain, those of one inside those of the other.
//
//	client --> gateway ==UDP==> socks1 ==UDP==> socks2 --> outside
func TestChainUDP(t *testing.T) {
	t.Parallel()
	dante, v2ray := interopDante("none"), interopV2ray("socks", `"udp": true, "ip": "198.51.100.12"`)
	for _, test := range []struct {
		name     string
		one, two func(testing.TB, *site) *process
		sizes    []int
	}{
		{"danted > danted", dante, dante, []int{1, 1200, 1400, 9000}},
		{"danted > v2ray", dante, v2ray, []int{1, 1200}},
		{"ss-local > danted", interopShadowsocks, dante, []int{1, 1200}},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.outside.udpServices(t, outsideAt, outsideAt6)
			one, two := w.sites()
			first, last := test.one(t, one), test.two(t, two)
			d := serve(t, w.gateway, settings{routes: "SERVER one 198.51.100.11\nSERVER two 198.51.100.12 udp=chain\nSERVER tcp 198.51.100.12\n" +
				"SOCKD5 @=one>tcp " + outsideAt + " eq 1111\nSOCKD5 @=one>two *\n"})
			w.observe(t)

			probed := regexp.MustCompile(`(?m)^one>two +udp +yes  relay at 198\.51\.100\.11:\d+, and by it at 198\.51\.100\.12:\d+$`)
			if out := d.cli(t, "check", "--probe", "-c", d.config).ok(t).out; !probed.MatchString(out) {
				t.Errorf("check --probe:\n%s", out)
			}
			named := w.client.mustLookup(t, insideNS, "www.example.org", dns.TypeA).String()
			for _, to := range []string{outsideAt, outsideAt6, named} {
				c := w.client.connected(t, net.JoinHostPort(to, "7"))
				for range 10 { // so that the flow has its own socket
					for _, n := range test.sizes {
						echoed(t, c, n)
					}
				}
			}
			b, err := say(w.client.connected(t, outsideAt+":2222"), []byte("who"), 5*time.Second)
			if from, parsed := netip.ParseAddrPort(string(b)); err != nil || parsed != nil || from.Addr().String() != two.out[0] {
				t.Errorf("the outside saw %q, want %s: %v", b, two.out[0], err)
			}
			refusedAtOnce(t, "a chain without udp=chain", w.client.connected(t, outsideAt+":1111"))

			// Without the last server, and without the first.
			for _, p := range []*process{last, first} {
				c := w.client.connected(t, outsideAt+":7")
				if p == last {
					echoed(t, c, 1)
				}
				p.kill()
				eventually(t, 5*time.Second, "the end is noticed", func() bool {
					_, err := say(c, []byte("x"), time.Second)
					return refused(err)
				})
			}
			eventually(t, 5*time.Second, "no association is left", func() bool { return d.metric(t, "tproxyd_udp_outlets") == 0 })
			if n, who := w.leaked(t); n != 0 {
				t.Errorf("%d packets leaked:\n%s", n, who)
			}
		})
	}
}

// wait returns the error with which waiting for a byte ends.
func (w *world) wait(to string) error {
	_, err := w.firstByte(to)
	return err
}
