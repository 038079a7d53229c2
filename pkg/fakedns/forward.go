package fakedns

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"
	"github.com/miekg/dns"
)

const (
	tryTimeout   = 1500 * time.Millisecond // for one resolver by UDP
	cacheSize    = 4096
	maxCacheTime = time.Hour
	maxNegative  = 5 * time.Minute
)

// forwarder asks the resolvers, remembers their answers for as long as they
// say, and asks a question that is under way already only once.
type forwarder struct {
	o         *Options
	resolvers atomic.Pointer[[]netip.AddrPort]
	mu        sync.Mutex
	calls     map[cacheKey]*call
	cache     *lru.Cache[cacheKey, cached]
}

type cacheKey struct {
	name       string
	qtype      uint16
	rd, do, cd bool
}

type cached struct {
	msg   *dns.Msg // never changed
	since time.Time
	until time.Time
}

type call struct {
	done chan struct{}
	msg  *dns.Msg
	err  error
}

func newForwarder(o *Options) *forwarder {
	cache, err := lru.New[cacheKey, cached](cacheSize)
	if err != nil {
		panic(err) // only for a size below 1
	}
	f := &forwarder{o: o, calls: map[cacheKey]*call{}, cache: cache}
	f.setResolvers(o.Resolvers)
	return f
}

// setResolvers puts others in place of the resolvers. What the old ones said,
// or are about to say, is not remembered.
func (f *forwarder) setResolvers(list []netip.AddrPort) {
	list = slices.Clone(list)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.resolvers.Store(&list)
	f.cache.Purge()
}

// of returns the resolvers that are asked for a name, which may be of any case and
// have a final dot; all are those that are asked for all other names.
func (f *forwarder) of(name string, all []netip.AddrPort) []netip.AddrPort {
	if f.o.ResolversOf != nil {
		if own := f.o.ResolversOf(strings.ToLower(strings.TrimSuffix(name, "."))); len(own) > 0 {
			return own
		}
	}
	return all
}

func (f *forwarder) forget() { f.cache.Purge() }

func keyOf(req *dns.Msg) cacheKey {
	q := req.Question[0]
	opt := req.IsEdns0()
	return cacheKey{strings.ToLower(q.Name), q.Qtype, req.RecursionDesired, opt != nil && opt.Do(), req.CheckingDisabled}
}

var errNoResolver = errors.New("fakedns: no resolver is known; set [dns] resolvers")

// exchange returns what the resolvers say to req. The message is the caller's.
func (f *forwarder) exchange(ctx context.Context, req *dns.Msg, a Asker) (*dns.Msg, error) {
	if req.Opcode != dns.OpcodeQuery || req.Question[0].Qtype == dns.TypeAXFR || req.Question[0].Qtype == dns.TypeIXFR {
		return f.ask(ctx, req, f.of(req.Question[0].Name, *f.resolvers.Load()))
	}
	key := keyOf(req)
	if m := f.fromCache(key); m != nil {
		return m, nil
	}
	f.mu.Lock()
	if c := f.calls[key]; c != nil {
		f.mu.Unlock()
		if f.o.Own(a.Addr) && a.Server.IsValid() {
			// Our own question, asked again by a stub on this host whom we
			// asked: it goes where the stub sent it.
			return f.ask(ctx, req, []netip.AddrPort{a.Server})
		}
		select {
		case <-c.done:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
		if c.err != nil {
			return nil, c.err
		}
		return c.msg.Copy(), nil
	}
	c := &call{done: make(chan struct{})}
	f.calls[key] = c
	f.mu.Unlock()

	resolvers := f.resolvers.Load()
	c.msg, c.err = f.ask(ctx, req, f.of(key.name, *resolvers))
	f.mu.Lock()
	if c.err == nil && resolvers == f.resolvers.Load() {
		f.keep(key, c.msg)
	}
	delete(f.calls, key)
	f.mu.Unlock()
	close(c.done)
	if c.err != nil {
		return nil, c.err
	}
	return c.msg.Copy(), nil
}

// ask goes through the resolvers until one gives an answer that is not its own
// failure.
func (f *forwarder) ask(ctx context.Context, req *dns.Msg, resolvers []netip.AddrPort) (resp *dns.Msg, err error) {
	err = errNoResolver
	for range 2 {
		for _, r := range resolvers {
			var m *dns.Msg
			var e error
			if m, e = f.askOne(ctx, req, r); e == nil {
				if m.Rcode != dns.RcodeServerFailure && m.Rcode != dns.RcodeRefused {
					return m, nil
				}
				resp = m
			} else {
				err = e
			}
			if ctx.Err() != nil {
				break
			}
		}
		if resp != nil || ctx.Err() != nil {
			break
		}
	}
	if resp != nil {
		return resp, nil
	}
	return nil, err
}

// askOne asks one resolver by UDP, and by TCP if the answer is cut.
func (f *forwarder) askOne(ctx context.Context, req *dns.Msg, r netip.AddrPort) (*dns.Msg, error) {
	if q := req.Question[0].Qtype; q != dns.TypeAXFR && q != dns.TypeIXFR {
		m, err := f.askUDP(ctx, req, r)
		if err != nil || !m.Truncated {
			return m, err
		}
	}
	conn, err := f.o.Dial(ctx, "tcp", r.String())
	if err != nil {
		return nil, err
	}
	return exchangeTCP(ctx, conn, req)
}

func (f *forwarder) askUDP(ctx context.Context, req *dns.Msg, r netip.AddrPort) (*dns.Msg, error) {
	ctx, cancel := context.WithTimeout(ctx, tryTimeout)
	defer cancel()
	conn, err := f.o.Dial(ctx, "udp", r.String()) // its own port for each question
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	ask := question1(req)
	b, err := ask.Pack()
	if err != nil {
		return nil, err
	}
	if _, err := conn.Write(b); err != nil {
		return nil, err
	}
	in := make([]byte, 4096)
	for {
		n, err := conn.Read(in)
		if err != nil {
			return nil, err
		}
		if m, err := accept(ask, in[:n]); err == nil {
			return m, nil
		}
	}
}

// keep remembers an answer for as long as it says.
func (f *forwarder) keep(key cacheKey, m *dns.Msg) {
	if m.Rcode != dns.RcodeSuccess && m.Rcode != dns.RcodeNameError || m.Truncated {
		return
	}
	d := maxCacheTime
	if len(m.Answer) == 0 {
		d = 0 // unless there is a SOA
	}
	for _, rr := range m.Ns {
		if soa, ok := rr.(*dns.SOA); ok { // a "no", perhaps at the end of CNAMEs: RFC 2308 section 5
			d = min(maxNegative, time.Duration(min(soa.Hdr.Ttl, soa.Minttl))*time.Second)
		}
	}
	for _, rr := range m.Answer {
		d = min(d, time.Duration(rr.Header().Ttl)*time.Second)
	}
	if d > 0 {
		now := time.Now()
		f.cache.Add(key, cached{m.Copy(), now, now.Add(d)})
	}
}

// fromCache returns an answer as it is now: its times have gone down.
func (f *forwarder) fromCache(key cacheKey) *dns.Msg {
	c, ok := f.cache.Get(key)
	now := time.Now()
	if !ok || !now.Before(c.until) {
		return nil
	}
	m := c.msg.Copy()
	age := uint32(now.Sub(c.since) / time.Second)
	for _, section := range [][]dns.RR{m.Answer, m.Ns, m.Extra} {
		for _, rr := range section {
			if h := rr.Header(); h.Rrtype != dns.TypeOPT {
				h.Ttl -= min(h.Ttl, age)
			}
		}
	}
	return m
}

// Resolve asks the resolvers for the addresses of a name, IPv4 first. It is
// for this host's own use: nothing is made synthetic.
func (s *Server) Resolve(ctx context.Context, name string) ([]netip.Addr, error) {
	ctx, cancel := context.WithTimeout(ctx, s.o.Timeout)
	defer cancel()
	type result struct {
		addrs []netip.Addr
		err   error
	}
	ask := func(qtype uint16) (r result) {
		req := new(dns.Msg).SetQuestion(dns.Fqdn(name), qtype)
		resp, err := s.fwd.exchange(ctx, req, Asker{})
		if err != nil {
			return result{err: err}
		}
		for _, rr := range resp.Answer {
			switch rr := rr.(type) {
			case *dns.A:
				r.addrs = append(r.addrs, addrOf(rr.A)...)
			case *dns.AAAA:
				r.addrs = append(r.addrs, addrOf(rr.AAAA)...)
			}
		}
		if len(r.addrs) == 0 {
			r.err = &net.DNSError{Err: dns.RcodeToString[resp.Rcode], Name: name, IsNotFound: true}
		}
		return r
	}
	six := make(chan result, 1)
	go func() { six <- ask(dns.TypeAAAA) }()
	r4 := ask(dns.TypeA)
	r6 := <-six
	if addrs := append(r4.addrs, r6.addrs...); len(addrs) > 0 {
		return addrs, nil
	}
	return nil, r4.err
}

func addrOf(ip net.IP) []netip.Addr {
	if a, ok := netip.AddrFromSlice(ip); ok {
		return []netip.Addr{a.Unmap()}
	}
	return nil
}
