// Package upstream is which server, and when: the order of a list, chains,
// failover, the memory of servers that are down, and connections that are made
// ahead of need.
//
// It promises that a flow moves to the next server when a server is at fault
// and only then: what the destination does (refused, unreachable, denied by
// rule) is the flow's own end. Each server is asked at most once for a flow,
// each within the time limits, and the error of a list that failed tells what
// was wrong with each of them. A server that failed is asked last until it has
// been seen to answer again, which a probe finds out within a second. What the
// pool starts by itself (probes, warm connections) ends with Close.
package upstream

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tproxyd/tproxyd/pkg/flow"
	"github.com/tproxyd/tproxyd/pkg/socks"
)

// Protocol is what a server is asked in.
type Protocol uint8

// The protocols. The zero value is SOCKS5.
const (
	Socks5   Protocol = iota
	Socks4            // names are resolved here, see Options.Resolve
	Socks4A           // names are sent
	SocksAny          // version 5; of a server that does not know it, 4, which is remembered
	HTTP              // CONNECT
)

var protocolNames = [...]string{"socks5", "socks4", "socks4a", "socks", "http"}

// String returns "socks5", "socks4", "socks4a", "socks" or "http".
func (p Protocol) String() string { return protocolNames[p] }

// Pipeline is what a server is sent before it has answered.
type Pipeline uint8

// How much is sent ahead. PipelineAuto sends what a probe has seen the server
// accept.
const (
	PipelineAuto Pipeline = iota
	PipelineOff
	PipelineGreeting // greeting, authentication and request in one write
	PipelineData     // and the first bytes of the flow
)

// Local is where a connection leaves from; the zero value leaves it to the
// kernel.
type Local struct {
	Addr netip.Addr // invalid: any
	If   string     // interface; empty: any
}

// Server is a server as the rules name it, by the way that it is reached. It is
// immutable; what is known of its health lives in the Pool. It may not be
// copied after its first use.
type Server struct {
	Name     string         // as the rules write it, for messages: "a", of a chain "a>b"
	Host     string         // a name to be resolved for each connection, by the server before it if there is one; empty: Addr is valid
	Addr     netip.AddrPort // where it listens; with Host set only the port counts
	Protocol Protocol
	Via      *Server     // the server that connects to this one; nil: this host does
	TLS      *tls.Config // nil: none; else its ServerName is set
	Auth     *socks.Auth // nil: none; SOCKS4 sends only the user name
	From     Local       // of a server without Via
	Pipeline Pipeline
	UDP      UDPMode // what it is told when it is asked for an association
	Cold     bool    // no connections are made ahead of need

	MaxFlows      int // that it carries at once; 0: no limit
	MaxHandshakes int // that are under way at once; 0: no limit

	health atomic.Pointer[health] // a copy of the pool's entry
}

// address is the server's place in words.
func (s *Server) address() string {
	if s.Host != "" {
		return fmt.Sprintf("%s:%d", s.Host, s.Addr.Port())
	}
	return s.Addr.String()
}

// target is the server's place as another server is asked for it.
func (s *Server) target() flow.Target {
	return flow.Target{Name: s.Host, Addr: s.Addr.Addr(), Port: s.Addr.Port()}
}

// key tells servers apart, also those of different plans.
type key struct {
	name, host string
	addr       netip.AddrPort
	protocol   Protocol
	tls        bool
	via        string
}

func (s *Server) key() key {
	k := key{s.Name, s.Host, s.Addr, s.Protocol, s.TLS != nil, ""}
	for v := s.Via; v != nil; v = v.Via {
		k.via += v.Name + "=" + v.address() + ">"
	}
	return k
}

// Same tells whether two servers are one and the same, in different plans.
func (s *Server) Same(t *Server) bool { return s == t || s != nil && t != nil && s.key() == t.key() }

// Options is how a Pool connects. Dial is needed, the rest has defaults.
type Options struct {
	Dial    func(ctx context.Context, from Local, to netip.AddrPort) (net.Conn, error)
	Resolve func(ctx context.Context, host string) ([]netip.Addr, error) // nil: servers given by name are at fault, and names cannot be asked of SOCKS4
	Packet  func(from Local) (PacketSocket, error)                       // bound to the address of from and any port; nil: no UDP

	ConnectTimeout   time.Duration // until a server has greeted: its name, TCP, TLS, authentication; 0: 10 s
	HandshakeTimeout time.Duration // from the request to the reply; 0: 30 s
	MaxFail          int           // faults in a row that make a server bad; 0: 1
	BadExpire        time.Duration // how long a bad server that no probe has found well waits for a flow to try it; 0: 30 s
	Interval         time.Duration // between probes of a server that is well; 0: none
	Probe            flow.Target   // what a probe connects to; the zero value: it ends with the greeting

	Log  *slog.Logger    // nil: silent
	Rand func(n int) int // a number below n; nil: math/rand/v2
}

// Pool knows the health of servers. It lives as long as the daemon: servers
// are recognized by what they are, so that a reload forgets nothing. Make it
// with New and end it with Close.
type Pool struct {
	options atomic.Pointer[Options]
	ctx     context.Context // of all that the pool does by itself
	end     context.CancelFunc
	tasks   sync.WaitGroup

	mu     sync.Mutex
	health map[key]*health
}

// New returns a pool that knows nothing bad of any server; see Configure.
func New(o Options, servers []*Server) *Pool {
	p := &Pool{health: map[key]*health{}}
	p.ctx, p.end = context.WithCancel(context.Background())
	p.Configure(o, servers)
	return p
}

// Configure changes how the pool connects from the next flow on. Servers are
// those in use from now on: what is known of them stays, what is known of
// others is forgotten.
func (p *Pool) Configure(o Options, servers []*Server) {
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	def(&o.ConnectTimeout, 10*time.Second)
	def(&o.HandshakeTimeout, 30*time.Second)
	def(&o.BadExpire, 30*time.Second)
	if o.MaxFail == 0 {
		o.MaxFail = 1
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Rand == nil {
		o.Rand = rand.IntN
	}
	p.options.Store(&o)
	p.keep(servers)
}

// Close ends what the pool does by itself, and its warm connections. Those that
// carry flows are not the pool's.
func (p *Pool) Close() {
	p.mu.Lock()
	p.end()
	all := p.health
	p.health = map[key]*health{}
	p.mu.Unlock()
	for _, h := range all {
		h.retire()
	}
	p.tasks.Wait()
}

// task runs f on a goroutine that Close waits for. After Close it does nothing.
func (p *Pool) task(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ctx.Err() == nil {
		p.tasks.Go(f)
	}
}

// of returns what is known of s.
func (p *Pool) of(s *Server) *health {
	if h := s.health.Load(); h != nil && h.p == p && !h.retired.Load() {
		return h
	}
	k := s.key()
	p.mu.Lock()
	defer p.mu.Unlock()
	h := p.health[k]
	if h == nil {
		h = &health{p: p, server: s}
		p.health[k] = h
	}
	s.health.Store(h)
	return h
}

// keep forgets all servers but those given and what they are reached through.
func (p *Pool) keep(servers []*Server) {
	used := map[key]bool{}
	for _, s := range servers {
		for ; s != nil; s = s.Via {
			used[s.key()] = true
		}
	}
	var gone []*health
	p.mu.Lock()
	for k, h := range p.health {
		if !used[k] {
			delete(p.health, k)
			gone = append(gone, h)
		}
	}
	p.mu.Unlock()
	for _, h := range gone {
		h.retire()
	}
	for _, s := range servers {
		for ; s != nil; s = s.Via {
			p.of(s).adopt(s)
		}
	}
}

// Request is what a flow asks of a list of servers.
type Request struct {
	To  flow.Target
	Src netip.Addr // the client, for Hash; invalid: unknown
	// Early returns the first bytes of the flow that the client has said, which
	// may be sent ahead to a server that is known to take them. It waits up to
	// the time given if there are none, and returns the same bytes when it is
	// called again. Nil: nothing is sent ahead.
	Early func(wait time.Duration) []byte
}

// isIPv6 tells whether the flow goes to an IPv6 address, which not every server
// takes.
func (r Request) isIPv6() bool { return r.To.Name == "" && r.To.Addr.Unmap().Is6() }

// Carried is a connection that carries a flow. Who gets one owns Conn, and
// calls Done once when the flow is over.
type Carried struct {
	Conn   net.Conn // what Options.Dial returned, or TLS over it; the flow's bytes follow
	Server *Server
	Sent   int       // how many bytes of Request.Early the server has had
	by     []*health // servers that count it, the last of a chain first
}

// Done says that the flow is over. On nil it does nothing.
func (c *Carried) Done() {
	if c == nil {
		return
	}
	for _, h := range c.by {
		h.left()
	}
}

// Connect asks the servers of a group, in its order, to connect to where the
// request wants to go, until one does. Servers that are bad are asked after the
// good ones.
//
// The error is a socks.Reply, socks.Reply4 or socks.HTTPStatus where a server
// answered for the destination; otherwise it names each server and its fault.
// In either case the server that answered last is in the error, as a
// ServerError. If ctx ends no further server is asked.
func (p *Pool) Connect(ctx context.Context, g *Group, r Request) (*Carried, error) {
	var c *Carried
	err := p.first(ctx, g, r, nil, func(s *Server, h *health, soft time.Duration) (err error) {
		c, err = p.carry(ctx, s, h, r, soft)
		return err
	})
	if err != nil {
		return nil, err
	}
	return c, nil
}

// first asks the servers in their order, preferred before all others, until one
// does what ask asks of it. Servers that are bad, those that are being tried by
// another flow, and those that do not take such an address, come last.
func (p *Pool) first(ctx context.Context, g *Group, r Request, preferred *Server, ask func(*Server, *health, time.Duration) error) error {
	if len(g.Servers) == 0 {
		return errors.New("upstream: no server")
	}
	var room [8]*Server
	if pinned := g.pinned.Load(); pinned != nil {
		preferred = pinned
	}
	order := p.order(room[:0], g, r, preferred)
	var faults []error
	var last []*Server
	for i := 0; i < len(order)+len(last); i++ {
		var s *Server
		forced := i >= len(order)
		if forced {
			s = last[i-len(order)]
		} else {
			s = order[i]
		}
		h := p.of(s)
		if !forced && r.isIPv6() && h.lacksIPv6() {
			last = append(last, s)
			continue
		}
		how, in, err := h.enter(forced)
		switch {
		case err != nil: // it has its limits
		case !in:
			last = append(last, s)
			continue
		default:
			soft := time.Duration(0)
			if i+1 < len(order) && !forced && p.anyGood(order[i+1:]) {
				soft = h.patience()
			}
			began := time.Now()
			err = ask(s, h, soft)
			took := time.Since(began)
			if err == nil {
				h.leave(how, well, nil, took)
				return nil
			}
			v := judge(err)
			if v == fault && over(ctx) != nil {
				v = unknown // it was not given the time
			}
			h.leave(how, v, err, took)
			if v == destination {
				return &ServerError{s, err}
			}
		}
		faults = append(faults, &ServerError{s, err})
		if err := over(ctx); err != nil {
			faults = append(faults, err)
			break
		}
	}
	return errors.Join(faults...)
}

// over returns why ctx has ended, nil if it has not. A connection can know it
// first.
func over(ctx context.Context) error {
	if end, ok := ctx.Deadline(); ok && ctx.Err() == nil && !time.Now().Before(end) {
		return context.DeadlineExceeded
	}
	return ctx.Err()
}

// anyGood tells whether one of the servers would be asked in its turn.
func (p *Pool) anyGood(servers []*Server) bool {
	for _, s := range servers {
		if p.of(s).up() {
			return true
		}
	}
	return false
}

// ServerError is what went wrong with one server.
type ServerError struct {
	Server *Server
	Err    error
}

// Error names the server and its address before the cause.
func (e *ServerError) Error() string {
	text := strings.TrimPrefix(e.Err.Error(), "upstream: ")
	return fmt.Sprintf("upstream: %s (%s): %s", e.Server.Name, e.Server.address(), strings.TrimPrefix(text, "socks: "))
}

// Unwrap returns the cause.
func (e *ServerError) Unwrap() error { return e.Err }
