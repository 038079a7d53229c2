package main

import (
	"encoding/binary"
	"net/netip"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	batchSize    = 64   // datagrams that one call moves at most
	datagramRoom = 2048 // of one datagram
	socksHeader  = 10   // bytes before a datagram to or from an IPv4 address (RFC 1928 section 7)
	udpBuffer    = 4 << 20
)

// mmsghdr is struct mmsghdr of recvmmsg(2).
type mmsghdr struct {
	hdr unix.Msghdr
	n   uint32
}

// batch receives and sends datagrams, many with one call, so that what is
// measured against costs as little as it can. One goroutine may use it.
type batch struct {
	msgs   [batchSize]mmsghdr
	iovecs [batchSize]unix.Iovec
	names  [batchSize]unix.RawSockaddrInet4 // where from, or where to
	room   [batchSize][socksHeader + datagramRoom]byte
}

// newBatch returns a batch for sockets that are connected, or, if named, for
// those that are not.
func newBatch(named bool) *batch {
	b := &batch{}
	for i := range b.msgs {
		h := &b.msgs[i].hdr
		h.Iov = &b.iovecs[i]
		h.SetIovlen(1)
		if named {
			h.Name = (*byte)(unsafe.Pointer(&b.names[i]))
			h.Namelen = unix.SizeofSockaddrInet4
		}
	}
	return b
}

// receive takes what there is, behind room for a header.
func (b *batch) receive(fd, flags int) (int, error) {
	for i := range b.msgs {
		b.iovecs[i].Base = &b.room[i][socksHeader]
		b.iovecs[i].SetLen(datagramRoom)
	}
	for {
		n, _, e := unix.Syscall6(unix.SYS_RECVMMSG, uintptr(fd), uintptr(unsafe.Pointer(&b.msgs[0])), batchSize, uintptr(flags), 0, 0)
		switch e {
		case 0:
			return int(n), nil
		case unix.EINTR:
		default:
			return 0, e
		}
	}
}

// data is the ith datagram that was received.
func (b *batch) data(i int) []byte {
	return b.room[i][socksHeader : socksHeader+int(b.msgs[i].n)]
}

// put makes d, which stays the caller's, the ith datagram to send.
func (b *batch) put(i int, d []byte) {
	b.iovecs[i].Base = unsafe.SliceData(d)
	b.iovecs[i].SetLen(len(d))
}

// send sends the first n datagrams. What the kernel does not take is lost, as
// datagrams are.
func (b *batch) send(fd, n int) {
	for i := 0; i < n; {
		k, _, e := unix.Syscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(&b.msgs[i])), uintptr(n-i), unix.MSG_DONTWAIT, 0, 0)
		switch e {
		case 0:
			i += int(k)
		case unix.EINTR:
		default: // of the first of them
			i++
		}
	}
}

// sockaddr returns a socket address of IPv4 as the kernel wants it.
func sockaddr(a netip.AddrPort) unix.RawSockaddrInet4 {
	s := unix.RawSockaddrInet4{Family: unix.AF_INET, Addr: a.Addr().As4()}
	binary.BigEndian.PutUint16((*[2]byte)(unsafe.Pointer(&s.Port))[:], a.Port())
	return s
}

// openUDP opens a socket of IPv4 with large buffers; flags are those of
// socket(2). The caller binds or connects it.
func openUDP(flags int) (fd int, err error) {
	if fd, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|flags, 0); err != nil {
		return -1, err
	}
	for _, option := range []int{unix.SO_RCVBUFFORCE, unix.SO_SNDBUFFORCE} {
		if err := unix.SetsockoptInt(fd, unix.SOL_SOCKET, option, udpBuffer); err != nil {
			unix.Close(fd)
			return -1, err
		}
	}
	return fd, nil
}

// bindUDP opens a socket at an address; port 0 is any.
func bindUDP(at netip.AddrPort, flags int) (fd int, err error) {
	if fd, err = openUDP(flags); err != nil {
		return -1, err
	}
	if err := unix.Bind(fd, &unix.SockaddrInet4{Port: int(at.Port()), Addr: at.Addr().As4()}); err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// echoDatagrams sends back what comes to a socket that is not connected.
func echoDatagrams(fd int) {
	b := newBatch(true)
	for {
		n, err := b.receive(fd, unix.MSG_WAITFORONE)
		if err != nil {
			continue // what ICMP says of an answer that nobody waits for
		}
		for i := range n {
			b.put(i, b.data(i))
		}
		b.send(fd, n)
	}
}
