package routes

import (
	"net/netip"
	"slices"
	"strings"
)

// maxCover keeps the search linear in the rules.
const maxCover = 256

// coveredBy returns an earlier rule because of which r can never match; nil:
// there is none. Each part of r's destination must be within one earlier rule
// with no stricter conditions; parts that only several rules cover together
// are not looked for, nor are rules behind the first maxCover of one list.
func (p *parser) coveredBy(t *Table, r *Rule) *Rule {
	if r.Default {
		return nil
	}
	var by *Rule
	covered := func(list []*Rule) bool {
		for _, e := range list[:min(len(list), maxCover)] {
			if e.Index < r.Index && e.noStricterThan(r) && !p.diags.wrong[e.number] {
				if by == nil || e.Index > by.Index {
					by = e
				}
				return true
			}
		}
		return false
	}
	for _, prefix := range r.dest.prefixes {
		if !t.coversPrefix(prefix, covered) {
			return nil
		}
	}
	if r.dest.anyName && !covered(t.anyName) {
		return nil
	}
	for _, n := range r.dest.names {
		if !covered(t.anyName) && !covered(t.names[n]) && !t.coversBelow(n, covered) {
			return nil
		}
	}
	for _, s := range r.dest.suffixes {
		if !covered(t.anyName) && !covered(t.suffixes[s]) && !t.coversBelow(s, covered) {
			return nil
		}
	}
	return by
}

// resolvedHere returns a RESOLVE line because of which no flow has a name that
// r is about; nil: there is none, or r is about addresses too.
func (t *Table) resolvedHere(r *Rule) (by *resolveRule) {
	if !r.ownName() || r.dest.anyName || len(r.dest.prefixes) > 0 {
		return nil
	}
	var all []*resolveRule
	for _, n := range r.dest.names {
		all = append(all, &resolveRule{name: n})
	}
	for _, s := range r.dest.suffixes {
		all = append(all, &resolveRule{suffix: s})
	}
	for _, names := range all {
		i := slices.IndexFunc(t.resolves, func(e *resolveRule) bool { return e.covers(names) || names.covers(e) })
		if i < 0 || t.resolves[i].mode != ResolveLocal || !t.resolves[i].covers(names) {
			return nil
		}
		by = t.resolves[i]
	}
	return by
}

func (t *Table) coversPrefix(p netip.Prefix, covered func([]*Rule) bool) bool {
	for _, n := range t.prefixes.Supernets(p) {
		if covered(n.rules) {
			return true
		}
	}
	return false
}

func (t *Table) coversBelow(name string, covered func([]*Rule) bool) bool {
	for {
		i := strings.IndexByte(name, '.')
		if i < 0 {
			return false
		}
		name = name[i+1:]
		if covered(t.suffixes[name]) {
			return true
		}
	}
}

// noStricterThan tells whether every flow that meets r's conditions meets e's.
func (e *Rule) noStricterThan(r *Rule) bool {
	switch {
	case e.Protocols != AnyProtocol && e.Protocols != r.Protocols:
		return false
	case len(e.Ports) > 0 && (len(r.Ports) == 0 || !portsWithin(r.Ports, e.Ports)):
		return false
	case len(e.Ifs) > 0 && (len(r.Ifs) == 0 || slices.ContainsFunc(r.Ifs, func(i string) bool { return !slices.Contains(e.Ifs, i) })):
		return false
	case len(e.Src) > 0:
		return len(r.Src) > 0 && !slices.ContainsFunc(r.Src, func(p netip.Prefix) bool {
			return !slices.ContainsFunc(e.Src, func(q netip.Prefix) bool { return contains(q, p) })
		})
	}
	return true
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
