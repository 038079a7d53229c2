package redirect

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"
	"unsafe"

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
	t testing.TB
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

// closed closes a socket for good: a child of another test that is just being
// made has it for a moment longer, but disconnected it stands for nothing.
func (c *udpClient) closed() {
	c.t.Helper()
	raw, err := c.SyscallConn()
	if err == nil {
		var nobody unix.RawSockaddrAny // AF_UNSPEC
		raw.Control(func(fd uintptr) {
			_, _, errno := unix.RawSyscall(unix.SYS_CONNECT, fd, uintptr(unsafe.Pointer(&nobody)), unsafe.Sizeof(nobody))
			if errno != 0 {
				err = errno
			}
		})
	}
	if err != nil {
		c.t.Fatal(err)
	}
	c.Close()
}

// heardIn returns the text that comes, or the error.
func (c *udpClient) heardIn(wait time.Duration) string {
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
	if got := c.heardIn(wait); got != want {
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
