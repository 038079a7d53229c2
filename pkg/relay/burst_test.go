package relay

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"net"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// newBurst returns a burst and a connected socket for it to send by, and what
// is at the other end.
func newBurst(t testing.TB, at string) (b *burst, p *Packet, far *relayServer) {
	t.Helper()
	far = newRelayServer(t, at)
	o, err := outletTo(far.addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { o.Socket.Close() })
	b = &burst{}
	b.init()
	return b, o.Socket, far
}

// take reads n datagrams.
func (s *relayServer) take(n int) (texts []string) {
	s.t.Helper()
	b := make([]byte, 1<<16)
	s.SetReadDeadline(time.Now().Add(10 * time.Second))
	for range n {
		n, err := s.Read(b)
		if err != nil {
			s.t.Fatalf("after %d datagrams: %v", len(texts), err)
		}
		texts = append(texts, string(b[:n]))
	}
	return texts
}

// nothing wants no datagram to be left.
func (s *relayServer) nothing() {
	s.t.Helper()
	s.SetReadDeadline(time.Now().Add(time.Millisecond))
	if n, err := s.Read(make([]byte, 1<<16)); err == nil {
		s.t.Fatalf("a datagram of %d bytes is left", n)
	}
}

func TestAlike(t *testing.T) {
	for _, c := range []struct {
		header int
		data   []int
		want   int
	}{
		{0, []int{5}, 1},
		{10, []int{0, 0, 0}, 1},
		{10, []int{5, 5, 5}, 3},
		{10, []int{5, 5, 4, 4}, 3}, // one shorter ends it
		{10, []int{5, 5, 6}, 2},
		{10, []int{5, 5, 0}, 2}, // the kernel would not send the empty one
		{10, []int{4, 5}, 1},
		{0, []int{maxSuper / 2, maxSuper / 2, 1}, 2},
		{1, []int{maxSuper / 2, maxSuper / 2}, 1},
		{0, []int{maxSuper + 1, 1}, 1},
		{0, bytesOf(100, 1), burstSize},
	} {
		var data [][]byte
		for _, n := range c.data {
			data = append(data, make([]byte, n))
		}
		if got := alike(c.header, data); got != c.want {
			t.Errorf("header of %d, %v: %d, want %d", c.header, c.data, got, c.want)
		}
	}
}

func bytesOf(n, each int) (list []int) {
	for range n {
		list = append(list, each)
	}
	return list
}

// Whatever the lengths are, each datagram arrives as itself, behind its header,
// in its place.
func TestBurst(t *testing.T) {
	lengths := map[string]func(i int) int{
		"equal":            func(int) int { return 1200 },
		"empty":            func(int) int { return 0 },
		"one by one":       func(i int) int { return i },
		"runs":             func(i int) int { return 100 + i/5*7%300 },
		"runs with a tail": func(i int) int { return 300 - min(i%6, 1)*10 },
		"empty ones":       func(i int) int { return i % 3 * 50 },
		"large":            func(i int) int { return 30_000 + i%2 },
		"random":           func(int) int { return rand.IntN(4) * 400 },
		"random, some":     func(int) int { return rand.IntN(1500) / 700 * 700 },
	}
	supers := map[string]int{"any": maxSuper, "none": 0, "short ones": 250}
	for _, at := range []string{"127.0.0.1:0", "[::1]:0"} {
		b, p, far := newBurst(t, at)
		for name, length := range lengths {
			for allowed, super := range supers {
				for _, head := range []string{"", "header"} {
					for _, n := range []int{1, 2, 63, 64, 65, 150} {
						if n*length(1) > 1<<20 {
							continue // more than the far end has room for
						}
						var data [][]byte
						for i := range n {
							data = append(data, bytes.Repeat([]byte{byte(i)}, length(i)))
						}
						limit := super
						sent, e := b.send(int(p.fd.Load()), []byte(head), data, &limit)
						if sent != n || e != 0 || limit != super {
							t.Fatalf("%s, %s: sent %d of %d, %v, super %d", name, allowed, sent, n, e, limit)
						}
						for i, got := range far.take(n) {
							if got != head+string(data[i]) {
								t.Fatalf("%s, %s, header %q: %d. of %d is %d bytes, want %d", name, allowed, head, i, n, len(got), len(head)+len(data[i]))
							}
						}
					}
				}
			}
			far.nothing()
		}
	}
}

// Datagrams of one length are one message, and one message when they come in.
func TestBurstSegments(t *testing.T) {
	b, p, far := newBurst(t, "127.0.0.1:0")
	raw, err := far.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var in intake
	in.init()
	for _, c := range []struct {
		data []string
		want string // lengths of the messages received, and of their datagrams
	}{
		{[]string{"one"}, "9/9"},
		{[]string{"one", "two", "end"}, "27/9"},
		{[]string{"one", "two", "."}, "25/9"},
		{[]string{".", "one", "two"}, "7/7 18/9"},
		{[]string{".", "..", "one", "two", ""}, "7/7 8/8 18/9 6/6"},
		{strings.Split(strings.Repeat("xyz ", 66), " ")[:66], "576/9 18/9"},
	} {
		raw.Control(func(fd uintptr) { preparePacket(int(fd)) })
		var data [][]byte
		for _, d := range c.data {
			data = append(data, []byte(d))
		}
		super := maxSuper
		if n, e := b.send(int(p.fd.Load()), []byte("header"), data, &super); n != len(data) || e != 0 {
			t.Fatalf("sent %d, %v", n, e)
		}
		var got []string
		var texts [][]byte
		raw.Control(func(fd uintptr) {
			n, e := in.receive(int(fd))
			if e != 0 {
				t.Fatal(e)
			}
			for i := range n {
				m, segment := in.message(i)
				got = append(got, fmt.Sprintf("%d/%d", len(m), min(len(m), segment)))
				texts = split(texts, m, segment)
			}
			if _, e := in.receive(int(fd)); e != unix.EAGAIN {
				t.Errorf("more is there: %v", e)
			}
		})
		if g := strings.Join(got, " "); g != c.want {
			t.Errorf("%q came as %s, want %s", c.data, g, c.want)
		}
		for i, d := range texts {
			if len(texts) != len(data) || string(d) != "header"+c.data[i] {
				t.Fatalf("%q came as %q", c.data, texts)
			}
		}
	}
}

// Where the kernel does not take messages apart, each datagram goes by itself,
// and it is not asked again.
func TestBurstFallback(t *testing.T) {
	b, p, far := newBurst(t, "127.0.0.1:0")
	fd := int(p.fd.Load())
	if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_NO_CHECK, 1); err != nil {
		t.Fatal(err)
	}
	super := maxSuper
	data := [][]byte{[]byte("one"), []byte("two"), []byte("end"), []byte(".")}
	for _, want := range []int{4, 4} {
		if n, e := b.send(fd, []byte("a"), data, &super); n != len(data) || e != 0 || super >= want {
			t.Fatalf("sent %d, %v; the next try is below %d", n, e, super)
		}
		if got := fmt.Sprint(far.take(4)); got != "[aone atwo aend a.]" {
			t.Fatal(got)
		}
	}
}

// What the kernel does not take is told by its place; the rest can go on.
func TestBurstErrors(t *testing.T) {
	b, p, far := newBurst(t, "127.0.0.1:0")
	fd, super := int(p.fd.Load()), maxSuper
	long := make([]byte, 65507-6+1)
	for place := range 4 {
		data := [][]byte{[]byte("one"), []byte("two"), []byte("three")}
		data = append(data[:place:place], append([][]byte{long}, data[place:]...)...)
		n, e := b.send(fd, []byte("header"), data, &super)
		if n != place || e != unix.EMSGSIZE {
			t.Errorf("%d: sent %d, %v", place, n, e)
		}
		far.take(n)
	}
	if n, e := b.send(fd, []byte("header"), [][]byte{long[1:]}, &super); n != 1 || e != 0 {
		t.Errorf("the longest: %v", e)
	}
	if got := far.take(1); len(got[0]) != 65507 {
		t.Errorf("the longest came as %d bytes", len(got[0]))
	}
	far.nothing()

	// A pair that nobody reads fills up.
	q, f, err := PacketPair()
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	defer q.Close()
	super = 0
	sent := 0
	for {
		n, e := b.send(int(q.fd.Load()), []byte("header"), [][]byte{make([]byte, 1000), make([]byte, 1000), make([]byte, 10)}, &super)
		sent += n
		if e != 0 {
			if e != unix.EAGAIN {
				t.Errorf("a pair that is full: %v", e)
			}
			break
		}
	}
	buf := make([]byte, 2000)
	for i := range sent {
		want := 1006
		if i%3 == 2 {
			want = 16
		}
		if n, err := f.Read(buf); n != want || err != nil {
			t.Fatalf("%d. of %d: %d bytes, %v", i, sent, n, err)
		}
	}
}

// An error that waits in the socket is of an earlier datagram: the one at hand
// has not been sent.
func TestBurstPendingError(t *testing.T) {
	b, p, far := newBurst(t, "127.0.0.1:0")
	fd, super := int(p.fd.Load()), maxSuper
	far.Close()
	one := [][]byte{[]byte("one")}
	if n, e := b.send(fd, nil, one, &super); n != 1 || e != 0 {
		t.Fatal(n, e)
	}
	if n, e := b.send(fd, nil, [][]byte{one[0], one[0]}, &super); n != 0 || e != unix.ECONNREFUSED || super != maxSuper {
		t.Fatal(n, e, super)
	}
	back, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(far.addr))
	if err != nil {
		t.Fatal(err)
	}
	defer back.Close()
	if n, e := b.send(fd, nil, one, &super); n != 1 || e != 0 {
		t.Fatal(n, e)
	}
}
