package relay

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// flowSockets opens sockets of flows whose destinations are addresses of this
// host.
type flowSockets struct {
	asked atomic.Int32
	fail  error
	set   func(fd int) error // to each of them; nil: nothing
	bound func()             // called before one is connected; nil: nothing
}

func (s *flowSockets) open(client, dst netip.AddrPort) (fd int, err error) {
	s.asked.Add(1)
	if s.fail != nil {
		return -1, s.fail
	}
	family := unix.AF_INET
	if dst.Addr().Is6() {
		family = unix.AF_INET6
	}
	if fd, err = unix.Socket(family, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0); err != nil {
		return -1, err
	}
	err = unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	if err == nil && s.set != nil {
		err = s.set(fd)
	}
	if err == nil {
		if e := rawAddr(unix.SYS_BIND, fd, dst); e != 0 {
			err = e
		} else if s.bound != nil {
			s.bound()
		}
		if e := rawAddr(unix.SYS_CONNECT, fd, client); err == nil && e != 0 {
			err = e
		}
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// udpClient is a socket of a client. What it sends comes to the injector until
// the flow has a socket of its own, as the kernel does it.
type udpClient struct {
	*net.UDPConn
	r    *udpRig
	addr string
}

func (r *udpRig) client(at string) *udpClient {
	r.t.Helper()
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(at)))
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { c.Close() })
	c.SetReadBuffer(4 << 20)
	r.fds++
	return &udpClient{c, r, c.LocalAddr().String()}
}

// asks sends to dst and wants it at the server.
func (c *udpClient) asks(dst, text string) (outlet netip.AddrPort) {
	c.r.t.Helper()
	c.send(dst, text)
	return c.r.server.expect(dst, text)
}

func (c *udpClient) send(dst, text string) {
	c.r.t.Helper()
	c.r.settle()
	if !c.own(dst) {
		c.r.send(c.addr, dst, text)
	} else if _, err := c.WriteToUDPAddrPort([]byte(text), netip.MustParseAddrPort(dst)); err != nil {
		c.r.t.Fatal(err)
	}
}

// own tells whether the flow has a socket of its own.
func (c *udpClient) own(dst string) (own bool) {
	k := flowKey{netip.MustParseAddrPort(c.addr), netip.MustParseAddrPort(dst)}
	c.r.inside(func(sh *shard) { own = own || sh.flows[k] != nil && sh.flows[k].fd >= 0 })
	return own
}

// hears wants a datagram, by a socket of the flow or by the raw sender.
func (c *udpClient) hears(from, text string) {
	c.r.t.Helper()
	b := make([]byte, 1<<16)
	wants := fmt.Sprintf("%s > %s: %s", from, c.addr, text)
	for end := time.Now().Add(10 * time.Second); ; {
		got := ""
		c.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
		n, addr, err := c.ReadFromUDPAddrPort(b)
		if err == nil {
			got = fmt.Sprintf("%s > %s: %s", addr, c.addr, b[:n])
		} else if time.Now().After(end) {
			c.r.t.Fatal(err)
		} else {
			select {
			case got = <-c.r.src.replies:
			default:
				continue
			}
		}
		if got != wants {
			c.r.t.Fatalf("got %.60q, %d bytes, want %.60q, %d bytes", got, len(got), wants, len(wants))
		}
		return
	}
}

// warm brings a flow to have a socket of its own, and returns its outlet.
func (c *udpClient) warm(dst string) (outlet netip.AddrPort) {
	c.r.t.Helper()
	for range ownSocketAfter {
		outlet = c.asks(dst, "question")
	}
	if c.r.settle(); !c.own(dst) {
		c.r.t.Fatalf("%s has no socket of its own", dst)
	}
	return outlet
}

// families are of a client and of destinations that this host itself has.
func families(t *testing.T, f func(t *testing.T, at, dst string)) {
	for at, dst := range map[string]string{"127.0.0.1:0": "127.77.0.1", "[::1]:0": "[::1]"} {
		t.Run(at, func(t *testing.T) {
			free := newRelayServer(t, at)
			free.Close()
			f(t, at, fmt.Sprintf("%s:%d", dst, free.addr.Port()))
		})
	}
}

// The fourth datagram of a flow, in whichever direction, opens a socket for it;
// the rest goes by that.
func TestUDPOwnSocket(t *testing.T) {
	families(t, func(t *testing.T, at, dst string) {
		var s flowSockets
		r := newUDPRig(t, UDPOptions{FlowSocket: s.open})
		c := r.client(at)
		for i := range ownSocketAfter - 1 {
			o := c.asks(dst, "question")
			if i == 0 {
				r.server.answer(o, header(netip.MustParseAddrPort(dst)), "answer")
				r.reply("%s > %s: answer", dst, c.addr)
			}
			if c.own(dst) != (i == ownSocketAfter-2) {
				t.Fatalf("%d datagrams, own socket %v", i+2, c.own(dst))
			}
		}
		for range 3 {
			o := c.asks(dst, "more")
			r.server.answer(o, header(netip.MustParseAddrPort(dst)), "answer")
			c.hears(dst, "answer")
		}
		none(t, r.src.replies)
		if s := r.Stats(); s.Sockets != 2 || s.Flows != 1 {
			t.Errorf("%+v", s)
		}
		// What still comes by the source is of the same flow.
		r.send(c.addr, dst, "late")
		r.server.expect(dst, "late")
		// It lives as long as the flow does.
		r.tick(1001)
		if s := r.Stats(); s.Sockets != 0 || s.Flows != 0 {
			t.Errorf("%+v", s)
		}
		c.warm(dst)
		if s.asked.Load() != 2 {
			t.Errorf("asked for %d sockets", s.asked.Load())
		}
	})
}

// A flow that cannot have one goes on without, and nobody makes room for it.
func TestUDPNoOwnSocket(t *testing.T) {
	s := flowSockets{fail: errors.New("no")}
	r := newUDPRig(t, UDPOptions{FlowSocket: s.open})
	for range 10 {
		r.exchange(client1, web)
	}
	if n := s.asked.Load(); n != 1 {
		t.Errorf("asked %d times", n)
	}
	var full flowSockets
	r = newUDPRig(t, UDPOptions{FlowSocket: full.open, MaxSockets: 1})
	for range 10 {
		r.exchange(client1, web)
	}
	if x := r.Stats(); full.asked.Load() != 0 || x.Evicted != 0 || x.Sockets != 1 {
		t.Errorf("asked %d times; %+v", full.asked.Load(), x)
	}
	r.src.full = true
	r.server.answer(r.carries(client1, web, "hello"), header(netip.MustParseAddrPort(web)), "answer")
	r.dropped(DropFull, 1)
}

// What came to the socket of a flow before it was connected, from another
// client, is of that one's flow. If that is refused it is not, since the
// interface could not be known.
func TestUDPOwnSocketOfOther(t *testing.T) {
	families(t, func(t *testing.T, at, dst string) {
		for _, refused := range []bool{false, true} {
			var s flowSockets
			r := newUDPRig(t, UDPOptions{FlowSocket: s.open})
			c, other := r.client(at), r.client(at)
			r.decides(func(v *Verdict, client, _ netip.AddrPort) {
				if refused && client.String() == other.addr {
					v.Way = nil
				}
			})
			s.bound = func() { other.WriteToUDPAddrPort([]byte("mine"), netip.MustParseAddrPort(dst)) }
			o := c.warm(dst)
			if refused {
				r.dropped(DropStranger, 1)
			} else if p := r.server.expect(dst, "mine"); p == o {
				t.Error("two clients share an outlet")
			}
			c.asks(dst, "more")
			r.check()
			if n := r.Stats().Sessions; n != 2 && !refused || n != 1 && refused {
				t.Errorf("%d sessions", n)
			}
			r.close()
		}
	})
}

// A client whose socket is gone ends its flow.
func TestUDPClientGone(t *testing.T) {
	families(t, func(t *testing.T, at, dst string) {
		var s flowSockets
		r := newUDPRig(t, UDPOptions{FlowSocket: s.open})
		c := r.client(at)
		o := c.warm(dst)
		r.exchange(c.addr, netip.AddrPortFrom(netip.MustParseAddrPort(dst).Addr(), 9).String())
		c.Close()
		r.server.answer(o, header(netip.MustParseAddrPort(dst)), "one")
		eventually(t, "the flow ends", func() bool { return r.Stats().Flows == 1 })
		r.check()
		if s := r.Stats(); s.Sessions != 1 || s.Sockets != 1 || s.Evicted != 0 {
			t.Errorf("%+v", s)
		}
	})
}

// Datagrams of every length that can be carried are.
func TestUDPLengths(t *testing.T) {
	families(t, func(t *testing.T, at, dst string) {
		var s flowSockets
		r := newUDPRig(t, UDPOptions{FlowSocket: s.open})
		head := header(netip.MustParseAddrPort(dst))
		most := 65507 // over IPv4, which the outlet is
		c := r.client(at)
		for _, n := range []int{0, 0, 0, 1, 1200, 1473, 9000, 60_000, most - len(head)} {
			text := strings.Repeat("x", n)
			o := c.asks(dst, text)
			r.server.answer(o, head, text)
			c.hears(dst, text)
		}
		before := r.Stats().Dropped["toolong"]
		c.send(dst, strings.Repeat("x", most-len(head)+1))
		r.dropped(DropTooLong, int(before)+1)
		c.asks(dst, "after it")
	})
}

// What goes directly has the whole room, and an empty datagram is one.
func TestUDPLengthsDirect(t *testing.T) {
	var s flowSockets
	r := newUDPRig(t, UDPOptions{FlowSocket: s.open})
	r.decides(func(v *Verdict, _, _ netip.AddrPort) { v.Header = nil })
	c := r.client("127.0.0.1:0")
	dst := "127.77.0.1:7777"
	for range 3 {
		for _, n := range []int{0, 1, 1472, 65507} {
			text := strings.Repeat("x", n)
			c.send(dst, text)
			b := make([]byte, 1<<16)
			k, o, err := r.server.ReadFromUDPAddrPort(b)
			if err != nil || k != n {
				t.Fatalf("%d bytes of %d, %v", k, n, err)
			}
			r.server.answer(o, nil, text)
			c.hears(dst, text)
		}
	}
	if x := r.Stats(); x.UpDatagrams != 12 || x.DownDatagrams != 12 || x.Up != 3*(1+1472+65507) || x.Down != x.Up {
		t.Errorf("%+v", x)
	}
}

// Many datagrams at once keep their borders and their order, both ways, whether
// the kernel takes them apart or not.
func TestUDPBursts(t *testing.T) {
	families(t, func(t *testing.T, at, dst string) {
		for _, segments := range []bool{true, false} {
			s := flowSockets{set: func(fd int) error {
				if segments {
					return nil
				}
				return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_NO_CHECK, 1)
			}}
			r := newUDPRig(t, UDPOptions{FlowSocket: s.open})
			c := r.client(at)
			o := c.warm(dst)
			to := netip.MustParseAddrPort(dst)
			for round := range 20 {
				var up, down []string
				for i := range 40 {
					up = append(up, strings.Repeat(string(rune('a'+i)), 1000))
					down = append(down, strings.Repeat(string(rune('A'+i)), 1000-round%3*(i%5)))
				}
				sendSegments(t, c.UDPConn, to, up)
				for i, text := range up {
					if _, _, got := r.server.next(); got != text {
						t.Fatalf("up, %d: %.20q", i, got)
					}
				}
				var framed []string
				for _, text := range down {
					framed = append(framed, string(header(to))+text)
				}
				sendSegments(t, r.server.UDPConn, o, framed)
				for _, text := range down {
					c.hears(dst, text)
				}
			}
			if s := r.Stats(); s.Dropped["full"] != 0 || s.DownDatagrams < 800 {
				t.Errorf("%+v", s)
			}
			r.close()
		}
	})
}

// What is more than one turn of the loop takes is served in the next one.
func TestUDPManyWait(t *testing.T) {
	families(t, func(t *testing.T, at, dst string) {
		const many = (turnBatches + 1) * burstSize
		var s flowSockets
		r := newUDPRig(t, UDPOptions{FlowSocket: s.open})
		c := r.client(at)
		o := c.warm(dst)
		done := make(chan struct{})
		r.src.hook(func() {
			for i := range many {
				r.server.answer(o, header(netip.MustParseAddrPort(dst)), fmt.Sprint(i))
				c.WriteToUDPAddrPort([]byte(fmt.Sprint(i)), netip.MustParseAddrPort(dst))
			}
			close(done)
		})
		r.send("[2001:db8::1]:1", "[2001:db8::2]:2", "wakes the loop")
		<-done
		texts := map[string]bool{}
		for range many + 1 {
			_, _, text := r.server.next()
			texts[text] = true
		}
		for i := range many {
			c.hears(dst, fmt.Sprint(i))
			if !texts[fmt.Sprint(i)] {
				t.Errorf("%d did not come to the server", i)
			}
		}
	})
}

// sendSegments sends datagrams with as few calls as their lengths let it.
func sendSegments(t *testing.T, c *net.UDPConn, to netip.AddrPort, texts []string) {
	t.Helper()
	for len(texts) > 0 {
		n := 1
		for n < len(texts) && len(texts[n]) == len(texts[0]) {
			n++
		}
		oob := make([]byte, unix.CmsgSpace(2))
		b := burst{}
		b.init()
		copy(oob, b.control[:])
		oob[unix.CmsgLen(0)], oob[unix.CmsgLen(0)+1] = byte(len(texts[0])), byte(len(texts[0])>>8)
		if _, _, err := c.WriteMsgUDPAddrPort([]byte(strings.Join(texts[:n], "")), oob, to); err != nil {
			t.Fatal(err)
		}
		texts = texts[n:]
	}
}
