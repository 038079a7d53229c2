// Package upstream is which SOCKS server, and when: the order of a list,
// BALANCE, failover and the memory of servers that are down.
//
// It promises that a flow moves to the next server when a server is at fault
// and only then: what the destination does (refused, unreachable, denied by
// rule) is the flow's own end. Each server is asked at most once for a flow,
// each within the time limits, and the error of a list that failed tells what
// was wrong with each of them.
package upstream

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/tproxyd/tproxyd/pkg/flow"
	"github.com/tproxyd/tproxyd/pkg/socks"
)

// Server is a SOCKS5 server as the rules name it. It is immutable; what is
// known of its health lives in the Pool.
type Server struct {
	Name     string         // as the rules write it, for messages
	Host     string         // a name to be resolved for each connection; empty: Addr is valid
	Addr     netip.AddrPort // where it listens; with Host set only the port counts
	Auth     *socks.Auth    // nil: none
	Pipeline bool           // see socks.Options
	UDP      UDPMode        // what it is told when it is asked for an association
}

// address is the server's place in words.
func (s *Server) address() string {
	if s.Host != "" {
		return fmt.Sprintf("%s:%d", s.Host, s.Addr.Port())
	}
	return s.Addr.String()
}

// Options is how a Pool connects. Dial is needed, the rest has defaults.
type Options struct {
	Dial    func(ctx context.Context, to netip.AddrPort) (net.Conn, error)
	Resolve func(ctx context.Context, host string) ([]netip.Addr, error) // nil: servers given by name are at fault
	Packet  func(local netip.Addr) (PacketSocket, error)                 // bound to an address and any port; nil: no UDP

	ConnectTimeout   time.Duration   // for TCP to one server, looking up its name included; 0: 10 s
	HandshakeTimeout time.Duration   // from the greeting to the reply; 0: 30 s
	MaxFail          int             // faults in a row that make a server bad; 0: 1
	BadExpire        time.Duration   // how long a bad server is asked last; 0: 30 s
	Log              *slog.Logger    // nil: silent
	Rand             func(n int) int // a number below n, for BALANCE; nil: math/rand/v2
}

// Pool knows the health of servers. It lives as long as the daemon: servers
// are recognized by name and address, so that a reload forgets nothing.
type Pool struct {
	options atomic.Pointer[Options]
	mu      sync.Mutex
	health  map[key]*health
}

type key struct {
	name, host string
	addr       netip.AddrPort
}

type health struct {
	fails      int       // in a row
	badUntil   time.Time // zero: good
	carried    uint64    // flows
	faults     uint64
	noUDP      time.Time // until then it is not asked for UDP, which it does not have
	associated uint64    // UDP associations
}

// New returns a pool that knows nothing bad of any server.
func New(o Options) *Pool {
	p := &Pool{health: map[key]*health{}}
	p.Configure(o)
	return p
}

// Configure changes how the pool connects from the next flow on. What it knows
// of the servers stays.
func (p *Pool) Configure(o Options) {
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
}

// state returns the health of s. The lock is held.
func (p *Pool) state(s *Server) *health {
	k := key{s.Name, s.Host, s.Addr}
	h := p.health[k]
	if h == nil {
		h = &health{}
		p.health[k] = h
	}
	return h
}

// Status is what the pool knows of a server.
type Status struct {
	Name    string `json:"name"`
	Address string `json:"address"`
	Up      bool   `json:"up"`      // false: bad, asked last
	Carried uint64 `json:"carried"` // flows since the start
	Faults  uint64 `json:"faults"`  // since the start

	Associations uint64 `json:"associations"`  // for UDP, since the start
	UDP          string `json:"udp,omitempty"` // "yes" or "no"; empty: nobody has asked lately
}

// Status returns what is known of the servers given, in their order.
func (p *Pool) Status(servers []*Server) []Status {
	p.mu.Lock()
	defer p.mu.Unlock()
	list := make([]Status, len(servers))
	for i, s := range servers {
		h := p.state(s)
		list[i] = Status{
			Name: s.Name, Address: s.address(), Up: !time.Now().Before(h.badUntil), Carried: h.carried, Faults: h.faults,
			Associations: h.associated,
		}
		switch {
		case s.UDP == UDPOff || time.Now().Before(h.noUDP):
			list[i].UDP = "no"
		case h.associated > 0:
			list[i].UDP = "yes"
		}
	}
	return list
}

// Connect asks the servers in their order, or in a random one if balance, to
// connect to t, until one does. Bad servers are asked after the good ones. It
// returns the connection, on which the flow's bytes follow, and the server.
//
// The error is a socks.Reply where a server answered for the destination;
// otherwise it names each server and its fault. If ctx ends no further server
// is asked.
func (p *Pool) Connect(ctx context.Context, servers []*Server, balance bool, t flow.Target) (net.Conn, *Server, error) {
	var conn net.Conn
	s, err := p.first(ctx, servers, balance, nil, func(s *Server) (err error) {
		conn, err = p.ask(ctx, s, t)
		return err
	})
	if err != nil {
		return nil, s, err
	}
	p.good(s, func(h *health) { h.carried++ })
	return conn, s, nil
}

// first asks the servers in their order, preferred before all others, until one
// does what ask asks of it, and returns that one, or the one that answered for
// the destination.
func (p *Pool) first(ctx context.Context, servers []*Server, balance bool, preferred *Server, ask func(*Server) error) (*Server, error) {
	if len(servers) == 0 {
		return nil, errors.New("upstream: no server")
	}
	var room [8]*Server
	order := p.order(room[:0], servers, balance, preferred)
	var faults []error
	for _, s := range order {
		err := ask(s)
		if err == nil {
			return s, nil
		}
		err = &ServerError{s, err}
		switch judge(err) {
		case destination:
			p.good(s, nil)
			return s, err
		case fault:
			if ctx.Err() == nil {
				p.bad(s, err)
			}
		case incapable:
			p.good(s, nil)
		}
		faults = append(faults, err)
		if ctx.Err() != nil {
			break
		}
	}
	return nil, errors.Join(faults...)
}

// order appends the servers to l as they are to be asked.
func (p *Pool) order(l, servers []*Server, balance bool, preferred *Server) []*Server {
	l = append(l, servers...)
	if balance {
		for i := len(l) - 1; i > 0; i-- {
			j := p.options.Load().Rand(i + 1)
			l[i], l[j] = l[j], l[i]
		}
	}
	if len(l) < 2 {
		return l
	}
	if i := slices.Index(l, preferred); i > 0 {
		copy(l[1:i+1], l[:i])
		l[0] = preferred
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	good := 0
	for i, s := range l { // a stable partition: the good ones move forward
		if now.Before(p.state(s).badUntil) {
			continue
		}
		copy(l[good+1:i+1], l[good:i])
		l[good] = s
		good++
	}
	return l
}

// ask connects to one server and has it connect to t.
func (p *Pool) ask(ctx context.Context, s *Server, t flow.Target) (net.Conn, error) {
	conn, err := p.dial(ctx, s)
	if err != nil {
		return nil, err
	}
	err = p.handshake(ctx, conn, func() error {
		_, err := socks.Connect(conn, t, s.options())
		return err
	})
	if err != nil {
		conn.Close()
		return nil, err
	}
	return conn, nil
}

// options is how the server wants to be spoken to.
func (s *Server) options() socks.Options { return socks.Options{Auth: s.Auth, Pipeline: s.Pipeline} }

// handshake runs f, which talks on conn, within the limits.
func (p *Pool) handshake(ctx context.Context, conn net.Conn, f func() error) error {
	conn.SetDeadline(time.Now().Add(p.options.Load().HandshakeTimeout))
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	err := f()
	if !stop() {
		return ctx.Err() // its deadline would outlive the handshake
	}
	if err == nil {
		err = conn.SetDeadline(time.Time{})
	}
	return err
}

func (p *Pool) dial(ctx context.Context, s *Server) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, p.options.Load().ConnectTimeout)
	defer cancel()
	if s.Host == "" {
		return p.options.Load().Dial(ctx, s.Addr)
	}
	if p.options.Load().Resolve == nil {
		return nil, errors.New("no way to resolve its name")
	}
	addrs, err := p.options.Load().Resolve(ctx, s.Host)
	if err == nil && len(addrs) == 0 {
		err = errors.New("its name has no address")
	}
	end, _ := ctx.Deadline()
	for i, a := range addrs {
		// An equal share of what is left, so that a silent address (IPv6 that
		// leads nowhere) leaves time for the next.
		share, cancel := context.WithTimeout(ctx, time.Until(end)/time.Duration(len(addrs)-i))
		var conn net.Conn
		conn, err = p.options.Load().Dial(share, netip.AddrPortFrom(a, s.Addr.Port()))
		cancel()
		if err == nil {
			return conn, nil
		}
	}
	return nil, err
}

// good notes that s answered as a server should, and what else there is to
// note.
func (p *Pool) good(s *Server, also func(*health)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	h := p.state(s)
	if also != nil {
		also(h)
	}
	h.fails = 0
	if !h.badUntil.IsZero() {
		h.badUntil = time.Time{}
		p.options.Load().Log.Info("server is back", "upstream", s.Name)
	}
}

// bad notes a fault of s.
func (p *Pool) bad(s *Server, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	h := p.state(s)
	h.faults++
	if h.fails++; h.fails < p.options.Load().MaxFail {
		return
	}
	if h.badUntil.IsZero() {
		p.options.Load().Log.Warn("server is asked last from now on", "upstream", s.Name, "for", p.options.Load().BadExpire, "err", err)
	}
	h.badUntil = time.Now().Add(p.options.Load().BadExpire)
}

// ServerError is what went wrong with one server.
type ServerError struct {
	Server *Server
	Err    error
}

// Error names the server and its address before the cause.
func (e *ServerError) Error() string {
	return fmt.Sprintf("upstream: %s (%s): %s", e.Server.Name, e.Server.address(), strings.TrimPrefix(e.Err.Error(), "socks: "))
}

// Unwrap returns the cause.
func (e *ServerError) Unwrap() error { return e.Err }

// verdict is whose fault an error is.
type verdict uint8

const (
	fault       verdict = iota // the server's: ask the next, remember it
	incapable                  // the server cannot do this: ask the next
	ours                       // this host's own, or it was not asked: ask the next, nothing is known of the server
	destination                // nobody else will do better
)

// judge tells a server's fault from a destination's, by what each reply is
// used for in practice. General failure is ambiguous: some servers send it for
// a name that does not exist, so it moves this flow on and blames nobody.
func judge(err error) verdict {
	if errors.Is(err, socks.ErrTooLong) {
		return incapable // nothing was said to it
	}
	var none *noUDP
	if errors.As(err, &none) {
		if !none.asked {
			return ours
		}
		return incapable
	}
	// No descriptor, no memory, no port left.
	for _, e := range []syscall.Errno{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.EADDRNOTAVAIL} {
		if errors.Is(err, e) {
			return ours
		}
	}
	var r socks.Reply
	if !errors.As(err, &r) {
		return fault
	}
	switch r {
	case socks.NotAllowed, socks.NetworkUnreachable, socks.HostUnreachable, socks.ConnectionRefused, socks.TTLExpired:
		return destination
	}
	return incapable
}
