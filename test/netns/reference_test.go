package netns_test

import (
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

// office is the topology of the reference scenario, with the addresses of the
// paper. As in world, plain routing reaches everything, so that the far side
// would see the client itself if the gateway let it through.
//
//	client 10.0.1.10 -- 10.0.1.1 gateway 10.0.0.1 -- net --+
//	                                                       |
//	   int1      10.0.3.1 | 203.0.113.1   user + password  +
//	   int2      10.0.3.2 | 203.0.113.2   user + password  +
//	   d1        10.0.4.1 | 192.168.100.1                  +
//	   p1   192.168.100.2 | 172.31.0.1    asked by d1      +
//	   intranet  10.0.5.5 web, 10.0.5.53 name server       +
//	   dmz  192.168.100.50 web                             +
//	   private  172.31.0.80 web, 172.31.0.53 name server   +
//	   internet 203.0.113.80 web, 203.0.113.53 name server +
type office struct {
	*world                       // client, gateway, net only
	int1, int2, d1, p1           *host
	int1Dante, int2Dante         *danted
	d1Dante, p1Dante             *danted
	corpDNS, privateDNS, inetDNS *nameServer
	decoyDNS                     *nameServer // d1's
	intranetWeb, dmzWeb          *webServer
	privateWeb, inetWeb          *webServer
}

// fixture reads a file of testdata.
func fixture(t testing.TB, name string) string {
	t.Helper()
	b, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// paperDante is a danted.conf of the scenario without its own logoutput.
func paperDante(t testing.TB, name string) string {
	t.Helper()
	return strings.Replace(fixture(t, "dante/"+name), "logoutput: syslog\n", "", 1)
}

func newOffice(t testing.TB) *office {
	t.Helper()
	o := &office{world: &world{
		client: newHost(t, "client"), gateway: newHost(t, "gateway"), net: newHost(t, "net"),
	}}
	for _, router := range []*host{o.gateway, o.net} {
		router.sysctl(t, "net.ipv4.ip_forward", "1")
	}
	connect(t, o.client, "eth0", o.gateway, "lan0")
	o.client.ip(t, "addr add 10.0.1.10/24 dev eth0", "route add default via 10.0.1.1")
	o.gateway.ip(t, "addr add 10.0.1.1/24 dev lan0")
	o.net.ip(t, "addr add 198.51.100.254/32 dev lo")
	o.uplink(t, o.gateway, "wan0", "10.0.0.1")
	o.net.ip(t, "route add 10.0.1.0/24 via 10.0.0.1 dev wan0 onlink")
	at := func(name string, addrs ...string) *host {
		h := newHost(t, name)
		o.uplink(t, h, name, addrs...)
		return h
	}
	o.int1 = at("int1", "203.0.113.1", "10.0.3.1")
	o.int2 = at("int2", "203.0.113.2", "10.0.3.2")
	o.d1 = at("d1", "192.168.100.1/24", "10.0.4.1")
	o.p1 = at("p1", "172.31.0.1/24", "192.168.100.2/24")
	intranet := at("intranet", "10.0.5.5", "10.0.5.53", "10.0.4.53")
	dmz := at("dmz", "192.168.100.50")
	private := at("private", "172.31.0.80", "172.31.0.53")
	internet := at("internet", "203.0.113.80", "203.0.113.53")

	o.client.resolver(t, "10.0.5.53")
	o.gateway.resolver(t, "10.0.5.53")
	o.d1.resolver(t, "10.0.4.53")
	o.int1.resolver(t, "203.0.113.53")
	o.int2.resolver(t, "203.0.113.53")
	o.p1.resolver(t, "172.31.0.53")
	o.corpDNS = startNameServer(t, intranet, []string{"10.0.5.53"}, "intranet.corp.example. 60 IN A 10.0.5.5")
	// danted looks every name up before it passes it on unresolved, and
	// refuses what it cannot find. What it finds is a decoy.
	o.decoyDNS = startNameServer(t, intranet, []string{"10.0.4.53"}, "*.private-net.org. 60 IN A 192.0.2.99")
	o.privateDNS = startNameServer(t, private, []string{"172.31.0.53"}, "www.private-net.org. 60 IN A 172.31.0.80")
	o.inetDNS = startNameServer(t, internet, []string{"203.0.113.53"}, "*.example.org. 60 IN A 203.0.113.80")
	o.intranetWeb = startWeb(t, intranet, "10.0.5.5")
	o.dmzWeb = startWeb(t, dmz, "192.168.100.50")
	o.privateWeb = startWeb(t, private, "172.31.0.80")
	o.inetWeb = startWeb(t, internet, "203.0.113.80", "203.0.113.80:443", "203.0.113.80:8080")

	for _, h := range []*host{o.int1, o.int2} {
		h.user(t, "int", passwordHash)
	}
	o.int1Dante = o.startInt1(t)
	o.int2Dante = startDanted(t, o.int2, "10.0.3.2:1080",
		strings.NewReplacer("10.0.3.1", "10.0.3.2", "203.0.113.1", "203.0.113.2").Replace(paperDante(t, "danted.conf.socks-int1")))
	o.d1Dante = startDanted(t, o.d1, "10.0.4.1:1080", paperDante(t, "danted.conf.socks-d1"))
	o.p1Dante = startDanted(t, o.p1, "192.168.100.2:1080", danteConf([]string{"192.168.100.2"}, []string{"172.31.0.1"}, "none", `
client pass { from: 192.168.100.0/24 to: 192.168.100.2/32 log: connect error }
socks pass { from: 192.168.100.0/24 to: .private-net.org log: connect error }`))
	return o
}

func (o *office) startInt1(t testing.TB) *danted {
	t.Helper()
	return startDanted(t, o.int1, "10.0.3.1:1080", paperDante(t, "danted.conf.socks-int1"))
}

// paperRoutes is the paper's Hummingbird sample with what its format has no
// place for: credentials, and a bad mark that expires within the test.
func paperRoutes(t testing.TB) string {
	t.Helper()
	return "HEALTH badexpire=5s\n" +
		"SERVER int1 10.0.3.1:1080 auth=userpass credential=int\n" +
		"SERVER int2 10.0.3.2:1080 auth=userpass credential=int\n" +
		strings.ReplaceAll(fixture(t, "hummingbird/socks.cnf"), "@=10.0.3.1,10.0.3.2", "@=int1,int2")
}

const paperCredentials = "[int]\nusername = \"int\"\npassword = \"" + password + "\"\n"

// carriedBy is danted's log lines about connections to target that user made;
// an empty user is nobody.
func (d *danted) carriedBy(user, target string) (lines []string) {
	for _, line := range strings.Split(d.log(), "\n") {
		if strings.Contains(line, "tcp/connect [") && strings.Contains(line, target) &&
			(user == "" || strings.Contains(line, "username%"+user+"@")) {
			lines = append(lines, line)
		}
	}
	return lines
}

// TestReferenceScenario is the office of the paper with its six requirements,
// each asserted at the far side, and what follows from them.
func TestReferenceScenario(t *testing.T) {
	t.Parallel()
	o := newOffice(t)
	serve(t, o.gateway, settings{routes: paperRoutes(t), credentials: paperCredentials, resolvers: []string{"10.0.5.53"}})

	// 1) 10.0.0.0/8 direct, by address and by name.
	o.client.curl(t, "http://10.0.5.5/one").fetched(t, "10.0.1.10")
	o.client.curl(t, "http://intranet.corp.example/one").fetched(t, "10.0.1.10")

	// 2) the Internet by HTTP through int1 and int2, 3) both actively used,
	// 4) with a user and a password, by name as the client spelled it.
	via := map[string]int{}
	for i := range 24 {
		p := o.client.curl(t, fmt.Sprintf("http://www%d.example.org/two", i)).fetched(t, "203.0.113.1", "203.0.113.2")
		via[p.from.String()]++
	}
	if via["203.0.113.1"] == 0 || via["203.0.113.2"] == 0 {
		t.Errorf("balance: %v, want both used", via)
	}
	o.client.curl(t, "http://203.0.113.80/two").fetched(t, "203.0.113.1", "203.0.113.2")
	for name, d := range map[string]*danted{"203.0.113.1": o.int1Dante, "203.0.113.2": o.int2Dante} {
		if n := len(d.carriedBy("int", "203.0.113.80.80")); n < via[name] {
			t.Errorf("%s logged %d connections of the user int, want %d\n%s", name, n, via[name], d.log())
		}
		if all := len(d.carriedBy("", "203.0.113.80.80")); all != len(d.carriedBy("int", "203.0.113.80.80")) {
			t.Errorf("%s carried somebody without a user\n%s", name, d.log())
		}
	}
	for i := range 24 {
		name := fmt.Sprintf("www%d.example.org", i)
		asked := o.inetDNS.questions(name)
		if len(asked) == 0 {
			t.Errorf("nobody asked the Internet for %s: the server was not given the name", name)
		}
		for _, q := range asked {
			if from := q.From.String(); from != "203.0.113.1" && from != "203.0.113.2" {
				t.Errorf("the Internet was asked for %s by %s", name, from)
			}
		}
	}

	// 5) 192.168.100.0/24 through d1.
	o.client.curl(t, "http://192.168.100.50/five").fetched(t, "192.168.100.1")

	// 6) *.private-net.org through d1 and p1; only p1's side knows the name.
	o.client.curl(t, "http://www.private-net.org/six").fetched(t, "172.31.0.1")
	if q := o.corpDNS.questions("www.private-net.org"); len(q) != 0 {
		t.Errorf("the office's name server was asked for a private name: %v", q)
	}
	if q := o.privateDNS.questions("www.private-net.org"); len(q) == 0 || q[0].From.String() != "172.31.0.1" {
		t.Errorf("p1's name server was asked %v, want by 172.31.0.1", q)
	}
	if len(o.d1Dante.carriedBy("", "192.168.100.2.1080 [172.31.0.1")) == 0 || len(o.d1Dante.carriedBy("", "www.private-net.org.80")) == 0 {
		t.Errorf("d1 did not pass the name on to p1:\n%s", o.d1Dante.log())
	}
	if len(o.p1Dante.carriedBy("", "172.31.0.80.80")) == 0 {
		t.Errorf("p1 did not carry it:\n%s", o.p1Dante.log())
	}

	// Only HTTP: everything else is refused by the default, at once.
	o.client.curl(t, "https://www0.example.org/").refused(t)
	o.client.curl(t, "https://203.0.113.80/").refused(t)
	o.client.curl(t, "http://www0.example.org:8080/").refused(t)
	if p := o.client.curl(t, "https://203.0.113.80/"); p.code != 7 {
		t.Errorf("HTTPS to an address: curl exit %d, want 7 (refused by the kernel)", p.code)
	}

	// int1 stopped: everything through int2. Back again: both.
	o.int1Dante.kill()
	for i := range 12 {
		o.client.curl(t, fmt.Sprintf("http://www%d.example.org/down", i)).fetched(t, "203.0.113.2")
	}
	// Back again it is used again, once its bad mark has expired.
	o.int1Dante = o.startInt1(t)
	back := map[string]int{}
	eventually(t, 20*time.Second, "both are used again", func() bool {
		p := o.client.curl(t, "http://www0.example.org/back").fetched(t, "203.0.113.1", "203.0.113.2")
		back[p.from.String()]++
		return len(back) == 2
	})
	for _, from := range o.inetWeb.from("/two") {
		if s := from.String(); s != "203.0.113.1" && s != "203.0.113.2" {
			t.Errorf("the Internet saw %s", s)
		}
	}
}

// TestPaperVerbatim loads the sample as the paper prints it.
func TestPaperVerbatim(t *testing.T) {
	t.Parallel()
	h := newHost(t, "any")
	r := h.run(t, command{args: []string{program(t), "check", "--routes", abs(t, "testdata/hummingbird/socks.cnf-verbatim")}}).ok(t)
	if !strings.Contains(r.out+r.err, "socks.cnf-verbatim:7:") || !strings.Contains(r.out+r.err, "warning") {
		t.Errorf("no warning about line 7:\n%s%s", r.out, r.err)
	}
}
