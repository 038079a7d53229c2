package redirect

import (
	"errors"
	"net"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tproxyd/tproxyd/pkg/flow"
	"golang.org/x/sys/unix"
)

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

// All checksums of an error add up, and what is inside is the datagram's
// beginning.
func TestPutError(t *testing.T) {
	sum := func(parts ...[]byte) uint16 {
		s := uint64(0)
		for _, p := range parts {
			s = add16(s, p)
		}
		return fold(s)
	}
	for _, ends := range [][2]string{{"192.0.2.1:40000", "198.51.100.2:443"}, {"[2001:db8::1]:40000", "[2001:db8:ffff::2]:443"}} {
		client, asked := netip.MustParseAddrPort(ends[0]), netip.MustParseAddrPort(ends[1])
		for size := range 200 {
			d := flow.Datagram{Src: client, Dst: asked, Data: make([]byte, size)}
			for i := range d.Data {
				d.Data[i] = byte(0xff - i*7)
			}
			var b [maxError]byte
			kind := [4]byte{3, 4}
			n := putError(&b, client.Addr(), asked.Addr(), &d, kind, 1300)
			ip, pseudo := header4, []byte(nil)
			if asked.Addr().Is6() {
				ip, pseudo = header6, append(append([]byte(nil), b[8:header6]...), 0, 0, 0, byte(n-header6), 0, 0, 0, unix.IPPROTO_ICMPV6)
			}
			if got := sum(pseudo, b[ip:n]); got != 0xffff {
				t.Errorf("%s, %d bytes: the sum is %#x", asked, size, got)
			}
			inner := b[ip+headerICMP : n]
			if ip == header4 {
				if got := sum(inner[:ip]); got != 0xffff {
					t.Errorf("%s, %d bytes: the sum of the header inside is %#x", asked, size, got)
				}
			}
			if want := ip + headerUDP + min(size, quoted); len(inner) != want || !slices.Equal(inner[ip+headerUDP:], d.Data[:want-ip-headerUDP]) {
				t.Errorf("%s, %d bytes: %d are inside, not %d, or others", asked, size, len(inner), want)
			}
			var whole [maxHeader]byte
			if k := putHeader(&whole, client.Addr(), asked.Addr(), client.Port(), asked.Port(), d.Data); !slices.Equal(whole[ip:k], inner[ip:k]) {
				t.Errorf("%s, %d bytes: the header is % x, not % x", asked, size, inner[ip:k], whole[ip:k])
			}
		}
	}
}

// Errors have a rate.
func TestErrorRate(t *testing.T) {
	r, now := &Refuser{}, time.Now()
	may := func() (n int) {
		for r.may(now) {
			n++
		}
		return n
	}
	if n := may(); n != errorRate {
		t.Errorf("%d at once", n)
	}
	for _, d := range []time.Duration{time.Second / errorRate, 5 * time.Second / errorRate, time.Second, time.Hour} {
		now = now.Add(d)
		if n, want := may(), min(int(d*errorRate/time.Second), errorRate); n != want {
			t.Errorf("after %v: %d, not %d", d, n, want)
		}
	}
}
