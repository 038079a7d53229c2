package relay

import (
	"sync"

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

	mu      sync.Mutex
	full    []*pipe // of the size asked for; last in, first out
	small   []*pipe // smaller: the kernel would not give more
	made    int     // that exist, lent or not
	low     int     // least number at rest since the last trim
	refused bool    // the kernel would not give another; asked again after a trim
	closed  bool
}

// get lends an empty pipe, or nil if there is none to be had now.
func (p *pipePool) get() *pipe {
	p.mu.Lock()
	if n := len(p.full); n > 0 {
		q := p.full[n-1]
		p.full = p.full[:n-1]
		p.rested()
		p.mu.Unlock()
		return q
	}
	if p.made >= p.max || p.refused || p.closed {
		var q *pipe
		if n := len(p.small); n > 0 {
			q = p.small[n-1]
			p.small = p.small[:n-1]
		}
		p.rested()
		p.mu.Unlock()
		return q
	}
	p.made++
	p.mu.Unlock()

	q := newPipe(p.size)
	if q == nil {
		p.mu.Lock()
		p.made--
		p.refused = true
		p.mu.Unlock()
	}
	return q
}

// put takes back a pipe that is empty.
func (p *pipePool) put(q *pipe) {
	p.mu.Lock()
	switch {
	case p.closed:
		p.made--
		p.mu.Unlock()
		q.close()
		return
	case q.size >= p.size:
		p.full = append(p.full, q)
	default:
		p.small = append(p.small, q)
	}
	p.mu.Unlock()
}

// drop takes back a pipe that still holds bytes; they are gone with it.
func (p *pipePool) drop(q *pipe) {
	q.close()
	p.mu.Lock()
	p.made--
	p.mu.Unlock()
}

func (p *pipePool) rested() {
	p.low = min(p.low, len(p.full)+len(p.small))
}

// trim closes half of the pipes that nobody needed since the last call, and
// lets get ask the kernel again.
func (p *pipePool) trim() {
	const keep = 2
	p.mu.Lock()
	n := 0
	if p.low > keep {
		n = (p.low - keep + 1) / 2
	}
	var out []*pipe
	for ; n > 0; n-- {
		from := &p.small
		if len(p.small) == 0 {
			from = &p.full
		}
		// The bottom of the stack is the coldest.
		out = append(out, (*from)[0])
		*from = append((*from)[:0], (*from)[1:]...)
		p.made--
	}
	p.low = len(p.full) + len(p.small)
	p.refused = false
	p.mu.Unlock()
	for _, q := range out {
		q.close()
	}
}

// close closes the pipes at rest; those lent are closed as they come back.
func (p *pipePool) close() {
	p.mu.Lock()
	out := append(p.full, p.small...)
	p.full, p.small, p.closed = nil, nil, true
	p.made -= len(out)
	p.mu.Unlock()
	for _, q := range out {
		q.close()
	}
}

// count returns how many pipes exist and how many of them are lent.
func (p *pipePool) count() (made, lent int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.made, p.made - len(p.full) - len(p.small)
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
