package socks

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

// patience is for what comes in no time if it comes.
const patience = 10 * time.Second

// udpEcho sends back each datagram; it returns its address.
func udpEcho(t *testing.T, addr string) netip.AddrPort {
	t.Helper()
	c := udpSocket(t, netip.MustParseAddr(addr))
	go func() {
		b := make([]byte, 1<<16)
		for {
			n, from, err := c.ReadFromUDPAddrPort(b)
			if err != nil {
				return
			}
			c.WriteToUDPAddrPort(b[:n], from)
		}
	}()
	return c.LocalAddr().(*net.UDPAddr).AddrPort()
}

func udpSocket(t *testing.T, addr netip.Addr) *net.UDPConn {
	t.Helper()
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(addr, 0)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// associated asks the server for an association, for a socket at the control
// connection's address. It names the socket's address and port if own is set.
func associated(t *testing.T, server netip.AddrPort, own bool) (control net.Conn, socket *net.UDPConn, relay netip.AddrPort, err error) {
	t.Helper()
	control, err = net.Dial("tcp", server.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { control.Close() })
	control.SetDeadline(time.Now().Add(patience))
	socket = udpSocket(t, control.LocalAddr().(*net.TCPAddr).AddrPort().Addr())
	from := netip.AddrPort{}
	if own {
		from = socket.LocalAddr().(*net.UDPAddr).AddrPort()
	}
	relay, err = Associate(control, from, Options{})
	return control, socket, relay, err
}

// TestInteropAssociate has datagrams carried by Dante and hpsockd, until the
// control connection ends, and none by microsocks.
func TestInteropAssociate(t *testing.T) {
	echo4, echo6 := udpEcho(t, "127.0.0.1"), udpEcho(t, "::1")
	address := func(a netip.AddrPort) flow.Target { return flow.Target{Addr: a.Addr(), Port: a.Port()} }
	both := []flow.Target{address(echo4), address(echo6)}
	tests := []struct {
		name    string
		start   func(t *testing.T) []netip.AddrPort
		targets []flow.Target
		want    error
		zeros   bool       // it carries too what comes from an address that the request does not name
		relay   netip.Addr // where it wants datagrams; zero value: where the control connection goes
	}{
		{"danted", func(t *testing.T) []netip.AddrPort { return danted(t, false, 9) }, both, nil, true, netip.Addr{}},
		// Its relay has the address of its route to the outside.
		{"hpsockd", hpsockd, both[:1], nil, false, netip.MustParseAddr("127.0.0.1")},
		{"microsocks", func(t *testing.T) []netip.AddrPort { return microsocks(t, false) }, nil, CommandNotSupported, false, netip.Addr{}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for _, server := range tt.start(t) {
				for _, own := range []bool{true, false} {
					control, socket, relay, err := associated(t, server, own)
					if err != tt.want {
						t.Errorf("%v, own %v: %v, want %v", server, own, err, tt.want)
					}
					if err != nil {
						continue
					}
					at := tt.relay
					if !at.IsValid() {
						at = server.Addr()
					}
					if relay.Addr() != at || relay.Port() == 0 {
						t.Errorf("%v, own %v: relay %v", server, own, relay)
					}
					if !own && !tt.zeros {
						// It says yes and carries nothing.
						if err := exchange(socket, relay, tt.targets[0], 1, 100*time.Millisecond); !errors.Is(err, os.ErrDeadlineExceeded) {
							t.Errorf("%v with zeros: %v", server, err)
						}
						continue
					}
					for _, target := range tt.targets {
						for _, size := range []int{0, 1, 1472, 60000} {
							if err := exchange(socket, relay, target, size, patience); err != nil {
								t.Errorf("%v, own %v: %d bytes to %v: %v", server, own, size, target, err)
							}
						}
					}
					control.Close()
					if err := refused(socket, relay, tt.targets[0]); err != nil {
						t.Errorf("%v, own %v, after the end: %v", server, own, err)
					}
				}
			}
		})
	}
}

// exchange sends an echo a datagram and wants it back in time.
func exchange(socket *net.UDPConn, relay netip.AddrPort, target flow.Target, size int, in time.Duration) error {
	sent, err := AppendUDPHeader(nil, target)
	if err != nil {
		return err
	}
	payload := strings.Repeat("x", size)
	if _, err := socket.WriteToUDPAddrPort(append(sent, payload...), relay); err != nil {
		return err
	}
	b := make([]byte, 1<<16)
	socket.SetReadDeadline(time.Now().Add(in))
	n, peer, err := socket.ReadFromUDPAddrPort(b)
	if err != nil {
		return err
	}
	from, name, head, err := ParseUDPHeader(b[:n])
	switch {
	case err != nil:
		return err
	case peer != relay:
		return fmt.Errorf("from %v, not %v", peer, relay)
	case from != netip.AddrPortFrom(target.Addr, target.Port) || name != nil:
		return fmt.Errorf("answered by %v %q", from, name)
	case string(b[head:n]) != payload:
		return fmt.Errorf("%d bytes came back", n-head)
	}
	return nil
}

// refused sends datagrams from the socket, which it closes, until the relay is
// no more, and wants none of those answered.
func refused(socket *net.UDPConn, relay netip.AddrPort, target flow.Target) error {
	local := socket.LocalAddr().(*net.UDPAddr)
	socket.Close()
	c, err := net.DialUDP("udp", local, net.UDPAddrFromAddrPort(relay)) // learns of ICMP errors
	if err != nil {
		return err
	}
	defer c.Close()
	sent, err := AppendUDPHeader(nil, target)
	if err != nil {
		return err
	}
	b := make([]byte, 1<<16)
	for end := time.Now().Add(patience); time.Now().Before(end); {
		c.Write(sent)
		c.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
		if _, err := c.Read(b); errors.Is(err, syscall.ECONNREFUSED) {
			return nil
		}
	}
	return fmt.Errorf("the relay is there after %v", patience)
}
