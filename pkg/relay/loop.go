package relay

import (
	"os"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

const (
	loopEvents  = 256
	scratchSize = 64 << 10
	wakeKey     = -1 // in place of a descriptor: the event is of loop.wakefd
)

// loop is an epoll descriptor and the goroutine that serves it.
type loop struct {
	e      *Engine
	epfd   int
	wakefd int      // eventfd: something was posted while the loop slept
	file   *os.File // owns epfd; it is what Go's network poller watches

	events  []unix.EpollEvent
	again   []*Stream // have more to do; only touched by the loop
	scratch []byte    // for copying in a shortage of pipes; nil until used

	awake   atomic.Bool
	stopped atomic.Bool

	mu     sync.Mutex
	posted []*Stream // handed in from outside: to be served
	gone   bool      // the loop has ended
	taken  []*Stream // spare array for posted; only touched by the loop
}

func newLoop(e *Engine) (*loop, error) {
	epfd, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, os.NewSyscallError("epoll_create1", err)
	}
	// os.NewFile hands a non-blocking descriptor to the network poller.
	if err := unix.SetNonblock(epfd, true); err != nil {
		rawClose(epfd)
		return nil, os.NewSyscallError("fcntl", err)
	}
	l := &loop{e: e, epfd: epfd, events: make([]unix.EpollEvent, loopEvents)}
	l.file = os.NewFile(uintptr(epfd), "epoll")
	if l.wakefd, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		l.file.Close()
		return nil, os.NewSyscallError("eventfd", err)
	}
	ev := unix.EpollEvent{Events: unix.EPOLLIN | edgeTriggered, Fd: wakeKey}
	if err := unix.EpollCtl(epfd, unix.EPOLL_CTL_ADD, l.wakefd, &ev); err != nil {
		l.release()
		return nil, os.NewSyscallError("epoll_ctl", err)
	}
	return l, nil
}

// edgeTriggered is EPOLLET as the unsigned number that EpollEvent holds.
const edgeTriggered = uint32(1) << 31

func (l *loop) release() {
	rawClose(l.wakefd)
	l.file.Close()
}

// run serves the loop until stop.
func (l *loop) run() {
	defer l.leave()
	rc, err := l.file.SyscallConn()
	if err == nil {
		// One Read for the whole life: the poller calls turns each time that
		// the epoll descriptor becomes readable, until it returns true.
		err = rc.Read(l.turns)
	}
	if err != nil && !l.stopped.Load() {
		l.e.log.Error("event loop ended", "err", err)
	}
}

// leave ends the loop. What is posted from now on is served by its poster's
// helper, so that a Join after Close is still answered.
func (l *loop) leave() {
	l.mu.Lock()
	l.gone = true
	l.mu.Unlock()
	l.serve()
	l.release()
}

// turns serves what there is, and returns when the loop has to sleep.
//
// A fetch that did not fill the array left nothing ready behind, and what gets
// ready from then on makes the epoll descriptor readable anew, so there is no
// need to fetch once more before sleeping.
func (l *loop) turns(uintptr) (done bool) {
	l.awake.Store(true)
	for {
		n := l.fetch()
		for i := range l.events[:n] {
			l.dispatch(&l.events[i])
		}
		l.serve()
		if l.stopped.Load() {
			return true
		}
		if len(l.again) > 0 || n == len(l.events) {
			// Handlers made ready by the events above run now.
			runtime.Gosched()
			continue
		}
		l.awake.Store(false)
		if l.hasPosted() {
			l.awake.Store(true)
			continue
		}
		return false
	}
}

// fetch takes ready events, none if there are none; it does not wait.
func (l *loop) fetch() int {
	n, _, e := syscall.RawSyscall6(unix.SYS_EPOLL_PWAIT, uintptr(l.epfd), uintptr(unsafe.Pointer(&l.events[0])), uintptr(len(l.events)), 0, 0, 0)
	if e != 0 {
		return 0
	}
	return int(n)
}

func (l *loop) dispatch(ev *unix.EpollEvent) {
	if ev.Fd == wakeKey {
		var b [8]byte
		rawRead(l.wakefd, b[:])
		return
	}
	c := l.e.conns.get(int(ev.Fd))
	if c == nil || c.gen != uint32(ev.Pad) {
		return // of a socket that was closed after the event was fetched
	}
	if s := c.stream.Load(); s != nil {
		s.event(l, int(c.side), ev.Events)
		return
	}
	c.event(l, ev.Events)
}

// serve goes on with streams that used up their turn or were posted.
func (l *loop) serve() {
	n := len(l.again)
	for i := range n {
		s := l.again[i]
		l.again[i] = nil
		s.serve(l)
	}
	l.again = append(l.again[:0], l.again[n:]...)

	l.mu.Lock()
	if len(l.posted) == 0 {
		l.mu.Unlock()
		return
	}
	l.posted, l.taken = l.taken[:0], l.posted
	l.mu.Unlock()
	for i, s := range l.taken {
		l.taken[i] = nil
		s.serve(l)
	}
}

func (l *loop) hasPosted() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.posted) > 0 || l.stopped.Load()
}

// post has the loop serve s. Any goroutine may call it.
func (l *loop) post(s *Stream) {
	l.mu.Lock()
	if l.gone {
		l.mu.Unlock()
		go s.serve(nil)
		return
	}
	l.posted = append(l.posted, s)
	l.mu.Unlock()
	l.wake()
}

// wake makes the loop take a turn. The loop clears awake before it looks at
// what is posted for the last time, and we post before we look at awake.
func (l *loop) wake() {
	if l.awake.Load() {
		return
	}
	one := [8]byte{1}
	unix.RawSyscall(unix.SYS_WRITE, uintptr(l.wakefd), uintptr(unsafe.Pointer(&one[0])), 8)
}

func (l *loop) stop() {
	l.stopped.Store(true)
	l.wake()
}

// register puts a socket into the epoll set. The kernel reports at once what
// it is ready for, so no edge can be missed.
func (l *loop) register(fd int32, gen, events uint32) unix.Errno {
	return l.control(unix.EPOLL_CTL_ADD, fd, gen, events)
}

// modify changes what is asked of a registered socket, with the same effect.
func (l *loop) modify(fd int32, gen, events uint32) unix.Errno {
	return l.control(unix.EPOLL_CTL_MOD, fd, gen, events)
}

func (l *loop) control(op int, fd int32, gen, events uint32) unix.Errno {
	ev := unix.EpollEvent{Events: events | edgeTriggered, Fd: fd, Pad: int32(gen)}
	_, _, e := unix.RawSyscall6(unix.SYS_EPOLL_CTL, uintptr(l.epfd), uintptr(op), uintptr(fd), uintptr(unsafe.Pointer(&ev)), 0, 0)
	return e
}

// buffer returns the loop's scratch buffer.
func (l *loop) buffer() []byte {
	if l.scratch == nil {
		l.scratch = make([]byte, scratchSize)
	}
	return l.scratch
}
