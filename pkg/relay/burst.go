package relay

import (
	"encoding/binary"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	burstSize     = 64       // datagrams that one call moves at most
	datagramRoom  = 64 << 10 // of one message received, which can hold several datagrams (UDP_GRO)
	maxSuper      = 65000    // bytes of a message that the kernel takes apart (UDP_SEGMENT), below 65,507
	controlRoom   = 32       // of a control message with one int
	segmentedNone = 1 << 30  // intake.segment: the message is one datagram
)

// mmsghdr is struct mmsghdr of recvmmsg(2).
type mmsghdr struct {
	hdr unix.Msghdr
	n   uint32
}

// intake receives from sockets, many datagrams with one call.
type intake struct {
	msgs    [burstSize]mmsghdr
	iovecs  [burstSize]unix.Iovec
	control [burstSize][controlRoom]byte
	names   [burstSize]unix.RawSockaddrAny
	room    []byte
	used    int // of msgs, by the call before
}

func (in *intake) init() {
	in.room = make([]byte, burstSize*datagramRoom) // what is not used is not in memory
	for i := range in.msgs {
		in.iovecs[i].Base = &in.room[i*datagramRoom]
		in.iovecs[i].SetLen(datagramRoom)
		h := &in.msgs[i].hdr
		h.Iov = &in.iovecs[i]
		h.SetIovlen(1)
		h.Control = &in.control[i][0]
		h.Name = (*byte)(unsafe.Pointer(&in.names[i]))
	}
	in.used = burstSize
}

// buffer returns the room of the ith message.
func (in *intake) buffer(i int) []byte {
	return in.room[i*datagramRoom : (i+1)*datagramRoom : (i+1)*datagramRoom]
}

// receive takes what is there, 0 and EAGAIN if there is nothing, 0 and EMSGSIZE
// if a router said that a datagram was too long for it, which the kernel has
// noted for those to come. What came before is overwritten.
func (in *intake) receive(fd int) (int, unix.Errno) {
	for i := range in.msgs[:in.used] {
		h := &in.msgs[i].hdr
		h.SetControllen(controlRoom)
		h.Namelen = unix.SizeofSockaddrInet6
		h.Flags = 0
	}
	in.used = 0
	for {
		n, _, e := unix.RawSyscall6(unix.SYS_RECVMMSG, uintptr(fd), uintptr(unsafe.Pointer(&in.msgs[0])), burstSize, unix.MSG_DONTWAIT, 0, 0)
		switch e {
		case 0:
			in.used = int(n)
			return int(n), 0
		case unix.EINTR:
		default:
			return 0, e
		}
	}
}

// message returns the ith message and the length of the datagrams that it
// consists of; the last one may be shorter.
func (in *intake) message(i int) (data []byte, segment int) {
	m := &in.msgs[i]
	segment = segmentedNone
	if c := in.control[i][:min(controlRoom, int(m.hdr.Controllen))]; len(c) >= unix.CmsgLen(4) {
		h := (*unix.Cmsghdr)(unsafe.Pointer(&c[0]))
		if h.Level == unix.SOL_UDP && h.Type == unix.UDP_GRO {
			if n := int(binary.NativeEndian.Uint32(c[unix.CmsgLen(0):])); n > 0 {
				segment = n
			}
		}
	}
	return in.buffer(i)[:min(int(m.n), datagramRoom)], segment
}

// sentBy tells whether the ith message came from an address. A socket that is
// connected can hold what came before it was, and what was on its way to it at
// that moment.
func (in *intake) sentBy(i int, from netip.AddrPort) bool {
	switch a := from.Addr(); in.names[i].Addr.Family {
	case unix.AF_INET:
		p := (*unix.RawSockaddrInet4)(unsafe.Pointer(&in.names[i]))
		return a.Is4() && p.Addr == a.As4() && swapPort(p.Port) == from.Port()
	case unix.AF_INET6:
		p := (*unix.RawSockaddrInet6)(unsafe.Pointer(&in.names[i]))
		return a.Is6() && p.Addr == a.As16() && swapPort(p.Port) == from.Port()
	}
	return false
}

// burst sends datagrams, many with one call.
type burst struct {
	msgs    [burstSize]mmsghdr
	iovecs  [2 * burstSize]unix.Iovec
	control [controlRoom]byte
	zero    byte
}

func (b *burst) init() {
	for i := range b.msgs {
		b.msgs[i].hdr.Iov = &b.iovecs[2*i]
		b.msgs[i].hdr.SetIovlen(2)
	}
	h := (*unix.Cmsghdr)(unsafe.Pointer(&b.control[0]))
	h.Level, h.Type = unix.SOL_UDP, unix.UDP_SEGMENT
	h.SetLen(unix.CmsgLen(2))
}

// put makes the ith pair of vectors of a header and data.
func (b *burst) put(i int, header, data []byte) {
	v := (*[2]unix.Iovec)(b.iovecs[2*i:])
	v[0].Base, v[1].Base = &b.zero, &b.zero
	if len(header) > 0 {
		v[0].Base = &header[0]
	}
	if len(data) > 0 {
		v[1].Base = &data[0]
	}
	v[0].SetLen(len(header))
	v[1].SetLen(len(data))
}

// send sends the datagrams by a connected socket, each with the header before
// it, and returns how many the kernel took and why it did not take the next:
// the one at that place, which is not tried again.
//
// Datagrams of one length go as one message that the kernel takes apart, as
// late as it can (UDP_SEGMENT). That fails where they are longer than the path
// allows; super is the longest with which it has not failed yet, header
// included.
func (b *burst) send(fd int, header []byte, data [][]byte, super *int) (sent int, errno unix.Errno) {
	for len(data) > 0 {
		n := alike(len(header), data)
		if length := len(header) + len(data[0]); n > 1 && length <= *super {
			for i, d := range data[:n] {
				b.put(i, header, d)
			}
			switch e := b.segmented(fd, n, length); e {
			case 0:
				sent += n
				data = data[n:]
				continue
			case unix.EMSGSIZE, unix.EINVAL, unix.EIO, unix.EOPNOTSUPP:
				*super = length - 1
			default:
				return sent, e
			}
		}
		n = 1
		for n < min(len(data), burstSize) && (len(data[n]) != len(data[n-1]) || len(header)+len(data[n]) > *super) {
			n++
		}
		if n > 1 && n < len(data) && len(data[n]) == len(data[n-1]) {
			n-- // it begins a run of its own
		}
		for i, d := range data[:n] {
			b.put(i, header, d)
		}
		k, e := b.single(fd, n)
		if e == unix.EMSGSIZE {
			k, e = b.single(fd, n) // it can be what a router said of an earlier one
		}
		sent += k
		if e != 0 {
			return sent, e
		}
		data = data[k:]
	}
	return sent, 0
}

// alike returns how many of the first datagrams can go as one message: those of
// the length of the first, and one more if it is shorter.
func alike(header int, data [][]byte) int {
	length, n := len(data[0]), 1
	if length == 0 {
		return 1
	}
	total := header + length
	for n < min(len(data), burstSize) && len(data[n]) <= length && len(data[n]) > 0 && total+header+len(data[n]) <= maxSuper {
		total += header + len(data[n])
		n++
		if len(data[n-1]) < length {
			break
		}
	}
	return n
}

func (b *burst) segmented(fd, n, length int) unix.Errno {
	binary.NativeEndian.PutUint16(b.control[unix.CmsgLen(0):], uint16(length))
	h := unix.Msghdr{Iov: &b.iovecs[0], Control: &b.control[0]}
	h.SetIovlen(2 * n)
	h.SetControllen(unix.CmsgSpace(2))
	for {
		_, _, e := unix.RawSyscall(unix.SYS_SENDMSG, uintptr(fd), uintptr(unsafe.Pointer(&h)), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		if e != unix.EINTR {
			return e
		}
	}
}

// single sends the first n pairs of vectors as a datagram each.
func (b *burst) single(fd, n int) (int, unix.Errno) {
	for {
		var k uintptr
		var e unix.Errno
		if n == 1 && b.iovecs[0].Len+b.iovecs[1].Len > 0 { // writev(2) of nothing does nothing
			k = 1
			_, _, e = unix.RawSyscall(unix.SYS_WRITEV, uintptr(fd), uintptr(unsafe.Pointer(&b.iovecs[0])), 2)
		} else {
			k, _, e = unix.RawSyscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(&b.msgs[0])), uintptr(n), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL, 0, 0)
		}
		switch e {
		case 0:
			return int(k), 0
		case unix.EINTR:
		default:
			return 0, e
		}
	}
}
