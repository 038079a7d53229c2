package socksserver

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

// TestAssociate carries from each family to each, by address and by name.
func TestAssociate(t *testing.T) {
	echo4, echo6 := echoAt(t, "127.0.0.1"), echoAt(t, "::1")
	for _, addr := range []string{"127.0.0.2", "::1"} {
		t.Run(addr, func(t *testing.T) {
			s := &Server{Resolve: func(string) (netip.Addr, error) { return echo6.Addr(), nil }}
			c := associate(t, serveUDP(t, s, addr), own)
			if at := c.relay(); at.Addr() != netip.MustParseAddr(addr) || at.Port() == 0 {
				t.Fatalf("relay %v", at)
			}
			for _, tt := range []struct{ ask, want, payload string }{
				{head(echo4), head(echo4), "IPv4"},
				{head(echo6), head(echo6), "IPv6"},
				{named("www.example.org", echo6), head(echo6), "name"},
				{head(netip.AddrPortFrom(netip.AddrFrom16(echo4.Addr().As16()), echo4.Port())), head(echo4), "mapped"},
				{head(echo4), head(echo4), ""},
				{head(echo4), head(echo4), strings.Repeat("x", 65507-10)},
			} {
				c.send(tt.ask + tt.payload)
				if got := c.hear(); got != tt.want+tt.payload {
					t.Errorf("%.20q: %.40q, want %.40q", tt.payload, got, tt.want+tt.payload)
				}
			}
			if diff := cmp.Diff(Counts{Alive: 1, Total: 1, Up: 6, Down: 6}, s.Counts()); diff != "" {
				t.Error(diff)
			}
			c.control.Close()
			until(t, "the end", func() bool { return s.Counts().Alive == 0 })
			c.socket.Close()
			gone, err := net.DialUDP("udp", net.UDPAddrFromAddrPort(c.addr()), net.UDPAddrFromAddrPort(c.relay()))
			if err != nil {
				t.Fatal(err)
			}
			defer gone.Close()
			gone.Write([]byte(head(echo4)))
			gone.SetReadDeadline(time.Now().Add(patience))
			if _, err := gone.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("after the end: %v", err)
			}
		})
	}
}

// TestAssociateReply wants what the script says in place of the true reply.
func TestAssociateReply(t *testing.T) {
	failed := func(rep string) string { return "05" + rep + "0001000000000000" }
	broken := errors.New("no socket")
	tests := []struct {
		name   string
		server *Server
		dst    string
		want   string // PPPP: the true port
	}{
		{"own", &Server{}, own, "050000017f000002PPPP"},
		{"zeros", &Server{}, zeros, "050000017f000002PPPP"},
		{"a name", &Server{}, "\x03\x01x\x00\x50", failed("01")},
		{"refuse", &Server{UDP: UDP{Refuse: 7}}, own, failed("07")},
		{"reply", &Server{Fault: Fault{Reply: 2}}, own, failed("02")},
		{"hang up", &Server{UDP: UDP{HangUp: true}}, own, "EOF"},
		{"close", &Server{Fault: Fault{Close: AtRequest}}, own, "EOF"},
		{"own only: own", &Server{UDP: UDP{OwnOnly: true}}, own, "050000017f000002PPPP"},
		{"own only: zeros", &Server{UDP: UDP{OwnOnly: true}}, zeros, "050000017f000002PPPP"},
		{"own only: other", &Server{UDP: UDP{OwnOnly: true}}, "\x01\x7f\x00\x00\x09\x00\x50", failed("02")},
		{"bound to zero", &Server{UDP: UDP{Bound: netip.AddrPortFrom(netip.IPv4Unspecified(), 0)}}, own, "0500000100000000PPPP"},
		{"bound to other", &Server{UDP: UDP{Bound: netip.MustParseAddrPort("[2001:db8::1]:53")}}, own, "0500000420010db80000000000000000000000010035"},
		{"bound to port", &Server{UDP: UDP{Bound: netip.AddrPortFrom(netip.Addr{}, 53)}}, own, "050000017f0000020035"},
		{"bound to name", &Server{UDP: UDP{BoundName: "abc"}}, own, "0500000303616263PPPP"},
		{"no inside", &Server{UDP: UDP{Inside: func(netip.Addr) (PacketConn, error) { return nil, broken }}}, own, failed("01")},
		{"no outside", &Server{UDP: UDP{Outside: func() (PacketConn, error) { return nil, broken }}}, own, failed("01")},
		{"no port to tell", &Server{UDP: UDP{
			Inside: func(netip.Addr) (PacketConn, error) { return Echo(), nil }, Bound: netip.MustParseAddrPort("0.0.0.0:0"),
		}}, own, "05000001000000000000"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			inside := make(chan uint16, 1)
			inside <- 0
			if tt.server.UDP.Inside == nil {
				tt.server.UDP.Inside = func(at netip.Addr) (PacketConn, error) {
					c, err := listenUDP(netip.AddrPortFrom(at, 0))
					if err == nil {
						<-inside
						inside <- addrOf(c.(net.PacketConn)).Port()
					}
					return c, err
				}
			}
			c := associate(t, serveUDP(t, tt.server, "127.0.0.2"), tt.dst)
			want := strings.ReplaceAll(tt.want, "PPPP", fmt.Sprintf("%04x", <-inside))
			if c.reply != want {
				t.Errorf("%s, want %s", c.reply, want)
			}
			alive := 0
			if strings.HasPrefix(c.reply, "0500") {
				alive = 1
			}
			until(t, "alive", func() bool { return tt.server.Counts().Alive == alive })
		})
	}
}

// TestWho sends from sockets that the association is not for.
func TestWho(t *testing.T) {
	echo := echoAt(t, "127.0.0.1")
	for name, tt := range map[string]struct {
		dst  func(c *net.UDPConn) string // nil: own
		from string                      // of the other socket
	}{
		"own":              {nil, "127.0.0.2"},
		"zeros":            {func(*net.UDPConn) string { return zeros }, "127.0.0.2"},
		"another address":  {func(*net.UDPConn) string { return zeros }, "127.0.0.3"},
		"no port":          {func(*net.UDPConn) string { return "\x01\x7f\x00\x00\x02\x00\x00" }, "127.0.0.2"},
		"no address":       {func(c *net.UDPConn) string { return zeros[:5] + port(addrOf(c)) }, "127.0.0.2"},
		"of somebody else": {func(*net.UDPConn) string { return "\x01\x7f\x00\x00\x03\x00\x00" }, "127.0.0.2"},
	} {
		t.Run(name, func(t *testing.T) {
			s := &Server{}
			server := serveUDP(t, s, "127.0.0.2")
			socket := listenAt(t, "127.0.0.2")
			if name == "of somebody else" {
				socket = listenAt(t, "127.0.0.3")
			}
			dst := target(addrOf(socket))
			if tt.dst != nil {
				dst = tt.dst(socket)
			}
			c := associateFrom(t, server, socket, dst)
			c.send(head(echo) + "first")
			if got := c.hear(); got != head(echo)+"first" {
				t.Errorf("%q", got)
			}
			other := listenAt(t, tt.from)
			other.WriteToUDPAddrPort([]byte(head(echo)+"other"), c.relay())
			until(t, "a drop", func() bool { return s.Counts().Dropped == 1 })
			c.send(head(echo) + "again")
			if got := c.hear(); got != head(echo)+"again" {
				t.Errorf("%q", got)
			}
			if diff := cmp.Diff(Counts{Alive: 1, Total: 1, Up: 2, Down: 2, Dropped: 1}, s.Counts()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestOwnOnly carries for those alone that name their port.
func TestOwnOnly(t *testing.T) {
	echo := echoAt(t, "127.0.0.1")
	s := &Server{UDP: UDP{OwnOnly: true}}
	server := serveUDP(t, s, "127.0.0.1")
	for i, dst := range []string{zeros, "\x01\x7f\x00\x00\x01\x00\x00"} {
		c := associate(t, server, dst)
		c.send(head(echo))
		until(t, "a drop", func() bool { return s.Counts().Dropped == uint64(i+1) })
	}
	socket := listenAt(t, "127.0.0.1")
	for _, dst := range []string{target(addrOf(socket)), zeros[:5] + port(addrOf(socket))} {
		c := associateFrom(t, server, socket, dst)
		c.send(head(echo) + "x")
		if got := c.hear(); got != head(echo)+"x" {
			t.Errorf("%q", got)
		}
	}
}

// TestThirdParty answers from a socket that was not asked.
func TestThirdParty(t *testing.T) {
	for _, only := range []bool{false, true} {
		t.Run(fmt.Sprintf("asked only %v", only), func(t *testing.T) {
			s := &Server{UDP: UDP{AskedOnly: only}}
			c := associate(t, serveUDP(t, s, "127.0.0.1"), own)
			asked, third := listenAt(t, "127.0.0.1"), listenAt(t, "127.0.0.1")
			c.send(head(addrOf(asked)) + "question")
			question, from := receive(t, asked)
			if question != "question" {
				t.Errorf("%q", question)
			}
			third.WriteToUDPAddrPort([]byte("third"), from)
			if only {
				until(t, "a drop", func() bool { return s.Counts().Dropped == 1 })
			} else if got := c.hear(); got != head(addrOf(third))+"third" {
				t.Errorf("%q", got)
			}
			asked.WriteToUDPAddrPort([]byte("answer"), from)
			if got := c.hear(); got != head(addrOf(asked))+"answer" {
				t.Errorf("%q", got)
			}
			// All destinations see one socket.
			c.send(head(addrOf(third)) + "question")
			if _, again := receive(t, third); again != from {
				t.Errorf("from %v, then from %v", from, again)
			}
		})
	}
}

// TestHeader scripts the header of replies.
func TestHeader(t *testing.T) {
	all := make(chan Request, 8)
	s := &Server{UDP: UDP{Names: true, Frag: 3, OnDatagram: func(r Request) { all <- r }}}
	s.Resolve = func(name string) (netip.Addr, error) {
		if name != "www.example.org" {
			return netip.Addr{}, errors.New("no such name")
		}
		return netip.MustParseAddr("192.0.2.1"), nil
	}
	s.UDP.Outside = func() (PacketConn, error) { return Echo(), nil }
	c := associate(t, serveUDP(t, s, "127.0.0.1"), own)
	at, other := netip.MustParseAddrPort("192.0.2.1:443"), netip.MustParseAddrPort("[2001:db8::1]:443")
	for _, h := range []string{named("www.example.org", at), head(other), head(at)} {
		c.send(h + "x")
		h = h[:2] + "\x03" + h[3:]
		if got := c.hear(); got != h+"x" {
			t.Errorf("%q, want %q", got, h+"x")
		}
	}
	c.send(named("nowhere.test", at))
	until(t, "a drop", func() bool { return s.Counts().Dropped == 1 })
	for _, want := range []flow.Target{
		{Name: "www.example.org", Port: 443}, {Addr: other.Addr(), Port: 443},
		{Addr: at.Addr(), Port: 443}, {Name: "nowhere.test", Port: 443},
	} {
		if got := <-all; got != (Request{Client: c.addr(), Network: flow.UDP, Target: want}) {
			t.Errorf("%+v, want %+v", got, want)
		}
	}
}

// TestOnRequestUDP wants that the request is told from one to connect.
func TestOnRequestUDP(t *testing.T) {
	asked := make(chan Request, 1)
	s := &Server{OnRequest: func(r Request) { asked <- r }}
	c := associate(t, serveUDP(t, s, "127.0.0.1"), own)
	want := Request{
		Client:  c.control.LocalAddr().(*net.TCPAddr).AddrPort(),
		Network: flow.UDP,
		Target:  flow.Target{Addr: c.addr().Addr(), Port: c.addr().Port()},
	}
	if got := <-asked; got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}

// TestEndAssociations ends them from the server's side, which goes on.
func TestEndAssociations(t *testing.T) {
	s := &Server{}
	server := serveUDP(t, s, "127.0.0.1")
	for range 2 {
		c := associate(t, server, own)
		s.EndAssociations()
		c.control.SetReadDeadline(time.Now().Add(patience))
		if _, err := c.control.Read(make([]byte, 1)); err != io.EOF {
			t.Error(err)
		}
		until(t, "the end", func() bool { return s.Counts().Alive == 0 })
	}
	if n := s.Counts().Total; n != 2 {
		t.Errorf("%d associations", n)
	}
}

// TestServeEndsAssociations wants Serve to end them with its context.
func TestServeEndsAssociations(t *testing.T) {
	s := &Server{}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- s.Serve(ctx, ln) }()
	c := associate(t, ln.Addr().(*net.TCPAddr).AddrPort(), own)
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if n := s.Counts().Alive; n != 0 {
		t.Errorf("%d associations", n)
	}
	if b, err := io.ReadAll(c.control); len(b) != 0 || err != nil {
		t.Errorf("%q, %v", b, err)
	}
}

// TestMany makes as many associations as a busy gateway has, and uses each.
func TestMany(t *testing.T) {
	const n = 2000
	s := &Server{}
	server, echo := serveUDP(t, s, "127.0.0.1"), echoAt(t, "127.0.0.1")
	clients := make([]*client, n)
	for i := range clients {
		clients[i] = associate(t, server, own)
	}
	for i, c := range clients {
		payload := fmt.Sprint(i)
		c.send(head(echo) + payload)
		if got := c.hear(); got != head(echo)+payload {
			t.Fatalf("%d: %q", i, got)
		}
	}
	if diff := cmp.Diff(Counts{Alive: n, Total: n, Up: n, Down: n}, s.Counts()); diff != "" {
		t.Error(diff)
	}
	for _, c := range clients {
		c.control.Close()
	}
	until(t, "the end", func() bool { return s.Counts().Alive == 0 })
}

// TestParseDatagram has what TestAssociate has not: datagrams that are none.
func TestParseDatagram(t *testing.T) {
	whole := []string{
		"\x00\x00\x00\x01\x7f\x00\x00\x01\x00\x50",
		"\x00\x00\x00\x03\x01x\x00\x50",
		"\x00\x00\x00\x04" + strings.Repeat("\x20", 16) + "\x00\x50",
	}
	for _, w := range whole {
		if _, payload, err := parseDatagram([]byte(w)); len(payload) != 0 || err != nil {
			t.Errorf("%q: %q, %v", w, payload, err)
		}
		for n := range w {
			if _, _, err := parseDatagram([]byte(w[:n])); err == nil {
				t.Errorf("%q is taken", w[:n])
			}
		}
	}
	for name, b := range map[string]string{
		"fragment":     "\x00\x00\x01" + whole[0][3:],
		"address type": "\x00\x00\x00\x02" + whole[0][4:],
		"empty name":   "\x00\x00\x00\x03\x00\x00\x50",
	} {
		if _, _, err := parseDatagram([]byte(b)); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
}

// FuzzParseDatagram wants the payload to be what is behind the header, and the
// header to be read as it would be written.
func FuzzParseDatagram(f *testing.F) {
	at := netip.MustParseAddrPort("192.0.2.1:53")
	for _, seed := range []string{head(at) + "x", named("www.example.org", at), head(netip.MustParseAddrPort("[2001:db8::1]:53")), ""} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		to, payload, err := parseDatagram(b)
		if err != nil {
			return
		}
		again := head(netip.AddrPortFrom(to.Addr, to.Port))
		if to.Name != "" {
			again = named(to.Name, netip.AddrPortFrom(to.Addr, to.Port))
		} else if to.Addr.Is4() && b[3] == 4 {
			again = "\x00\x00" + string(b[2:22]) // mapped
		}
		if want := "\x00\x00" + string(b[2:]); again+string(payload) != want {
			t.Errorf("%q, want %q", again+string(payload), want)
		}
	})
}
