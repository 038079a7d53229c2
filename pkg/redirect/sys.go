package redirect

import (
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// What x/sys/unix does not have in a form that allocates nothing, or that does
// not tell Go's scheduler: of calls that never sleep it need not know, and each
// that it hears of after a moment of rest wakes the thread that looks after it,
// which then looks every 20 µs for a while.

func getsockopt(fd, level, name int, b *byte, n *uint32) error {
	_, _, errno := unix.RawSyscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(name),
		uintptr(unsafe.Pointer(b)), uintptr(unsafe.Pointer(n)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}

func setsockoptInt(fd, level, name, value int) error {
	v := int32(value)
	_, _, errno := unix.RawSyscall6(unix.SYS_SETSOCKOPT, uintptr(fd), uintptr(level), uintptr(name), uintptr(unsafe.Pointer(&v)), 4, 0)
	if errno != 0 {
		return errno
	}
	return nil
}

// nextCmsg takes the first control message (cmsg(3)) off a buffer; a nil header
// says that there is none.
func nextCmsg(b []byte) (h *unix.Cmsghdr, data, rest []byte) {
	if len(b) < unix.SizeofCmsghdr {
		return nil, nil, nil
	}
	h = (*unix.Cmsghdr)(unsafe.Pointer(&b[0]))
	if uint64(h.Len) < unix.SizeofCmsghdr || uint64(h.Len) > uint64(len(b)) {
		return nil, nil, nil
	}
	data = b[unix.SizeofCmsghdr:h.Len]
	return h, data, b[min(len(b), unix.CmsgSpace(len(data))):]
}

// mmsghdr is struct mmsghdr of recvmmsg(2).
type mmsghdr struct {
	hdr unix.Msghdr
	n   uint32
}

// recvmmsg and sendmmsg do not block: they are for sockets of Go's poller.
func recvmmsg(fd int, ms []mmsghdr) (int, unix.Errno) {
	n, _, errno := unix.RawSyscall6(unix.SYS_RECVMMSG, uintptr(fd), uintptr(unsafe.Pointer(&ms[0])), uintptr(len(ms)), unix.MSG_DONTWAIT, 0, 0)
	return int(n), errno
}

func sendmmsg(fd int, ms []mmsghdr) (int, unix.Errno) {
	n, _, errno := unix.RawSyscall6(unix.SYS_SENDMMSG, uintptr(fd), uintptr(unsafe.Pointer(&ms[0])), uintptr(len(ms)), unix.MSG_DONTWAIT, 0, 0)
	return int(n), errno
}

// sendto does not block.
func sendto(fd int, b []byte, to *unix.RawSockaddrInet6, size int) error {
	_, _, errno := unix.RawSyscall6(unix.SYS_SENDTO, uintptr(fd), uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)),
		unix.MSG_DONTWAIT, uintptr(unsafe.Pointer(to)), uintptr(size))
	if errno != 0 {
		return errno
	}
	return nil
}

// bpfTries is how often bpf asks: the kernel gives up (EAGAIN) what a signal
// interrupts, and Go's runtime sends itself some where much is going on.
const bpfTries = 100

// bpf is bpf(2). Alive is what the attributes point to.
func bpf(cmd int, attr unsafe.Pointer, size uintptr, alive ...[]byte) (int, error) {
	fd, _, errno := unix.Syscall(unix.SYS_BPF, uintptr(cmd), uintptr(attr), size)
	for i := 1; errno == unix.EAGAIN && i < bpfTries; i++ {
		fd, _, errno = unix.Syscall(unix.SYS_BPF, uintptr(cmd), uintptr(attr), size)
	}
	runtime.KeepAlive(alive)
	if errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}
