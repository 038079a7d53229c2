package upstream

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tproxyd/tproxyd/pkg/socks"
)

// packets is a UDP socket that notes what is done with it.
type packets struct {
	to     netip.AddrPort
	closed bool
}

func (p *packets) LocalAddrPort() netip.AddrPort   { return netip.MustParseAddrPort("192.0.2.9:40000") }
func (p *packets) Connect(to netip.AddrPort) error { p.to = to; return nil }
func (p *packets) Close() error                    { p.closed = true; return nil }

// peered is a pipe between two addresses.
type peered struct {
	net.Conn
	local, remote string
}

func (p peered) LocalAddr() net.Addr {
	return net.TCPAddrFromAddrPort(netip.MustParseAddrPort(p.local))
}
func (p peered) RemoteAddr() net.Addr {
	return net.TCPAddrFromAddrPort(netip.MustParseAddrPort(p.remote))
}

const associated = "\x05\x00\x00\x01\xc0\x00\x02\x01\x12\x34"

// TestAssociate: order, preference and what each answer means.
func TestAssociate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b, c := server("a", 1), server("b", 2), server("c", 3)
		l := &lab{hosts: map[string]behaviour{
			a.Addr.String(): says("\x05\x00", "\x05\x07\x00\x01\x00\x00\x00\x00\x00\x00"), // no UDP
			b.Addr.String(): says("\x05\x00", "EOF"),                                      // as ssh -D
			c.Addr.String(): says("\x05\x00", associated),
		}}
		var made []*packets
		p := New(Options{
			Dial: func(ctx context.Context, from Local, to netip.AddrPort) (net.Conn, error) {
				conn, err := l.dial(ctx, from, to)
				if err != nil {
					return nil, err
				}
				return peered{conn, "192.0.2.9:50000", to.String()}, nil
			},
			Packet: func(local Local) (PacketSocket, error) {
				if local.Addr.String() != "192.0.2.9" {
					t.Errorf("a socket on %v", local)
				}
				made = append(made, &packets{})
				return made[len(made)-1], nil
			},
		}, nil)
		defer p.Close()
		got, err := p.Associate(t.Context(), &Group{Servers: []*Server{a, b, c}}, Request{To: target}, nil)
		if err != nil {
			t.Fatal(err)
		}
		if asked := l.asked(); got.Server != c || asked != a.Addr.String()+" "+b.Addr.String()+" "+c.Addr.String() {
			t.Errorf("by %s, asked %s", got.Server.Name, asked)
		}
		if len(made) != 3 || !made[0].closed || !made[1].closed || made[2].closed || made[2].to.String() != "192.0.2.1:4660" {
			t.Errorf("sockets %+v", made)
		}
		got.Close()

		// Who has no UDP is not asked for it again for a while, and is as good as before for TCP.
		if got, err = p.Associate(t.Context(), &Group{Servers: []*Server{a, b, c}}, Request{To: target}, nil); err != nil {
			t.Fatal(err)
		}
		if asked := l.asked(); asked != c.Addr.String() {
			t.Errorf("asked %s", asked)
		}
		got.Close()
		for i, s := range p.Status([]*Server{a, b, c}) {
			if want := []string{"no", "no", "yes"}[i]; !s.Up || s.UDP != want || s.Associations != uint64([]int{0, 0, 2}[i]) {
				t.Errorf("%+v, UDP is %q", s, want)
			}
		}
		if _, err = p.Associate(t.Context(), &Group{Servers: []*Server{a, b}}, Request{To: target}, nil); !errors.Is(err, ErrNoUDP) || l.asked() != "" {
			t.Errorf("of two servers without UDP: %v", err)
		}
		time.Sleep(31 * time.Second)
		if _, err = p.Associate(t.Context(), &Group{Servers: []*Server{a, b}}, Request{To: target}, nil); !errors.Is(err, ErrNoUDP) || l.asked() == "" {
			t.Errorf("later: %v, or they were not asked", err)
		}

		// The one that served before comes first, a bad one does not.
		if got, err = p.Associate(t.Context(), &Group{Servers: []*Server{a, b, c}}, Request{To: target}, c); err != nil || l.asked() != c.Addr.String() {
			t.Errorf("preferred: %v", err)
		}
		got.Close()
		l.hosts[c.Addr.String()] = func(context.Context) (net.Conn, error) { return nil, errors.New("refused") }
		if _, err = p.Associate(t.Context(), &Group{Servers: []*Server{a, c}}, Request{To: target}, c); err == nil || errors.Is(err, ErrNoUDP) {
			t.Errorf("one is down and one without UDP: %v", err)
		}
		if s := p.Status([]*Server{c})[0]; s.Up {
			t.Error("a server that is down is not known to be")
		}
		// Who is not asked is not known to be back, and what another one says is
		// what the client hears.
		if _, err = p.Associate(t.Context(), &Group{Servers: []*Server{a, c}}, Request{To: target}, nil); err == nil || p.Status([]*Server{c})[0].Up {
			t.Errorf("a bad server is good again: %v", err)
		}
		d := server("d", 4)
		l.hosts[d.Addr.String()] = says("\x05\x00", "\x05\x02\x00\x01\x00\x00\x00\x00\x00\x00")
		var r socks.Reply
		if _, err = p.Associate(t.Context(), &Group{Servers: []*Server{a, d}}, Request{To: target}, nil); !errors.As(err, &r) || errors.Is(err, ErrNoUDP) {
			t.Errorf("without UDP, and not allowed: %v", err)
		}
		off := server("a", 1)
		off.UDP = UDPOff
		l.asked()
		if _, err = p.Associate(t.Context(), &Group{Servers: []*Server{off}}, Request{To: target}, nil); !errors.Is(err, ErrNoUDP) || l.asked() != "" {
			t.Errorf("udp=off: %v", err)
		}
	})
}

// TestAssociateEnds: a silent server is a fault within the limit, and a context
// that ends leaves nothing open.
func TestAssociateEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := server("silent", 1)
		l := &lab{hosts: map[string]behaviour{s.Addr.String(): says("\x05\x00")}}
		sock := &packets{}
		p := New(Options{
			Dial: func(ctx context.Context, from Local, to netip.AddrPort) (net.Conn, error) {
				conn, err := l.dial(ctx, from, to)
				return peered{conn, "192.0.2.9:50000", to.String()}, err
			},
			Packet:           func(Local) (PacketSocket, error) { return sock, nil },
			HandshakeTimeout: 5 * time.Second,
		}, nil)
		defer p.Close()
		start := time.Now()
		if _, err := p.Associate(t.Context(), &Group{Servers: []*Server{s}}, Request{To: target}, nil); err == nil || time.Since(start) != 5*time.Second || !sock.closed {
			t.Errorf("%v after %v, closed %v", err, time.Since(start), sock.closed)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := p.Associate(ctx, &Group{Servers: []*Server{s}}, Request{To: target}, nil); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
	})
}

func TestRelayAddr(t *testing.T) {
	for _, c := range []struct{ bnd, peer, want string }{
		{"198.51.100.7:4000", "203.0.113.1", "198.51.100.7:4000"},
		{"0.0.0.0:4000", "203.0.113.1", "203.0.113.1:4000"},
		{"[::]:4000", "203.0.113.1", "203.0.113.1:4000"},
		{"[2001:db8::1]:4000", "203.0.113.1", "203.0.113.1:4000"},
		{"10.0.0.1:4000", "203.0.113.1", "203.0.113.1:4000"},
		{"10.0.0.1:4000", "192.168.1.1", "10.0.0.1:4000"},
		{"127.0.0.1:4000", "192.168.1.1", "192.168.1.1:4000"},
		{"127.0.0.1:4000", "127.0.0.2", "127.0.0.1:4000"},
		{"[::ffff:198.51.100.7]:4000", "203.0.113.1", "198.51.100.7:4000"},
		{"[fe80::1]:4000", "fe80::2%eth0", "[fe80::2%eth0]:4000"},
	} {
		got, err := relayAddr(netip.MustParseAddrPort(c.bnd), netip.MustParseAddr(c.peer))
		if err != nil || got.String() != c.want {
			t.Errorf("BND %s of a server at %s: %v, %v, want %s", c.bnd, c.peer, got, err, c.want)
		}
	}
	if got, err := relayAddr(netip.AddrPortFrom(netip.Addr{}, 4000), netip.MustParseAddr("203.0.113.1")); err != nil || got.String() != "203.0.113.1:4000" {
		t.Errorf("a name: %v, %v", got, err)
	}
	if _, err := relayAddr(netip.MustParseAddrPort("198.51.100.7:0"), netip.MustParseAddr("203.0.113.1")); !errors.Is(err, ErrNoUDP) {
		t.Errorf("port 0: %v", err)
	}
}

// server is one at an address that no other has.
func server(name string, n byte) *Server {
	return &Server{Name: name, Addr: netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, 113, n}), 1080)}
}
