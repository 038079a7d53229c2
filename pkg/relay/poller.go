package relay

import (
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	loopEvents = 256
	wakeKey    = -1 // in place of a descriptor: the event is of poller.wakefd

	// edgeTriggered is EPOLLET as the unsigned number that EpollEvent holds.
	edgeTriggered = uint32(1) << 31
)

// poller is what a loop sleeps on: an epoll descriptor that is itself watched
// by Go's network poller, so that an idle loop is a parked goroutine.
type poller struct {
	epfd   int
	wakefd int      // eventfd: something was posted while the loop slept
	file   *os.File // owns epfd; it is what Go's network poller watches

	events  []unix.EpollEvent
	awake   atomic.Bool
	stopped atomic.Bool

	waking   sync.Mutex
	released bool // wakefd is closed, and can be another's
}

func (p *poller) open() error {
	epfd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("epoll_create1", err)
	}
	// os.NewFile hands a non-blocking descriptor to the network poller.
	if err := unix.SetNonblock(epfd, true); err != nil {
		rawClose(epfd)
		return os.NewSyscallError("fcntl", err)
	}
	p.epfd, p.events = epfd, make([]unix.EpollEvent, loopEvents)
	p.file = os.NewFile(uintptr(epfd), "epoll")
	if err := p.file.SetDeadline(time.Time{}); err != nil { // Go's poller could not take it
		p.file.Close()
		return fmt.Errorf("epoll: %w", err)
	}
	if p.wakefd, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		p.file.Close()
		return os.NewSyscallError("eventfd", err)
	}
	ev := unix.EpollEvent{Events: unix.EPOLLIN | edgeTriggered, Fd: wakeKey}
	if err := unix.EpollCtl(epfd, unix.EPOLL_CTL_ADD, p.wakefd, &ev); err != nil {
		p.release()
		return os.NewSyscallError("epoll_ctl", err)
	}
	return nil
}

func (p *poller) release() {
	p.waking.Lock()
	p.released = true
	p.waking.Unlock()
	rawClose(p.wakefd)
	p.file.Close()
}

// watch calls turns each time that the epoll descriptor becomes readable,
// until it returns true: one Read of Go's poller for the whole life.
func (p *poller) watch(turns func(uintptr) bool) error {
	rc, err := p.file.SyscallConn()
	if err == nil {
		err = rc.Read(turns)
	}
	if p.stopped.Load() {
		return nil
	}
	return err
}

// fetch takes ready events, none if there are none; it does not wait.
func (p *poller) fetch() int {
	for {
		n, _, e := syscall.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(p.epfd), uintptr(unsafe.Pointer(&p.events[0])), uintptr(len(p.events)), 0, 0, 0)
		switch e {
		case 0:
			return int(n)
		case unix.EINTR: // what was ready is not reported again to whoever sleeps
		default:
			return 0
		}
	}
}

// woken tells whether the event was made by wake. What wake has written is not
// read: each write is an edge of its own, and they cannot come to 2^64.
func (p *poller) woken(ev *unix.EpollEvent) bool { return ev.Fd == wakeKey }

// wake makes the loop take a turn. The loop clears awake before it looks at
// what is posted for the last time, and we post before we look at awake.
func (p *poller) wake() {
	if p.awake.Load() {
		return
	}
	one := [8]byte{1}
	p.waking.Lock()
	if !p.released {
		unix.RawSyscall(unix.SYS_WRITE, uintptr(p.wakefd), uintptr(unsafe.Pointer(&one[0])), 8)
	}
	p.waking.Unlock()
}

func (p *poller) stop() {
	p.stopped.Store(true)
	p.wake()
}

func (p *poller) control(op int, fd int32, gen, events uint32) unix.Errno {
	ev := unix.EpollEvent{Events: events, Fd: fd, Pad: int32(gen)}
	_, _, e := unix.RawSyscall6(unix.SYS_EPOLL_CTL, uintptr(p.epfd), uintptr(op), uintptr(fd), uintptr(unsafe.Pointer(&ev)), 0, 0)
	return e
}
