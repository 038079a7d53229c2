package netns_test

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// Topology: world, and behind the gateway's uplink address a port forward to
// the client:
//
//	outside --8080--> gateway (dnat) --80--> client
//	client  --------> gateway --------> inside     DIRECT, by address and name
//	client  --------> gateway --x                  DENY, and UDP, which the server does not carry

const directRoutes = `SERVER one 198.51.100.11 udp=off
DENY 203.0.113.80 eq 81
DENY 2001:db8:3::80 eq 81
DIRECT 198.51.100.0/24
DIRECT 2001:db8:2::/64
DIRECT 203.0.113.80 eq 2222
DIRECT *.example.net eq 80
SOCKD5 @=one *
`

func TestDirectAndDeny(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.dante(t)
	w.insideDNS.add(t, "www.example.net. 60 IN A "+outsideAt, "www.example.net. 60 IN AAAA "+outsideAt6)
	startWeb(t, w.outside, outsideAt+":2222", "["+outsideAt6+"]:2222", outsideAt+":81", outsideAt+":8081")
	startWeb(t, w.client, clientAt, clientAt6)
	startWeb(t, w.gateway, lanAt+":22", "["+lanAt6+"]:22", wanAt+":22")
	w.gateway.nft(t, fmt.Sprintf(`
table inet forwards {
	chain pre { type nat hook prerouting priority dstnat; policy accept;
		iifname "wan0" ip daddr %s tcp dport 8080 dnat ip to %s:80
		iifname "wan0" ip6 daddr %s tcp dport 8080 dnat ip6 to [%s]:80
	}
}`, wanAt, clientAt, wanAt6, clientAt6))
	d := serve(t, w.gateway, settings{routes: directRoutes})

	// DIRECT by address keeps the client's own address and costs the daemon
	// nothing, whatever goes by.
	w.client.curl(t, "http://"+insideAt+"/direct").fetched(t, clientAt)
	w.client.curl(t, "http://["+insideAt6+"]/direct").fetched(t, clientAt6)
	w.client.curl(t, "http://"+outsideAt+":2222/direct").fetched(t, clientAt)
	bulk := w.inside.listen(t, "tcp", insideAt+":9000")
	go func() {
		for {
			c, err := bulk.Accept()
			if err != nil {
				return
			}
			io.CopyN(c, zeros{}, 64<<20)
			c.Close()
		}
	}()
	idle := d.cpu(t)
	c, err := w.client.dial("tcp", insideAt+":9000", 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	if n, err := io.Copy(io.Discard, c); n != 64<<20 {
		t.Errorf("DIRECT: %d bytes, %v", n, err)
	}
	c.Close()
	if used := d.cpu(t) - idle; used > 30*time.Millisecond {
		t.Errorf("64 MB of DIRECT cost the daemon %v of CPU", used)
	}

	// DIRECT by name: real addresses, the client's own source, only at the
	// rule's port.
	if a := w.client.mustLookup(t, insideNS, "www.example.net", dns.TypeA); !pool4.Contains(a) {
		w.client.curl(t, "http://www.example.net/direct", "-4").fetched(t, clientAt)
		w.client.curl(t, "http://www.example.net/direct", "-6").fetched(t, clientAt6)
		w.client.curl(t, "http://www.example.net:8081/direct", "-4").fetched(t, socks1Out)
	} else {
		// A name that a catch-all SOCKD5 rule can match, too, is synthetic and
		// dialled by the gateway (R4).
		w.client.curl(t, "http://www.example.net/direct", "-4").fetched(t, wanAt, wanAt6)
	}

	// Proxied meanwhile, by name and by address.
	w.client.curl(t, "http://www.example.org/").fetched(t, socks1Out, socks1Out6)
	w.client.curl(t, "http://"+outsideAt+"/").fetched(t, socks1Out)
	w.client.curl(t, "http://["+outsideAt6+"]/").fetched(t, socks1Out6)

	// DENY at once: the connect itself fails.
	for _, a := range []string{outsideAt, outsideAt6} {
		began := time.Now()
		c, err := w.client.dial("tcp", net.JoinHostPort(a, "81"), 5*time.Second)
		if err == nil {
			c.Close()
		}
		atOnce(t, "DENY "+a, began, err)
		if !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("DENY %s: %v, want connection refused", a, err)
		}
	}

	// UDP that would have to be proxied is refused at once; DIRECT UDP goes.
	synthetic4 := w.client.mustLookup(t, insideNS, "www.example.org", dns.TypeA)
	synthetic6 := w.client.mustLookup(t, insideNS, "www.example.org", dns.TypeAAAA)
	for _, a := range []string{outsideAt, outsideAt6, synthetic4.String(), synthetic6.String()} {
		began := time.Now()
		err := w.client.udp(net.JoinHostPort(a, "443"))
		atOnce(t, "UDP to "+a, began, err)
		if !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("UDP to %s: %v, want connection refused", a, err)
		}
	}
	for _, a := range []string{insideAt, insideAt6} {
		p := w.inside.listenPacket(t, "udp", net.JoinHostPort(a, "7"))
		go func() {
			buf := make([]byte, 1500)
			for {
				n, from, err := p.ReadFrom(buf)
				if err != nil {
					return
				}
				p.WriteTo(buf[:n], from)
			}
		}()
		if err := w.client.udp(net.JoinHostPort(a, "7")); err != nil {
			t.Errorf("DIRECT UDP to %s: %v", a, err)
		}
	}

	// ping follows DIRECT and is prohibited elsewhere.
	for _, a := range []string{insideAt, insideAt6, lanAt, lanAt6} {
		if err := w.client.ping(netip.MustParseAddr(a)); err != nil {
			t.Errorf("ping %s: %v", a, err)
		}
	}
	for _, a := range []netip.Addr{synthetic4, synthetic6, netip.MustParseAddr(outsideAt), netip.MustParseAddr(outsideAt6)} {
		began := time.Now()
		atOnce(t, "ping "+a.String(), began, w.client.ping(a))
	}

	// Others reach us: the port forward, the client itself, the gateway's own
	// service, from both sides.
	w.outside.curl(t, "http://"+wanAt+":8080/forward").fetched(t, outsideAt)
	w.outside.curl(t, "http://["+wanAt6+"]:8080/forward").fetched(t, outsideAt6)
	w.outside.curl(t, "http://"+clientAt+"/routed").fetched(t, outsideAt)
	w.outside.curl(t, "http://["+clientAt6+"]/routed").fetched(t, outsideAt6)
	w.gateway.curl(t, "http://"+clientAt+"/gateway").fetched(t, lanAt)
	w.gateway.curl(t, "http://["+clientAt6+"]/gateway").fetched(t, lanAt6)
	w.client.curl(t, "http://"+lanAt+":22/own").fetched(t, clientAt)
	w.client.curl(t, "http://["+lanAt6+"]:22/own").fetched(t, clientAt6)
	w.client.curl(t, "http://"+wanAt+":22/own").fetched(t, clientAt)
	w.outside.curl(t, "http://"+wanAt+":22/own").fetched(t, outsideAt)
	// A listener of the daemon is no service for the LAN.
	w.gateway.curl(t, "http://www.example.org/own", "--resolve", "www.example.org:80:"+outsideAt).fetched(t, wanAt)

	// With the daemon killed DIRECT goes on, the rest is refused at once.
	d.process.kill()
	w.client.curl(t, "http://"+insideAt+"/dead").fetched(t, clientAt)
	w.client.curl(t, "http://["+insideAt6+"]/dead").fetched(t, clientAt6)
	w.outside.curl(t, "http://"+wanAt+":8080/dead").fetched(t, outsideAt)
	for _, a := range []string{outsideAt, outsideAt6, synthetic4.String(), synthetic6.String()} {
		began := time.Now()
		c, err := w.client.dial("tcp", net.JoinHostPort(a, "80"), 5*time.Second)
		if err == nil {
			c.Close()
		}
		atOnce(t, "dead daemon, TCP to "+a, began, err)
		began = time.Now()
		atOnce(t, "dead daemon, UDP to "+a, began, w.client.udp(net.JoinHostPort(a, "443")))
	}
	began := time.Now()
	atOnce(t, "dead daemon, DNS", began, w.client.udp(insideNS+":53"))
}

// zeros is an endless source.
type zeros struct{}

func (zeros) Read(b []byte) (int, error) { return len(b), nil }

// udp sends a datagram from a connected socket and waits for an echo.
func (h *host) udp(to string) error {
	return h.in(func() error {
		c, err := net.Dial("udp", to)
		if err != nil {
			return err
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(3 * time.Second))
		if _, err := c.Write([]byte("echo")); err != nil {
			return err
		}
		_, err = c.Read(make([]byte, 1500))
		return err
	})
}

// cpu returns the CPU time that the daemon has used.
func (d *daemon) cpu(t testing.TB) time.Duration {
	t.Helper()
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", d.pid()))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(stat), ") ")
	fields := strings.Fields(rest)
	var user, system int
	fmt.Sscan(fields[11], &user)
	fmt.Sscan(fields[12], &system)
	return time.Duration(user+system) * 10 * time.Millisecond // USER_HZ is 100
}

// TestDirectByName: a name that only DIRECT and DENY rules can match gets its
// real addresses, and those pass in the kernel, at the rule's port.
func TestDirectByName(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.insideDNS.add(t, "www.example.net. 60 IN A "+outsideAt, "www.example.net. 60 IN AAAA "+outsideAt6,
		"www.example.net. 60 IN HTTPS 1 . ipv4hint="+insideAt)
	startWeb(t, w.outside, outsideAt+":8081", "["+outsideAt6+"]:8081")
	d := serve(t, w.gateway, settings{routes: "DIRECT *.example.net eq 80\nDEFAULT DENY\n"})

	// Before anybody asked, the address is nobody's.
	w.client.curl(t, "http://"+outsideAt+"/early").refused(t)
	for _, family := range []string{"-4", "-6"} {
		w.client.curl(t, "http://www.example.net/byname", family).fetched(t, clientAt, clientAt6)
		w.client.curl(t, "http://www.example.net:8081/byname", family).refused(t)
	}
	// The hints of an HTTPS record are addresses, too.
	w.client.curl(t, "http://"+insideAt+"/early").refused(t)
	if m, err := w.client.ask("udp", insideNS, "www.example.net", dns.TypeHTTPS); err != nil || !strings.Contains(m.String(), insideAt) {
		t.Errorf("HTTPS: %v %v", err, m)
	}
	w.client.curl(t, "http://"+insideAt+"/hint").fetched(t, clientAt)
	// All of that passed in the kernel: the daemon carried nothing.
	for _, action := range []string{"direct", "proxied"} {
		if n := d.metric(t, `tproxyd_flows_total{action="`+action+`"}`); n != 0 {
			t.Errorf("%v flows DIRECT by name came to user space", n)
		}
	}
	if d.metric(t, `tproxyd_kernel_packets_total{verdict="direct"}`) == 0 {
		t.Error("the kernel counted no DIRECT packet")
	}
	// A reload that no longer says DIRECT resets what runs (R11).
	l := w.outside.listen(t, "tcp", outsideAt+":8082")
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go io.Copy(c, c)
		}
	}()
	d.routes(t, "DIRECT *.example.net\nDEFAULT DENY\n")
	d.reload(t)
	w.client.mustLookup(t, insideNS, "www.example.net", dns.TypeA)
	c, err := w.client.dial("tcp", outsideAt+":8082", 5*time.Second)
	if err != nil {
		t.Fatalf("DIRECT by name at any port: %v", err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	c.Write([]byte("hello"))
	if _, err := io.ReadFull(c, make([]byte, 5)); err != nil {
		t.Fatal(err)
	}
	// Restarted by a reload that still says DIRECT it lives on.
	d.reload(t)
	c.Write([]byte("hello"))
	if _, err := io.ReadFull(c, make([]byte, 5)); err != nil {
		t.Fatalf("after a reload that changes nothing: %v", err)
	}
	d.routes(t, "DEFAULT DENY\n")
	d.reload(t)
	w.observe(t) // not earlier: the last echo's acknowledgement may be late
	c.Write([]byte("hello"))
	if _, err := io.ReadFull(c, make([]byte, 5)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a flow that is no longer DIRECT: %v, want a reset", err)
	}
	if n, who := w.leaked(t); n != 0 {
		t.Errorf("%d packets leaked after the reload:\n%s", n, who)
	}
}
