package netns_test

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// question is one that a nameServer was asked.
type question struct {
	From    netip.Addr
	Network string // "udp" or "tcp"
	Name    string // lower case, without the final dot
	Type    string
}

// nameServer is an authoritative server for a handful of names that remembers
// who asked.
type nameServer struct {
	mu     sync.Mutex
	asked  []question
	silent map[string]bool                // names that get no answer at all
	names  map[string]map[uint16][]dns.RR // owner in lower case; "*.x." too
	whole  map[question][]dns.RR          // by name and type: the answer, whatever the names say
	every  func(name string) netip.Addr   // not nil: what every name has for an address
}

// startNameServer answers on each address of the host, UDP and TCP port 53,
// from records in zone file form. Unknown names are NXDOMAIN.
func startNameServer(t testing.TB, h *host, addrs []string, records ...string) *nameServer {
	t.Helper()
	n := startNameServerAt(t, h, net.JoinHostPort(addrs[0], "53"), records...)
	for _, a := range addrs[1:] {
		n.serve(t, h, net.JoinHostPort(a, "53"))
	}
	return n
}

// startNameServerAt is startNameServer at one address and port.
func startNameServerAt(t testing.TB, h *host, at string, records ...string) *nameServer {
	t.Helper()
	n := &nameServer{names: map[string]map[uint16][]dns.RR{}, silent: map[string]bool{}, whole: map[question][]dns.RR{}}
	n.add(t, records...)
	n.serve(t, h, at)
	return n
}

func (n *nameServer) serve(t testing.TB, h *host, at string) {
	t.Helper()
	for _, s := range []*dns.Server{
		{PacketConn: h.listenPacket(t, "udp", at), Handler: n},
		{Listener: h.listen(t, "tcp", at), Handler: n},
	} {
		go s.ActivateAndServe()
	}
}

// add adds records in zone file form.
func (n *nameServer) add(t testing.TB, records ...string) {
	t.Helper()
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, text := range records {
		rr, err := dns.NewRR(text)
		if err != nil {
			t.Fatal(err)
		}
		owner := strings.ToLower(rr.Header().Name)
		if n.names[owner] == nil {
			n.names[owner] = map[uint16][]dns.RR{}
		}
		n.names[owner][rr.Header().Rrtype] = append(n.names[owner][rr.Header().Rrtype], rr)
	}
}

// ServeDNS answers one question.
func (n *nameServer) ServeDNS(w dns.ResponseWriter, q *dns.Msg) {
	owner := strings.ToLower(q.Question[0].Name)
	qtype := q.Question[0].Qtype
	from := netip.MustParseAddrPort(w.RemoteAddr().String()).Addr().Unmap()
	n.mu.Lock()
	defer n.mu.Unlock()
	n.asked = append(n.asked, question{from, w.LocalAddr().Network(), strings.TrimSuffix(owner, "."), dns.TypeToString[qtype]})
	if n.silent[strings.TrimSuffix(owner, ".")] {
		return
	}
	m := new(dns.Msg).SetReply(q)
	m.RecursionAvailable = true
	rrs, known := n.names[owner]
	name := strings.TrimSuffix(owner, ".")
	if whole := n.whole[question{Name: name, Type: dns.TypeToString[qtype]}]; whole != nil {
		rrs, known = map[uint16][]dns.RR{}, true
		m.Answer = whole
	}
	if n.every != nil {
		rrs, known = map[uint16][]dns.RR{dns.TypeA: {&dns.A{Hdr: dns.RR_Header{Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 5}, A: n.every(name).AsSlice()}}}, true
	}
	if !known {
		if _, parent, cut := strings.Cut(owner, "."); cut {
			rrs, known = n.names["*."+parent]
		}
	}
	if !known {
		m.Rcode = dns.RcodeNameError
	}
	for _, rr := range rrs[qtype] {
		rr = dns.Copy(rr)
		rr.Header().Name = q.Question[0].Name
		m.Answer = append(m.Answer, rr)
	}
	if w.LocalAddr().Network() == "udp" {
		size := dns.MinMsgSize
		if o := q.IsEdns0(); o != nil {
			size = int(o.UDPSize())
		}
		m.Truncate(size)
	}
	w.WriteMsg(m)
}

// questions returns what was asked about a name so far, in order.
func (n *nameServer) questions(name string) []question {
	n.mu.Lock()
	defer n.mu.Unlock()
	var qs []question
	for _, q := range n.asked {
		if q.Name == name {
			qs = append(qs, q)
		}
	}
	return qs
}

// ask asks a name server from the host, over "udp" or "tcp". As every stub
// resolver it asks again when a datagram is lost.
func (h *host) ask(network, server, name string, qtype uint16) (*dns.Msg, error) {
	var m *dns.Msg
	err := h.in(func() (err error) {
		c := dns.Client{Net: network, Timeout: 2 * time.Second}
		for range 3 {
			q := new(dns.Msg).SetQuestion(dns.Fqdn(name), qtype)
			m, _, err = c.Exchange(q, net.JoinHostPort(server, "53"))
			var ne net.Error
			if !errors.As(err, &ne) || !ne.Timeout() {
				break
			}
		}
		return err
	})
	return m, err
}

// lookup asks for a name's address of one family and returns the first.
func (h *host) lookup(server, name string, qtype uint16) (netip.Addr, error) {
	m, err := h.ask("udp", server, name, qtype)
	if err != nil {
		return netip.Addr{}, err
	}
	for _, rr := range m.Answer {
		switch rr := rr.(type) {
		case *dns.A:
			return netip.MustParseAddr(rr.A.String()), nil
		case *dns.AAAA:
			return netip.MustParseAddr(rr.AAAA.String()), nil
		}
	}
	return netip.Addr{}, fmt.Errorf("%s %s: %s, no address", name, dns.TypeToString[qtype], dns.RcodeToString[m.Rcode])
}

// mustLookup is lookup that fails the test.
func (h *host) mustLookup(t testing.TB, server, name string, qtype uint16) netip.Addr {
	t.Helper()
	a, err := h.lookup(server, name, qtype)
	if err != nil {
		t.Fatal(err)
	}
	return a
}
