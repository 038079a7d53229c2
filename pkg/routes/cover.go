package routes

import (
	"net/netip"
	"slices"
	"strings"
)

// Bounds of the search for rules that can never match, so that it costs no more
// than a part of what reading them does.
const (
	maxCover  = 256     // rules of one list that are looked at
	maxSearch = 1 << 22 // looks in all
)

// coverage is the search for earlier rules because of which r can never match.
type coverage struct {
	p    *parser
	t    *Table
	r    *Rule
	by   *Rule // the last one of those found
	all  bool  // it alone covers everything: both are of the same LIST
	left *int  // of maxSearch
}

// coveredBy returns an earlier rule because of which r can never match; nil:
// there is none. Each part of r's destination must be within one earlier rule
// with no stricter conditions; parts that only several rules cover together
// are not looked for, nor are rules beyond the bounds.
func (p *parser) coveredBy(t *Table, r *Rule, left *int) *Rule {
	c := &coverage{p: p, t: t, r: r, left: left}
	if r.Default || !c.everything() {
		return nil
	}
	return c.by
}

// everything tells whether all of the rule's destination is covered.
func (c *coverage) everything() bool {
	d := &c.r.dest
	for _, p := range d.prefixes {
		if !c.prefix(p) {
			return false
		}
		if c.all {
			return true
		}
	}
	if !d.noName() && c.oneOf(c.t.anyName) {
		return true
	}
	if d.anyName {
		return false
	}
	for n := range d.names.all() {
		if !c.oneOf(c.t.exact(n)) && !c.above(n) {
			return false
		}
		if c.all {
			return true
		}
	}
	for s := range d.suffixes.all() {
		if !c.oneOf(c.t.under(s)) && !c.above(s) {
			return false
		}
		if c.all {
			return true
		}
	}
	return c.by != nil
}

// oneOf tells whether a rule of the list comes before r and has no stricter
// conditions.
func (c *coverage) oneOf(list []*Rule) bool {
	for _, e := range list[:min(len(list), maxCover)] {
		if *c.left--; e.Index >= c.r.Index || *c.left < 0 {
			break
		}
		if !e.noStricterThan(c.r) || c.p.diags.wrong[e.number] {
			continue
		}
		if c.by == nil || e.Index > c.by.Index {
			c.by = e
		}
		if l := c.r.dest.list; l != nil && e.dest.list == l && (e.By == ByAny || e.By == c.r.By) {
			c.all = true
		}
		return true
	}
	return false
}

func (c *coverage) prefix(p netip.Prefix) bool {
	for _, n := range c.t.prefixes.Supernets(p) {
		if c.oneOf(c.t.groups[n.group]) {
			return true
		}
	}
	return false
}

// above tells whether a pattern covers a name that is below it.
func (c *coverage) above(name string) bool {
	for c.t.below {
		i := strings.IndexByte(name, '.')
		if i < 0 {
			break
		}
		name = name[i+1:]
		if c.oneOf(c.t.under(name)) {
			return true
		}
	}
	return false
}

// resolvedHere returns a RESOLVE line because of which no flow has a name that
// r is about; nil: there is none, or r is about addresses too.
func (t *Table) resolvedHere(r *Rule, left *int) (by *resolveRule) {
	if !r.ownName() || r.dest.anyName || len(r.dest.prefixes) > 0 {
		return nil
	}
	local := func(names resolveRule) bool {
		for _, e := range t.resolves.list {
			if *left--; *left < 0 {
				break
			}
			if e.covers(&names) {
				by = e
				return e.mode == ResolveLocal
			}
			if names.covers(e) || e.list != nil && e.mode != ResolveLocal { // it may have some of them
				break
			}
		}
		return false
	}
	for n := range r.dest.names.all() {
		if !local(resolveRule{name: n}) {
			return nil
		}
	}
	for s := range r.dest.suffixes.all() {
		if !local(resolveRule{suffix: s}) {
			return nil
		}
	}
	return by
}

// alwaysDirect says why a rule that is not DIRECT can never match: all of its
// addresses are DIRECT before all rules. Empty: not so.
func alwaysDirect(r *Rule) (why string) {
	if r.Action == Direct || !r.dest.noName() || len(r.dest.prefixes) == 0 {
		return ""
	}
	for _, p := range r.dest.prefixes {
		i := slices.IndexFunc(implicitPrefixes, func(e implicitPrefix) bool { return contains(e.prefix, p) })
		if i < 0 {
			return ""
		}
		why = implicitPrefixes[i].why
	}
	return why
}

// noStricterThan tells whether every flow that meets r's conditions meets e's.
func (e *Rule) noStricterThan(r *Rule) bool {
	switch {
	case e.Protocols != AnyProtocol && e.Protocols != r.Protocols:
		return false
	case len(e.Ports) > 0 && (len(r.Ports) == 0 || !portsWithin(r.Ports, e.Ports)):
		return false
	}
	return e.Client.noStricterThan(&r.Client)
}

// portsWithin tells whether all ports of a are in b; both are merged.
func portsWithin(a, b []PortRange) bool {
	for _, r := range a {
		if !slices.ContainsFunc(b, func(s PortRange) bool { return s.From <= r.From && r.To <= s.To }) {
			return false
		}
	}
	return true
}
