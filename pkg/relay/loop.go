package relay

import (
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

const scratchSize = 64 << 10

// loop is an epoll descriptor and the goroutine that serves it.
type loop struct {
	poller
	e       *Engine
	again   []*Stream // have more to do; only touched by the loop
	scratch []byte    // for copying in a shortage of pipes; nil until used

	mu     sync.Mutex
	posted []*Stream // handed in from outside: to be served
	gone   bool      // the loop has ended
	taken  []*Stream // spare array for posted; only touched by the loop
}

func newLoop(e *Engine) (*loop, error) {
	l := &loop{e: e}
	if err := l.open(); err != nil {
		return nil, err
	}
	return l, nil
}

// run serves the loop until stop.
func (l *loop) run() {
	defer l.leave()
	if err := l.watch(l.turns); err != nil {
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

func (l *loop) dispatch(ev *unix.EpollEvent) {
	if l.woken(ev) {
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

// register puts a socket into the epoll set. The kernel reports at once what
// it is ready for, so no edge can be missed.
func (l *loop) register(fd int32, gen, events uint32) unix.Errno {
	return l.control(unix.EPOLL_CTL_ADD, fd, gen, events|edgeTriggered)
}

// modify changes what is asked of a registered socket, with the same effect.
func (l *loop) modify(fd int32, gen, events uint32) unix.Errno {
	return l.control(unix.EPOLL_CTL_MOD, fd, gen, events|edgeTriggered)
}

// buffer returns the loop's scratch buffer.
func (l *loop) buffer() []byte {
	if l.scratch == nil {
		l.scratch = make([]byte, scratchSize)
	}
	return l.scratch
}
