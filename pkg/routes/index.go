package routes

import (
	"cmp"
	"net/netip"
	"slices"
	"strings"

	"github.com/gaissmai/bart"
)

// index is where a flow's destination finds the rules that it can match. Each
// list of rules is in their order.
//
// The members of a LIST share one list of rules, whatever their number, and the
// rules that use the LIST are entered once for all of them: so a LIST costs its
// own size, and not that times the rules.
type index struct {
	prefixes bart.Table[*prefixNode] // by address: the longest prefix, from which parents lead on
	names    nameTable
	below    bool    // there is a pattern
	anyName  []*Rule // catch-alls, for every name
	anyAddr  []*Rule // catch-alls, for an address that is not known

	groups [][]*Rule // lists that are shared; the first one is empty
}

// nameRules are two of index.groups: what is said of a name, and of the names
// below it.
type nameRules struct{ exact, below uint32 }

// prefixNode is what the rules say of one prefix.
type prefixNode struct {
	group  uint32      // one of index.groups
	parent *prefixNode // the next shorter prefix; nil: none
}

// exact returns the rules for a name, of which it is one.
func (x *index) exact(name string) []*Rule { return x.groups[x.names.get(name).exact] }

// under returns the rules for all names below a domain.
func (x *index) under(domain string) []*Rule { return x.groups[x.names.get(domain).below] }

// indexer makes an index.
type indexer struct {
	index
	merged map[[2]uint32]uint32 // two groups, and what they are together
}

// newIndex enters rules, which have their Index.
func newIndex(rules []*Rule, names *nameText) *index {
	x := indexer{index: index{groups: [][]*Rule{nil}}, merged: map[[2]uint32]uint32{}}
	// The members that rules spell out, by what they are.
	prefixes := map[netip.Prefix][]*Rule{}
	exact, below := map[string][]*Rule{}, map[string][]*Rule{}
	// And the rules that use a LIST: for its addresses, and for its names.
	var lists []*list
	users := map[*list]*[2][]*Rule{}
	for _, r := range rules {
		d := &r.dest
		if d.anyName {
			x.anyName = append(x.anyName, r)
		}
		if slices.ContainsFunc(d.prefixes, func(p netip.Prefix) bool { return p.Bits() == 0 }) {
			x.anyAddr = append(x.anyAddr, r)
		}
		if d.list != nil {
			u := users[d.list]
			if u == nil {
				u = &[2][]*Rule{}
				users[d.list] = u
				lists = append(lists, d.list)
			}
			if len(d.prefixes) > 0 {
				u[0] = append(u[0], r)
			}
			if r.ownName() {
				u[1] = append(u[1], r)
			}
			continue
		}
		for _, p := range d.prefixes {
			prefixes[p] = appendOnce(prefixes[p], r)
		}
		for n := range d.names.all() {
			exact[n] = appendOnce(exact[n], r)
		}
		for s := range d.suffixes.all() {
			below[s] = appendOnce(below[s], r)
		}
	}
	x.names = newNameTable(names, names.n)
	for p, rules := range prefixes {
		x.prefix(p, x.group(rules))
	}
	for n, rules := range exact {
		x.name(names.add([]byte(n)), nameRules{exact: x.group(rules)})
	}
	for s, rules := range below {
		x.name(names.add([]byte(s)), nameRules{below: x.group(rules)})
	}
	for _, l := range lists {
		u := users[l]
		if g := x.group(u[0]); g != 0 {
			for _, p := range l.dest.prefixes {
				x.prefix(p, g)
			}
		}
		if g := x.group(u[1]); g != 0 {
			for _, n := range l.dest.names.refs {
				x.name(n, nameRules{exact: g})
			}
			for _, s := range l.dest.suffixes.refs {
				x.name(s, nameRules{below: g})
			}
		}
	}
	x.link()
	return &x.index
}

// group makes a list of rules one of the groups.
func (x *indexer) group(rules []*Rule) uint32 {
	if len(rules) == 0 {
		return 0
	}
	x.groups = append(x.groups, rules)
	return uint32(len(x.groups) - 1)
}

// together returns the group with the rules of both.
func (x *indexer) together(a, b uint32) uint32 {
	if a == 0 || a == b {
		return b
	}
	if b == 0 {
		return a
	}
	if g, ok := x.merged[[2]uint32{a, b}]; ok {
		return g
	}
	all := slices.Concat(x.groups[a], x.groups[b])
	slices.SortFunc(all, func(a, b *Rule) int { return cmp.Compare(a.Index, b.Index) })
	g := x.group(slices.Compact(all))
	x.merged[[2]uint32{a, b}] = g
	x.merged[[2]uint32{g, b}] = g // a member that a LIST has twice
	return g
}

func (x *indexer) prefix(p netip.Prefix, g uint32) {
	x.prefixes.Modify(p, func(n *prefixNode, ok bool) (*prefixNode, bool) {
		if !ok {
			n = &prefixNode{}
		}
		n.group = x.together(n.group, g)
		return n, false
	})
}

func (x *indexer) name(name nameRef, more nameRules) {
	n := x.names.slot(name)
	n.exact, n.below = x.together(n.exact, more.exact), x.together(n.below, more.below)
	x.below = x.below || more.below != 0
}

// appendOnce appends a rule that may be the last one of the list already.
func appendOnce(list []*Rule, r *Rule) []*Rule {
	if n := len(list); n > 0 && list[n-1] == r {
		return list
	}
	return append(list, r)
}

// link leads from each prefix to the next shorter one. Sorted, a prefix comes
// before those that it contains, so the parent is found on the stack.
func (x *index) link() {
	var stack []netip.Prefix
	var nodes []*prefixNode
	for p, n := range x.prefixes.AllSorted() {
		for len(stack) > 0 && !contains(stack[len(stack)-1], p) {
			stack, nodes = stack[:len(stack)-1], nodes[:len(nodes)-1]
		}
		if len(nodes) > 0 {
			n.parent = nodes[len(nodes)-1]
		}
		stack, nodes = append(stack, p), append(nodes, n)
	}
}

func contains(outer, inner netip.Prefix) bool {
	return outer.Bits() <= inner.Bits() && outer.Contains(inner.Addr())
}

// ofName calls f with each list of rules that a flow to a name can match.
func (x *index) ofName(name string, f func([]*Rule)) {
	f(x.anyName)
	f(x.exact(name))
	for rest := name; x.below; {
		i := strings.IndexByte(rest, '.')
		if i < 0 {
			return
		}
		rest = rest[i+1:]
		f(x.under(rest))
	}
}
