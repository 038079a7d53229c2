package relay

import (
	"context"
	"encoding/binary"
	"fmt"
	"net/netip"
	"strings"
	"testing"

	"github.com/tproxyd/tproxyd/internal/netns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// narrow has the server of a rig, at an address of this host, and the outlets
// that lead there, in a network of their own whose packets have 1,500 bytes.
func (r *udpRig) narrow(at string) *netns.Namespace {
	r.t.Helper()
	n, err := netns.New()
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { r.close(); n.Close() })
	if err := n.Do(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		if err := netlink.LinkSetMTU(lo, 1500); err != nil {
			return err
		}
		if err := netlink.LinkSetUp(lo); err != nil {
			return err
		}
		r.server = newRelayServer(r.t, at)
		return nil
	}); err != nil {
		r.t.Fatal(err)
	}
	r.decides(func(v *Verdict, _, _ netip.AddrPort) {
		v.Way = &Way{Key: "narrow", Open: func(context.Context, any) (o Outlet, err error) {
			err = n.Do(func() (err error) { o, err = outletTo(r.server.addr); return err })
			return o, err
		}}
	})
	r.fds, r.routines = openFDs(r.t), r.routines+1
	return n
}

var narrowServers = []struct {
	at      string
	headers int
}{{"127.0.0.1:0", 28}, {"[::1]:0", 48}}

// A datagram that no longer fits into a packet once it has its header is
// carried all the same. The client is told, once in a tick, what fits.
func TestUDPTooBig(t *testing.T) {
	for _, c := range narrowServers {
		t.Run(c.at, func(t *testing.T) {
			r := newUDPRig(t, UDPOptions{})
			r.narrow(c.at)
			r.carries(client1, web, "begin") // the path is asked once it is open
			fits := 1500 - c.headers - len(header(netip.MustParseAddrPort(web)))
			for _, n := range []int{1000, fits, 1500 - 28 + 1, 9000, 60_000} {
				r.carries(client1, web, strings.Repeat("x", n))
			}
			r.settle()
			none(t, r.tooBig)
			for range 3 {
				r.carries(client1, web, strings.Repeat("x", fits+1))
				want(t, r.tooBig, fmt.Sprintf("%s > %s: %d, %d", client1, web, fits+1, fits+28))
				r.carries(client1, web, strings.Repeat("x", 1500-28))
				r.carries(client1, game, strings.Repeat("x", 1500-28))
				want(t, r.tooBig, fmt.Sprintf("%s > %s: %d, %d", client1, game, 1500-28, fits+28))
				r.settle()
				none(t, r.tooBig)
				r.tick(1)
			}
			r.carries("[2001:db8::1]:1", "[2001:db8::2]:2", "begin")
			r.carries("[2001:db8::1]:1", "[2001:db8::2]:2", strings.Repeat("x", 1500-48))
			if c.headers == 48 { // over IPv4 the header has room for what IPv6 has none
				want(t, r.tooBig, fmt.Sprintf("[2001:db8::1]:1 > [2001:db8::2]:2: %d, %d", 1500-48, fits+48))
			}
			r.settle()
			none(t, r.tooBig)
		})
	}
}

// Many datagrams of a length that the path has no room for go one by one, in
// fragments; the shorter ones still go together.
func TestUDPSegmentsTooBig(t *testing.T) {
	for _, c := range narrowServers {
		t.Run(c.at, func(t *testing.T) {
			r := newUDPRig(t, UDPOptions{})
			r.narrow(c.at)
			r.carries(client1, web, "begin")
			for _, n := range []int{1400, 1450, 3000, 1400, 2000, 1473} {
				var texts []string
				for i := range 20 {
					texts = append(texts, strings.Repeat(string(rune('a'+i)), n))
				}
				r.send(client1, web, texts...)
				for _, text := range texts {
					r.server.expect(web, text)
				}
			}
			r.inside(func(sh *shard) {
				for _, f := range sh.flows {
					if f.out.super < 1400+19 || f.out.super >= 1473+19 {
						t.Errorf("together go those of %d bytes at most", f.out.super)
					}
				}
			})
		})
	}
}

// A router that says that a packet was too long for it ends no outlet, and the
// next datagram is not lost for it.
func TestUDPPathNarrows(t *testing.T) {
	for _, c := range narrowServers {
		t.Run(c.at, func(t *testing.T) {
			r := newUDPRig(t, UDPOptions{})
			n := r.narrow(c.at)
			o := r.carries(client1, web, "begin")
			say := func() {
				if err := n.Do(func() error { return sayTooBig(o, r.server.addr, 1300) }); err != nil {
					t.Fatal(err)
				}
			}
			for range 3 {
				say()
				r.settle()
				r.server.answer(o, header(netip.MustParseAddrPort(web)), "answer")
				r.reply("%s > %s: answer", web, client1)
				r.src.hook(say) // it has not been seen when the datagram is to leave
				r.send(client1, web, strings.Repeat("x", 1400))
				if p := r.server.expect(web, strings.Repeat("x", 1400)); p != o {
					t.Error("it left by another outlet")
				}
			}
			if s := r.Stats(); s.Associations != 1 || s.Dropped["toolong"] != 0 {
				t.Errorf("%+v", s)
			}
		})
	}
}

// sayTooBig sends what a router says of a datagram of from to to, which are on
// this host.
func sayTooBig(from, to netip.AddrPort, mtu int) error {
	udp := binary.BigEndian.AppendUint16(binary.BigEndian.AppendUint16(nil, from.Port()), to.Port())
	udp = append(udp, 5, 140, 0, 0)
	if from.Addr().Is4() {
		fd, err := unix.Socket(unix.AF_INET, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMP)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		b := binary.BigEndian.AppendUint16([]byte{3, 4, 0, 0, 0, 0}, uint16(mtu))
		b = append(b, 0x45, 0, 5, 160, 0, 0, 0x40, 0, 64, unix.IPPROTO_UDP, 0, 0)
		b = append(append(append(b, from.Addr().AsSlice()...), to.Addr().AsSlice()...), udp...)
		sum := uint32(0)
		for i := 0; i < len(b); i += 2 {
			sum += uint32(binary.BigEndian.Uint16(b[i:]))
		}
		sum = sum&0xffff + sum>>16
		binary.BigEndian.PutUint16(b[2:], ^uint16(sum+sum>>16))
		return unix.Sendto(fd, b, 0, &unix.SockaddrInet4{Addr: from.Addr().As4()})
	}
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMPV6)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	b := binary.BigEndian.AppendUint32([]byte{2, 0, 0, 0}, uint32(mtu)) // the kernel puts the checksum
	b = append(b, 0x60, 0, 0, 0, 5, 140, unix.IPPROTO_UDP, 64)
	b = append(append(append(b, from.Addr().AsSlice()...), to.Addr().AsSlice()...), udp...)
	return unix.Sendto(fd, b, 0, &unix.SockaddrInet6{Addr: from.Addr().As16()})
}
