package relay

import "sync"

// wheelSlots is the number of ticks a wheel spans; an entry that is due later
// is looked at once in each turn.
const wheelSlots = 512

// wheel says which of many entries are due, at the price of a list operation
// for each entry and time, not of a look at all of them on each tick. Its time
// is a count of ticks that its owner advances.
//
// Entries are not moved when there is activity: their owner notes the tick at
// which something happened, and puts an entry back when it comes up too early.
type wheel[T any] struct {
	mu    sync.Mutex
	now   uint32
	slots [wheelSlots]*entry[T]
}

// entry is a place in a wheel. The zero value is in none.
type entry[T any] struct {
	owner      *T
	prev, next *entry[T]
	due        uint32
	in         bool
}

// add puts x in, due at the given tick or, if that is past, at the next. If x
// is in already it stays where it is, or comes forward.
func (w *wheel[T]) add(x *entry[T], due uint32) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if int32(due-w.now) <= 0 {
		due = w.now + 1
	}
	if x.in {
		if int32(x.due-due) <= 0 {
			return
		}
		w.unlink(x)
	}
	x.due, x.in = due, true
	head := &w.slots[due%wheelSlots]
	x.prev, x.next = nil, *head
	if *head != nil {
		(*head).prev = x
	}
	*head = x
}

// remove takes x out; no-op if it is in no wheel.
func (w *wheel[T]) remove(x *entry[T]) {
	w.mu.Lock()
	if x.in {
		w.unlink(x)
	}
	w.mu.Unlock()
}

// advance moves the time on by one tick and appends to out the owners of the
// entries that are due now, taking those entries out.
func (w *wheel[T]) advance(out []*T) []*T {
	w.mu.Lock()
	w.now++
	for x := w.slots[w.now%wheelSlots]; x != nil; {
		next := x.next
		if x.due == w.now {
			w.unlink(x)
			out = append(out, x.owner)
		}
		x = next
	}
	w.mu.Unlock()
	return out
}

func (w *wheel[T]) unlink(x *entry[T]) {
	if x.prev != nil {
		x.prev.next = x.next
	} else {
		w.slots[x.due%wheelSlots] = x.next
	}
	if x.next != nil {
		x.next.prev = x.prev
	}
	x.prev, x.next, x.in = nil, nil, false
}
