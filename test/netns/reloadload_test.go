package netns_test

import (
	"flag"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/tproxyd/tproxyd/internal/socksserver"
)

// manyRules is n rules for networks that nobody asks, which differ from one
// edition to the next, then those given.
func manyRules(n, edition int, rest string) string {
	var b strings.Builder
	b.WriteString("SERVER one 198.51.100.11\n")
	for i := range n {
		fmt.Fprintf(&b, "%s 10.%d.%d.%d/31\n", []string{"DIRECT", "DENY", "SOCKD5 @=one"}[(i+edition)%3], i>>14&0xff, i>>6&0xff, i<<2&0xff)
	}
	return b.String() + rest
}

// reloadRules is how many rules most of the reloads have; with 100000 the test
// takes minutes.
var reloadRules = flag.Int("reload-rules", 3000, "rules of TestReloadLoaded, but for two of its reloads")

// TestReloadLoaded: twenty reloads, two of them to and from 100,000 rules, and
// nothing is lost, nor leaks. Then a rule turned from DIRECT to SOCKD5 cuts just
// its flows.
func TestReloadLoaded(t *testing.T) {
	t.Parallel()
	rules := *reloadRules
	w := newWorld(t)
	w.socks1.startSocks(t, &socksserver.Server{}, socks1At+":1080")
	d := serve(t, w.gateway, settings{resolvers: []string{outsideNS}, routes: manyRules(rules, 0, "SOCKD5 @=one *\n")})
	w.observe(t)
	load := w.startLoad(t)
	began := time.Now()
	const reloads = 20
	for i := range reloads {
		n := rules
		if i == reloads/2 {
			n = 100_000
		}
		d.routes(t, manyRules(n, i+1, "SOCKD5 @=one *\n"))
		d.reload(t)
	}
	t.Logf("%d reloads of %d rules, one of 100,000, in %v", reloads, rules, time.Since(began).Round(time.Millisecond))
	if n, who := w.leaked(t); n != 0 {
		t.Errorf("%d packets leaked:\n%s", n, who)
	}

	direct := func(at ...string) string {
		text := ""
		for _, a := range at {
			text += "DIRECT " + a + "\n"
		}
		return manyRules(rules, 0, text+"SOCKD5 @=one *\n")
	}
	d.routes(t, direct(insideAt, insideNS))
	d.reload(t)
	flows := map[string]net.Conn{}
	for _, at := range []string{insideAt, insideNS} {
		w.inside.answerTCP(t, at+":7", func(c *net.TCPConn) { io.Copy(c, c) })
		c, err := w.client.dial("tcp", at+":7", 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		talk(t, c)
		flows[at] = c
	}
	d.routes(t, direct(insideAt))
	d.reload(t)
	talk(t, flows[insideAt])
	c := flows[insideNS]
	c.SetDeadline(time.Now().Add(5 * time.Second))
	began = time.Now()
	_, err := c.Write([]byte("hello"))
	if err == nil {
		_, err = c.Read(make([]byte, 5))
	}
	atOnce(t, "no longer DIRECT", began, err)
	load.finish(t)
}
