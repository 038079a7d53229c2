package relay

import (
	"net/netip"
	"runtime"
	"sync"

	"github.com/tproxyd/tproxyd/pkg/flow"
	"golang.org/x/sys/unix"
)

// shard is a loop that owns sessions: everything of them happens on its one
// goroutine, so nothing of them is locked. Only post, wake and stop may be
// called from elsewhere.
type shard struct {
	poller
	u       *UDP
	sources []flow.PacketSource
	refs    []ref // by descriptor: whose it is
	gen     uint32
	now     uint32 // the tick that was served last
	epoch   uint32 // of UDP, the one that all flows were decided for last

	sessions map[netip.AddrPort]*session // by client socket
	flows    map[flowKey]*udpFlow
	long     flowList             // in the order of their last datagram
	brief    flowList             // the same, of those that go by the shorter limit
	timed    map[uint32]*flowList // the same, of those that have one of their own, by that in ticks
	sockets  int                  // of outlets and flows

	openers *crew[opening]

	in      intake
	out     burst
	batch   [burstSize]flow.Datagram
	next    [burstSize]int8 // of batch: the next one of the same flow
	dirty   []*udpFlow      // have datagrams in batch
	data    [][]byte        // of one flow, for one call
	header  []byte          // before them, where there are two
	replies []flow.Datagram
	astray  []int // messages that came by another flow's socket

	mu     sync.Mutex
	posted []func() // from outside
	gone   bool     // the loop has ended
}

type flowKey struct{ client, dst netip.AddrPort }

// ref tells whose descriptor it is; one field is set.
type ref struct {
	gen    uint32
	source flow.PacketSource
	flow   *udpFlow
	outlet *outlet
}

func newShard(u *UDP, sources []flow.PacketSource) (*shard, error) {
	sh := &shard{u: u, sources: sources, sessions: map[netip.AddrPort]*session{}, flows: map[flowKey]*udpFlow{}, timed: map[uint32]*flowList{}}
	sh.openers = newCrew(&u.opening, sh.opens)
	if err := sh.open(); err != nil {
		return nil, err
	}
	sh.in.init()
	sh.out.init()
	for i := range sh.batch {
		sh.batch[i].Data = sh.in.buffer(i)
	}
	for _, src := range sources {
		if u.o.Paused {
			break
		}
		err := src.Control(func(fd int) error {
			if e := sh.register(fd, ref{source: src}); e != 0 {
				return e
			}
			return nil
		})
		if err != nil {
			sh.release()
			return nil, err
		}
	}
	return sh, nil
}

// register has a socket reported: a source as long as there is something to
// read, any other when something comes.
func (sh *shard) register(fd int, r ref) unix.Errno {
	if fd >= len(sh.refs) {
		sh.refs = append(sh.refs, make([]ref, fd+1+len(sh.refs)/4-len(sh.refs))...)
	}
	sh.gen++
	r.gen = sh.gen
	events := uint32(unix.EPOLLIN)
	if r.source == nil {
		events |= edgeTriggered
	}
	e := sh.control(unix.EPOLL_CTL_ADD, int32(fd), r.gen, events)
	if e == 0 {
		sh.refs[fd] = r
	}
	return e
}

// forget is called before a registered descriptor is closed.
func (sh *shard) forget(fd int) { sh.refs[fd] = ref{} }

func (sh *shard) run() {
	defer sh.leave()
	if err := sh.watch(sh.turns); err != nil {
		sh.u.log.Error("loop of datagrams ended", "err", err)
	}
}

// leave ends the sessions. What is posted from now on is run by its poster.
func (sh *shard) leave() {
	sh.mu.Lock()
	sh.gone = true
	sh.mu.Unlock()
	sh.serve()
	for _, f := range sh.flows {
		sh.closeFlow(f)
	}
	sh.openers.end()
	sh.release()
}

// turns serves what there is, and returns when the loop has to sleep. A fetch
// that did not fill the array left nothing ready behind but a source, which is
// reported for as long as there is something to read.
func (sh *shard) turns(uintptr) (done bool) {
	sh.awake.Store(true)
	for {
		n := sh.fetch()
		more := n == len(sh.events)
		for i := range sh.events[:n] {
			if sh.dispatch(&sh.events[i]) {
				more = true
			}
		}
		sh.serve()
		if sh.stopped.Load() {
			return true
		}
		if more {
			// What the events above made ready runs now.
			runtime.Gosched()
			continue
		}
		sh.awake.Store(false)
		if sh.waiting() {
			sh.awake.Store(true)
			continue
		}
		return false
	}
}

// dispatch serves one event, and tells whether there may be more of it that no
// further event will report.
func (sh *shard) dispatch(ev *unix.EpollEvent) (more bool) {
	if sh.woken(ev) {
		return false
	}
	r := sh.refs[ev.Fd]
	if r.gen != uint32(ev.Pad) {
		return false // it was closed after the event was fetched
	}
	if r.source != nil {
		sh.fromClients(r.source)
		return true
	}
	for range turnBatches {
		if r.flow != nil {
			more = sh.fromClient(r.flow)
		} else {
			more = sh.fromOutlet(r.outlet)
		}
		if !more {
			return false
		}
	}
	// The others first. The kernel reports anew what is ready then.
	sh.control(unix.EPOLL_CTL_MOD, ev.Fd, r.gen, unix.EPOLLIN|edgeTriggered)
	return true
}

// turnBatches is how often a socket is read before others have their turn.
const turnBatches = 4

// serve runs Invalidate, what was posted, and the clock. What was posted before
// an Invalidate can be datagrams that may no longer leave.
func (sh *shard) serve() {
	sh.mu.Lock()
	posted := sh.posted
	sh.posted = nil
	sh.mu.Unlock()
	if epoch := sh.u.epoch.Load(); epoch != sh.epoch {
		sh.epoch = epoch
		sh.decideAll()
	}
	for _, f := range posted {
		f()
	}
	if now := sh.u.now.Load(); now != sh.now {
		sh.now = now
		sh.expire()
	}
}

func (sh *shard) waiting() bool {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	return len(sh.posted) > 0 || sh.now != sh.u.now.Load() || sh.epoch != sh.u.epoch.Load() || sh.stopped.Load()
}

// post has the loop run f; false if the loop has ended. Any goroutine may call
// it.
func (sh *shard) post(f func()) bool {
	sh.mu.Lock()
	if sh.gone {
		sh.mu.Unlock()
		return false
	}
	sh.posted = append(sh.posted, f)
	sh.mu.Unlock()
	sh.wake()
	return true
}

// fromClients serves what came for flows without a socket of their own.
func (sh *shard) fromClients(src flow.PacketSource) {
	n, err := src.TryReadBatch(sh.batch[:])
	if err != nil {
		if !sh.stopped.Load() {
			sh.u.lost(err)
		}
		// It would be reported for ever.
		src.Control(func(fd int) error { sh.forget(fd); sh.control(unix.EPOLL_CTL_DEL, int32(fd), 0, 0); return nil })
		return
	}
	for i := range sh.batch[:n] {
		d := &sh.batch[i]
		f := sh.find(src, d)
		sh.next[i] = -1
		if f.tail < 0 {
			f.head = int8(i)
			sh.dirty = append(sh.dirty, f)
		} else {
			sh.next[f.tail] = int8(i)
		}
		f.tail = int8(i)
	}
	for i, f := range sh.dirty {
		sh.dirty[i] = nil
		sh.data = sh.data[:0]
		for k := f.head; k >= 0; k = sh.next[k] {
			sh.data = append(sh.data, sh.batch[k].Data)
		}
		f.head, f.tail = -1, -1
		if f.closed { // it made room for another of the same batch
			sh.u.drop(DropLimit, len(sh.data))
		} else {
			sh.up(f, sh.data)
		}
	}
	sh.dirty = sh.dirty[:0]
}

// fromClient serves what came by a flow's own socket, and tells whether there
// may be more.
func (sh *shard) fromClient(f *udpFlow) (more bool) {
	n, e := sh.in.receive(int(f.fd))
	switch e {
	case 0:
	case unix.EAGAIN:
		return false
	case unix.EMSGSIZE:
		return true
	default:
		sh.closeFlow(f) // the client's socket is gone: ICMP said so
		return false
	}
	sh.data = sh.data[:0]
	for i := range n {
		data, segment := sh.in.message(i)
		if sh.in.sentBy(i, f.s.client) {
			sh.data = split(sh.data, data, segment)
		} else {
			sh.astray = append(sh.astray, i)
		}
	}
	if len(sh.data) > 0 {
		sh.up(f, sh.data)
	}
	if len(sh.astray) > 0 {
		sh.fromOthers(f.src, f.dst)
	}
	return n == burstSize && f.fd >= 0
}

// fromOthers serves what came by the socket of another flow to the same
// destination. The kernel looks for a socket and then whether that is connected;
// if it is being connected just then, the first one is found for anybody. Which
// interface such a datagram came in by is not known.
func (sh *shard) fromOthers(src flow.PacketSource, dst netip.AddrPort) {
	for _, i := range sh.astray {
		client := addrPort(&sh.in.names[i])
		data, segment := sh.in.message(i)
		f := sh.find(src, &flow.Datagram{Src: client, Dst: dst})
		if f.verdict.Way == nil && f.s.ifIndex == 0 {
			sh.u.drop(DropStranger, 1)
			sh.closeFlow(f) // the next one will be decided with its interface
			continue
		}
		sh.data = split(sh.data[:0], data, segment)
		sh.up(f, sh.data)
	}
	sh.astray = sh.astray[:0]
}

// split appends the datagrams that a message consists of.
func split(list [][]byte, data []byte, segment int) [][]byte {
	for len(data) > segment {
		list = append(list, data[:segment])
		data = data[segment:]
	}
	return append(list, data)
}

// fromOutlet serves what came back, and tells whether there may be more.
// Datagrams of one flow that follow one another go together.
func (sh *shard) fromOutlet(o *outlet) (more bool) {
	n, e := sh.in.receive(int(o.fd))
	switch e {
	case 0:
	case unix.EAGAIN:
		return false
	case unix.EMSGSIZE:
		return true
	default:
		sh.brokenOutlet(o, e)
		return false
	}
	var to *udpFlow
	sh.data = sh.data[:0]
	for i := range n {
		data, segment := sh.in.message(i)
		if o.socket.pair {
			if len(data) == 0 {
				sh.down(to, sh.data)
				sh.brokenOutlet(o, unix.EPIPE)
				return false
			}
		} else if !sh.in.sentBy(i, o.socket.peer) {
			sh.u.drop(DropStranger, 1)
			continue
		}
		for more := true; more; {
			d := data
			if more = len(data) > segment; more {
				d, data = data[:segment], data[segment:]
			}
			if o.closed { // by what was delivered before
				sh.u.drop(DropOutlet, 1)
				continue
			}
			f, payload := sh.sender(o, d)
			if f != to {
				sh.down(to, sh.data)
				to, sh.data = f, sh.data[:0]
			}
			if f != nil {
				sh.data = append(sh.data, payload)
			}
		}
	}
	sh.down(to, sh.data)
	return n == burstSize && !o.closed
}

// sender returns the flow that a datagram of an outlet is an answer to, and
// what is behind its header; nil if it is dropped.
func (sh *shard) sender(o *outlet, d []byte) (*udpFlow, []byte) {
	if o.bare != nil {
		return o.bare, d
	}
	if o.inner != nil {
		n, ok := o.inner(d)
		if !ok {
			sh.u.drop(DropStranger, 1)
			return nil, nil
		}
		d = d[n:]
	}
	from, name, n, err := sh.u.o.Header(d)
	if err != nil || len(name) == 0 && !from.IsValid() {
		sh.u.drop(DropMalformed, 1)
		return nil, nil
	}
	f := o.answers(from, len(name) > 0)
	if f == nil && len(name) == 0 {
		f = sh.stranger(o, from)
	}
	if f == nil {
		sh.u.drop(DropStranger, 1)
		return nil, nil
	}
	return f, d[n:]
}
