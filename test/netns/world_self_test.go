package netns_test

import (
	"testing"

	"github.com/miekg/dns"
)

// TestWorld proves the topology by itself, without the daemon: everybody
// reaches everybody, so that a leak would be one; the observer sees a leak;
// danted and microsocks carry and are told apart at the far side.
func TestWorld(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.observe(t)

	w.client.curl(t, "http://"+outsideAt+"/plain").fetched(t, clientAt)
	w.client.curl(t, "http://["+outsideAt6+"]/plain").fetched(t, clientAt6)
	w.client.curl(t, "http://direct.example/").fetched(t, clientAt, clientAt6)
	if n, who := w.leaked(t); n == 0 {
		t.Fatalf("the observer saw nothing of plain forwarding %s", who)
	}
	w.observe(t)
	if n, who := w.leaked(t); n != 0 {
		t.Fatalf("the observer does not start at 0: %d %s", n, who)
	}

	one, _ := w.dante(t)
	w.gateway.curl(t, "http://www.example.org/d4", "--socks5-hostname", socks1At+":1080").fetched(t, socks1Out, socks1Out6)
	w.gateway.curl(t, "http://"+outsideAt+"/d4", "--socks5", socks2At+":1080").fetched(t, socks2Out)
	w.gateway.curl(t, "http://["+outsideAt6+"]/d6", "--socks5", "["+socks2At6+"]:1080").fetched(t, socks2Out6)
	if n, who := w.leaked(t); n != 0 || w.carried(t) == 0 {
		t.Fatalf("through SOCKS: %d packets leaked, %d carried %s", n, w.carried(t), who)
	}
	if q := w.outsideDNS.questions("www.example.org"); len(q) == 0 || q[0].From.String() != socks1Out {
		t.Errorf("www.example.org was asked by %v, want %s\n%s", q, socks1Out, one.log())
	}
	if a := w.client.mustLookup(t, insideNS6, "direct.example", dns.TypeAAAA); a.String() != insideAt6 {
		t.Errorf("direct.example is %v", a)
	}

	one.kill()
	startMicrosocks(t, w.socks1, socks1At+":1080")
	w.gateway.curl(t, "http://www.example.org/m", "--socks5-hostname", socks1At+":1080").fetched(t, socks1Out, socks1Out6, socks1At, socks1At6)
}
