package relay

import (
	"fmt"
	"net/netip"
	"runtime"
	"strings"
	"testing"

	"github.com/tproxyd/tproxyd/pkg/flow"
	"golang.org/x/sys/unix"
)

// A flood of client sockets and destinations costs what the limits allow, and
// each datagram of it is accounted for.
func TestUDPFlood(t *testing.T) {
	a, b := newInjector(t), newInjector(t)
	r := newUDPRig(t, UDPOptions{MaxSessions: 200, MaxFlows: 500, MaxSockets: 120, MaxQueued: 1 << 16, Sources: [][]flow.PacketSource{{a}, {b}}})
	r.decides(func(v *Verdict, _, dst netip.AddrPort) {
		if dst.Port() == 9 {
			v.Way, v.Refusal = nil, RefuseSilently
		}
	})
	const n = 20_000
	for i := range n {
		client := netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 0, byte(i % 7), 1}), uint16(1+i%3000))
		dst := netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, byte(i % 11), byte(i % 241)}), uint16(8+i%3))
		src := a
		if client.Port()%2 == 1 {
			src = b
		}
		src.put(flow.Datagram{Data: []byte(client.String()), Src: client, Dst: dst})
	}
	eventually(t, "all are served", func() bool {
		s := r.Stats()
		return s.UpDatagrams+s.Dropped["limit"] == n
	})
	r.check()
	s := r.Stats()
	if s.Sessions > 200 || s.Flows > 500 || s.Sockets > 120 || r.queued.Load() > 1<<16 || s.Sessions < 40 || s.Refused == 0 || s.Evicted == 0 {
		t.Errorf("%+v", s)
	}
	r.opensBy(nil)
	a.put(datagram(client1, web, "after the flood"))
	for {
		if _, to, text := r.server.next(); text == "after the flood" {
			if to != web {
				t.Error(to)
			}
			break
		}
	}
	r.tick(1001)
	r.check()
	if s := r.Stats(); s.Sessions != 0 || r.endings.Load() != int64(s.Opened) {
		t.Errorf("%d ended; %+v", r.endings.Load(), s)
	}
}

// Rubbish at the socket of an association, from anybody but its server, is
// nobody's; from the server it is dropped.
func TestUDPRubbish(t *testing.T) {
	r := newUDPRig(t, UDPOptions{})
	o := r.exchange(client1, web)
	for _, at := range []string{"127.0.0.1:0", "127.0.0.2:0"} {
		other := newRelayServer(t, at)
		r.fds++
		for i := range 1000 {
			// Where nobody listens for it the kernel says so.
			other.WriteToUDPAddrPort(append(header(netip.MustParseAddrPort(web)), fmt.Sprint(i)...), o)
		}
	}
	for range 50 {
		for _, text := range []string{"", "a", "n", strings.Repeat("x", 1400), strings.Repeat("\x00", 60_000)} {
			r.server.answer(o, nil, text)
		}
		r.settle()
	}
	r.dropped(DropMalformed, 250)
	r.server.answer(o, header(netip.MustParseAddrPort(web)), "answer")
	r.reply("%s > %s: answer", web, client1)
	if s := r.Stats(); s.DownDatagrams != 2 || s.Dropped["stranger"] != 0 || s.Flows != 1 {
		t.Errorf("%+v", s)
	}
}

// echoFlow is a flow with a socket of its own, and descriptors of both ends.
func echoFlow(t testing.TB) (client, server int) {
	t.Helper()
	var s flowSockets
	r := newUDPRig(t, UDPOptions{FlowSocket: s.open})
	c := r.client("127.0.0.1:0")
	dst := "127.77.0.1:7777"
	o := c.warm(dst)
	at := netip.MustParseAddrPort(c.addr)
	c.Close()
	server = blocking(t, r.server.addr, o, func() { r.server.Close() })
	client = blocking(t, at, netip.MustParseAddrPort(dst), func() {})
	return client, server
}

// blocking returns a connected socket in place of one that is closed.
func blocking(t testing.TB, local, remote netip.AddrPort, closed func()) int {
	t.Helper()
	closed()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, 4<<20)
	for _, e := range []unix.Errno{rawAddr(unix.SYS_BIND, fd, local), rawAddr(unix.SYS_CONNECT, fd, remote)} {
		if e != 0 {
			t.Fatal(e)
		}
	}
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 10}); err != nil {
		t.Fatal(err)
	}
	return fd
}

// bounce has n datagrams go to the server and back.
func bounce(t testing.TB, client, server, n int, data, b []byte) {
	for range n {
		moves(t, unix.Write, client, data)
		k := moves(t, unix.Read, server, b)
		moves(t, unix.Write, server, b[:k])
		if k = moves(t, unix.Read, client, b); k != len(data) {
			t.Fatalf("%d bytes came back", k)
		}
	}
}

// moves calls unix.Read or unix.Write until no signal comes between.
func moves(t testing.TB, call func(int, []byte) (int, error), fd int, b []byte) int {
	for {
		switch n, err := call(fd, b); err {
		case nil:
			return n
		case unix.EINTR:
		default:
			t.Fatal(err)
		}
	}
}

// A datagram of a flow that lasts allocates nothing, there and back.
func TestUDPAllocations(t *testing.T) {
	client, server := echoFlow(t)
	data, b := make([]byte, 1200), make([]byte, 2000)
	bounce(t, client, server, 100, data, b)
	const n = 2000
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	bounce(t, client, server, n, data, b)
	runtime.ReadMemStats(&after)
	if k := after.Mallocs - before.Mallocs; k > n/50 && !raceDetector {
		t.Errorf("%d allocations for %d datagrams", k, n)
	}
}

// BenchmarkUDP is a datagram to the server and back, one after another, and
// many under way at once.
func BenchmarkUDP(b *testing.B) {
	for _, size := range []int{64, 1200} {
		b.Run(fmt.Sprintf("bounce/%d", size), func(b *testing.B) {
			client, server := echoFlow(b)
			b.ReportAllocs()
			b.ResetTimer()
			bounce(b, client, server, b.N, make([]byte, size), make([]byte, 2000))
		})
		b.Run(fmt.Sprintf("bulk/%d", size), func(b *testing.B) {
			client, server := echoFlow(b)
			var out burst
			out.init()
			var data [][]byte
			for range 50 {
				data = append(data, make([]byte, size))
			}
			room := make([]byte, 2000)
			b.ReportAllocs()
			b.ResetTimer()
			for n := 0; n < b.N; n += len(data) {
				super := maxSuper
				if k, e := out.send(client, nil, data, &super); k != len(data) || e != 0 {
					b.Fatal(k, e)
				}
				for range data {
					moves(b, unix.Read, server, room)
				}
			}
		})
	}
}
