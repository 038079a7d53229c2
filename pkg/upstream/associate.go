package upstream

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"time"

	"github.com/tproxyd/tproxyd/pkg/flow"
	"github.com/tproxyd/tproxyd/pkg/socks"
)

// UDPMode is what a server is told of where datagrams will come from (RFC 1928
// section 7).
type UDPMode uint8

// The modes.
const (
	UDPOwn   UDPMode = iota // the address and port of the socket that will send; some servers insist on it
	UDPZero                 // zeros; for a server behind an address translation
	UDPChain                // zeros; behind another server its relay is reached by that one's relay
	UDPOff                  // it is never asked
)

// PacketSocket is a UDP socket that an association sends by. *relay.Packet is
// one.
type PacketSocket interface {
	LocalAddrPort() netip.AddrPort
	Connect(netip.AddrPort) error // to send there and receive from there alone
	Close() error
}

// Association is a server's UDP relay, for as long as the control connections
// live. Who gets one owns it.
type Association struct {
	Control []net.Conn     // what Options.Dial returned: one for each server of the chain, the nearest first
	Socket  PacketSocket   // connected to Relay
	Server  *Server        // that made it
	Relay   netip.AddrPort // of the nearest server
	Hops    []flow.Target  // relays of the servers behind it: a datagram has a header for each of these, the nearest first, and then its own
}

// Close ends the association.
func (a *Association) Close() error {
	err := a.Socket.Close()
	for _, c := range a.Control {
		err = errors.Join(err, c.Close())
	}
	return err
}

// ErrNoUDP says that a server carries no UDP, or that none of a list does.
// Errors match it by errors.Is.
var ErrNoUDP = errors.New("upstream: no UDP")

// noUDP is ErrNoUDP with the reason.
type noUDP struct {
	why   error
	asked bool // the server said so, just now
}

func (e *noUDP) Error() string        { return "carries no UDP: " + e.why.Error() }
func (e *noUDP) Unwrap() error        { return e.why }
func (e *noUDP) Is(target error) bool { return target == ErrNoUDP }

// Associate asks the servers for a UDP association, in their order as Connect
// does, but preferred before the others unless it is bad; nil: none is. A
// server that has no UDP is not asked again for BadExpire, and is as good as
// before for TCP. The error is ErrNoUDP to errors.Is if no server of the group
// has UDP.
func (p *Pool) Associate(ctx context.Context, g *Group, r Request, preferred *Server) (*Association, error) {
	var a *Association
	without := 0
	err := p.first(ctx, g, r, preferred, func(s *Server, h *health, soft time.Duration) (err error) {
		if a, err = p.associate(ctx, s, h, soft); errors.Is(err, ErrNoUDP) {
			without++
		}
		return err
	})
	switch {
	case err == nil:
		return a, nil
	case without > 0 && without < len(g.Servers):
		return nil, some{err}
	}
	return nil, err
}

// lacksUDP says why a server need not be asked for UDP; empty: it may have it.
// What TLS leads to has a relay that would be reached in the clear, and what a
// chain leads to one that this host cannot reach.
func (s *Server) lacksUDP() string {
	switch {
	case s.UDP == UDPOff:
		return "udp=off"
	case s.Protocol != Socks5 && s.Protocol != SocksAny:
		return "its protocol has none"
	case s.TLS != nil:
		return "it is reached by TLS"
	case s.Via == nil:
		return ""
	case s.UDP != UDPChain:
		return "it is reached through " + s.Via.Name
	}
	if why := s.Via.lacksUDP(); why != "" {
		return "by way of " + s.Via.Name + ": " + why
	}
	return ""
}

// some is the error of a list of which only some have no UDP: all of err but
// ErrNoUDP.
type some struct{ err error }

func (e some) Error() string        { return e.err.Error() }
func (e some) Is(target error) bool { return target != ErrNoUDP && errors.Is(e.err, target) }
func (e some) As(target any) bool   { return errors.As(e.err, target) }

func (p *Pool) associate(ctx context.Context, s *Server, h *health, soft time.Duration) (*Association, error) {
	o := p.options.Load()
	switch why := s.lacksUDP(); {
	case o.Packet == nil:
		return nil, &noUDP{why: errors.New("this pool has no sockets for it")}
	case why != "":
		return nil, &noUDP{why: errors.New(why)}
	case h.lacksUDP():
		return nil, &noUDP{why: errors.New("it said so a moment ago")}
	case s.Via != nil:
		return p.associateThrough(ctx, s, h)
	}
	if conn, proto := h.takeWarm(s); conn != nil && proto == Socks5 {
		// Of a connection that the server had given up the end says nothing.
		a, err := p.associateOn(talkOn(ctx, conn), s, socks.AssociateGreeted)
		if v := judge(err); v != fault && !errors.Is(err, socks.ErrNoReply) || ctx.Err() != nil || errors.Is(err, errSilent) {
			return h.associates(a, err)
		}
	}
	end := time.Now().Add(o.ConnectTimeout)
	if soft != 0 {
		end = sooner(end, time.Now().Add(soft))
	}
	if h.aheadNow(s) >= PipelineGreeting && s.Protocol == Socks5 {
		conn, err := p.reach(ctx, s, end)
		if err != nil {
			return nil, err
		}
		a, err := p.associateOn(talkOn(ctx, conn), s, func(conn net.Conn, from netip.AddrPort) (netip.AddrPort, error) {
			return socks.Associate(conn, from, socks.Options{Auth: s.Auth, Pipeline: true})
		})
		if !h.unlearn(s, err) || ctx.Err() != nil {
			return h.associates(a, err)
		}
	}
	t, proto, err := p.ready(ctx, s, end)
	if err != nil {
		return nil, err
	}
	if proto != Socks5 {
		return nil, t.done(&noUDP{errors.New("it speaks SOCKS4"), true})
	}
	return h.associates(p.associateOn(t, s, socks.AssociateGreeted))
}

// associateOn asks for an association on a connection, by ask. It takes the
// connection over.
func (p *Pool) associateOn(t *talk, s *Server, ask func(net.Conn, netip.AddrPort) (netip.AddrPort, error)) (*Association, error) {
	o := p.options.Load()
	conn := t.conn
	socket, err := o.Packet(Local{addrPort(conn.LocalAddr()).Addr(), s.From.If})
	if err != nil {
		return nil, t.done(err)
	}
	a := &Association{Control: []net.Conn{conn}, Socket: socket, Server: s}
	err = t.step(time.Now().Add(o.HandshakeTimeout), "request", func() (err error) {
		var from netip.AddrPort
		if s.UDP == UDPOwn {
			from = socket.LocalAddrPort()
		}
		a.Relay, err = ask(conn, from)
		return err
	})
	if err == nil {
		a.Relay, err = relayAddr(a.Relay, addrPort(conn.RemoteAddr()).Addr())
	}
	if err == nil {
		err = socket.Connect(a.Relay)
	}
	if err = t.done(err); err != nil {
		socket.Close()
		return nil, err
	}
	return a, nil
}

// associateThrough asks the last server of a chain for an association whose relay
// is reached by that of the server before it: to the last one, what comes from
// there comes from where it was asked.
func (p *Pool) associateThrough(ctx context.Context, s *Server, h *health) (*Association, error) {
	o := p.options.Load()
	a, err := p.associateHop(ctx, s.Via)
	if err != nil {
		return nil, err
	}
	t, proto, err := p.ready(ctx, s, time.Now().Add(o.ConnectTimeout))
	if err == nil && proto != Socks5 {
		err = t.done(&noUDP{errors.New("it speaks SOCKS4"), true})
	}
	if err != nil {
		a.Close()
		return nil, err
	}
	var hop flow.Target
	err = t.step(time.Now().Add(o.HandshakeTimeout), "request", func() (err error) {
		hop, err = s.askRelay(t.conn)
		return err
	})
	if err = t.done(err); err != nil {
		a.Close()
		return h.associates(nil, err)
	}
	a.Server, a.Hops, a.Control = s, append(a.Hops, hop), append(a.Control, t.conn)
	return h.associates(a, nil)
}

// associateHop is associate for a server that others are behind.
func (p *Pool) associateHop(ctx context.Context, s *Server) (*Association, error) {
	h := p.of(s)
	how, in, err := h.enter(true)
	if !in {
		return nil, &hopError{s, err}
	}
	began := time.Now()
	a, err := p.associate(ctx, s, h, 0)
	v := judge(err)
	if v == fault && ctx.Err() != nil && !errors.Is(err, errSilent) {
		v = unknown
	}
	h.leave(how, v, err, time.Since(began))
	switch {
	case err == nil:
		return a, nil
	case errors.Is(err, ErrNoUDP), v == destination, v == incapable: // for a chain it has none, however well it is for TCP
		return nil, &noUDP{&hopError{s, err}, v != unknown}
	}
	return nil, &hopError{s, err}
}

// askRelay asks s, on a greeted connection through the server before it, for an
// association, and returns where that one has to send datagrams.
func (s *Server) askRelay(conn net.Conn) (relay flow.Target, err error) {
	zeros := netip.IPv4Unspecified()
	if s.Addr.Addr().Is6() && s.Host == "" {
		zeros = netip.IPv6Unspecified()
	}
	bnd, err := socks.AssociateGreeted(conn, netip.AddrPortFrom(zeros, 0))
	if err != nil {
		return relay, err
	}
	peer := s.Addr.Addr()
	if s.Host != "" {
		peer = bnd.Addr() // where the name leads is not known here
	}
	if bnd, err = relayAddr(bnd, peer); err != nil {
		return relay, err
	}
	relay = flow.Target{Addr: bnd.Addr(), Port: bnd.Port()}
	if !relay.Addr.IsValid() || relay.Addr.IsUnspecified() || s.Host != "" && relay.Addr.IsLoopback() {
		relay.Name, relay.Addr = s.Host, netip.Addr{}
	}
	return relay, nil
}

// associates notes whether the server has UDP, by what it answered.
func (h *health) associates(a *Association, err error) (*Association, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	switch {
	case err == nil:
		h.associated++
		h.noUDP = time.Time{}
	case errors.Is(err, socks.CommandNotSupported), errors.Is(err, socks.ErrNoReply):
		o := h.p.options.Load()
		if h.noUDP.IsZero() {
			o.Log.Warn("server carries no UDP", "upstream", h.server.Name)
		}
		h.noUDP = time.Now().Add(o.BadExpire)
		return nil, &noUDP{err, true}
	}
	return a, err
}

func (h *health) lacksUDP() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return time.Now().Before(h.noUDP)
}

// relayAddr is where datagrams are to be sent if a server that is reached at
// peer says BND. Many say an address that is of no use from here: none, their
// own behind a translation, or one of the other family.
func relayAddr(bnd netip.AddrPort, peer netip.Addr) (netip.AddrPort, error) {
	if bnd.Port() == 0 {
		return bnd, &noUDP{errors.New("its relay has port 0"), true}
	}
	inside := func(a netip.Addr) bool { return a.IsPrivate() || a.IsLoopback() || a.IsLinkLocalUnicast() }
	a := bnd.Addr().Unmap()
	if !a.IsValid() || a.IsUnspecified() || a.Is4() != peer.Is4() || inside(a) && !inside(peer) || a.IsLoopback() && !peer.IsLoopback() ||
		a.IsLinkLocalUnicast() {
		a = peer
	}
	return netip.AddrPortFrom(a, bnd.Port()), nil
}

func addrPort(a net.Addr) netip.AddrPort {
	if t, ok := a.(*net.TCPAddr); ok {
		ap := t.AddrPort()
		return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
	}
	return netip.AddrPort{}
}
