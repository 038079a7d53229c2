package socksserver

import (
	"context"
	"encoding/hex"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"
)

const patience = 5 * time.Second

// serveUDP starts s at addr and returns where.
func serveUDP(t *testing.T, s *Server, addr string) netip.AddrPort {
	t.Helper()
	ln, err := net.Listen("tcp", netip.AddrPortFrom(netip.MustParseAddr(addr), 0).String())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx, ln) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return ln.Addr().(*net.TCPAddr).AddrPort()
}

// client is the other side of an association.
type client struct {
	t       *testing.T
	control net.Conn
	socket  *net.UDPConn
	reply   string // hexadecimal
}

// own names the client's own address and port in its request.
const own = "own"

// zeros leaves open where the datagrams will come from.
const zeros = "\x01\x00\x00\x00\x00\x00\x00"

// associate asks server for an association, with DST as given: own, or the
// bytes from ATYP on. Its socket has the server's address.
func associate(t *testing.T, server netip.AddrPort, dst string) *client {
	t.Helper()
	socket := listenAt(t, server.Addr().String())
	if dst == own {
		dst = target(addrOf(socket))
	}
	return associateFrom(t, server, socket, dst)
}

// associateFrom asks by a connection from the server's own address for an
// association of socket.
func associateFrom(t *testing.T, server netip.AddrPort, socket *net.UDPConn, dst string) *client {
	t.Helper()
	dialer := net.Dialer{LocalAddr: net.TCPAddrFromAddrPort(netip.AddrPortFrom(server.Addr(), 0))}
	control, err := dialer.Dial("tcp", server.String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { control.Close() })
	c := &client{t: t, control: control, socket: socket}
	heard := talk(control, "\x05\x01\x00", "\x05\x03\x00"+dst)
	var ok bool
	if c.reply, ok = strings.CutPrefix(heard, "0500 "); !ok {
		t.Fatalf("greeting: %s", heard)
	}
	return c
}

func listenAt(t *testing.T, addr string) *net.UDPConn {
	t.Helper()
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.AddrPortFrom(netip.MustParseAddr(addr), 0)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func (c *client) addr() netip.AddrPort { return addrOf(c.socket) }

func addrOf(c net.PacketConn) netip.AddrPort { return c.LocalAddr().(*net.UDPAddr).AddrPort() }

// relay returns where the reply wants datagrams.
func (c *client) relay() netip.AddrPort {
	c.t.Helper()
	b, err := hex.DecodeString(c.reply)
	if err != nil || len(b) != 10 && len(b) != 22 || b[1] != 0 {
		c.t.Fatalf("reply %s", c.reply)
	}
	addr, _ := netip.AddrFromSlice(b[4 : len(b)-2])
	return netip.AddrPortFrom(addr, uint16(b[len(b)-2])<<8|uint16(b[len(b)-1]))
}

// send sends a datagram to the relay.
func (c *client) send(b string) {
	c.t.Helper()
	if _, err := c.socket.WriteToUDPAddrPort([]byte(b), c.relay()); err != nil {
		c.t.Fatal(err)
	}
}

// hear returns what comes from the relay.
func (c *client) hear() string {
	c.t.Helper()
	b, from := receive(c.t, c.socket)
	if from != c.relay() {
		c.t.Errorf("%v sends, not the relay %v", from, c.relay())
	}
	return b
}

func receive(t *testing.T, c *net.UDPConn) (string, netip.AddrPort) {
	t.Helper()
	b := make([]byte, 1<<16)
	c.SetReadDeadline(time.Now().Add(patience))
	n, from, err := c.ReadFromUDPAddrPort(b)
	if err != nil {
		t.Fatal(err)
	}
	return string(b[:n]), from
}

// target returns an address as a request and a header have it.
func target(a netip.AddrPort) string {
	return string(addrBytes(a.Addr())) + port(a)
}

func port(a netip.AddrPort) string { return string([]byte{byte(a.Port() >> 8), byte(a.Port())}) }

func head(a netip.AddrPort) string { return "\x00\x00\x00" + target(a) }

func named(name string, a netip.AddrPort) string {
	return "\x00\x00\x00\x03" + string([]byte{byte(len(name))}) + name + port(a)
}

// echoAt answers with what it is sent.
func echoAt(t *testing.T, addr string) netip.AddrPort {
	t.Helper()
	c := listenAt(t, addr)
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
	return addrOf(c)
}

// until waits for ok, which has no other way to be waited for.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%s: not in %v", what, patience)
		}
	}
}
