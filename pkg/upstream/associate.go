package upstream

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"time"

	"github.com/tproxyd/tproxyd/pkg/socks"
)

// UDPMode is what a server is told of where datagrams will come from (RFC 1928
// section 7).
type UDPMode uint8

// The modes.
const (
	UDPOwn  UDPMode = iota // the address and port of the socket that will send; some servers insist on it
	UDPZero                // zeros; for a server behind an address translation
	UDPOff                 // it is never asked
)

// PacketSocket is a UDP socket that an association sends by. *relay.Packet is
// one.
type PacketSocket interface {
	LocalAddrPort() netip.AddrPort
	Connect(netip.AddrPort) error // to send there and receive from there alone
	Close() error
}

// Association is a server's UDP relay, for as long as the control connection
// lives. Who gets one owns it.
type Association struct {
	Control net.Conn     // what Options.Dial returned
	Socket  PacketSocket // connected to Relay
	Server  *Server      // that made it
	Relay   netip.AddrPort
}

// Close ends the association.
func (a *Association) Close() error { return errors.Join(a.Control.Close(), a.Socket.Close()) }

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
// before for TCP. The error is ErrNoUDP to errors.Is if no server of the list
// has UDP.
func (p *Pool) Associate(ctx context.Context, servers []*Server, balance bool, preferred *Server) (*Association, error) {
	var a *Association
	without := 0
	s, err := p.first(ctx, servers, balance, preferred, func(s *Server) (err error) {
		if a, err = p.associate(ctx, s); errors.Is(err, ErrNoUDP) {
			without++
		}
		return err
	})
	switch {
	case err == nil:
		p.good(s, func(h *health) { h.associated++; h.noUDP = time.Time{} })
		return a, nil
	case without > 0 && without < len(servers):
		return nil, some{err}
	}
	return nil, err
}

// some is the error of a list of which only some have no UDP: all of err but
// ErrNoUDP.
type some struct{ err error }

func (e some) Error() string        { return e.err.Error() }
func (e some) Is(target error) bool { return target != ErrNoUDP && errors.Is(e.err, target) }
func (e some) As(target any) bool   { return errors.As(e.err, target) }

func (p *Pool) associate(ctx context.Context, s *Server) (*Association, error) {
	o := p.options.Load()
	if o.Packet == nil {
		return nil, &noUDP{why: errors.New("this pool has no sockets for it")}
	}
	if s.UDP == UDPOff {
		return nil, &noUDP{why: errors.New("udp=off")}
	}
	if p.lacksUDP(s) {
		return nil, &noUDP{why: errors.New("it said so a moment ago")}
	}
	conn, err := p.dial(ctx, s)
	if err != nil {
		return nil, err
	}
	a := &Association{Control: conn, Server: s}
	if a.Socket, err = o.Packet(addrPort(conn.LocalAddr()).Addr()); err != nil {
		conn.Close()
		return nil, err
	}
	err = p.handshake(ctx, conn, func() (err error) {
		var from netip.AddrPort
		if s.UDP == UDPOwn {
			from = a.Socket.LocalAddrPort()
		}
		a.Relay, err = socks.Associate(conn, from, s.options())
		return err
	})
	if errors.Is(err, socks.CommandNotSupported) || errors.Is(err, socks.ErrNoReply) {
		p.lackUDP(s)
		err = &noUDP{err, true}
	}
	if err == nil {
		a.Relay, err = relayAddr(a.Relay, addrPort(conn.RemoteAddr()).Addr())
	}
	if err == nil {
		err = a.Socket.Connect(a.Relay)
	}
	if err != nil {
		a.Close()
		return nil, err
	}
	return a, nil
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

func (p *Pool) lacksUDP(s *Server) bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return time.Now().Before(p.state(s).noUDP)
}

func (p *Pool) lackUDP(s *Server) {
	o := p.options.Load()
	p.mu.Lock()
	defer p.mu.Unlock()
	h := p.state(s)
	if h.noUDP.IsZero() {
		o.Log.Warn("server carries no UDP", "upstream", s.Name)
	}
	h.noUDP = time.Now().Add(o.BadExpire)
}
