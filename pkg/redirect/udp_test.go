package redirect

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tproxyd/tproxyd/pkg/flow"
	"golang.org/x/sys/unix"
)

// arrival is a datagram as it came to a shard of the listener.
type arrival struct {
	shard int
	d     flow.Datagram
}

func (a arrival) text() string { return string(a.d.Data) }

// gather replaces the listener for datagrams by one that answers nothing, and
// returns what comes to it.
func (w *world) gather(p *Plan, shards int) <-chan arrival {
	w.t.Helper()
	w.udp.Close()
	var err error
	w.gateway.do(func() { w.udp, err = ListenUDP(testMarks, shards) })
	if err != nil {
		w.t.Fatal(err)
	}
	p.Ports.UDP = w.udp.Port()
	w.apply(*p)
	c := make(chan arrival, 1024)
	for i, shard := range w.udp.Shards() {
		if len(shard) != 2 {
			w.t.Fatalf("shard %d has %d sockets", i, len(shard))
		}
		for _, s := range shard {
			go gatherFrom(s, i, c)
		}
	}
	return c
}

func gatherFrom(s flow.PacketSource, shard int, c chan<- arrival) {
	for {
		ds := []flow.Datagram{{Data: make([]byte, 1<<16)}}
		if _, err := s.ReadBatch(ds); err != nil {
			return
		}
		c <- arrival{shard, ds[0]}
	}
}

// next waits for a datagram.
func (w *world) next(c <-chan arrival) arrival {
	w.t.Helper()
	select {
	case a := <-c:
		return a
	case <-time.After(wait):
		w.t.Fatal("nothing came to the listener")
	}
	panic("not reached")
}

// expectText wants a datagram of a client with such a text, and returns it.
func (w *world) expectText(c <-chan arrival, text string) arrival {
	w.t.Helper()
	a := w.next(c)
	if a.text() != text {
		w.t.Fatalf("%q came from %s, not %q", a.text(), a.d.Src, text)
	}
	return a
}

// udpClient is a connected socket of a client, which fails its test where
// something else happens than what it is asked for.
type udpClient struct {
	*net.UDPConn
	t *testing.T
}

func (w *world) dialUDP(from *netns, addr string) *udpClient {
	w.t.Helper()
	var c net.Conn
	var err error
	from.do(func() { c, err = net.Dial("udp", addr) })
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { c.Close() })
	return &udpClient{c.(*net.UDPConn), w.t}
}

func (c *udpClient) addr() netip.AddrPort { return c.LocalAddr().(*net.UDPAddr).AddrPort() }

// say sends something. A refusal that this host is told of at once is heard of
// later all the same.
func (c *udpClient) say(text string) {
	c.t.Helper()
	if _, err := c.Write([]byte(text)); err != nil && !errors.Is(err, unix.EPERM) {
		c.t.Fatal(err)
	}
}

// set switches an option on, by its name for either family.
func (c *udpClient) set(v4, v6 int) {
	c.t.Helper()
	o := option{unix.SOL_IP, v4, "IPv4"}
	if c.addr().Addr().Is6() {
		o = option{unix.SOL_IPV6, v6, "IPv6"}
	}
	raw, err := c.SyscallConn()
	if err == nil {
		raw.Control(func(fd uintptr) { err = switchOn(int(fd), o) })
	}
	if err != nil {
		c.t.Fatal(err)
	}
}

// closed closes sockets, and returns when no child of another test that has yet
// to call exec has them either.
func closed(cs ...io.Closer) {
	for _, c := range cs {
		c.Close()
	}
	syscall.ForkLock.Lock() // held until exec
	syscall.ForkLock.Unlock()
}

// heard returns the text that came, or the error.
func (c *udpClient) heard() string {
	c.SetReadDeadline(time.Now().Add(wait))
	b := make([]byte, 1<<16)
	n, err := c.Read(b)
	if err != nil {
		return errName(err)
	}
	return string(b[:n])
}

// hear waits for a text or, by its name, an error.
func (c *udpClient) hear(want string) {
	c.t.Helper()
	if got := c.heard(); got != want {
		c.t.Fatalf("%s to %s: got %.60q, not %.60q", c.addr(), c.RemoteAddr(), got, want)
	}
}

// connectUDP makes the socket of a flow; it is closed with the test.
func (w *world) connectUDP(client, dst netip.AddrPort) (fd int) {
	w.t.Helper()
	var err error
	w.gateway.do(func() { fd, err = testMarks.ConnectUDP(client, dst) })
	if err != nil {
		w.t.Fatal(err)
	}
	return fd
}

// flowSocket is connectUDP as a client.
func (w *world) flowSocket(client, dst netip.AddrPort) *udpClient {
	w.t.Helper()
	f := os.NewFile(uintptr(w.connectUDP(client, dst)), "flow")
	defer f.Close()
	c, err := net.FileConn(f)
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { c.Close() })
	return &udpClient{c.(*net.UDPConn), w.t}
}

func (w *world) reply(d flow.Datagram, text string) {
	w.t.Helper()
	s := w.udp.Shards()[0][0]
	if d.Src.Addr().Is6() {
		s = w.udp.Shards()[0][1]
	}
	if n, err := s.WriteBatch([]flow.Datagram{{Data: []byte(text), Src: d.Dst, Dst: d.Src}}); n != 1 || err != nil {
		w.t.Fatalf("WriteBatch: %d, %v", n, err)
	}
}

// udpDestinations are proxied, of both families.
var udpDestinations = []string{"203.0.113.5:7000", "[2001:db8:a::5]:7000", "198.18.3.4:443", "[fd74:7072:6f78::5]:443"}

// everywhere runs f for clients of the gateway and for itself, each in a world
// of its own.
func everywhere(t *testing.T, f func(t *testing.T, w *world, p *Plan, from *netns, came <-chan arrival)) {
	t.Parallel()
	for _, name := range []string{"forwarded", "local"} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			p := worldPlan()
			p.Local = name == "local"
			p = w.start(p)
			from := w.client
			if p.Local {
				from = w.gateway
			}
			f(t, w, &p, from, w.gather(&p, 1))
			w.leaked()
		})
	}
}

// A flow: its first datagram comes to the listener, the later ones to its
// socket; those of others do not.
func TestFlowOfDatagrams(t *testing.T) {
	everywhere(t, func(t *testing.T, w *world, p *Plan, from *netns, came <-chan arrival) {
		for _, to := range udpDestinations {
			dst := netip.MustParseAddrPort(to)
			c, other := w.dialUDP(from, to), w.dialUDP(from, to)
			c.say("one")
			a := w.expectText(came, "one")
			index := 1
			if !p.Local {
				index = 11
			}
			if a.d.Dst != dst || a.d.Src != c.addr() || a.d.IfIndex != index {
				t.Errorf("%s: it came from %s to %s by interface %d", to, a.d.Src, a.d.Dst, a.d.IfIndex)
			}
			w.reply(a.d, "answer one")
			c.hear("answer one")

			f := w.flowSocket(a.d.Src, a.d.Dst)
			c.say("two")
			f.hear("two")
			f.say("answer two")
			c.hear("answer two")
			other.say("other")
			w.expectText(came, "other") // and two has not come here
			c.say("three")
			f.hear("three")
			w.reply(a.d, "answer three") // by whichever way
			c.hear("answer three")
			long := strings.Repeat("x", 5000)
			f.say(long)
			c.hear(long)
			c.say(long)
			f.hear(long)

			// Conntrack can lose it, and see our answer first then.
			w.forgetAll()
			f.say("again")
			c.hear("again")
			c.say("four")
			f.hear("four")

			closed(f)
			c.say("five")
			w.expectText(came, "five")
		}
	})
}

// forgetAll makes the gateway forget all flows.
func (w *world) forgetAll() {
	w.t.Helper()
	var err error
	w.gateway.do(func() {
		var c *nfnl
		if c, err = dialNfnl(); err != nil {
			return
		}
		defer c.close()
		m, _ := conntrackMessage(conntrackDelete, 0)
		err = c.query(m, false, nil)
	})
	if err != nil {
		w.t.Fatal(err)
	}
}

// A client that is gone answers by an error, which the flow's socket sees.
func TestClientGone(t *testing.T) {
	everywhere(t, func(t *testing.T, w *world, p *Plan, from *netns, came <-chan arrival) {
		if p.Local {
			from.run("sysctl -qw net.ipv4.fwmark_reflect=1 net.ipv6.fwmark_reflect=1")
		}
		for _, to := range udpDestinations {
			for _, forget := range []bool{false, true} {
				c := w.dialUDP(from, to)
				c.say("one")
				a := w.next(came)
				f := w.flowSocket(a.d.Src, a.d.Dst)
				closed(c)
				if forget {
					w.forgetAll()
				}
				f.say("late")
				f.hear("ECONNREFUSED")
			}
		}
	})
}

// The rules decide each datagram anew, whatever was before.
func TestRulesDecideDatagrams(t *testing.T) {
	everywhere(t, func(t *testing.T, w *world, p *Plan, from *netns, came <-chan arrival) {
		proxied := p.Blocks
		for _, to := range udpDestinations[:2] {
			w.server.run("nft reset counters")
			c := w.dialUDP(from, to)
			c.say("one")
			a := w.next(came)
			f := w.flowSocket(a.d.Src, a.d.Dst)
			c.say("two")
			f.hear("two")
			prohibited := "EHOSTUNREACH"
			if a.d.Dst.Addr().Is6() {
				prohibited = "EACCES"
			}
			for range 2 {
				p.Blocks = []Block{{Deny: ranges("203.0.113.0/24", "2001:db8:a::/48")}, {Proxy: ranges("0.0.0.0/0", "::/0")}}
				w.apply(*p)
				c.say("denied")
				c.hear(prohibited)
				p.Blocks = proxied
				w.apply(p.Closed())
				c.say("refused")
				c.hear("ECONNREFUSED")
				w.leaked()
				w.apply(*p)
				c.say("proxied")
				f.hear("proxied") // and nothing before
				f.say("answer")
				c.hear("answer")
			}
			p.Blocks = []Block{{Direct: ranges("203.0.113.0/24", "2001:db8:a::/48")}}
			w.apply(*p)
			closed(f)
			c.say("direct")
			c.hear("server direct")
			p.Blocks = proxied
			w.apply(*p)
			c.say("proxied")
			w.expectText(came, "proxied")
		}
		w.server.run("nft reset counters") // it has seen what was DIRECT
	})
}

// Flows whose source was translated by this host's own rules until now come to
// us with their own, and those that were diverted until now are translated.
func TestTranslatedFlows(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := w.start(worldPlan())
	came := w.gather(&p, 1)
	w.gateway.run(`nft -f - <<'N'
table inet nat { chain post { type nat hook postrouting priority srcnat; oifname wan0 masquerade; }; }
N`)
	w.server.run("nft 'add rule inet seen pre ip saddr 10.7.1.0/24 counter name other; add rule inet seen pre ip6 saddr 2001:db8:1::/64 counter name other'")
	direct := p
	direct.Blocks = []Block{{Direct: ranges("0.0.0.0/0", "::/0")}}
	proxied := p
	proxied.Blocks = []Block{{Ifs: []string{"wlan0"}, Deny: ranges("0.0.0.0/0")}, {Proxy: ranges("0.0.0.0/0", "::/0")}}
	w.apply(direct)
	for _, to := range udpDestinations[:2] {
		c, kept := w.dialUDP(w.client, to), w.dialUDP(w.client, to)
		for range 2 {
			c.say("direct")
			c.hear("server direct")
			w.apply(proxied)
			c.say("proxied")
			a := w.expectText(came, "proxied")
			if a.d.Src != c.addr() {
				t.Errorf("%s: it came from %s, not from %s", to, a.d.Src, c.addr())
			}
			w.reply(a.d, "answer")
			c.hear("answer")
			w.apply(direct)
		}
		// Where the kernel has not forgotten it is refused.
		kept.say("direct")
		kept.hear("server direct")
		w.r.mu.Lock()
		err := w.r.apply(&proxied)
		w.r.mu.Unlock()
		if err != nil {
			t.Fatal(err)
		}
		kept.say("proxied")
		kept.hear("ECONNREFUSED")
		w.apply(direct)
		c.say("direct")
		c.hear("server direct")
	}
	if len(came) > 0 {
		t.Errorf("%q came too", (<-came).text())
	}
	if err := w.r.Close(false); err != nil {
		t.Fatal(err)
	}
	if out := w.server.run("nft list counter inet seen other"); !strings.Contains(out, "packets 0 ") {
		t.Errorf("packets came with the client's own source: %s", out)
	}
}

// What a client sees of a refusal.
func TestRefuser(t *testing.T) {
	everywhere(t, func(t *testing.T, w *world, p *Plan, from *netns, came <-chan arrival) {
		var r *Refuser
		var err error
		w.gateway.do(func() { r, err = NewRefuser(testMarks) })
		if err != nil {
			t.Fatal(err)
		}
		defer r.Close()
		for _, to := range udpDestinations {
			c, other := w.dialUDP(from, to), w.dialUDP(from, to)
			wants := []string{"ECONNREFUSED", "EHOSTUNREACH", "ENETUNREACH", "EHOSTUNREACH"}
			if c.addr().Addr().Is6() {
				wants[Prohibited] = "EACCES"
			}
			for _, why := range []Refusal{PortUnreachable, Prohibited, HostUnreachable, NetUnreachable} {
				if why == HostUnreachable {
					c.set(unix.IP_RECVERR, unix.IPV6_RECVERR) // these two are not told else
				}
				want := wants[why]
				for _, size := range []int{0, 5, 129, 3000} {
					c.say(strings.Repeat("x", size))
					if err := r.Refuse(w.next(came).d, why); err != nil {
						t.Fatal(err)
					}
					c.hear(want)
				}
			}
			c.say("too long")
			if err := r.TooBig(w.next(came).d, 1300); err != nil {
				t.Fatal(err)
			}
			if c.addr().Addr().Is6() && mtu(t, c) == 1300 {
				// IPv6 changes the path and does not tell the socket (RFC 8201).
			} else {
				c.hear("EMSGSIZE")
			}
			if got := mtu(t, c); got != 1300 {
				t.Errorf("%s: the path has an MTU of %d", to, got)
			}
			other.say("still")
			w.expectText(came, "still")
		}
		if err := r.Refuse(flow.Datagram{Src: netip.MustParseAddrPort("192.0.2.1:1"), Dst: netip.MustParseAddrPort("[2001:db8::1]:1")}, 0); !errors.Is(err, unix.EAFNOSUPPORT) {
			t.Errorf("of two families: %v", err)
		}
		r.Close()
		if err := r.Refuse(flow.Datagram{Src: netip.MustParseAddrPort("192.0.2.1:1"), Dst: netip.MustParseAddrPort("192.0.2.2:1")}, 0); !errors.Is(err, net.ErrClosed) {
			t.Errorf("after Close: %v", err)
		}
	})
}

func mtu(t *testing.T, c *udpClient) (n int) {
	t.Helper()
	level, name := unix.SOL_IP, unix.IP_MTU
	if c.addr().Addr().Is6() {
		level, name = unix.SOL_IPV6, unix.IPV6_MTU
	}
	raw, err := c.SyscallConn()
	if err == nil {
		raw.Control(func(fd uintptr) { n, err = unix.GetsockoptInt(int(fd), level, name) })
	}
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// Nobody there: refused, within a moment. TestDeadListener has the rest.
func TestListenerGone(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := w.start(worldPlan())
	came := w.gather(&p, 2)
	for _, to := range udpDestinations {
		c := w.dialUDP(w.client, to)
		c.say("one")
		w.expectText(came, "one")
	}
	closed(w.udp)
	for _, to := range udpDestinations {
		c := w.dialUDP(w.client, to)
		began := time.Now()
		c.say("two")
		c.hear("ECONNREFUSED")
		if took := time.Since(began); took > 200*time.Millisecond {
			t.Errorf("%s: it took %v", to, took)
		}
	}
	w.leaked()
}

// Without a port for datagrams they are refused, and all else is as it was.
func TestNoPortForDatagrams(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := worldPlan()
	p.Local = true
	p = w.start(p)
	p.Ports.UDP = 0
	w.apply(p)
	for _, from := range []*netns{w.client, w.gateway} {
		w.expect(from,
			asked{"udp 203.0.113.5:7000", "ECONNREFUSED"}, asked{"udp [2001:db8:a::5]:7000", "ECONNREFUSED"},
			asked{"udp 198.18.3.4:7000", "ECONNREFUSED"}, asked{"udp [fd74:7072:6f78::5]:7000", "ECONNREFUSED"},
			asked{"udp 198.51.100.5:7000", "server hello"})
	}
	w.expect(w.client, asked{"tcp 203.0.113.5:80", "proxy 203.0.113.5:80 lan"}, asked{"udp 203.0.113.5:53", "dns 203.0.113.5:53 lan hello"})
	w.expect(w.gateway, asked{"tcp 203.0.113.5:80", "proxy 203.0.113.5:80 lo"}, asked{"udp 203.0.113.5:53", "dns 203.0.113.5:53 lo hello"})
	w.leaked()
}

// All that a client's socket sends comes to one shard, and the shards share the
// clients.
func TestShards(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := w.start(worldPlan())
	came := w.gather(&p, 2)
	for _, dst := range [][]string{{"203.0.113.5:7000", "203.0.113.77:443", "198.18.3.4:7"}, {"[2001:db8:a::5]:7000", "[2001:db8:a::77]:443", "[fd74:7072:6f78::5]:7"}} {
		clients := map[int]int{} // of each shard
		for range 24 {
			var c net.PacketConn
			var err error
			w.client.do(func() { c, err = net.ListenPacket("udp", ":0") })
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			var shards []int
			for _, to := range dst {
				if _, err := c.WriteTo([]byte(to), net.UDPAddrFromAddrPort(netip.MustParseAddrPort(to))); err != nil {
					t.Fatal(err)
				}
				a := w.expectText(came, to)
				if a.d.Dst.String() != to {
					t.Errorf("%s came for %s", to, a.d.Dst)
				}
				shards = append(shards, a.shard)
			}
			if len(slices.Compact(shards)) != 1 {
				t.Errorf("what one socket sent came to more than one shard: %v", shards)
			}
			clients[shards[0]]++
		}
		if len(clients) != 2 {
			t.Errorf("the shards have %v clients", clients)
		}
	}
}

// A service of this host on all addresses has its port to itself; the flow goes
// on by the listener.
func TestPortOfService(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := w.start(worldPlan())
	came := w.gather(&p, 1)
	var service net.PacketConn
	var err error
	w.gateway.do(func() { service, err = net.ListenPacket("udp", ":7000") })
	if err != nil {
		t.Fatal(err)
	}
	defer service.Close()
	c := w.dialUDP(w.client, udpDestinations[0])
	c.say("one")
	a := w.expectText(came, "one")
	w.gateway.do(func() { _, err = testMarks.ConnectUDP(a.d.Src, a.d.Dst) })
	if !errors.Is(err, unix.EADDRINUSE) {
		t.Fatalf("the port is taken, and the error is %v", err)
	}
	w.reply(a.d, "answer")
	c.hear("answer")
	c.say("two")
	w.expectText(came, "two")
	w.gateway.do(func() { _, err = testMarks.ConnectUDP(a.d.Src, netip.MustParseAddrPort(udpDestinations[1])) })
	if !errors.Is(err, unix.EAFNOSUPPORT) {
		t.Errorf("a flow of two families: %v", err)
	}
}

// TryReadBatch returns at once, and allocates nothing, whether there is
// something or not.
func TestTryReadBatch(t *testing.T) { // alone: allocations are counted
	w := newWorld(t)
	p := worldPlan()
	p.Local = true
	p = w.start(p)
	w.unlisten()
	var err error
	w.gateway.do(func() { w.udp, err = ListenUDP(testMarks, 1) })
	if err != nil {
		t.Fatal(err)
	}
	p.Ports = Ports{UDP: w.udp.Port()}
	w.apply(p)
	ds := make([]flow.Datagram, 8)
	for i := range ds {
		ds[i].Data = make([]byte, 2048)
	}
	text := []byte("one")
	for i, s := range w.udp.Shards()[0] {
		c := w.dialUDP(w.gateway, udpDestinations[i])
		fd := -1
		if err := s.Control(func(n int) error { fd = n; return nil }); err != nil {
			t.Fatal(err)
		}
		if size, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF); err != nil || size != 2*receiveBuffer {
			t.Errorf("the receive buffer has %d bytes, %v", size, err)
		}
		raw, err := c.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		var failed error
		raw.Control(func(from uintptr) {
			allocs := testing.AllocsPerRun(50, func() {
				if n, err := s.TryReadBatch(ds); n != 0 || err != nil {
					failed = fmt.Errorf("of nothing: %d, %v", n, err)
				}
				for range 2 {
					if _, err := unix.Write(int(from), text); err != nil {
						failed = err
					}
				}
				for got := 0; got < 2 && failed == nil; {
					n, err := s.TryReadBatch(ds)
					if err != nil {
						failed = err
					}
					got += n
				}
			})
			if allocs != 0 {
				t.Errorf("%v allocations", allocs)
			}
		})
		if failed != nil {
			t.Error(failed)
		}
		if d := ds[0]; string(d.Data) != "one" || d.Dst.String() != udpDestinations[i] {
			t.Errorf("%q came for %s", d.Data, d.Dst)
		}
		s.Close()
		_, err1 := s.TryReadBatch(ds)
		_, err2 := s.ReadBatch(ds)
		_, err3 := s.WriteBatch([]flow.Datagram{{Data: text, Src: netip.MustParseAddrPort(udpDestinations[i]), Dst: c.addr()}})
		err4 := s.Control(func(int) error { return nil })
		for i, err := range []error{err1, err2, err3, err4} {
			if !errors.Is(err, net.ErrClosed) {
				t.Errorf("%d: after Close: %v", i, err)
			}
		}
	}
	w.leaked()
}

// Close ends a wait.
func TestCloseEndsRead(t *testing.T) {
	t.Parallel()
	n := newNetns(t)
	var u *UDPListener
	var err error
	n.do(func() { u, err = ListenUDP(testMarks, 1) })
	if err != nil {
		t.Fatal(err)
	}
	s := u.Shards()[0][0].(*packetConn)
	ended := make(chan error)
	go func() {
		_, err := s.ReadBatch([]flow.Datagram{{Data: make([]byte, 1)}})
		ended <- err
	}()
	for { // until it waits
		s.recv.mu.Lock()
		waits := s.recv.poller != nil
		s.recv.mu.Unlock()
		if waits {
			break
		}
		time.Sleep(time.Millisecond)
	}
	u.Close()
	if err := <-ended; !errors.Is(err, net.ErrClosed) {
		t.Errorf("ReadBatch: %v", err)
	}
}
