package fakedns

import (
	"hash/maphash"
)

// table is the two-way map between names and indexes, bounded, in the order of
// last use. An index is a place in the pools (address = the pool's first one +
// index) and the number of its entry. There is no pointer per name: entries
// name one another by number and the bytes of the names lie in one arena, so
// that a name costs about 60 bytes and the garbage collector walks nothing. A
// library's LRU costs three times that.
//
// Index 0 is never given (it is the pool's own address), so 0 means none.
type table struct {
	entries []entry  // by index
	buckets []uint32 // heads of the hash chains; a power of two many
	text    []byte   // the names, in the order in which they came
	garbage int      // bytes of text that no entry means any more
	seed    maphash.Seed
	size    int // names

	newest, oldest uint32 // names by last use
	head, tail     uint32 // evicted indexes in quarantine, the earliest first

	fresh uint32 // the lowest index that was never given
	limit uint32 // the first index that is not of the pools
	max   int    // names at most
	pins  map[uint32]int
}

type entry struct {
	chain        uint32 // the next one of the bucket
	newer, older uint32 // by last use; in quarantine newer is the next in the queue
	at           uint32 // where in text the name begins
	evicted      uint32 // seconds since 1970; 0: in use, or never given
	gen          uint16 // of the rules by which every client gets the synthetic address; 0: not known
	len          uint8
}

func newTable(limit uint32, max int) *table {
	return &table{entries: make([]entry, 1, 1024), buckets: make([]uint32, 1024), seed: maphash.MakeSeed(), fresh: 1, limit: limit, max: max, pins: map[uint32]int{}}
}

func (t *table) name(i uint32) []byte {
	e := &t.entries[i]
	return t.text[e.at : e.at+uint32(e.len)]
}

// owner tells whether a name has the index.
func (t *table) owner(i uint32) bool {
	return i > 0 && i < uint32(len(t.entries)) && t.entries[i].len > 0
}

func (t *table) bucket(name []byte) *uint32 {
	return &t.buckets[maphash.Bytes(t.seed, name)&uint64(len(t.buckets)-1)]
}

// find returns the index of a name; 0: it has none.
func (t *table) find(name []byte) uint32 {
	for i := *t.bucket(name); i != 0; i = t.entries[i].chain {
		if string(t.name(i)) == string(name) {
			return i
		}
	}
	return 0
}

// touch makes i the one last used.
func (t *table) touch(i uint32) {
	if t.newest != i {
		t.unlink(i)
		t.link(i)
	}
}

func (t *table) link(i uint32) {
	e := &t.entries[i]
	e.newer, e.older = 0, t.newest
	if t.newest != 0 {
		t.entries[t.newest].newer = i
	} else {
		t.oldest = i
	}
	t.newest = i
}

func (t *table) unlink(i uint32) {
	e := &t.entries[i]
	if e.newer != 0 {
		t.entries[e.newer].older = e.older
	} else {
		t.newest = e.older
	}
	if e.older != 0 {
		t.entries[e.older].newer = e.newer
	} else {
		t.oldest = e.newer
	}
}

// put gives index i, which no name has, to a name.
func (t *table) put(i uint32, name []byte) {
	for uint32(len(t.entries)) <= i {
		t.entries = append(t.entries, entry{})
	}
	if t.size >= len(t.buckets) {
		t.grow()
	}
	e := &t.entries[i]
	*e = entry{at: uint32(len(t.text)), len: uint8(len(name))}
	t.text = append(t.text, name...)
	b := t.bucket(name)
	e.chain, *b = *b, i
	t.link(i)
	t.size++
	t.fresh = max(t.fresh, i+1)
}

func (t *table) grow() {
	t.buckets = make([]uint32, 2*len(t.buckets))
	for i := t.oldest; i != 0; i = t.entries[i].newer {
		b := t.bucket(t.name(i))
		t.entries[i].chain, *b = *b, i
	}
}

// evict takes its index from a name and puts it into quarantine.
func (t *table) evict(i uint32, now uint32) {
	t.remove(i)
	t.entries[i].evicted = now
	if t.tail != 0 {
		t.entries[t.tail].newer = i
	} else {
		t.head = i
	}
	t.tail = i
}

func (t *table) remove(i uint32) {
	e := &t.entries[i]
	for p := t.bucket(t.name(i)); ; p = &t.entries[*p].chain {
		if *p == i {
			*p = e.chain
			break
		}
	}
	t.unlink(i)
	t.garbage += int(e.len)
	*e = entry{}
	t.size--
	if t.garbage > 1<<16 && t.garbage > len(t.text)/2 {
		t.compact()
	}
}

func (t *table) compact() {
	text := make([]byte, 0, len(t.text)-t.garbage)
	for i := t.oldest; i != 0; i = t.entries[i].newer {
		at := uint32(len(text))
		text = append(text, t.name(i)...)
		t.entries[i].at = at
	}
	t.text, t.garbage = text, 0
}

// victim is the name that was used longest ago and has no flow; 0: all have.
// Names with flows that stand in the way are in use, so they go to the front
// and are not met again.
func (t *table) victim() uint32 {
	if len(t.pins) >= t.size {
		return 0
	}
	for t.pins[t.oldest] > 0 {
		t.touch(t.oldest)
	}
	return t.oldest
}

// free returns an index that can be given: one that never was, or the one
// longest in quarantine if its time is over by now. 0: there is none.
func (t *table) free(now, quarantine uint32) uint32 {
	if t.fresh < t.limit {
		return t.fresh
	}
	i := t.head
	if i == 0 || now-t.entries[i].evicted < quarantine {
		return 0
	}
	t.head = t.entries[i].newer
	if t.head == 0 {
		t.tail = 0
	}
	t.entries[i] = entry{}
	return i
}
