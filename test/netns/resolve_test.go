package netns_test

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// Topology: world. Who resolves a name, the gateway's resolver or the SOCKS
// server's, and what follows for its flows:
//
//	client --> gateway --53--> inside             RESOLVE local, PROXY_NAME, DIRECT
//	              '--SOCKS--> socks1 --53--> outside   everything else

func TestResolve(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one, _ := w.dante(t)
	w.insideDNS.add(t,
		"direct.corp.example. 60 IN A "+insideAt, "proxied.corp.example. 60 IN A "+outsideAt,
		"known.example.com. 60 IN A "+insideAt, "www.example.org. 60 IN A 192.0.2.99")
	w.insideDNS.silent["silent.example.com"] = true
	w.outsideDNS.add(t, "only.example.com. 60 IN A "+outsideAt, "silent.example.com. 60 IN A "+outsideAt)
	serve(t, w.gateway, settings{routes: `SERVER one 198.51.100.11
TIMEOUT dns=1s
PROXY_NAME @=one
RESOLVE local *.corp.example
SOCKD5 @=one *.example.org
DENY *.nx.example reject=dns-nxdomain
DENY *.refused.example reject=dns-refused
DENY denied.example
DIRECT 198.51.100.0/24
SOCKD5 @=one *
`})

	for _, test := range []struct {
		name   string
		want   string // an address, "pool", or the answer's code
		from   string // as whom the page is fetched; empty: it is not
		inside bool   // the gateway's resolver is asked
		remote bool   // the SOCKS server is given the name, and asks its own
	}{
		// RESOLVE local: then the address decides.
		{"direct.corp.example", insideAt, clientAt, true, false},
		{"proxied.corp.example", outsideAt, socks1Out, true, false},
		{"none.corp.example", "NXDOMAIN", "", true, false},
		// A rule of its own: remote, whatever is known here.
		{"www.example.org", "pool", socks1Out, false, true},
		// PROXY_NAME: local if known here, else remote.
		{"known.example.com", insideAt, clientAt, true, false},
		{"only.example.com", "pool", socks1Out, true, true},
		{"silent.example.com", "pool", socks1Out, true, true},
	} {
		if got := w.answer(t, test.name); got != test.want {
			t.Errorf("%s is %s, want %s", test.name, got, test.want)
		}
		p := w.client.curl(t, "http://"+test.name+"/resolve", "-4")
		if test.from == socks1Out { // which may take the name's IPv6 address
			p.fetched(t, socks1Out, socks1Out6)
		} else if test.from != "" {
			p.fetched(t, test.from)
		} else if p.code != 6 {
			t.Errorf("%s: curl exit %d, want 6 (no such name)\n%s", test.name, p.code, p.body)
		}
		if asked := w.insideDNS.questions(test.name); len(asked) > 0 != test.inside {
			t.Errorf("%s: the inside was asked %v", test.name, asked)
		}
		if asked := w.outsideDNS.questions(test.name); len(asked) > 0 != test.remote {
			t.Errorf("%s: the outside was asked %v", test.name, asked)
		}
	}
	if n := len(one.carriedBy("", "203.0.113.80.80")); n == 0 {
		t.Errorf("danted logged nothing of it\n%s", one.log())
	}
}

// TestResolveVia: names with resolvers of their own are asked of those, by this
// host itself: marked as its own, whatever the rules say of the way there.
func TestResolveVia(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.dante(t)
	w.outsideDNS.add(t, "db.corp.example. 60 IN A "+insideAt, "six.corp6.example. 60 IN A "+insideAt)
	odd := startNameServerAt(t, w.outside, outsideAt+":5353", "odd.example. 60 IN A "+insideAt)
	d := serve(t, w.gateway, settings{local: true, routes: `SERVER one 198.51.100.11
RESOLVE local *.corp.example via=203.0.113.53
RESOLVE local *.corp6.example via=[2001:db8:3::53]
RESOLVE local odd.example via=203.0.113.80:5353
RESOLVE local direct.example
DIRECT 198.51.100.0/24
SOCKD5 @=one *
`})
	for _, test := range []struct {
		name string
		ns   *nameServer
	}{{"db.corp.example", w.outsideDNS}, {"six.corp6.example", w.outsideDNS}, {"odd.example", odd}, {"direct.example", w.insideDNS}} {
		for _, h := range []*host{w.client, w.gateway} {
			if a := h.mustLookup(t, insideNS, test.name, dns.TypeA); a.String() != insideAt {
				t.Errorf("%s: %s is %v", h.name, test.name, a)
			}
		}
		for _, ns := range []*nameServer{w.insideDNS, w.outsideDNS, odd} {
			asked := ns.questions(test.name)
			if (len(asked) > 0) != (ns == test.ns) {
				t.Errorf("%s: somebody else was asked: %v", test.name, asked)
			}
			for _, q := range asked {
				if from := q.From.String(); from != wanAt && from != wanAt6 {
					t.Errorf("%s was asked by %s, want by the gateway itself", test.name, from)
				}
			}
		}
	}
	w.client.curl(t, "http://db.corp.example/via").fetched(t, clientAt)
	if out := d.cli(t, "explain", "-c", d.config, "db.corp.example:80").ok(t).out; !strings.Contains(out, "asked is 203.0.113.53:53 (") {
		t.Errorf("explain does not say who is asked:\n%s", out)
	}
	// Another line, another resolver, and nothing remembered of the one before.
	w.insideDNS.add(t, "db.corp.example. 60 IN A "+outsideAt)
	d.routes(t, "SERVER one 198.51.100.11\nRESOLVE local *.corp.example via=198.51.100.53\nSOCKD5 @=one *\n")
	d.reload(t)
	if a := w.client.mustLookup(t, insideNS, "db.corp.example", dns.TypeA); a.String() != outsideAt {
		t.Errorf("after the reload db.corp.example is %v", a)
	}
}

// TestDeniedNames: DENY is asked of nobody, and says it in the way that the
// rule wants.
func TestDeniedNames(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	serve(t, w.gateway, settings{routes: `DENY *.nx.example reject=dns-nxdomain
DENY *.refused.example reject=dns-refused
DENY *.denied.example
SOCKD5 @=198.51.100.11 *.example.org
DEFAULT DENY
`})
	w.observe(t)
	for _, test := range []struct{ name, want string }{
		{"x.nx.example", "NXDOMAIN"}, {"x.refused.example", "REFUSED"}, {"x.denied.example", "pool"}, {"x.default.example", "pool"},
	} {
		if got := w.answer(t, test.name); got != test.want {
			t.Errorf("%s is %s, want %s", test.name, got, test.want)
		}
		if p := w.client.curl(t, "http://"+test.name+"/"); test.want == "pool" {
			p.refused(t)
		} else if p.code != 6 {
			t.Errorf("%s: curl exit %d, want 6 (no such name)", test.name, p.code)
		}
	}
	if n, who := w.leaked(t); n != 0 || w.carried(t) != 0 {
		t.Errorf("somebody was asked: %d packets %s, %d to a SOCKS server", n, who, w.carried(t))
	}
}

// answer asks for a name's IPv4 address: an address, "pool" for a synthetic
// one, or the code of an answer without any.
func (w *world) answer(t testing.TB, name string) string {
	t.Helper()
	m, err := w.client.ask("udp", insideNS, name, dns.TypeA)
	if err != nil {
		t.Errorf("%s: %v", name, err)
		return ""
	}
	if len(m.Answer) == 0 {
		return dns.RcodeToString[m.Rcode]
	}
	if a := m.Answer[0].(*dns.A).A.String(); !pool4.Contains(netip.MustParseAddr(a)) {
		return a
	}
	return "pool"
}

// TestResolveList: the names of a list are resolved here, and those that it gets later.
func TestResolveList(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.insideDNS.add(t, "one.corp.example. 60 IN A "+insideAt, "two.corp.example. 60 IN A "+insideAt)
	w.gateway.file(t, "corp", "one.corp.example\n", 0o644)
	serve(t, w.gateway, settings{routes: "LIST corp file=corp\nRESOLVE local $corp\nDIRECT 198.51.100.0/24\nSOCKD5 @=198.51.100.11 *\n"})
	for name, want := range map[string]string{"one.corp.example": insideAt, "two.corp.example": "pool"} {
		if got := w.answer(t, name); got != want {
			t.Errorf("%s is %s, want %s", name, got, want)
		}
	}
	w.client.curl(t, "http://one.corp.example/").fetched(t, clientAt)
	w.gateway.file(t, "corp", "*.corp.example\n", 0o644)
	eventually(t, 20*time.Second, "the list that has changed", func() bool { return w.answer(t, "two.corp.example") == insideAt })
	w.client.curl(t, "http://two.corp.example/").fetched(t, clientAt)
}
