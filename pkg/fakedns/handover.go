package fakedns

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"

	"github.com/tproxyd/tproxyd/pkg/flow"
	"golang.org/x/sys/unix"
)

// Handover is what a Server goes on from that takes the place of another one, as
// a rule in another process.
type Handover struct {
	Dir    *os.File     // of the file of names, locked; nil: names are in memory only
	Log    []byte       // every name with its address, by last use
	Whole  bool         // the file says all of it, and can be written on
	Pinned []netip.Addr // of names with living flows, one for each name
}

// Stream is a client's TCP connection between two questions, or in one.
type Stream struct {
	Conn    *net.TCPConn
	Read    []byte // what the client has said that was not answered
	IfIndex int    // interface that it came in by, which the kernel tells but once; 0: not asked yet
}

// errLent is what comes of asking for an address while another Server has them.
var errLent = errors.New("fakedns: the synthetic addresses are another process's")

// left is what Serve… has read and not answered.
type left struct {
	questions []flow.Datagram
	streams   []Stream
}

// Left returns what was read and not answered when ServeUDP and ServeTCP ended,
// for those of this Server or of another one to begin with. The connections are
// the caller's from then on.
func (s *Server) Left() (questions []flow.Datagram, streams []Stream) {
	s.leftMu.Lock()
	defer s.leftMu.Unlock()
	questions, streams = s.left.questions, s.left.streams
	s.left = left{}
	return questions, streams
}

// leave keeps a question for Left. Its bytes are copied.
func (s *Server) leave(d *flow.Datagram) {
	s.leftMu.Lock()
	defer s.leftMu.Unlock()
	s.left.questions = append(s.left.questions, flow.Datagram{Data: slices.Clone(d.Data), Src: d.Src, Dst: d.Dst, IfIndex: d.IfIndex})
}

func (s *Server) leaveStream(st Stream) {
	s.leftMu.Lock()
	defer s.leftMu.Unlock()
	s.left.streams = append(s.left.streams, st)
}

// Lend returns what a Server needs that takes the place of this one. ServeUDP and
// ServeTCP must have ended. From then on this one gives no address, nor writes
// to its file, until TakeBack; what it knows can be looked up. The caller closes
// Dir.
func (s *Server) Lend() (*Handover, error) { return s.pool.lend() }

// TakeBack ends Lend: the other one has failed, and given no address.
func (s *Server) TakeBack() { s.pool.takeBack() }

// Release gives the file and its lock up to the Server that goes on from Lend.
// Look-ups and pins still work.
func (s *Server) Release() { s.pool.release() }

func (p *pool) lend() (*Handover, error) {
	h := &Handover{}
	if p.s != nil {
		close(p.done)
		p.wg.Wait()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lent = true
	h.Log = p.t.dump()
	for i := range p.t.pins {
		if p.v4.IsValid() {
			h.Pinned = append(h.Pinned, p.v4.addr(i))
		} else {
			h.Pinned = append(h.Pinned, p.v6.addr(i))
		}
	}
	if p.s == nil {
		return h, nil
	}
	fd, err := unix.FcntlInt(p.s.dir.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("fakedns: dup: %w", err)
	}
	h.Dir, h.Whole = os.NewFile(uintptr(fd), p.s.dir.Name()), p.s.file != nil
	return h, nil
}

func (p *pool) takeBack() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.lent = false
	if p.s != nil {
		p.done = make(chan struct{})
		p.wg.Go(p.housekeep)
	}
}

func (p *pool) release() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.s == nil {
		return
	}
	if p.s.file != nil {
		p.s.file.Close()
	}
	p.s.dir.Close() // the lock is the other one's too
	p.s = nil
}

// takeStore makes a store of dir, which another one has locked, and returns what
// it held.
func takeStore(dir string, h *Handover) (s *store, content []byte, err error) {
	if h.Dir == nil {
		return nil, nil, fmt.Errorf("fakedns: %s: it was not handed over", dir)
	}
	fd, err := unix.FcntlInt(h.Dir.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("fakedns: dup: %w", err)
	}
	s = &store{dir: os.NewFile(uintptr(fd), dir)}
	there, err := s.dir.Stat()
	wanted, err2 := os.Stat(dir)
	if err = errors.Join(err, err2); err == nil && !os.SameFile(there, wanted) {
		err = errors.New("another directory was handed over")
	}
	if err != nil {
		s.dir.Close()
		return nil, nil, fmt.Errorf("fakedns: %s: %w", dir, err)
	}
	if h.Whole {
		s.goOn(len(h.Log))
	}
	return s, h.content(), nil
}

// goOn writes on the file that is there, whose names are a log of live bytes. If
// it cannot, the file is written anew.
func (s *store) goOn(live int) {
	f, err := os.OpenFile(filepath.Join(s.dir.Name(), logName), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return
	}
	info, err := f.Stat()
	if err != nil || info.Size() < int64(len(logHeader)) {
		f.Close()
		return
	}
	s.file, s.size, s.live = f, int(info.Size()), live
}

// content is the records of the log.
func (h *Handover) content() []byte {
	if len(h.Log) < len(logHeader) || string(h.Log[:len(logHeader)]) != logHeader {
		return nil
	}
	return h.Log[len(logHeader):]
}
