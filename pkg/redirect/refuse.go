package redirect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"sync"
	"time"
	"unsafe"

	"github.com/tproxyd/tproxyd/pkg/flow"
	"golang.org/x/sys/unix"
)

// Refusal is what a client is told of a datagram that is not carried. The zero
// value is PortUnreachable.
type Refusal uint8

// The refusals, by their names in RFC 792 and RFC 4443, and the error that a
// connected socket on Linux has of each. Of the two that say that something is
// unreachable now it has none, unless it asked for all (IP_RECVERR): most
// programs go on waiting then.
const (
	PortUnreachable Refusal = iota // ECONNREFUSED
	HostUnreachable                // EHOSTUNREACH
	NetUnreachable                 // ENETUNREACH
	Prohibited                     // EHOSTUNREACH over IPv4, EACCES over IPv6
)

// code returns the code of the refusal, of ICMP type 3 or of ICMPv6 type 1.
func (r Refusal) code(v6 bool) byte {
	codes := [...][2]byte{PortUnreachable: {3, 4}, HostUnreachable: {1, 3}, NetUnreachable: {0, 0}, Prohibited: {13, 1}}
	if int(r) >= len(codes) {
		r = PortUnreachable
	}
	if v6 {
		return codes[r][1]
	}
	return codes[r][0]
}

// The least that the MTU of a path can be (RFC 791, RFC 8200), in bytes. Linux
// takes less than 552 over IPv4 for that, by default.
const (
	minMTU4 = 68
	minMTU6 = 1280
)

// quoted is how much of the payload an error brings back, in bytes.
const quoted = 128

// Refuser answers datagrams with ICMP errors: from the address that was asked,
// to the client, with the beginning of the datagram rebuilt inside, so that the
// client's kernel gives it to the socket that sent it. Any number of goroutines
// may use it. It never waits: what the kernel has no room for is dropped, and
// so is what is more than errorRate (RFC 4443, section 2.4 (f)).
type Refuser struct {
	v4 *socket
	v6 *socket // nil on a host without IPv6

	mu    sync.Mutex
	spent time.Duration // at since, of the second that all of the rate is
	since time.Time
}

// errorRate is how many errors are sent in a second on average, and at once at
// most.
const errorRate = 1000

// may takes one error's share of the rate, if there is any left.
func (r *Refuser) may(now time.Time) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.spent, r.since = max(0, r.spent-now.Sub(r.since)), now
	if r.spent > (errorRate-1)*time.Second/errorRate {
		return false
	}
	r.spent += time.Second / errorRate
	return true
}

// NewRefuser makes a Refuser in the network namespace of the calling thread. It
// needs CAP_NET_RAW.
func NewRefuser(m Marks) (*Refuser, error) {
	v4, err := rawSocket(unix.IPPROTO_RAW, false, m)
	if err != nil {
		return nil, fmt.Errorf("redirect: %w", err)
	}
	v6, err := rawSocket(unix.IPPROTO_RAW, true, m)
	if err != nil && !noFamily(err) {
		v4.close()
		return nil, fmt.Errorf("redirect: %w", err)
	}
	return &Refuser{v4: v4, v6: v6}, nil
}

// Close closes its sockets.
func (r *Refuser) Close() error {
	err := r.v4.close()
	if r.v6 != nil {
		err = errors.Join(err, r.v6.close())
	}
	return err
}

// Refuse tells the client d.Src that d, for d.Dst, is not carried, and why. It
// keeps nothing of d.
func (r *Refuser) Refuse(d flow.Datagram, why Refusal) error {
	v6 := !d.Dst.Addr().Unmap().Is4()
	kind := byte(3)
	if v6 {
		kind = 1
	}
	return r.send(&d, v6, [4]byte{kind, why.code(v6)}, 0)
}

// TooBig tells the client d.Src that an IP packet to d.Dst may have mtu bytes at
// most, and d has more (RFC 1191, RFC 8201). What no path can be said to have
// counts as the least that one can, which is 1,280 over IPv6. It keeps nothing
// of d.
func (r *Refuser) TooBig(d flow.Datagram, mtu int) error {
	if d.Dst.Addr().Unmap().Is4() {
		return r.send(&d, false, [4]byte{3, 4}, uint32(min(max(mtu, minMTU4), 65535)))
	}
	return r.send(&d, true, [4]byte{2, 0}, uint32(min(max(mtu, minMTU6), 65535)))
}

// maxError is the longest error that there is.
const maxError = header6 + headerICMP + maxHeader + quoted

// send sends an error of a type and code; rest is the second word of its header.
func (r *Refuser) send(d *flow.Datagram, v6 bool, kind [4]byte, rest uint32) error {
	client, asked := d.Src.Addr().Unmap(), d.Dst.Addr().Unmap()
	s := r.v4
	if v6 {
		s = r.v6
	}
	if s == nil || !client.IsValid() || !asked.IsValid() || client.Is4() == v6 {
		return fmt.Errorf("redirect: refusal of %s to %s: %w", d.Src, d.Dst, unix.EAFNOSUPPORT)
	}
	if !r.may(time.Now()) {
		return nil
	}
	var b [maxError]byte
	n := putError(&b, client, asked, d, kind, rest)
	var to unix.RawSockaddrInet6 // of either family: the larger
	size := unix.SizeofSockaddrInet6
	if v6 {
		to = unix.RawSockaddrInet6{Family: unix.AF_INET6, Addr: client.As16(), Scope_id: scope(client)}
	} else {
		size = unix.SizeofSockaddrInet4
		*(*unix.RawSockaddrInet4)(unsafe.Pointer(&to)) = unix.RawSockaddrInet4{Family: unix.AF_INET, Addr: client.As4()}
	}
	err := s.control(func(fd int) error { return sendto(fd, b[:n], &to, size) })
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.ENOBUFS) {
		return nil // dropped, as the kernel drops errors that are too many
	}
	if err != nil {
		return fmt.Errorf("redirect: refusal of %s to %s: %w", d.Src, d.Dst, err)
	}
	return nil
}

// putError writes an error about a datagram that the client has sent to the
// address asked, and returns its length.
func putError(b *[maxError]byte, client, asked netip.Addr, d *flow.Datagram, kind [4]byte, rest uint32) int {
	data := d.Data[:min(len(d.Data), maxPayload)]
	proto, outer := byte(unix.IPPROTO_ICMP), header4
	if asked.Is6() {
		proto, outer = unix.IPPROTO_ICMPV6, header6
	}
	inner := (*[maxHeader]byte)(b[outer+headerICMP:])
	n := outer + headerICMP + putHeader(inner, client, asked, d.Src.Port(), d.Dst.Port(), data)
	if asked.Is4() {
		// Whoever learns the MTU of a path has forbidden to fragment. The kernel
		// completes the outer header only.
		inner[6] = 0x40
		binary.BigEndian.PutUint16(inner[10:], ^fold(add16(0, inner[:header4])))
	}
	n += copy(b[n:], data[:min(len(data), quoted)])
	putIP((*[header6]byte)(b[:]), asked, client, proto, n-outer)
	icmp := b[outer:n]
	copy(icmp, kind[:])
	binary.BigEndian.PutUint32(icmp[4:], rest)
	sum := uint64(0)
	if asked.Is6() { // RFC 4443, section 2.3
		sum = add16(uint64(proto)+uint64(len(icmp)), addresses(b[:]))
	}
	binary.BigEndian.PutUint16(icmp[2:], ^fold(add16(sum, icmp)))
	return n
}
