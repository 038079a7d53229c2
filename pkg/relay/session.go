package relay

import (
	"net/netip"
	"time"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

// session is a client socket with all that it sends to.
type session struct {
	client  netip.AddrPort
	ifIndex int
	start   time.Time
	flows   int // now
	order   flowList
	outlets []*outlet
	via     []lastVia
	result  SessionResult
}

// udpFlow is what a session sends to one destination.
type udpFlow struct {
	s        *session
	id       uint64
	start    time.Time
	moved    UDPTraffic
	dst      netip.AddrPort
	src      flow.PacketSource // whose raw sender the answers leave by
	verdict  Verdict
	out      *outlet // nil: none, or refused
	fd       int32   // socket of its own; -1: none
	seen     int     // datagrams in this tick, up to ownSocketAfter; not counted once it has a socket
	noSocket bool    // it cannot have one
	super    int     // see burst.send
	epoch    uint32  // of the verdict
	last     uint32  // tick of the last datagram
	retry    uint32  // tick; the way is not tried again before
	told     uint32  // tick of the last TooBig, plus one
	failed   bool    // the way could not be opened
	failure  Refusal // what the client was told of it
	closed   bool

	head, tail int8 // datagrams in shard.batch; -1: none

	list  *flowList // shard.long, shard.brief or one of shard.timed
	links [2]links  // in list and in session.order
}

// flowList keeps flows in the order of their last datagram.
type flowList struct {
	which       int // of udpFlow.links
	first, last *udpFlow
}

type links struct{ prev, next *udpFlow }

func (l *flowList) next(f *udpFlow) *udpFlow { return f.links[l.which].next }

func (l *flowList) add(f *udpFlow) {
	f.links[l.which] = links{prev: l.last}
	if l.last != nil {
		l.last.links[l.which].next = f
	} else {
		l.first = f
	}
	l.last = f
}

func (l *flowList) remove(f *udpFlow) {
	at := f.links[l.which]
	if at.prev != nil {
		at.prev.links[l.which].next = at.next
	} else {
		l.first = at.next
	}
	if at.next != nil {
		at.next.links[l.which].prev = at.prev
	} else {
		l.last = at.prev
	}
	f.links[l.which] = links{}
}

// find returns the flow that a client's datagram belongs to, a new one if need
// be.
func (sh *shard) find(src flow.PacketSource, d *flow.Datagram) *udpFlow {
	f := sh.flows[flowKey{d.Src, d.Dst}]
	if f == nil {
		f = sh.newFlow(src, d.Src, d.Dst, d.IfIndex)
		sh.decide(f)
	}
	return f
}

// newFlow makes a flow, which is not decided yet, and a session if it is the
// first of its client socket.
func (sh *shard) newFlow(src flow.PacketSource, client, dst netip.AddrPort, ifIndex int) *udpFlow {
	s := sh.sessions[client]
	if s != nil && s.flows >= maxSessionFlows {
		sh.evict(s.order.first)
	}
	for len(sh.flows) >= share(sh.u.o.MaxFlows, len(sh.u.shards)) || s == nil && len(sh.sessions) >= share(sh.u.o.MaxSessions, len(sh.u.shards)) {
		sh.evict(sh.oldest(nil))
		s = sh.sessions[client] // it can have been the last flow of this very session
	}
	now := time.Now()
	if s == nil {
		s = &session{client: client, ifIndex: ifIndex, start: now, order: flowList{which: 1}}
		s.result = SessionResult{Client: client, IfIndex: ifIndex, Dst: dst}
		sh.sessions[client] = s
		sh.u.sessions.Add(1)
		sh.u.opened.Add(1)
	}
	f := &udpFlow{s: s, id: sh.u.o.ID(), start: now, dst: dst, src: src, fd: -1, super: maxSuper, head: -1, tail: -1, last: sh.now}
	s.flows++
	s.result.Flows++
	sh.flows[flowKey{client, dst}] = f
	sh.u.flows.Add(1)
	return f
}

// share is the part of a limit that one of n shards has.
func share(limit, n int) int { return max((limit+n-1)/n, 1) }

// decide asks what becomes of a flow.
func (sh *shard) decide(f *udpFlow) {
	epoch := sh.u.epoch.Load() // before Decide, which may see a later plan
	sh.follow(f, sh.u.o.Decide(f.s.client, f.dst, f.s.ifIndex), epoch)
}

// follow gives a flow a verdict, and takes it out of an outlet that is not its
// way any longer.
func (sh *shard) follow(f *udpFlow, v Verdict, epoch uint32) {
	old := f.verdict.Release
	f.verdict, f.epoch = v, epoch
	if old != nil {
		old() // after the new verdict has taken what it wants to keep
	}
	note(&f.s.result.Why, v.Why)
	f.failed = false
	if o := f.out; o != nil {
		sh.detach(f)
		if v.Way != nil && !o.closed && o.takes(&v, f.dst) {
			sh.attach(f, o)
		} else if o.flows == 0 {
			sh.closeOutlet(o)
		}
	}
	if f.list != sh.listOf(f) {
		f.last = sh.now // as all lists are in that order
		sh.use(f)
	}
}

// decideAll decides every flow anew. One that is not to go on as it did ends, and
// its own socket with it: what the kernel decides is not to come to that, nor
// an answer to leave by it.
func (sh *shard) decideAll() {
	for _, f := range sh.flows {
		if f.epoch != sh.u.epoch.Load() {
			sh.decide(f)
		}
		if f.out == nil {
			sh.closeFlow(f)
		}
	}
}

// listOf returns the list that a flow belongs to.
func (sh *shard) listOf(f *udpFlow) *flowList {
	switch v := &f.verdict; {
	case v.Short || v.Way == nil:
		return &sh.brief
	case v.Idle > 0:
		limit := sh.u.ticks(v.Idle)
		if sh.timed[limit] == nil {
			sh.timed[limit] = &flowList{}
		}
		return sh.timed[limit]
	}
	return &sh.long
}

// lists gives each list of flows to yield, with its limit.
func (sh *shard) lists(yield func(l *flowList, limit uint32) bool) {
	if !yield(&sh.brief, sh.u.short.Load()) || !yield(&sh.long, sh.u.idle.Load()) {
		return
	}
	for limit, l := range sh.timed {
		if !yield(l, limit) {
			return
		}
	}
}

// use puts a flow at the end of its lists.
func (sh *shard) use(f *udpFlow) {
	if f.list != nil {
		f.list.remove(f)
		f.s.order.remove(f)
	}
	f.list = sh.listOf(f)
	f.list.add(f)
	f.s.order.add(f)
}

// touch notes that a flow is used, and has it decided anew after Invalidate.
func (sh *shard) touch(f *udpFlow) {
	if f.last != sh.now {
		f.last, f.seen = sh.now, 0
		if f.out != nil {
			sh.tend(f.out)
		}
		sh.use(f)
	}
	if f.epoch != sh.u.epoch.Load() {
		sh.decide(f)
	}
}

// closeFlow ends a flow, and its outlet and its session if it was their last.
func (sh *shard) closeFlow(f *udpFlow) {
	if f.closed {
		return
	}
	f.closed = true
	s := f.s
	delete(sh.flows, flowKey{s.client, f.dst})
	f.list.remove(f)
	s.order.remove(f)
	sh.u.flows.Add(-1)
	if f.fd >= 0 {
		sh.forget(int(f.fd))
		rawClose(int(f.fd))
		sh.giveSocket()
		f.fd = -1
	}
	if o := f.out; o != nil {
		if sh.detach(f); o.flows == 0 {
			sh.closeOutlet(o)
		}
	}
	if f.verdict.Release != nil {
		f.verdict.Release()
	}
	if s.flows--; s.flows > 0 {
		return
	}
	delete(sh.sessions, s.client)
	sh.u.sessions.Add(-1)
	if sh.u.o.Done != nil {
		s.result.Duration = time.Since(s.start)
		sh.u.o.Done(s.result)
	}
}

// expire ends the flows that nothing moved in for too long.
func (sh *shard) expire() {
	for l, limit := range sh.lists {
		// The tick under way counts for nothing, so that no limit is cut short.
		for f := l.first; f != nil && sh.now-f.last > limit; f = l.first {
			sh.closeFlow(f)
		}
		if l.first == nil && sh.timed[limit] == l {
			delete(sh.timed, limit)
		}
	}
}

// oldest returns the flow that was not used for the longest time, but for the
// one given; nil if there is no other.
func (sh *shard) oldest(but *udpFlow) (oldest *udpFlow) {
	for l := range sh.lists {
		f := l.first
		if f != nil && f == but {
			f = l.next(f)
		}
		if f != nil && (oldest == nil || int32(f.last-oldest.last) < 0) {
			oldest = f
		}
	}
	return oldest
}

// evict ends a flow to make room.
func (sh *shard) evict(f *udpFlow) {
	sh.u.evicted.Add(1)
	sh.closeFlow(f)
}
