package upstream

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

// eachMet has each connection to a server met by the next behaviour.
func eachMet(does ...behaviour) behaviour {
	n := -1
	return func(ctx context.Context) (net.Conn, error) {
		n++
		return does[n%len(does)](ctx)
	}
}

const (
	unasked   = "\x05\x07\x00\x01\x00\x00\x00\x00\x00\x00" // a command that it does not know
	forbidden = "\x05\x02\x00\x01\x00\x00\x00\x00\x00\x00"
	behind    = "\x05\x00\x00\x01\xcb\x00\x71\x02\x10\x92" // 203.0.113.2:4242
	nowhere   = "\x05\x00\x00\x01\x00\x00\x00\x00\x10\x92" // its own address
)

// TestAssociateChain: an association through the association of the server before,
// and what each answer of each of them means.
func TestAssociateChain(t *testing.T) {
	var named heard
	for _, test := range []struct {
		name   string
		udp    behaviour // of a, which is asked for an association first
		tcp    behaviour // and then for b
		host   string    // of b, if it is known by name
		hop    string    // where a has to send; empty: there is no association
		noUDP  bool
		a, b   bool   // they are well
		status string // of the chain's UDP
	}{
		{"both have it", says(chosen5, associated), says(chosen5, granted, chosen5, behind), "", "203.0.113.2:4242", false, true, true, "yes"},
		{"at the server's own address", says(chosen5, associated), says(chosen5, granted, chosen5, nowhere), "", "203.0.113.2:4242", false, true, true, "yes"},
		{"at the server's own name", says(chosen5, associated), says(chosen5, granted, chosen5, nowhere), "b.example", "b.example:4242", false, true, true, "yes"},
		{"zeros are told", says(chosen5, associated), named.talks(chosen5, granted, chosen5, behind), "b.example", "203.0.113.2:4242", false, true, true, "yes"},
		{"a has none", says(chosen5, unasked), nil, "", "", true, true, true, ""},
		{"a forbids it", says(chosen5, forbidden), nil, "", "", true, true, true, ""},
		{"a is gone", refuses, nil, "", "", false, false, false, ""},
		{"b has none", says(chosen5, associated), says(chosen5, granted, chosen5, unasked), "", "", true, true, true, "no"},
		{"b hangs up", says(chosen5, associated), says(chosen5, granted, chosen5, "EOF"), "", "", true, true, true, "no"},
		{"a does not reach b", says(chosen5, associated), says(chosen5, "\x05\x05\x00\x01\x00\x00\x00\x00\x00\x00"), "", "", false, true, false, ""},
		{"b is no server", says(chosen5, associated), says(chosen5, granted, "EOF"), "", "", false, true, false, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				a := server("a", 1)
				b := server("a>b", 2)
				b.Via, b.UDP, b.Host = a, UDPChain, test.host
				l := &lab{hosts: map[string]behaviour{a.Addr.String(): eachMet(test.udp, test.tcp)}}
				var made []*packets
				open := map[net.Conn]bool{}
				p := New(Options{
					Dial: func(ctx context.Context, from Local, to netip.AddrPort) (net.Conn, error) {
						conn, err := l.dial(ctx, from, to)
						if err != nil {
							return nil, err
						}
						c := peered{conn, "192.0.2.9:50000", to.String()}
						open[c] = true
						return c, nil
					},
					Packet: func(Local) (PacketSocket, error) {
						made = append(made, &packets{})
						return made[len(made)-1], nil
					},
				}, nil)
				defer p.Close()
				got, err := p.Associate(t.Context(), &Group{Servers: []*Server{b}}, Request{To: target}, nil)
				if st := p.Status([]*Server{a, b}); st[0].Up != test.a || st[1].Up != test.b || st[1].UDP != test.status && test.status != "" {
					t.Errorf("%+v", st)
				}
				if test.hop == "" {
					if err == nil || errors.Is(err, ErrNoUDP) != test.noUDP {
						t.Errorf("%v, want no UDP: %v", err, test.noUDP)
					}
					for _, s := range made {
						if !s.closed {
							t.Error("a socket is left open")
						}
					}
					for c := range open {
						if _, err := c.Write([]byte("x")); !errors.Is(err, io.ErrClosedPipe) {
							t.Errorf("a connection is left open: %v", err)
						}
					}
					return
				}
				if err != nil {
					t.Fatal(err)
				}
				defer got.Close()
				if len(got.Hops) != 1 || got.Hops[0].String() != test.hop || len(got.Control) != 2 || got.Server != b || made[0].to.String() != "192.0.2.1:4660" {
					t.Errorf("%+v, %+v", got, made[0])
				}
			})
		})
	}
	if all := strings.Join(named.take(), "|"); !strings.Contains(all, "b.example") || !strings.HasSuffix(all, "\x05\x03\x00\x01\x00\x00\x00\x00\x00\x00") {
		t.Errorf("a and b were told %q", all)
	}
}

// TestAssociateChainNever: what need not be asked is not.
func TestAssociateChainNever(t *testing.T) {
	for name, change := range map[string]func(a, b *Server){
		"udp=own":        func(_, b *Server) { b.UDP = UDPOwn },
		"udp=off before": func(a, _ *Server) { a.UDP = UDPOff },
		"HTTP before":    func(a, _ *Server) { a.Protocol = HTTP },
		"SOCKS4 behind":  func(_, b *Server) { b.Protocol = Socks4 },
	} {
		a, b := server("a", 1), server("a>b", 2)
		b.Via, b.UDP = a, UDPChain
		change(a, b)
		p := New(Options{Dial: func(context.Context, Local, netip.AddrPort) (net.Conn, error) {
			t.Errorf("%s: somebody was dialled", name)
			return nil, errors.New("no")
		}, Packet: func(Local) (PacketSocket, error) { return &packets{}, nil }}, nil)
		if _, err := p.Associate(t.Context(), &Group{Servers: []*Server{b}}, Request{To: flow.Target{}}, nil); !errors.Is(err, ErrNoUDP) {
			t.Errorf("%s: %v", name, err)
		}
		if st := p.Status([]*Server{b})[0]; st.UDP != "no" || !st.Up {
			t.Errorf("%s: %+v", name, st)
		}
		p.Close()
	}
}
