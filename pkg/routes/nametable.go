package routes

import (
	"hash/maphash"
	"iter"
	"math/bits"
	"strings"
)

// Names are most of what a table holds, by the million. So there is one text of all
// of them, each is four bytes wherever else it is named, and what finds them is one
// array without pointers.

// nameRef is a place in a nameText: a block, and where in it.
type nameRef uint32

const nameBlock = 1 << 16 // bytes of a block

// nameText holds names, each behind its length, which is 253 at most.
type nameText struct {
	blocks []string
	last   strings.Builder // of which the last block is what there is until now
	newest nameRef
	n      int // names, some of them twice
}

// add enters a name, unless it is the one that was entered last.
func (t *nameText) add(name []byte) nameRef {
	if len(t.blocks) > 0 && t.at(t.newest) == string(name) {
		return t.newest
	}
	if len(t.blocks) == 0 || nameBlock-t.last.Len() <= len(name) {
		t.last = strings.Builder{}
		t.last.Grow(nameBlock)
		t.blocks = append(t.blocks, "")
	}
	block := len(t.blocks) - 1
	t.newest = nameRef(block*nameBlock + t.last.Len())
	t.n++
	t.last.WriteByte(byte(len(name)))
	t.last.Write(name)
	t.blocks[block] = t.last.String()
	return t.newest
}

func (t *nameText) size() int { return len(t.blocks) * nameBlock }

func (t *nameText) at(r nameRef) string {
	b := t.blocks[r/nameBlock][r%nameBlock:]
	return b[1 : 1+int(b[0])]
}

// nameList is some of the names of a text.
type nameList struct {
	text *nameText
	refs []nameRef
}

func (t *nameText) list(name string) nameList { return nameList{t, []nameRef{t.add([]byte(name))}} }

func (l *nameList) add(more nameList) {
	if more.text != nil {
		l.text, l.refs = more.text, append(l.refs, more.refs...)
	}
}

// all yields the names.
func (l nameList) all() iter.Seq[string] {
	return func(yield func(string) bool) {
		for _, r := range l.refs {
			if !yield(l.text.at(r)) {
				return
			}
		}
	}
}

// nameTable finds what is said of a name: a hash table with open addressing, of a
// size that it keeps.
type nameTable struct {
	text  *nameText
	seed  maphash.Seed
	tags  []uint8 // of each slot: tagged and some bits of the hash; 0: it is empty
	slots []nameSlot
}

type nameSlot struct {
	name nameRef
	nameRules
}

const tagged = 1 << 7

// newNameTable makes a table that has room for so many names of a text.
func newNameTable(text *nameText, names int) nameTable {
	n := names + names/3 + 1
	return nameTable{text, maphash.MakeSeed(), make([]uint8, n), make([]nameSlot, n)}
}

// find returns the slot of a name, where it is or where it would be, and its tag.
func (t *nameTable) find(name string) (i int, tag uint8, there bool) {
	hash := maphash.String(t.seed, name)
	at, _ := bits.Mul64(hash, uint64(len(t.tags)))
	tag = uint8(hash) | tagged
	for i = int(at); t.tags[i] != 0; {
		if t.tags[i] == tag && t.text.at(t.slots[i].name) == name {
			return i, tag, true
		}
		if i++; i == len(t.tags) {
			i = 0
		}
	}
	return i, tag, false
}

// get returns what is said of a name, nothing if it is not there.
func (t *nameTable) get(name string) nameRules {
	if i, _, ok := t.find(name); ok {
		return t.slots[i].nameRules
	}
	return nameRules{}
}

// slot returns the slot of a name, which is there from then on.
func (t *nameTable) slot(r nameRef) *nameSlot {
	i, tag, ok := t.find(t.text.at(r))
	if !ok {
		t.tags[i], t.slots[i].name = tag, r
	}
	return &t.slots[i]
}
