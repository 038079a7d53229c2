package redirect

import (
	"fmt"
	"iter"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
)

// set is an nftables set. One without a name is anonymous and belongs to its
// rule. The elements are given in the form that the kernel keeps them: a range
// is an element for its first address and one, flagged as an end, for the first
// behind it.
type set struct {
	name     string
	key      nftables.SetDatatype
	data     nftables.SetDatatype // of a map; the zero value: it is none
	interval bool
	timeout  bool   // elements may end by themselves
	dynamic  bool   // rules add elements
	counter  bool   // each element counts what is found by it
	size     uint32 // 0: as it comes
	elements []nftables.SetElement
	ranges   []Range                       // in place of elements: so many that they are made when they are sent
	list     func(yield func(string) bool) // the elements as nft writes them; nil: none
}

// chunk is how many elements go into one message: the length of an attribute is
// a number of 16 bits, and what does not fit is cut off without an error.
const chunk = 1000

// pieces are the elements in messages' worth. Each is valid until the next.
func (s *set) pieces() iter.Seq[[]nftables.SetElement] {
	if s.ranges == nil {
		return slices.Chunk(s.elements, chunk)
	}
	return func(yield func([]nftables.SetElement) bool) {
		piece := make([]nftables.SetElement, 0, min(chunk, 2*len(s.ranges)))
		for _, r := range s.ranges {
			if len(piece)+2 > chunk {
				if !yield(piece) {
					return
				}
				piece = piece[:0]
			}
			piece = append(piece, nftables.SetElement{Key: r.From.AsSlice()})
			if end := r.To.Next(); end.IsValid() {
				piece = append(piece, nftables.SetElement{Key: end.AsSlice(), IntervalEnd: true})
			}
		}
		yield(piece)
	}
}

func (s *set) lookup() expr.Any { return &expr.Lookup{SourceRegister: reg1, SetName: s.name} }

// lib returns the set as the library knows it. The library counts sets in a
// variable of its own unless they have a number.
func (s *set) lib(t *nftables.Table, id uint32) *nftables.Set {
	n := &nftables.Set{Table: t, ID: id, Name: s.name, KeyType: s.key, Interval: s.interval,
		HasTimeout: s.timeout, Dynamic: s.dynamic, Counter: s.counter, Size: s.size}
	if s.data.Bytes > 0 {
		n.IsMap, n.DataType = true, s.data
	}
	switch s.key.Name {
	case nftables.TypeIFName.Name, nftables.TypeFIBAddr.Name, nftables.TypeUID.Name, nftables.TypeGID.Name, nftables.TypeCGroupV2.Name:
		n.KeyByteOrder = binaryutil.NativeEndian
	default:
		n.KeyByteOrder = binaryutil.BigEndian
	}
	if s.name == "" {
		n.Name, n.Anonymous, n.Constant = "__set%d", true, true
	}
	return n
}

func addrType(f family) nftables.SetDatatype {
	if f == ip4 {
		return nftables.TypeIPAddr
	}
	return nftables.TypeIP6Addr
}

// concat joins types as nft does (type1 . type2).
func concat(types ...nftables.SetDatatype) nftables.SetDatatype {
	t, err := nftables.ConcatSetType(types...)
	if err != nil {
		panic(err) // more than five types: a mistake of ours that every use shows
	}
	return t
}

// addrSet holds normal ranges of a family.
func addrSet(name string, f family, ranges []Range) *set {
	s := &set{name: name, key: addrType(f), interval: true, ranges: ranges}
	s.list = func(yield func(string) bool) {
		for _, r := range ranges {
			if !yield(r.text()) {
				return
			}
		}
	}
	return s
}

// portSet holds normal ranges of ports.
func portSet(name string, ports []PortRange) *set {
	s := &set{name: name, key: nftables.TypeInetService, interval: true}
	for _, r := range ports {
		s.elements = append(s.elements, nftables.SetElement{Key: big16(r.From)})
		if r.To < 65535 {
			s.elements = append(s.elements, nftables.SetElement{Key: big16(r.To + 1), IntervalEnd: true})
		}
	}
	s.list = func(yield func(string) bool) {
		for _, r := range ports {
			text := strconv.Itoa(int(r.From))
			if r.To != r.From {
				text += "-" + strconv.Itoa(int(r.To))
			}
			if !yield(text) {
				return
			}
		}
	}
	return s
}

func ifSet(name string, ifs []string) *set {
	s := &set{name: name, key: nftables.TypeIFName}
	for _, i := range ifs {
		s.elements = append(s.elements, nftables.SetElement{Key: ifname(i)})
	}
	s.list = func(yield func(string) bool) {
		for _, i := range ifs {
			if !yield(strconv.Quote(i)) {
				return
			}
		}
	}
	return s
}

// serverSet holds addresses of a family with their TCP ports.
func serverSet(name string, f family, servers []netip.AddrPort) *set {
	s := &set{name: name, key: concat(addrType(f), nftables.TypeInetService)}
	for _, a := range servers {
		s.elements = append(s.elements, nftables.SetElement{Key: append(append(a.Addr().AsSlice(), big16(a.Port())...), 0, 0)})
	}
	s.list = func(yield func(string) bool) {
		for _, a := range servers {
			if !yield(fmt.Sprintf("%s . %d", a.Addr(), a.Port())) {
				return
			}
		}
	}
	return s
}

// The dynamic sets: what Admit let in, and what of it is in use. The latter has
// two names, which take turns when a plan empties it: a packet that is still on
// its way through the rules before adds its address to the set before.
const (
	admittedSet = "dyn"
	dynamicSize = 1 << 17 // elements of each
)

var liveSets = [2]string{"live", "liveb"}

// dynamicSet is the set of one kind, family and part.
func dynamicSet(kind string, f family, p part) *set {
	types := []nftables.SetDatatype{addrType(f), nftables.TypeInetProto, nftables.TypeInetService}[:p+1]
	s := &set{name: kind + f.digit() + p.suffix(), key: types[0], timeout: true, dynamic: kind != admittedSet, size: dynamicSize}
	if p != partAddr {
		s.key = concat(types...)
	}
	return s
}

// text writes the set as nft does.
func (s *set) text(b *strings.Builder) {
	word, kind := "set", s.key.Name
	if s.data.Bytes > 0 {
		word, kind = "map", kind+" : "+s.data.Name
	}
	fmt.Fprintf(b, "\t%s %s {\n\t\ttype %s\n", word, s.name, kind)
	if s.size > 0 {
		fmt.Fprintf(b, "\t\tsize %d\n", s.size)
	}
	switch {
	case s.dynamic:
		b.WriteString("\t\tflags dynamic,timeout\n")
	case s.timeout:
		b.WriteString("\t\tflags timeout\n")
	case s.interval:
		b.WriteString("\t\tflags interval\n")
	}
	if s.counter {
		b.WriteString("\t\tcounter\n")
	}
	if s.list != nil && len(s.elements)+len(s.ranges) > 0 {
		sep := "\t\telements = { "
		for e := range s.list {
			b.WriteString(sep + e)
			sep = ",\n\t\t\t     "
		}
		b.WriteString(" }\n")
	}
	b.WriteString("\t}\n\n")
}
