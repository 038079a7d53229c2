package netns_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"

	"github.com/tproxyd/tproxyd/pkg/flow"
	"github.com/tproxyd/tproxyd/pkg/socks"
)

// Topology: world, with one of Debian's servers on socks1, to which the gateway
// brings every flow of an untouched client:
//
//	client --> gateway --SOCKS or CONNECT--> socks1 --> outside

// outcome is what the client sees of one thing that it does.
type outcome string

const (
	works outcome = "works" // the outside answers, and sees the server's address
	local outcome = "local" // that, by a name that the gateway has looked up
	abort outcome = "abort" // RST or "refused", within a second
	ended outcome = "ended" // FIN in place of an answer, at once
	later outcome = "later" // FIN in place of an answer, after a second
	lacks outcome = "lacks" // told at once that there is none: ICMP port unreachable, SERVFAIL; a refusal of BIND
	drops outcome = "drops" // taken without a word, and nothing comes of it
	blank outcome = "-"     // not asked: nothing to ask for
)

// interop is what the client sees of each server, by what it does: the rows are
// interopServers, the columns interopColumns. What surprises has its reason in
// the server:
//
//   - ss-local and v2ray report success before they connect, and v2ray tries for
//     a second: the client sees its connection closed by the far side.
//   - microsocks, hpsockd, ss-local, v2ray and tinyproxy take the end of one
//     direction for the end of the flow, and the answer is lost; v2ray waits a
//     second for it.
//   - hpsockd is of IPv4, and takes datagrams to others without a word. In SOCKS5
//     it announces an address for BIND at which nobody is heard.
//   - danted takes the SOCKS4A form of a name for the address 0.0.0.1.
//   - SOCKS4 has no room for a password, nor for IPv6.
var interop = map[string][16]outcome{
	//                     CONNECT                     dig    closed unrea- NX-    denied wrong  half-  UDP                         server
	//                     IPv4   IPv6   name   name6  TXT    port   chable DOMAIN        secret close  IPv4   IPv6   name   BIND   killed
	"danted":             {works, works, works, works, works, abort, abort, abort, abort, blank, works, works, works, works, works, ended},
	"danted, user":       {works, works, works, works, works, abort, abort, abort, abort, abort, works, works, works, works, works, ended},
	"danted, SOCKD":      {works, works, works, works, works, abort, abort, abort, abort, blank, works, works, works, works, blank, ended},
	"danted, SOCKD4":     {works, abort, local, abort, works, abort, abort, abort, abort, blank, works, lacks, lacks, lacks, works, ended},
	"danted, SOCKD4A":    {works, abort, abort, abort, works, abort, abort, abort, abort, blank, works, lacks, lacks, lacks, works, ended},
	"microsocks":         {works, works, works, works, works, abort, abort, abort, blank, blank, ended, lacks, lacks, lacks, lacks, ended},
	"microsocks, user":   {works, works, works, works, works, abort, abort, abort, blank, abort, ended, lacks, lacks, lacks, lacks, ended},
	"microsocks, SOCKD4": {abort, abort, abort, abort, lacks, abort, abort, abort, abort, blank, abort, lacks, lacks, lacks, lacks, abort},
	"ssh -D":             {works, works, works, works, works, abort, abort, abort, abort, blank, works, lacks, lacks, lacks, lacks, ended},
	"ssh -D, SOCKD4":     {works, abort, local, abort, works, abort, abort, abort, abort, blank, works, lacks, lacks, lacks, lacks, ended},
	"ssh -D, SOCKD4A":    {works, abort, works, works, works, abort, abort, abort, abort, blank, works, lacks, lacks, lacks, lacks, ended},
	"hpsockd":            {works, abort, works, abort, works, abort, abort, abort, abort, blank, ended, works, drops, drops, drops, ended},
	"hpsockd, SOCKD4":    {works, abort, local, abort, works, abort, abort, abort, abort, blank, ended, lacks, lacks, lacks, works, ended},
	"hpsockd v4, SOCKD":  {works, abort, local, abort, works, abort, abort, abort, abort, blank, ended, lacks, lacks, lacks, blank, ended},
	"ss-local":           {works, works, works, works, works, ended, ended, ended, ended, blank, ended, works, works, works, lacks, ended},
	"v2ray":              {works, works, works, works, works, later, later, later, ended, blank, later, works, works, works, lacks, ended},
	"v2ray, user":        {works, works, works, works, works, later, later, later, ended, abort, later, works, works, works, lacks, ended},
	"v2ray, SOCKD4A":     {works, abort, works, works, works, later, later, later, ended, blank, later, lacks, lacks, lacks, lacks, ended},
	"v2ray, HTTP":        {works, works, works, works, works, later, later, later, ended, blank, later, lacks, lacks, lacks, blank, ended},
	"v2ray, HTTP, user":  {works, works, works, works, works, later, later, later, ended, abort, later, lacks, lacks, lacks, blank, ended},
	"v2ray, TLS":         {works, works, works, works, works, later, later, later, ended, abort, later, lacks, lacks, lacks, blank, ended},
	"v2ray, HTTP, TLS":   {works, works, works, works, works, later, later, later, ended, abort, later, lacks, lacks, lacks, blank, ended},
	"tinyproxy":          {works, works, works, works, works, abort, abort, abort, abort, blank, ended, lacks, lacks, lacks, blank, ended},
	"tinyproxy, user":    {works, works, works, works, works, abort, abort, abort, abort, abort, ended, lacks, lacks, lacks, blank, ended},
}

// interopColumns is what the client does for each column, in this order.
var interopColumns = [16]struct {
	name string
	do   func(*interopRun) (outcome, error)
}{
	{"CONNECT to IPv4", func(r *interopRun) (outcome, error) { return r.fetch("http://" + outsideAt + "/") }},
	{"CONNECT to IPv6", func(r *interopRun) (outcome, error) { return r.fetch("http://[" + outsideAt6 + "]/") }},
	// Of both families, asked for as either.
	{"CONNECT to a name", func(r *interopRun) (outcome, error) { return r.fetchNamed("www.example.net", "-4", "-6") }},
	// That has an IPv6 address alone, where it is looked up.
	{"CONNECT to a name of IPv6", func(r *interopRun) (outcome, error) { return r.fetchNamed("only6.example.net", "-4") }},
	// A type that goes through the server to the gateway's resolver, over TCP.
	{"dig TXT", (*interopRun).digTXT},
	{"closed port", func(r *interopRun) (outcome, error) { return r.refused(outsideAt + ":9") }},
	// The server has no route there.
	{"unreachable", func(r *interopRun) (outcome, error) { return r.refused("203.0.113.99:80") }},
	{"NXDOMAIN", func(r *interopRun) (outcome, error) {
		return r.refused(net.JoinHostPort(r.synthetic("nowhere.example.com"), "80"))
	}},
	// By a rule of the server.
	{"denied", func(r *interopRun) (outcome, error) { return r.refused("203.0.113.81:7666") }},
	// A password, or a name in the certificate.
	{"wrong secret", func(r *interopRun) (outcome, error) { return r.refused(outsideAt + ":81") }},
	{"half-close", (*interopRun).halfClose},
	{"UDP to IPv4", func(r *interopRun) (outcome, error) { return r.datagram(outsideAt) }},
	{"UDP to IPv6", func(r *interopRun) (outcome, error) { return r.datagram(outsideAt6) }},
	{"UDP to a name", func(r *interopRun) (outcome, error) { return r.datagram(r.synthetic("www.example.net")) }},
	{"BIND", (*interopRun).bind},
	{"killed", (*interopRun).killed},
}

// interopServer is a row.
type interopServer struct {
	name    string
	start   func(testing.TB, *site) *process
	action  string // of the rule
	options string // of the SERVER line
	wrong   string // in their place, what the server must not be taken with; empty: blank
}

// interopServers are the rows: how each server is started, and how the gateway
// is told of it.
var interopServers = []interopServer{
	{"danted", interopDante("none"), "SOCKD5", "", ""},
	{"danted, user", interopDante("username"), "SOCKD5", "credential=int", "credential=wrong"},
	{"danted, SOCKD", interopDante("none"), "SOCKD", "", ""},
	{"danted, SOCKD4", interopDante("none"), "SOCKD4", "", ""},
	{"danted, SOCKD4A", interopDante("none"), "SOCKD4A", "", ""},
	{"microsocks", interopMicrosocks(), "SOCKD5", "", ""},
	{"microsocks, user", interopMicrosocks("-u", "int", "-P", interopPassword), "SOCKD5", "credential=int", "credential=wrong"},
	{"microsocks, SOCKD4", interopMicrosocks(), "SOCKD4", "", ""},
	{"ssh -D", interopSSH, "SOCKD5", "", ""},
	{"ssh -D, SOCKD4", interopSSH, "SOCKD4", "", ""},
	{"ssh -D, SOCKD4A", interopSSH, "SOCKD4A", "", ""},
	{"hpsockd", interopHpsockd(""), "SOCKD5", "", ""},
	{"hpsockd, SOCKD4", interopHpsockd(""), "SOCKD4", "", ""},
	{"hpsockd v4, SOCKD", interopHpsockd("v4-only;"), "SOCKD", "", ""},
	{"ss-local", interopShadowsocks, "SOCKD5", "", ""},
	{"v2ray", interopV2ray("socks", `"udp": true, "ip": "198.51.100.11"`), "SOCKD5", "", ""},
	{"v2ray, user", interopV2ray("socks", `"udp": true, "ip": "198.51.100.11", "auth": "password", `+interopAccounts), "SOCKD5", "credential=int", "credential=wrong"},
	{"v2ray, SOCKD4A", interopV2ray("socks", ""), "SOCKD4A", "", ""},
	{"v2ray, HTTP", interopV2ray("http", ""), "HTTP", "", ""},
	{"v2ray, HTTP, user", interopV2ray("http", interopAccounts), "HTTP", "credential=int", "credential=wrong"},
	{"v2ray, TLS", interopV2rayTLS("socks", ""), "SOCKD5", "tls sni=proxy.example", "tls sni=other.example"},
	{"v2ray, HTTP, TLS", interopV2rayTLS("http", ""), "HTTP", "tls sni=proxy.example", "tls sni=other.example"},
	{"tinyproxy", interopTinyproxy(""), "HTTP", "", ""},
	{"tinyproxy, user", interopTinyproxy("BasicAuth int " + interopPassword), "HTTP", "credential=int", "credential=wrong"},
}

// interopAhead is what the daemon finds that servers can be sent ahead of their
// answers, if they are far, and also which rows are tried at a distance. What is
// not asked in SOCKS5 is sent nothing ahead.
var interopAhead = map[string]string{
	"danted":           "data",
	"danted, user":     "data",
	"microsocks":       "off", // it hangs
	"microsocks, user": "off",
	"ssh -D":           "data",
	"ssh -D, SOCKD4A":  "",
	"hpsockd":          "greeting", // it loses the data
	"ss-local":         "data",
	"v2ray":            "data",
	"v2ray, HTTP":      "",
	"tinyproxy":        "",
}

func TestInterop(t *testing.T) {
	t.Parallel()
	for _, row := range interopServers {
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			r, d := newInteropRun(t, row, false)
			t.Run("check --probe", func(t *testing.T) { r.probe(t, d, row) })
			r.try(t, row.name)
		})
	}
	if len(interop) != len(interopServers) {
		t.Errorf("%d rows for %d servers", len(interop), len(interopServers))
	}
}

// TestInteropFar is the table again at a distance: connections are made and
// authenticated ahead of need, and what a server takes ahead is sent ahead. The
// client sees no difference.
func TestInteropFar(t *testing.T) {
	t.Parallel()
	for _, row := range interopServers {
		ahead, ok := interopAhead[row.name]
		if !ok {
			continue
		}
		t.Run(row.name, func(t *testing.T) {
			t.Parallel()
			r, d := newInteropRun(t, row, true)
			for range 2 { // of the first one it is learned how far it is
				if o, err := r.fetch("http://" + outsideAt + "/"); o != works {
					t.Fatalf("%s %v", o, err)
				}
			}
			var status struct {
				Servers []struct {
					Name, Pipeline string
					Warm           int
				}
			}
			eventually(t, 10*time.Second, "it is known, and connected to", func() bool {
				if err := json.Unmarshal([]byte(d.cli(t, "status", "--json", "-c", d.config).ok(t).out), &status); err != nil {
					t.Fatal(err)
				}
				for _, s := range status.Servers {
					if s.Name == "s" {
						return s.Pipeline == ahead && s.Warm > 0
					}
				}
				return false
			})
			r.try(t, row.name)
		})
	}
}

// try compares what the client sees with the row of this name.
func (r *interopRun) try(t *testing.T, name string) {
	want, ok := interop[name]
	if !ok {
		t.Fatal("not in the table")
	}
	for i, column := range interopColumns {
		t.Run(column.name, func(t *testing.T) {
			if want[i] == blank {
				return
			}
			began := time.Now()
			if got, err := column.do(r); got != want[i] {
				t.Errorf("%s after %v (%v), want %s", got, time.Since(began).Round(time.Millisecond), err, want[i])
			}
		})
	}
}

// interopRun is a row being tried.
type interopRun struct {
	*world
	t      testing.TB
	server *process
	action string
	auth   *socks.Auth
}

func newInteropRun(t *testing.T, row interopServer, far bool) (*interopRun, *daemon) {
	w := newWorld(t)
	one, _ := w.sites()
	if far {
		w.away(t, one, "socks1", socks1Out, socks1Out6, socks1At, socks1At6)
	}
	r := &interopRun{world: w, t: t, action: row.action}
	w.net.ip(t, "route add 203.0.113.81 dev outside")
	w.outside.ip(t, "addr add 203.0.113.81/32 dev wan0")
	// A name in the form of SOCKS4A is 0.0.0.1 to a server that does not know it.
	w.socks1.ip(t, "route add unreachable 203.0.113.99", "route add unreachable 0.0.0.0/8")
	w.outsideDNS.add(t, "only6.example.net. 60 IN AAAA "+outsideAt6)
	w.insideDNS.add(t,
		"www.example.net. 60 IN A "+outsideAt, "www.example.net. 60 IN AAAA "+outsideAt6,
		"only6.example.net. 60 IN AAAA "+outsideAt6,
		`txt.example.net. 60 IN TXT "known inside"`)
	w.outside.udpServices(t, outsideAt, outsideAt6)
	w.outside.answerTCP(t, outsideAt+":7", func(c *net.TCPConn) { io.Copy(c, c) })
	w.outside.answerTCP(t, outsideAt+":81", func(c *net.TCPConn) { c.Write([]byte("x")) })
	w.outside.answerTCP(t, "203.0.113.81:7666", func(c *net.TCPConn) { c.Write([]byte("x")) })
	w.outside.answerTCP(t, outsideAt+":7001", func(c *net.TCPConn) { // what it got, after the end of it
		b, _ := io.ReadAll(c)
		c.Write(b)
	})
	r.server = row.start(t, one)
	routes := "HEALTH probe=" + outsideAt + ":80\nSERVER s 198.51.100.11:1080 " + row.options + "\n"
	if row.wrong != "" {
		routes += "SERVER wrong 198.51.100.11:1080 " + row.wrong + "\n" + row.action + " @=wrong " + outsideAt + " eq 81\n"
	}
	if strings.Contains(row.options, "credential") {
		r.auth = &socks.Auth{Username: "int", Password: interopPassword}
	}
	return r, serve(t, w.gateway, settings{
		routes:      routes + row.action + " @=s *\n",
		credentials: fmt.Sprintf("[int]\nusername = \"int\"\npassword = %q\n[wrong]\nusername = \"int\"\npassword = \"wrong\"\n", interopPassword),
		trust:       one.dir + "/tls.crt", // of a server with TLS
	})
}

// synthetic is the address that the client is told for a name.
func (r *interopRun) synthetic(name string) string {
	return r.client.mustLookup(r.t, insideNS, name, dns.TypeA).String()
}

// resets is what a RST becomes, depending on what the client does as it comes.
var resets = []syscall.Errno{syscall.ECONNREFUSED, syscall.ECONNRESET, syscall.EPIPE, syscall.ENOTCONN}

// seen makes an outcome of the error with which waiting for an answer ended.
func seen(err error, took time.Duration) (outcome, error) {
	soon := took < 900*time.Millisecond
	switch {
	case err == nil:
		return works, nil
	case err == io.EOF && soon:
		return ended, err
	case err == io.EOF && took < 3*time.Second:
		return later, err
	case soon && slices.ContainsFunc(resets, func(e syscall.Errno) bool { return errors.Is(err, e) }):
		return abort, err
	case errors.Is(err, os.ErrDeadlineExceeded):
		return drops, err
	}
	return "?", err
}

// fetch has curl fetch a page of the outside, which must come to the server.
func (r *interopRun) fetch(url string, args ...string) (outcome, error) {
	p := r.client.curl(r.t, url, args...)
	err := fmt.Errorf("curl: exit %d: %s", p.code, p.result.err)
	switch from := p.from.String(); {
	case p.code == 0 && (from == socks1Out || from == socks1Out6):
		return works, nil
	case p.code == 52 && p.took < time.Second: // an empty reply
		return ended, err
	case (p.code == 7 || p.code == 55 || p.code == 56) && p.took < time.Second: // cannot connect, reset
		return abort, err
	}
	return "?", fmt.Errorf("%w, body %q", err, p.body)
}

// fetchNamed is fetch by a name, with options of curl in turn.
func (r *interopRun) fetchNamed(name string, families ...string) (outcome, error) {
	for _, f := range families {
		if o, err := r.fetch("http://"+name+"/", f); o != works {
			return o, err
		}
	}
	inside, outside := r.insideDNS.questions(name), r.outsideDNS.questions(name)
	switch {
	case len(inside) > 0 && len(outside) == 0 && !slices.ContainsFunc(inside, func(q question) bool { return q.From.String() != wanAt }):
		return local, nil
	case len(inside) == 0 && len(outside) > 0:
		return works, nil
	}
	return "?", fmt.Errorf("the inside was asked %v, the outside %v", inside, outside)
}

func (r *interopRun) digTXT() (outcome, error) {
	all := r.client.run(r.t, command{args: []string{tool(r.t, "dig"), "@" + insideNS, "+tries=1", "+time=3", "txt.example.net", "TXT"}}).ok(r.t).out
	for _, q := range r.insideDNS.questions("txt.example.net") {
		if q.From.String() != socks1Out || q.Network != "tcp" {
			return "?", fmt.Errorf("the inside was asked %v", q)
		}
	}
	switch {
	case strings.Contains(all, `"known inside"`):
		return works, nil
	case strings.Contains(all, "status: SERVFAIL"):
		return lacks, nil
	}
	return "?", errors.New(all)
}

// refused waits for a byte of a service.
func (r *interopRun) refused(to string) (outcome, error) {
	took, err := r.firstByte(to)
	return seen(err, took)
}

// open opens a flow to a service of the outside that repeats what it hears.
func (r *interopRun) open() (*net.TCPConn, error) {
	c, err := r.client.dial("tcp", outsideAt+":7", 5*time.Second)
	if err != nil {
		return nil, err
	}
	r.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(5 * time.Second))
	b := []byte("x")
	if _, err = c.Write(b); err == nil {
		_, err = c.Read(b)
	}
	return c.(*net.TCPConn), err
}

// halfClose says something, ends its direction, and waits for the answer.
func (r *interopRun) halfClose() (outcome, error) {
	c, err := r.client.dial("tcp", outsideAt+":7001", 5*time.Second)
	if err != nil {
		return seen(err, 0)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	began := time.Now()
	if _, err = c.Write([]byte("hello")); err == nil {
		err = c.(*net.TCPConn).CloseWrite()
	}
	if err == nil {
		_, err = io.ReadFull(c, make([]byte, 5))
	}
	return seen(err, time.Since(began))
}

// killed kills the server below two flows, of which one goes on talking. When a
// process is killed its kernel says goodbye for it: a FIN, and a RST to whatever
// comes after that. The idle one sees the first, who talks the second, and a new
// flow is refused.
func (r *interopRun) killed() (outcome, error) {
	idle, err := r.open()
	if err != nil {
		return seen(err, 0)
	}
	busy, err := r.open()
	if err != nil {
		return "?", err
	}
	talked := make(chan error, 1)
	go func() {
		for {
			if _, err := busy.Write(make([]byte, 100)); err != nil {
				talked <- err
				return
			}
			time.Sleep(time.Millisecond)
		}
	}()
	r.server.kill()
	began := time.Now()
	_, err = idle.Read(make([]byte, 1))
	o, why := seen(err, time.Since(began))
	// EPIPE is what a RST makes of a socket that has had the FIN.
	err = <-talked
	if took := time.Since(began); took > time.Second || !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.EPIPE) {
		return "?", fmt.Errorf("who talks ended with %w after %v", err, took)
	}
	if o, err := r.refused(outsideAt + ":7"); o != abort {
		return "?", fmt.Errorf("a new flow: %s %w", o, err)
	}
	return o, why
}

// datagram sends one to a service that repeats it.
func (r *interopRun) datagram(to string) (outcome, error) {
	c := r.client.connected(r.t, net.JoinHostPort(to, "7"))
	_, err := say(c, []byte("hello"), time.Second)
	if errors.Is(err, syscall.ECONNREFUSED) {
		return lacks, err
	}
	return seen(err, 0)
}

// bind has the server wait for a connection of the outside, as the gateway would
// ask it to, and speaks with who has come.
func (r *interopRun) bind() (outcome, error) {
	c, err := r.gateway.dial("tcp", socks1At+":1080", time.Second)
	r.gateway.must(r.t, err)
	defer c.Close()
	c.SetDeadline(time.Now().Add(5 * time.Second))
	from := flow.Target{Addr: netip.MustParseAddr(outsideAt)}
	var bound netip.AddrPort
	accept := socks.AcceptBind
	if r.action == "SOCKD5" {
		if err := socks.Greet(c, r.auth); err != nil {
			return "?", err
		}
		bound, err = socks.Bind(c, from)
	} else {
		bound, err = socks.Bind4(c, from, "")
		accept = socks.AcceptBind4
	}
	if err != nil {
		return lacks, err
	}
	peer, err := r.outside.dial("tcp", bound.String(), time.Second)
	for end := time.Now().Add(time.Second); errors.Is(err, syscall.ECONNREFUSED) && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond) // hpsockd announces first and listens then
		peer, err = r.outside.dial("tcp", bound.String(), time.Second)
	}
	if err != nil {
		return drops, err // announced, but in vain
	}
	defer peer.Close()
	if _, err := accept(c); err != nil {
		return seen(err, 0)
	}
	peer.Write([]byte("x"))
	_, err = io.ReadFull(c, make([]byte, 1))
	return seen(err, 0)
}
