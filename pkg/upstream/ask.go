package upstream

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"time"

	"github.com/tproxyd/tproxyd/pkg/flow"
	"github.com/tproxyd/tproxyd/pkg/socks"
)

// maxAddresses is how many addresses of a name a SOCKS4 server is asked for, one
// after the other.
const maxAddresses = 3

var (
	errNoIPv4       = errors.New("upstream: the name has no IPv4 address")
	errNeedsAddress = errors.New("upstream: the server takes no names")
)

// carry has s connect to where r wants to go. Soft, if it is not 0, takes the
// place of the connect limit.
func (p *Pool) carry(ctx context.Context, s *Server, h *health, r Request, soft time.Duration) (*Carried, error) {
	if r.To.Name == "" || !h.speaks4(s) {
		c, err := p.carryTo(ctx, s, h, r, soft)
		if !errors.Is(err, errNeedsAddress) {
			return c, err
		}
	}
	addrs, err := p.resolve4(ctx, r.To.Name)
	if err != nil {
		return nil, err
	}
	var c *Carried
	for _, a := range addrs {
		r.To = flow.Target{Addr: a, Port: r.To.Port}
		if c, err = p.carryTo(ctx, s, h, r, soft); judge(err) != destination {
			break
		}
	}
	return c, err
}

// resolve4 looks up a name's IPv4 addresses, for a server that takes no name.
func (p *Pool) resolve4(ctx context.Context, name string) ([]netip.Addr, error) {
	o := p.options.Load()
	if o.Resolve == nil {
		return nil, fmt.Errorf("%w that could be asked for", errNoIPv4)
	}
	ctx, cancel := context.WithTimeout(ctx, o.ConnectTimeout)
	defer cancel()
	addrs, err := o.Resolve(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", errNoIPv4, err)
	}
	addrs = slices.DeleteFunc(slices.Clone(addrs), func(a netip.Addr) bool { return !a.Unmap().Is4() })
	if len(addrs) == 0 {
		return nil, errNoIPv4
	}
	return addrs[:min(len(addrs), maxAddresses)], nil
}

// carryTo is carry for a target that the server takes as it is: on a warm
// connection if there is one that the server has not given up meanwhile, else
// on one of its own.
func (p *Pool) carryTo(ctx context.Context, s *Server, h *health, r Request, soft time.Duration) (*Carried, error) {
	c, err := p.carryAny(ctx, s, h, r, soft)
	if r.isIPv6() {
		h.knowsIPv6(err)
	}
	return c, err
}

func (p *Pool) carryAny(ctx context.Context, s *Server, h *health, r Request, soft time.Duration) (*Carried, error) {
	ahead := h.aheadNow(s)
	if conn, proto := h.takeWarm(s); conn != nil {
		c, err := p.on(talkOn(ctx, conn), proto, s, h, r, ahead)
		if v := judge(err); v != fault && !errors.As(err, new(*silentEnd)) || ctx.Err() != nil || errors.Is(err, errSilent) {
			return c, err
		}
	}
	end := time.Now().Add(p.options.Load().ConnectTimeout)
	if soft != 0 {
		end = sooner(end, time.Now().Add(soft))
	}
	if ahead >= PipelineGreeting && s.Protocol == Socks5 {
		c, greeted, err := p.pipelined(ctx, s, h, r, end, ahead)
		if greeted || !h.unlearn(s, err) || ctx.Err() != nil {
			return c, err
		}
	}
	t, proto, err := p.ready(ctx, s, end)
	if err != nil {
		return nil, err
	}
	return p.on(t, proto, s, h, r, ahead)
}

// on has s connect, on a connection that is ready for the request.
func (p *Pool) on(t *talk, proto Protocol, s *Server, h *health, r Request, ahead Pipeline) (*Carried, error) {
	c, err := p.request(t, proto, s, r, ahead, p.options.Load().HandshakeTimeout)
	if err = t.done(err); err != nil {
		return nil, err
	}
	return h.carries(c), nil
}

// carries counts a flow in, at the server and at those before it.
func (h *health) carries(c *Carried) *Carried {
	for s := c.Server; s != nil; s = s.Via {
		h := h.p.of(s)
		h.flows.Add(1)
		c.by = append(c.by, h)
	}
	h.mu.Lock()
	h.carried++
	h.mu.Unlock()
	return c
}

// request asks for the connection to where r wants to go.
func (p *Pool) request(t *talk, proto Protocol, s *Server, r Request, ahead Pipeline, limit time.Duration) (*Carried, error) {
	conn := t.conn
	if proto == Socks4 && r.To.Name != "" {
		return nil, errNeedsAddress
	}
	c := &Carried{Conn: conn, Server: s}
	early := r.said(ahead, 0)
	err := t.step(time.Now().Add(limit), "request", func() (err error) {
		switch proto {
		case Socks4, Socks4A:
			user := ""
			if s.Auth != nil {
				user = s.Auth.Username
			}
			_, err = socks.Connect4(conn, r.To, user, early)
		case HTTP:
			err = socks.ConnectHTTP(conn, r.To, s.Auth, early)
		default:
			if err = socks.SendAsk(conn, r.To, early); err == nil {
				early, err = p.later(conn, s, r, ahead, early)
			}
			if err == nil {
				_, err = socks.ReadReply(conn)
			}
		}
		return ended(err)
	})
	p.speaks(s, proto, err)
	c.Sent = len(early)
	return c, err
}

// later sends what the client says while the request is on its way. Half a round
// trip is waited for it, in which no reply can come.
func (p *Pool) later(conn net.Conn, s *Server, r Request, ahead Pipeline, early []byte) ([]byte, error) {
	if len(early) > 0 || ahead != PipelineData {
		return early, nil
	}
	if early = r.said(ahead, p.of(s).halfTrip()); len(early) == 0 {
		return nil, nil
	}
	_, err := conn.Write(early)
	return early, err
}

// said returns the first bytes of the flow, if they may be sent ahead.
func (r Request) said(ahead Pipeline, wait time.Duration) []byte {
	if ahead != PipelineData || r.Early == nil {
		return nil
	}
	return r.Early(wait)
}

// ended tells a connection that was closed where a reply should begin or go on
// from other errors.
func ended(err error) error {
	if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
		return &silentEnd{err}
	}
	return err
}

// pipelined connects and sends all messages at once. Greeted is false if that was
// for nothing and a server that takes one after the other may do better.
func (p *Pool) pipelined(ctx context.Context, s *Server, h *health, r Request, end time.Time, ahead Pipeline) (c *Carried, greeted bool, err error) {
	start := time.Now()
	conn, err := p.reach(ctx, s, end)
	if err != nil {
		return nil, true, err
	}
	t := talkOn(ctx, conn)
	early := r.said(ahead, 0)
	err = t.step(sooner(end, h.soonest(s)), "greeting", func() (err error) {
		if err = socks.SendPipelined(conn, r.To, s.Auth, early); err == nil {
			early, err = p.later(conn, s, r, ahead, early)
		}
		if err == nil {
			err = socks.ReadGreeting(conn, s.Auth)
		}
		return err
	})
	if greeted = err == nil; greeted {
		h.took(time.Since(start))
		h.learn(s)
		err = t.step(time.Now().Add(p.options.Load().HandshakeTimeout), "request", func() error {
			_, err := socks.ReadReply(conn)
			return ended(err)
		})
	}
	if err = t.done(err); err != nil {
		return nil, greeted, err
	}
	return h.carries(&Carried{Conn: conn, Server: s, Sent: len(early)}), true, nil
}

// ready returns a connection to s that can be asked for a destination, and in
// which protocol.
func (p *Pool) ready(ctx context.Context, s *Server, end time.Time) (*talk, Protocol, error) {
	h := p.of(s)
	start := time.Now()
	conn, err := p.reach(ctx, s, end)
	if err != nil {
		return nil, 0, err
	}
	t := talkOn(ctx, conn)
	proto := s.Protocol
	if proto == SocksAny {
		proto = Socks5
		if h.speaks4(s) {
			proto = Socks4
		}
	}
	if proto == Socks5 {
		err = t.step(end, "greeting", func() error { return socks.Greet(conn, s.Auth) })
		if err != nil {
			err = t.done(err)
			if s.Protocol != SocksAny || !knowsNo5(err) {
				return nil, 0, err
			}
			if conn, err = p.reach(ctx, s, end); err != nil {
				return nil, 0, err
			}
			t, proto = talkOn(ctx, conn), Socks4
			p.speaks(s, Socks4, nil) // until it shows that it does not
		} else {
			p.speaks(s, Socks5, nil)
		}
	}
	h.took(time.Since(start))
	h.learn(s)
	return t, proto, nil
}

// knowsNo5 tells whether a greeting failed as it does with a server that knows
// only version 4: it answers in that version, or hangs up.
func knowsNo5(err error) bool {
	return errors.Is(err, socks.ErrVersion) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF)
}

// speaks notes which version a server of SocksAny speaks, by what it answered
// in proto.
func (p *Pool) speaks(s *Server, proto Protocol, err error) {
	if s.Protocol != SocksAny {
		return
	}
	v := uint8(5)
	if proto == Socks4 {
		v = 4
		if judge(err) == fault || judge(err) == unknown {
			v = 0
		}
	}
	h := p.of(s)
	h.mu.Lock()
	h.version = v
	h.mu.Unlock()
}

// speaks4 tells whether s takes no names.
func (h *health) speaks4(s *Server) bool {
	if s.Protocol != SocksAny {
		return s.Protocol == Socks4
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.version == 4
}

// reach returns a connection to s itself: from here or through the server
// before it, and TLS over that if s has it.
func (p *Pool) reach(ctx context.Context, s *Server, end time.Time) (conn net.Conn, err error) {
	ctx, cancel := context.WithDeadline(ctx, end)
	defer cancel()
	start := time.Now()
	if s.Via == nil {
		conn, err = p.dial(ctx, s)
	} else {
		conn, err = p.through(ctx, s)
	}
	if err == nil {
		p.of(s).away(conn, time.Since(start), s.Via == nil)
	}
	if err != nil || s.TLS == nil {
		return conn, err
	}
	t := tls.Client(conn, s.TLS)
	if err := t.HandshakeContext(ctx); err != nil {
		conn.Close()
		return nil, fmt.Errorf("upstream: TLS: %w", late(ctx, "TLS handshake", err))
	}
	return t, nil
}

// through has the server before s connect to it.
func (p *Pool) through(ctx context.Context, s *Server) (net.Conn, error) {
	h := p.of(s.Via)
	how, in, err := h.enter(true)
	if !in {
		return nil, &hopError{s.Via, err}
	}
	began := time.Now()
	c, err := p.carry(ctx, s.Via, h, Request{To: s.target()}, 0)
	v := judge(err)
	if v == fault && ctx.Err() != nil && !errors.Is(err, errSilent) {
		v = unknown
	}
	h.leave(how, v, err, time.Since(began))
	if err != nil {
		return nil, &hopError{s.Via, err}
	}
	c.Done()
	return c.Conn, nil
}

// dial connects to s from here.
func (p *Pool) dial(ctx context.Context, s *Server) (net.Conn, error) {
	o := p.options.Load()
	if s.Host == "" {
		conn, err := o.Dial(ctx, s.From, s.Addr)
		return conn, late(ctx, "connection", err)
	}
	if o.Resolve == nil {
		return nil, errors.New("no way to resolve its name")
	}
	addrs, err := o.Resolve(ctx, s.Host)
	if err != nil {
		err = fmt.Errorf("look-up of %s: %w", s.Host, err)
	} else if len(addrs) == 0 {
		err = errors.New("its name has no address")
	}
	end, limited := ctx.Deadline()
	if !limited {
		end = time.Now().Add(o.ConnectTimeout)
	}
	for i, a := range addrs {
		// An equal share of what is left, so that a silent address (IPv6 that
		// leads nowhere) leaves time for the next.
		share, cancel := context.WithTimeout(ctx, time.Until(end)/time.Duration(len(addrs)-i))
		var conn net.Conn
		conn, err = o.Dial(share, s.From, netip.AddrPortFrom(a, s.Addr.Port()))
		cancel()
		if err == nil {
			return conn, nil
		}
	}
	return nil, late(ctx, "connection", err)
}

// errSilent is a time limit that a server let pass.
var errSilent = errors.New("upstream: no answer in time")

// late says what was waited for, if err is that the time was over.
func late(ctx context.Context, what string, err error) error {
	if err == nil || !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, os.ErrDeadlineExceeded) {
		return err
	}
	if errors.Is(ctx.Err(), context.Canceled) {
		return ctx.Err()
	}
	return fmt.Errorf("%w: %s", errSilent, what)
}

// talk is a handshake on a connection: it ends with a context, and each of its
// steps has a limit.
type talk struct {
	ctx  context.Context
	conn net.Conn
	stop func() bool
}

func talkOn(ctx context.Context, conn net.Conn) *talk {
	return &talk{ctx, conn, context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })}
}

// step runs f until end.
func (t *talk) step(end time.Time, what string, f func() error) error {
	if limit, ok := t.ctx.Deadline(); ok {
		end = sooner(end, limit)
	}
	t.conn.SetDeadline(end)
	if t.ctx.Err() != nil { // its deadline was overwritten
		return t.ctx.Err()
	}
	return late(t.ctx, what, f())
}

// done ends the talk. If there is an error, or ctx has ended, the connection is
// closed.
func (t *talk) done(err error) error {
	if !t.stop() && err == nil {
		err = t.ctx.Err() // the deadline would outlive the talk
	}
	if err == nil {
		err = t.conn.SetDeadline(time.Time{})
	}
	if err != nil {
		t.conn.Close()
	}
	return err
}

func sooner(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}
