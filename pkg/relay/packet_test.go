package relay

import (
	"errors"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestPacket(t *testing.T) {
	for _, c := range []struct{ local, far string }{
		{"127.0.0.1", "127.0.0.1:0"},
		{"127.0.0.2", "127.0.0.1:0"},
		{"::ffff:127.0.0.1", "127.0.0.1:0"},
		{"0.0.0.0", "127.0.0.1:0"},
		{"::1", "[::1]:0"},
		{"::", "[::1]:0"},
	} {
		local := netip.MustParseAddr(c.local)
		far := newRelayServer(t, c.far)
		asked := 0
		p, err := NewPacket(local, func(fd int) error {
			asked++
			return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_BROADCAST, 1)
		})
		if err != nil {
			t.Fatal(err)
		}
		at := p.LocalAddrPort()
		if at.Addr() != local.Unmap() || at.Port() == 0 || asked != 1 {
			t.Errorf("%s: bound to %s, %d calls", c.local, at, asked)
		}
		if n := p.mtu(); n != 0 {
			t.Errorf("%s: MTU %d before it is connected", c.local, n)
		}
		if err := p.Connect(far.addr); err != nil {
			t.Fatal(err)
		}
		if p.v6 != far.addr.Addr().Is6() || p.mtu() < 1500 || p.LocalAddrPort().Port() != at.Port() {
			t.Errorf("%s: connected, IPv6 %v, MTU %d, bound to %s", c.local, p.v6, p.mtu(), p.LocalAddrPort())
		}
		first, second := p.Close(), p.Close()
		if first != nil || second != nil || p.LocalAddrPort().IsValid() || p.mtu() != 0 {
			t.Errorf("%s: not closed", c.local)
		}
		if err := p.Connect(far.addr); !errors.Is(err, unix.EBADF) {
			t.Errorf("%s: connected once closed: %v", c.local, err)
		}
	}
}

func TestPacketErrors(t *testing.T) {
	before := openFDs(t)
	if _, err := NewPacket(netip.MustParseAddr("192.0.2.1"), nil); !errors.Is(err, unix.EADDRNOTAVAIL) {
		t.Errorf("an address of somebody else: %v", err)
	}
	if _, err := NewPacket(netip.MustParseAddr("127.0.0.1"), func(int) error { return unix.EPERM }); err != unix.EPERM {
		t.Errorf("a mark that may not be set: %v", err)
	}
	p, err := NewPacket(netip.MustParseAddr("127.0.0.1"), nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Connect(netip.MustParseAddrPort("[::1]:1")); !errors.Is(err, unix.EAFNOSUPPORT) {
		t.Errorf("the other family: %v", err)
	}
	p.Close()
	if n := openFDs(t); n > before {
		t.Errorf("%d descriptors, %d before", n, before)
	}
}

// A pair keeps the borders of datagrams, and each end sees the other's end.
func TestPacketPair(t *testing.T) {
	before := openFDs(t)
	p, f, err := PacketPair()
	if err != nil {
		t.Fatal(err)
	}
	var b burst
	var in intake
	b.init()
	in.init()
	super := 0
	if n, e := b.send(int(p.fd.Load()), []byte("header"), [][]byte{[]byte("one"), []byte("two")}, &super); n != 2 || e != 0 {
		t.Fatal(n, e)
	}
	buf := make([]byte, 100)
	for _, want := range []string{"headerone", "headertwo"} {
		if n, err := f.Read(buf); string(buf[:n]) != want || err != nil {
			t.Errorf("%q, %v", buf[:n], err)
		}
	}
	long := make([]byte, 65_000)
	for _, d := range [][]byte{[]byte("one"), long} {
		if _, err := f.Write(d); err != nil {
			t.Fatal(err)
		}
	}
	n, e := in.receive(int(p.fd.Load()))
	if n != 2 || e != 0 {
		t.Fatal(n, e)
	}
	for i, want := range []int{3, len(long)} {
		if d, segment := in.message(i); len(d) != want || segment < want {
			t.Errorf("%d bytes in segments of %d", len(d), segment)
		}
	}
	if p.mtu() != 0 || p.LocalAddrPort().IsValid() {
		t.Errorf("MTU %d, address %s", p.mtu(), p.LocalAddrPort())
	}
	f.SetReadDeadline(time.Now().Add(time.Millisecond))
	if _, err := f.Read(buf); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error(err)
	}
	f.SetReadDeadline(time.Time{})
	p.Close()
	if n, err := f.Read(buf); n != 0 || err == nil {
		t.Errorf("%d bytes of a pair that ended", n)
	}
	if _, err := f.Write(buf); !errors.Is(err, unix.EPIPE) {
		t.Error(err)
	}
	f.Close()
	if n := openFDs(t); n > before { // fewer, if one of a test before this was still being closed
		t.Errorf("%d descriptors, %d before", n, before)
	}
}

// Who sent a message is told by its address and port, in both families.
func TestSentBy(t *testing.T) {
	var in intake
	in.init()
	for _, at := range []string{"127.0.0.1:0", "[::1]:0"} {
		_, p, far := newBurst(t, at)
		from := p.LocalAddrPort()
		if _, e := unix.Write(int(p.fd.Load()), []byte("hello")); e != nil {
			t.Fatal(e)
		}
		raw, err := far.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		raw.Read(func(fd uintptr) bool {
			n, e := in.receive(int(fd))
			if e == unix.EAGAIN {
				return false
			}
			if n != 1 || e != 0 {
				t.Errorf("%d, %v", n, e)
			}
			return true
		})
		if !in.sentBy(0, from) {
			t.Errorf("not from %s", from)
		}
		for _, other := range []string{"127.0.0.2", "127.0.0.1", "::1", "::2"} {
			if a := netip.AddrPortFrom(netip.MustParseAddr(other), from.Port()); a != from && in.sentBy(0, a) {
				t.Errorf("from %s, too", a)
			}
		}
		if in.sentBy(0, netip.AddrPortFrom(from.Addr(), from.Port()+1)) || in.sentBy(0, netip.AddrPort{}) {
			t.Error("from anybody")
		}
	}
}
