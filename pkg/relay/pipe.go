package relay

import (
	"os"
	"slices"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// minPipe is the smallest pipe worth having: below the kernel's default of
// 64 KiB splice saves nothing over copying (8 KiB pipes, which an unprivileged
// user gets beyond fs.pipe-user-pages-soft, cost as much per byte).
const minPipe = 64 << 10

// pipe is a kernel pipe; it is empty whenever it is in the pool.
type pipe struct {
	r, w  int
	size  int // capacity, bytes
	slots int // capacity, buffers: each holds at least one byte

	holder atomic.Pointer[Stream] // who has borrowed it; nil: it is in the pool
}

func (p *pipe) close() {
	rawClose(p.r)
	rawClose(p.w)
}

// pipePool lends pipes for as long as bytes are in them. It makes at most max
// and keeps what comes back; trim gives back to the kernel what nobody needed
// for a while.
type pipePool struct {
	max  int // pipes that may exist
	size int // capacity asked for, bytes
	keep int // pipes that fill makes, and trim leaves at rest

	spare *spareFD // while it is missing no pipe is made
	null  *os.File // what is left in a pipe goes there; nil: the pipe goes with it

	mu      sync.Mutex
	full    []*pipe // of the size asked for; last in, first out
	small   []*pipe // smaller: the kernel would not give more
	all     []*pipe // that exist, lent or not
	making  int     // that are about to
	low     int     // least number at rest since the last trim
	refused bool    // the kernel would not give another; asked again after a trim
	closed  bool
}

// fill makes the pipes to keep while the kernel gives them in full. From then on a
// pipe that comes back with bytes in it is emptied and stays.
func (p *pipePool) fill() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.keep > 0 {
		p.null, _ = os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	}
	for len(p.all) < p.keep {
		q := newPipe(p.size)
		if q == nil {
			return
		}
		if q.size < p.size {
			q.close()
			return
		}
		p.all, p.full = append(p.all, q), append(p.full, q)
	}
	p.low = len(p.full)
}

// get lends an empty pipe to s, or returns nil if there is none to be had now.
func (p *pipePool) get(s *Stream) *pipe {
	q := p.take()
	if q != nil {
		q.holder.Store(s)
	}
	return q
}

func (p *pipePool) take() *pipe {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := len(p.full); n > 0 {
		q := p.full[n-1]
		p.full = p.full[:n-1]
		p.rested()
		return q
	}
	if len(p.all)+p.making < p.max && !p.refused && !p.closed {
		p.making++
		p.mu.Unlock()
		q := newPipe(p.size)
		if q != nil && p.spare.missing.Load() {
			q.close()
			p.spare.restore()
			q = nil
		}
		p.mu.Lock()
		p.making--
		if q != nil {
			p.all = append(p.all, q)
			return q
		}
		p.refused = true
	}
	n := len(p.small)
	if n == 0 {
		return nil
	}
	q := p.small[n-1]
	p.small = p.small[:n-1]
	p.rested()
	return q
}

// put takes back a pipe that is empty.
func (p *pipePool) put(q *pipe) {
	q.holder.Store(nil)
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.closed:
		p.forget(q)
	case q.size >= p.size:
		p.full = append(p.full, q)
	default:
		p.small = append(p.small, q)
	}
}

// drop takes back a pipe that still holds bytes, which are of no use to anybody.
func (p *pipePool) drop(q *pipe) {
	if p.drain(q) {
		p.put(q)
		return
	}
	q.holder.Store(nil)
	p.mu.Lock()
	defer p.mu.Unlock()
	p.forget(q)
}

// drain empties a pipe, and returns whether it did.
func (p *pipePool) drain(q *pipe) bool {
	if p.null == nil {
		return false
	}
	for {
		switch n, e := rawSplice(q.r, int(p.null.Fd()), q.size); {
		case e == unix.EAGAIN:
			return true
		case e == unix.EINTR || e == 0 && n > 0:
		default:
			return false
		}
	}
}

// forget closes a pipe.
func (p *pipePool) forget(q *pipe) {
	i := slices.Index(p.all, q)
	p.all = slices.Delete(p.all, i, i+1)
	q.close()
}

func (p *pipePool) rested() {
	p.low = min(p.low, len(p.full)+len(p.small))
}

// trim closes half of the pipes that nobody needed since the last call, but for
// a few, and lets get ask the kernel again.
func (p *pipePool) trim() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for n := (p.low - max(p.keep, 2) + 1) / 2; n > 0; n-- {
		p.forgetColdest()
	}
	p.low = len(p.full) + len(p.small)
	p.refused = false
}

// shed closes one pipe that nobody uses now, for its descriptors.
func (p *pipePool) shed() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.full)+len(p.small) > 0 {
		p.forgetColdest()
		p.rested()
	}
}

// forgetColdest closes a pipe at rest: that at the bottom of the stack.
func (p *pipePool) forgetColdest() {
	from := &p.small
	if len(p.small) == 0 {
		from = &p.full
	}
	p.forget((*from)[0])
	*from = slices.Delete(*from, 0, 1)
}

// close closes the pipes at rest; those lent are closed as they come back.
func (p *pipePool) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, q := range slices.Concat(p.full, p.small) {
		p.forget(q)
	}
	p.full, p.small, p.closed = nil, nil, true
	p.null.Close()
}

// count returns how many pipes exist and how many of them are lent.
func (p *pipePool) count() (made, lent int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.all), len(p.all) - len(p.full) - len(p.small)
}

// holders returns who holds a pipe if there is a shortage, nil otherwise.
func (p *pipePool) holders() []*Stream {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.full)+len(p.small) > 0 || len(p.all) < p.max && !p.refused {
		return nil
	}
	var out []*Stream
	for _, q := range p.all {
		if s := q.holder.Load(); s != nil {
			out = append(out, s)
		}
	}
	return out
}

// newPipe makes a pipe of size bytes, or of what the kernel grants if that is
// at least minPipe; nil if not even that.
//
// Without CAP_SYS_RESOURCE or CAP_SYS_ADMIN the pipes of a user together may
// have fs.pipe-user-pages-soft pages (pipe(7)): beyond it F_SETPIPE_SZ fails
// with EPERM and new pipes come with two pages.
func newPipe(size int) *pipe {
	var fds [2]int
	if err := unix.Pipe2(fds[:], unix.O_NONBLOCK|unix.O_CLOEXEC); err != nil {
		return nil
	}
	p := &pipe{r: fds[0], w: fds[1]}
	for try := size; ; try /= 2 {
		got, err := unix.FcntlInt(uintptr(p.r), unix.F_SETPIPE_SZ, try)
		if err == nil {
			p.size = got
			break
		}
		if try/2 < minPipe {
			p.size, _ = unix.FcntlInt(uintptr(p.r), unix.F_GETPIPE_SZ, 0)
			break
		}
	}
	if p.size < min(minPipe, size) {
		p.close()
		return nil
	}
	p.slots = p.size / unix.Getpagesize()
	return p
}
