package netns_test

import (
	"fmt"
	"io"
	"math"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// Topology: world. What the rules have counted is held against what a counter of
// the client's own kernel has seen leave.

// TestRuleBytes: the sum over all rules, of what user space carried and of what the
// kernel let pass by itself, is what left the client, and so is the total that
// dashboards are told.
func TestRuleBytes(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.dante(t)
	d := serve(t, w.gateway, settings{noDNS: true, clash: "127.0.0.1:9090", routes: `SERVER one 198.51.100.11
DIRECT 198.51.100.20 255.255.255.255 eq 9
DIRECT 2001:db8:2::20
SOCKD5 @=one * eq 9
SOCKD5 @=one *
`})
	sink := func(c *net.TCPConn) { io.Copy(io.Discard, c) }
	inside, outside := insideAt+":9", outsideAt+":9"
	inside6, other := "["+insideAt6+"]:9", outsideAt+":10"
	for _, at := range []string{inside, inside6} {
		w.inside.answerTCP(t, at, sink)
	}
	for _, at := range []string{outside, other} {
		w.outside.answerTCP(t, at, sink)
	}
	w.outside.answerUDP(t, outsideAt+":9", func([]byte, netip.AddrPort) []byte { return nil })
	w.client.nft(t, `
table inet left {
	counter direct { }
	counter proxied { }
	chain out {
		type filter hook output priority 0
		oifname "eth0" ip daddr `+insideAt+` counter name direct accept
		oifname "eth0" ip6 daddr `+insideAt6+` counter name direct accept
		oifname "eth0" meta l4proto { tcp, udp } counter name proxied
	}
}`)
	sizes := map[string]int{inside: 12 << 20, inside6: 9 << 20, outside: 15 << 20, other: 6 << 20}
	for at, n := range sizes {
		c, err := w.client.dial("tcp", at, 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(30 * time.Second))
		if _, err := io.CopyN(c, zeros{}, int64(n)); err != nil {
			t.Fatalf("%s: %v", at, err)
		}
		c.(*net.TCPConn).CloseWrite()
		if _, err := c.Read(make([]byte, 1)); err != io.EOF { // all of it has arrived
			t.Fatalf("%s: %v", at, err)
		}
		c.Close()
	}
	u, err := w.client.dial("udp", outside, time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	for range 1000 {
		if _, err := u.Write(make([]byte, 1200)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(50 * time.Microsecond)
	}
	counted := func(name string) (packets, bytes float64) {
		out := w.client.run(t, command{args: []string{tool(t, "nft"), "list", "counter", "inet", "left", name}}).ok(t).out
		_, rest, _ := strings.Cut(out, "packets ")
		if n, err := fmt.Sscanf(rest, "%f bytes %f", &packets, &bytes); n != 2 {
			t.Fatalf("%v:\n%s", err, out)
		}
		return packets, bytes
	}
	_, direct := counted("direct")
	packets, proxied := counted("proxied")
	const headers = 20 + 20 + 12 // of IPv4 and TCP, which end here
	left := direct + proxied - packets*headers

	sum := func() (user, kernel float64) {
		for line := range strings.Lines(d.ask(t, "/metrics")) {
			var v float64
			if _, err := fmt.Sscan(line[strings.LastIndex(line, " ")+1:], &v); err != nil {
				continue
			}
			switch {
			case strings.HasPrefix(line, "tproxyd_rule_bytes_total{") && strings.Contains(line, `direction="up"`):
				user += v
			case strings.HasPrefix(line, "tproxyd_rule_kernel_bytes_total{"):
				kernel += v
			}
		}
		return user, kernel
	}
	eventually(t, 5*time.Second, "no TCP flow is left", func() bool { return d.metric(t, "tproxyd_flows") == 0 })
	user, kernel := sum()
	off := (user + kernel - left) / left
	t.Logf("left the client: %.0f; the rules: %.0f in user space, %.0f in the kernel; %.3f %%", left, user, kernel, 100*off)
	if math.Abs(off) > 0.01 {
		t.Errorf("the rules have counted %.0f and %.0f bytes, and %.0f left the client: off by %.2f %%", user, kernel, left, 100*off)
	}
	if payload := float64(sizes[inside] + sizes[inside6]); kernel < payload || math.Abs(kernel-direct) > 0.01*direct {
		t.Errorf("the kernel let pass %.0f bytes with headers, want %.0f and no less than %.0f", kernel, direct, payload)
	}
	eventually(t, 5*time.Second, "a dashboard adds up what the kernel let pass", func() bool {
		_, told := d.clash(t, readerSecret, "GET", "/connections", "")
		shown := 0.0
		for _, c := range told["connections"].([]any) {
			if c := c.(map[string]any); c["metadata"].(map[string]any)["type"] == "Kernel" {
				shown += c["upload"].(float64)
			}
		}
		total := told["uploadTotal"].(float64)
		t.Logf("dashboards: %.0f in all, %.0f in the kernel", total, shown)
		return shown == kernel && math.Abs(total-left) < 0.01*left
	})

	// What they are answered by way of the kernel is in the total, and only once.
	const answer = 8 << 20
	w.inside.answerTCP(t, "["+insideAt6+"]:11", func(c *net.TCPConn) { io.CopyN(c, zeros{}, answer) })
	download := func() float64 {
		_, told := d.clash(t, readerSecret, "GET", "/connections", "")
		return told["downloadTotal"].(float64)
	}
	before := download()
	c, err := w.client.dial("tcp", "["+insideAt6+"]:11", 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(30 * time.Second))
	if n, err := io.Copy(io.Discard, c); n != answer || err != nil {
		t.Fatalf("%d bytes, %v", n, err)
	}
	eventually(t, 5*time.Second, "a dashboard adds up what clients are sent", func() bool { return download()-before >= answer })
	if n := download() - before; n > 1.1*answer {
		t.Errorf("of %d bytes %.0f are told", answer, n)
	}
}
