package redirect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"time"
	"unsafe"

	"github.com/tproxyd/tproxyd/pkg/flow"
	"golang.org/x/sys/unix"
)

// batch is how many datagrams one system call moves at most.
const batch = 64

// controlSize has room for an original destination and a packet info.
const controlSize = 128

// packetConn receives what tproxy diverts to a UDP socket on loopback, and
// sends from any address by a raw socket. Neither way allocates.
type packetConn struct {
	v6   bool
	rush bool // what there is no room for is dropped at once

	recv   *socket
	reader reader

	send   *socket // raw
	writer writer

	long *socket // raw too, for what must be fragmented
}

var _ flow.PacketSource = (*packetConn)(nil)

// reader is the state of one ReadBatch. The function handed to the poller is
// made once, since a new one would be an allocation for each batch.
type reader struct {
	try     func(fd uintptr) bool
	at      unix.Sockaddr // the address that it is bound to
	want    int
	got     int
	errno   unix.Errno
	msgs    [batch]mmsghdr
	iovecs  [batch]unix.Iovec
	names   [batch]unix.RawSockaddrInet6 // of either family: the larger
	control [batch][controlSize]byte
	zones   map[uint32]string
}

// writer is the state of one WriteBatch.
type writer struct {
	try     func(fd uintptr) bool
	from    int
	to      int
	sent    int
	errno   unix.Errno
	msgs    [batch]mmsghdr
	iovecs  [batch][2]unix.Iovec
	names   [batch]unix.RawSockaddrInet6
	headers [batch][maxHeader]byte
}

// receiveTries is how often receiving is tried again after an error. One that waits
// at the socket is told once, and says nothing of the queue.
const receiveTries = 8

// newPacketConn owns recv from then on, unless there is an error.
func newPacketConn(recv *socket, v6 bool, m Marks) (*packetConn, error) {
	c := &packetConn{v6: v6, recv: recv}
	err := recv.control(func(fd int) (err error) {
		c.reader.at, err = unix.Getsockname(fd)
		return err
	})
	if err != nil {
		return nil, err
	}
	// Of protocol IPPROTO_RAW a socket receives nothing, and sends whole packets,
	// but none that is longer than its way allows.
	if c.send, err = rawSocket(unix.IPPROTO_RAW, v6, m); err != nil {
		return nil, err
	}
	if c.long, err = rawSocket(unix.IPPROTO_UDP, v6, m); err != nil {
		c.send.close()
		return nil, err
	}
	c.reader.init()
	c.writer.init()
	return c, nil
}

// rawSocket makes a socket that only sends, from any address.
func rawSocket(protocol int, v6 bool, m Marks) (*socket, error) {
	s, err := newSocket(v6, unix.SOCK_RAW, protocol, func(fd int) error {
		nothing := unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: 0}
		if err := unix.SetsockoptSockFprog(fd, unix.SOL_SOCKET, unix.SO_ATTACH_FILTER, &unix.SockFprog{Len: 1, Filter: &nothing}); err != nil {
			return fmt.Errorf("SO_ATTACH_FILTER: %w", err)
		}
		return transparent(fd, v6, m)
	})
	if err != nil {
		return nil, fmt.Errorf("raw socket: %w", err)
	}
	return s, nil
}

// Close implements flow.PacketConn.
func (c *packetConn) Close() error {
	return errors.Join(c.recv.close(), c.send.close(), c.long.close())
}

// SetReadDeadline ends a ReadBatch that waits at a time, with an error that is
// os.ErrDeadlineExceeded.
func (c *packetConn) SetReadDeadline(t time.Time) error {
	if _, err := c.recv.polled(); err != nil {
		return err
	}
	c.recv.mu.Lock()
	defer c.recv.mu.Unlock()
	if c.recv.fd < 0 {
		return net.ErrClosed
	}
	return c.recv.waiter.SetReadDeadline(t)
}

// Control implements flow.PacketSource.
func (c *packetConn) Control(f func(fd int) error) error { return c.recv.control(f) }

func (r *reader) init() {
	r.zones = map[uint32]string{}
	for i := range r.msgs {
		h := &r.msgs[i].hdr
		h.Name = (*byte)(unsafe.Pointer(&r.names[i]))
		h.Iov = &r.iovecs[i]
		h.Control = &r.control[i][0]
		h.SetIovlen(1)
	}
	r.try = func(fd uintptr) bool {
		for i := range r.want {
			h := &r.msgs[i].hdr
			h.Namelen = unix.SizeofSockaddrInet6
			h.SetControllen(controlSize)
			h.Flags = 0
		}
		for again := receiveTries; ; again-- {
			r.got, r.errno = recvmmsg(int(fd), r.msgs[:r.want])
			if r.errno == 0 || r.errno == unix.EAGAIN || again == 0 {
				return r.errno != unix.EAGAIN
			}
			if r.errno == unix.ECONNABORTED { // ss -K, which takes a port that was not asked for by its number
				if err := unix.Bind(int(fd), r.at); err != nil && err != unix.EINVAL { // EINVAL: it has it still
					return true
				}
			}
		}
	}
}

// ReadBatch implements flow.PacketConn. Src is the client, Dst the address
// that it asked, both with their zone if they are link-local.
func (c *packetConn) ReadBatch(ds []flow.Datagram) (int, error) { return c.read(ds, true) }

// TryReadBatch implements flow.PacketSource.
func (c *packetConn) TryReadBatch(ds []flow.Datagram) (int, error) { return c.read(ds, false) }

func (c *packetConn) read(ds []flow.Datagram, wait bool) (int, error) {
	r := &c.reader
	r.want = min(len(ds), batch)
	if r.want == 0 {
		return 0, nil
	}
	for {
		for i := range r.want {
			b := ds[i].Data[:cap(ds[i].Data)]
			r.iovecs[i].Base = unsafe.SliceData(b)
			r.iovecs[i].SetLen(len(b))
		}
		if wait {
			if err := c.recv.read(r.try); err != nil {
				return 0, err
			}
		} else if there, err := c.recv.try(r.try); !there || err != nil {
			return 0, err
		}
		if r.errno != 0 {
			return 0, fmt.Errorf("redirect: recvmmsg: %w", r.errno)
		}
		n := 0
		for i := range r.got {
			if !r.parse(i, &ds[i]) {
				continue // it came without its destination: whoever sent it sent it here
			}
			if n != i {
				ds[n], ds[i] = ds[i], ds[n]
			}
			n++
		}
		if n > 0 {
			return n, nil
		}
	}
}

// parse makes the ith message a datagram; false if the kernel has not said
// where it was sent, or if it was cut off.
func (r *reader) parse(i int, d *flow.Datagram) bool {
	m := &r.msgs[i]
	d.Data = d.Data[:min(int(m.n), cap(d.Data))]
	d.Src, d.IfIndex = r.addr((*[unix.SizeofSockaddrInet6]byte)(unsafe.Pointer(&r.names[i]))[:m.hdr.Namelen]), 0
	d.Dst = netip.AddrPort{}
	for rest := r.control[i][:min(controlSize, int(m.hdr.Controllen))]; ; {
		h, data, next := nextCmsg(rest)
		if h == nil {
			break
		}
		switch {
		case h.Level == unix.SOL_IP && h.Type == unix.IP_ORIGDSTADDR, h.Level == unix.SOL_IPV6 && h.Type == unix.IPV6_ORIGDSTADDR:
			d.Dst = r.addr(data)
		case h.Level == unix.SOL_IP && h.Type == unix.IP_PKTINFO && len(data) >= unix.SizeofInet4Pktinfo:
			d.IfIndex = int(binary.NativeEndian.Uint32(data))
		case h.Level == unix.SOL_IPV6 && h.Type == unix.IPV6_PKTINFO && len(data) >= unix.SizeofInet6Pktinfo:
			d.IfIndex = int(binary.NativeEndian.Uint32(data[16:]))
		}
		rest = next
	}
	if d.Src.Addr() == d.Dst.Addr() { // see InboundInterface
		d.IfIndex = loIndex
	}
	return d.Dst.IsValid() && d.Src.IsValid() && m.hdr.Flags&unix.MSG_TRUNC == 0
}

// addr reads a sockaddr_in or sockaddr_in6.
func (r *reader) addr(b []byte) netip.AddrPort {
	if len(b) < unix.SizeofSockaddrInet4 {
		return netip.AddrPort{}
	}
	port := binary.BigEndian.Uint16(b[2:])
	switch binary.NativeEndian.Uint16(b) {
	case unix.AF_INET:
		return netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), port)
	case unix.AF_INET6:
		if len(b) < unix.SizeofSockaddrInet6 {
			return netip.AddrPort{}
		}
		a := netip.AddrFrom16([16]byte(b[8:24]))
		if scope := binary.NativeEndian.Uint32(b[24:]); scope != 0 {
			a = a.WithZone(r.zone(scope))
		}
		return netip.AddrPortFrom(a, port)
	}
	return netip.AddrPort{}
}

// zone names an interface by its number, as RFC 4007 allows and as it stays
// right when the interface is renamed.
func (r *reader) zone(index uint32) string {
	z, ok := r.zones[index]
	if !ok {
		z = strconv.FormatUint(uint64(index), 10)
		r.zones[index] = z
	}
	return z
}

func (w *writer) init() {
	for i := range w.msgs {
		h := &w.msgs[i].hdr
		h.Name = (*byte)(unsafe.Pointer(&w.names[i]))
		h.Iov = &w.iovecs[i][0]
		h.SetIovlen(2)
		w.iovecs[i][0].Base = &w.headers[i][0]
	}
	w.try = func(fd uintptr) bool {
		for {
			w.sent, w.errno = sendmmsg(int(fd), w.msgs[w.from:w.to])
			if w.errno != unix.EINTR {
				return w.errno != unix.EAGAIN
			}
		}
	}
}

// WriteBatch implements flow.PacketConn. A datagram that is longer than its way
// allows is left to the kernel to fragment.
func (c *packetConn) WriteBatch(ds []flow.Datagram) (int, error) {
	sent := 0
	for len(ds) > 0 {
		n, err := c.write(ds[:min(len(ds), batch)])
		sent += n
		if err != nil {
			return sent, err
		}
		ds = ds[min(len(ds), batch):]
	}
	return sent, nil
}

func (c *packetConn) write(ds []flow.Datagram) (int, error) {
	w := &c.writer
	var origin [batch]uint8 // of the ith message among ds
	w.from, w.to = 0, 0
	for i := range ds {
		if w.prepare(w.to, &ds[i], c.v6) {
			origin[w.to] = uint8(i)
			w.to++
		}
	}
	sent := 0
	for w.from < w.to {
		if err := c.hand(c.send, w.try); err != nil {
			return sent, err
		}
		switch {
		case w.errno == 0:
			sent += w.sent
			w.from += w.sent
			continue
		case w.errno == unix.EAGAIN:
			return sent, nil
		case w.errno == unix.EMSGSIZE:
			if c.sendLong(&ds[origin[w.from]]) == nil {
				sent++
			}
		}
		w.from++ // this one cannot be sent; the next may
	}
	return sent, nil
}

// prepare makes the ith message; false if it is not one of this family.
func (w *writer) prepare(i int, d *flow.Datagram, v6 bool) bool {
	src, dst := d.Src.Addr().Unmap(), d.Dst.Addr().Unmap()
	if !src.IsValid() || !dst.IsValid() || src.Is6() != v6 || dst.Is6() != v6 || len(d.Data) > maxPayload {
		return false
	}
	n := putHeader(&w.headers[i], src, dst, d.Src.Port(), d.Dst.Port(), d.Data)
	w.iovecs[i][0].SetLen(n)
	w.iovecs[i][1].Base = unsafe.SliceData(d.Data)
	w.iovecs[i][1].SetLen(len(d.Data))
	h := &w.msgs[i].hdr
	if v6 {
		h.Namelen = unix.SizeofSockaddrInet6
		w.names[i] = unix.RawSockaddrInet6{Family: unix.AF_INET6, Addr: dst.As16(), Scope_id: scope(dst)}
	} else {
		h.Namelen = unix.SizeofSockaddrInet4
		*(*unix.RawSockaddrInet4)(unsafe.Pointer(&w.names[i])) = unix.RawSockaddrInet4{Family: unix.AF_INET, Addr: dst.As4()}
	}
	return true
}

// scope is the number of an address's zone.
func scope(a netip.Addr) uint32 {
	z := a.Zone()
	if z == "" {
		return 0
	}
	n, err := strconv.ParseUint(z, 10, 32)
	if err != nil {
		if i, err := net.InterfaceByName(z); err == nil {
			return uint32(i.Index)
		}
	}
	return uint32(n)
}

// sendLong sends one datagram in fragments: the kernel writes the IP header.
func (c *packetConn) sendLong(d *flow.Datagram) error {
	src, dst := d.Src.Addr().Unmap(), d.Dst.Addr().Unmap()
	var header [maxHeader]byte
	n := putHeader(&header, src, dst, d.Src.Port(), d.Dst.Port(), d.Data)
	whole := append(header[n-headerUDP:n:n], d.Data...)
	var from []byte
	var to unix.Sockaddr
	var err error
	if c.v6 {
		from = unix.PktInfo6(&unix.Inet6Pktinfo{Addr: src.As16()})
		to = &unix.SockaddrInet6{Addr: dst.As16(), ZoneId: scope(dst)}
	} else {
		from = unix.PktInfo4(&unix.Inet4Pktinfo{Spec_dst: src.As4()})
		to = &unix.SockaddrInet4{Addr: dst.As4()}
	}
	if e := c.hand(c.long, func(fd uintptr) bool {
		err = unix.Sendmsg(int(fd), whole, from, to, 0)
		return !errors.Is(err, unix.EAGAIN)
	}); e != nil {
		return e
	}
	return err
}

// hand lets f hand something to the kernel, and waits for room unless there is
// no time.
func (c *packetConn) hand(s *socket, f func(fd uintptr) bool) error {
	if !c.rush {
		return s.write(f)
	}
	_, err := s.try(f)
	return err
}
