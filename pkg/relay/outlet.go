package relay

import (
	"context"
	"net/netip"
	"slices"

	"golang.org/x/sys/unix"
)

// retryTicks is how long a way that could not be opened is not tried again for
// a flow.
const retryTicks = 1

// lastVia is the Via of the last outlet that a session had by a key.
type lastVia struct {
	key string
	via any
}

// outlet is a socket that datagrams of a session leave by.
type outlet struct {
	s      *session
	key    string
	socket *Packet
	ctl    []*Conn
	outer  []byte // of Outlet
	inner  func([]byte) (int, bool)
	fd     int32 // of socket; -1: not open yet, or closed
	cancel context.CancelFunc
	closed bool

	bare   *udpFlow // the only flow of an outlet without headers
	byAddr map[netip.AddrPort]*udpFlow
	named  map[uint16]*udpFlow // by port
	flows  int

	super  int      // see burst.send
	mtu    int      // of the path; 0: unknown
	mtuAge uint32   // tick at which it was asked for
	begun  uint32   // tick at which it was open
	busy   bool     // see prepare
	kept   bool     // see keepAlive
	queue  []queued // while it is being opened
}

type queued struct {
	f    *udpFlow
	data []byte
}

// answers returns the flow that is answered by a datagram from an address, or
// from a name on its port.
func (o *outlet) answers(from netip.AddrPort, byName bool) *udpFlow {
	if !byName {
		if f := o.byAddr[from]; f != nil {
			return f
		}
	}
	return o.named[from.Port()]
}

// takes tells whether one flow more, to dst, with a Way, fits into an outlet.
func (o *outlet) takes(v *Verdict, dst netip.AddrPort) bool {
	switch {
	case o.key != v.Way.Key:
		return false
	case v.Header == nil:
		return o.bare == nil
	case v.Named:
		return o.named[dst.Port()] == nil
	}
	return true
}

// findOutlet attaches a flow to an outlet, one of its session or a new one that
// is being opened; false if the flow is refused.
func (sh *shard) findOutlet(f *udpFlow) bool {
	w := f.verdict.Way
	if w == nil {
		return false
	}
	if f.failed && int32(sh.now-f.retry) < 0 {
		return false
	}
	f.failed = false
	for _, o := range f.s.outlets {
		if o.takes(&f.verdict, f.dst) {
			sh.attach(f, o)
			return true
		}
	}
	for !sh.takeSocket() {
		other := sh.oldest(f)
		if other == nil {
			f.failed, f.failure, f.retry = true, RefusePort, sh.now
			return false
		}
		sh.evict(other)
	}
	sh.openOutlet(f, w)
	return true
}

func (sh *shard) openOutlet(f *udpFlow, w *Way) {
	s := f.s
	o := &outlet{s: s, key: w.Key, fd: -1, super: maxSuper}
	s.outlets = append(s.outlets, o)
	sh.u.outlets.Add(1)
	sh.attach(f, o)
	ctx, cancel := context.WithCancel(sh.u.ctx)
	o.cancel = cancel
	sh.openers.do(opening{ctx, o, w, s.viaOf(w.Key)})
}

// opening is an outlet that is to be opened.
type opening struct {
	ctx   context.Context
	o     *outlet
	w     *Way
	first any
}

// opens opens an outlet, on a goroutine of the crew.
func (sh *shard) opens(p opening) {
	made, err := p.w.Open(p.ctx, p.first)
	if !sh.post(func() { sh.opened(p.o, p.w, made, err) }) && err == nil {
		made.close()
	}
}

func (m *Outlet) close() {
	for _, c := range m.Control {
		c.Close()
	}
	m.Socket.Close()
}

// opened takes over what was opened, and sends what has waited for it.
func (sh *shard) opened(o *outlet, w *Way, made Outlet, err error) {
	defer o.cancel()
	switch {
	case err != nil && o.closed:
		return
	case err != nil:
		sh.notOpened(o, w, err)
		return
	case o.closed:
		made.close()
		return
	}
	o.socket, o.ctl, o.outer, o.inner = made.Socket, made.Control, made.Outer, made.Inner
	o.fd = o.socket.fd.Load()
	o.begun = sh.now
	if o.socket.pair {
		o.super = 0
	}
	e := sh.register(int(o.fd), ref{outlet: o})
	if e != 0 {
		sh.brokenOutlet(o, e)
		return
	}
	for _, c := range o.ctl {
		c.whenEnded(func() { sh.post(func() { sh.closeOutlet(o) }) })
	}
	sh.u.associate.Add(1)
	o.s.noteVia(o.key, made.Via)
	queue := o.queue
	o.queue = nil
	for _, q := range queue {
		sh.u.queued.Add(-int64(len(q.data)))
		if q.f.out != o || len(sh.send(q.f, [][]byte{q.data})) > 0 {
			sh.u.drop(DropOutlet, 1)
		}
	}
}

// prepare is called for an outlet that more than a question goes through: it
// gets what most outlets would pay for in vain.
func (sh *shard) prepare(o *outlet) {
	if !o.busy {
		o.busy = true
		preparePacket(int(o.fd))
	}
}

// tend has the end of a control connection noticed, of an outlet that is still
// used when it is no longer new.
func (sh *shard) tend(o *outlet) {
	if !o.kept && len(o.ctl) > 0 && sh.now-o.begun > keepAliveTicks {
		o.kept = true
		for _, c := range o.ctl {
			c.Control(func(fd int) error { keepAlive(fd); return nil })
		}
	}
}

// keepAliveTicks is the age of an outlet from which on a server that is gone
// without a word has to be noticed.
const keepAliveTicks = 5

// keepAlive has the kernel ask whether the other end of a control connection is
// still there, which says nothing as long as all is well.
func keepAlive(fd int) {
	rawSetInt(fd, unix.SOL_SOCKET, unix.SO_KEEPALIVE, 1)
	rawSetInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPIDLE, 20)
	rawSetInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPINTVL, 5)
	rawSetInt(fd, unix.IPPROTO_TCP, unix.TCP_KEEPCNT, 3)
}

// viaOf returns the Via of the last outlet by a key; nil: there was none.
func (s *session) viaOf(key string) any {
	for _, v := range s.via {
		if v.key == key {
			return v.via
		}
	}
	return nil
}

func (s *session) noteVia(key string, via any) {
	if via == nil {
		return
	}
	note(&s.result.Via, via)
	for i := range s.via {
		if s.via[i].key == key {
			s.via[i].via = via
			return
		}
	}
	s.via = append(s.via, lastVia{key, via})
}

// note appends what is not in the list yet, unless it is long.
func note(list *[]any, x any) {
	const most = 16
	if x != nil && len(*list) < most && !slices.Contains(*list, x) {
		*list = append(*list, x)
	}
}

// notOpened answers the datagrams that have waited in vain.
func (sh *shard) notOpened(o *outlet, w *Way, err error) {
	why := RefusePort
	if w.Refusal != nil {
		why = w.Refusal(err)
	}
	queue := o.queue
	o.queue = nil
	for _, q := range queue {
		sh.u.queued.Add(-int64(len(q.data)))
		if !q.f.closed && q.f.out == o {
			sh.refuseOne(q.f, q.data, why)
		}
	}
	for f := range o.each() {
		f.failed, f.failure, f.retry = true, why, sh.now+retryTicks
	}
	sh.closeOutlet(o)
}

// enqueue keeps a datagram until the flow's outlet is open.
func (sh *shard) enqueue(f *udpFlow, d []byte) {
	o := f.out
	if len(o.queue) >= maxOutletQueue || sh.u.queued.Add(int64(len(d))) > int64(sh.u.o.MaxQueued) {
		if len(o.queue) < maxOutletQueue {
			sh.u.queued.Add(-int64(len(d)))
		}
		sh.u.drop(DropQueue, 1)
		return
	}
	o.queue = append(o.queue, queued{f, append([]byte(nil), d...)})
}

// attach makes an outlet the flow's.
func (sh *shard) attach(f *udpFlow, o *outlet) {
	f.out = o
	o.flows++
	switch {
	case f.verdict.Header == nil:
		o.bare = f
	case f.verdict.Named:
		if o.named == nil {
			o.named = map[uint16]*udpFlow{}
		}
		o.named[f.dst.Port()] = f
	default:
		if o.byAddr == nil {
			o.byAddr = map[netip.AddrPort]*udpFlow{}
		}
		o.byAddr[f.dst] = f
	}
}

// detach takes a flow out of its outlet, which may be left with none.
func (sh *shard) detach(f *udpFlow) {
	o := f.out
	f.out = nil
	o.flows--
	switch {
	case o.bare == f:
		o.bare = nil
	case o.named[f.dst.Port()] == f:
		delete(o.named, f.dst.Port())
	default:
		delete(o.byAddr, f.dst)
	}
}

// each yields the flows of an outlet.
func (o *outlet) each() func(yield func(*udpFlow) bool) {
	return func(yield func(*udpFlow) bool) {
		if o.bare != nil && !yield(o.bare) {
			return
		}
		for _, f := range o.named {
			if !yield(f) {
				return
			}
		}
		for _, f := range o.byAddr {
			if !yield(f) {
				return
			}
		}
	}
}

// brokenOutlet ends an outlet whose socket reported an error. Where it leads to
// the destination itself, the client is told what the destination said.
func (sh *shard) brokenOutlet(o *outlet, e unix.Errno) {
	if f := o.bare; f != nil && e == unix.ECONNREFUSED {
		sh.refuseOne(f, nil, RefusePort)
	}
	sh.closeOutlet(o)
}

// closeOutlet ends an outlet. Its flows stay, and find another with their next
// datagram.
func (sh *shard) closeOutlet(o *outlet) {
	if o.closed {
		return
	}
	o.closed = true
	o.cancel()
	for f := range o.each() {
		f.out = nil
	}
	o.bare, o.named, o.byAddr, o.flows = nil, nil, nil, 0
	for _, q := range o.queue {
		sh.u.queued.Add(-int64(len(q.data)))
		sh.u.drop(DropOutlet, 1)
	}
	o.queue = nil
	if o.fd >= 0 {
		sh.forget(int(o.fd))
		o.socket.Close()
		o.fd = -1
	}
	for _, c := range o.ctl {
		c.Close()
	}
	s := o.s
	if i := slices.Index(s.outlets, o); i >= 0 {
		s.outlets = slices.Delete(s.outlets, i, i+1)
	}
	sh.giveSocket()
	sh.u.outlets.Add(-1)
}
