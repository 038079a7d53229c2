package relay

import "fmt"

// tally is what a loop holds, counted by looking at all of it.
type tally struct{ sessions, flows, outlets, sockets, queued int }

func (t *tally) add(u tally) {
	t.sessions += u.sessions
	t.flows += u.flows
	t.outlets += u.outlets
	t.sockets += u.sockets
	t.queued += u.queued
}

// agrees compares with the counters.
func (t tally) agrees(u *UDP) error {
	s := u.Stats()
	if c := (tally{s.Sessions, s.Flows, s.Outlets, s.Sockets, int(u.queued.Load())}); c != t {
		return fmt.Errorf("there is %+v, counted is %+v", t, c)
	}
	return nil
}

// tallyOf counts, and returns what does not agree. It is called by the loop.
func tallyOf(sh *shard) (t tally, err error) {
	wrong := func(format string, args ...any) {
		if err == nil {
			err = fmt.Errorf(format, args...)
		}
	}
	flows := map[*session]int{}
	attached := map[*outlet]int{}
	look := func(l *flowList) (n int) {
		var before *udpFlow
		for f := l.first; f != nil; before, f = f, l.next(f) {
			if f.links[l.which].prev != before {
				wrong("%v: wrongly linked", f.dst)
			}
			if before != nil && int32(f.last-before.last) < 0 {
				wrong("%v: before one that was used later", before.dst)
			}
			n++
		}
		if l.last != before {
			wrong("a list does not end with its last")
		}
		return n
	}
	listed := 0
	for l := range sh.lists {
		listed += look(l)
	}
	for k, f := range sh.flows {
		t.flows++
		flows[f.s]++
		if f.closed || k != (flowKey{f.s.client, f.dst}) || sh.sessions[k.client] != f.s || f.list != sh.listOf(f) || f.head >= 0 || f.tail >= 0 {
			wrong("%v: kept wrongly", k)
		}
		if f.fd >= 0 {
			t.sockets++
			if sh.refs[f.fd].flow != f {
				wrong("%v: descriptor %d is not its own", k, f.fd)
			}
		}
		o := f.out
		if o == nil {
			continue
		}
		attached[o]++
		if o.closed || o.s != f.s {
			wrong("%v: an outlet that is not its session's", k)
		}
		if f.epoch == sh.u.epoch.Load() && (f.verdict.Way == nil || f.verdict.Way.Key != o.key) {
			wrong("%v: an outlet that is not its way", k)
		}
		if o.bare != f && o.named[f.dst.Port()] != f && o.byAddr[f.dst] != f {
			wrong("%v: its outlet does not know it", k)
		}
	}
	if listed != t.flows {
		wrong("%d flows, %d in the lists", t.flows, listed)
	}
	for client, s := range sh.sessions {
		t.sessions++
		if s.client != client || s.flows != flows[s] || s.flows == 0 || look(&s.order) != s.flows {
			wrong("%v: %d flows, says %d", client, flows[s], s.flows)
		}
		for _, o := range s.outlets {
			t.outlets++
			t.sockets++
			known := 0
			for range o.each() {
				known++
			}
			if o.closed || o.s != s || o.flows != attached[o] || o.flows != known || o.flows == 0 {
				wrong("%v: an outlet with %d flows, says %d, knows %d", client, attached[o], o.flows, known)
			}
			if o.fd >= 0 && (sh.refs[o.fd].outlet != o || len(o.queue) > 0) || len(o.queue) > maxOutletQueue {
				wrong("%v: outlet %d is kept wrongly, %d in its queue", client, o.fd, len(o.queue))
			}
			for _, q := range o.queue {
				t.queued += len(q.data)
			}
		}
	}
	refs := len(sh.sources)
	for fd, r := range sh.refs {
		switch {
		case r.source != nil:
			refs--
		case r.flow != nil && int(r.flow.fd) != fd, r.outlet != nil && int(r.outlet.fd) != fd:
			wrong("descriptor %d belongs to something that is gone", fd)
		}
	}
	if refs != 0 {
		wrong("%d sources are not registered", refs)
	}
	return t, err
}
