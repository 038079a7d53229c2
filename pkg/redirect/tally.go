package redirect

import (
	"maps"
	"net"
	"slices"
	"strconv"
)

// A range can have a tag, and what is decided because of it is counted by that: by
// a counter of its own where all of a list has one tag, and else by one for each
// element of the set that decides. The former costs a packet a counter, the latter
// nothing that it would not do anyway but the same counter.

// tallies are what a table counts by tags.
type tallies struct {
	objects map[string]string            // by tag: the name of its counter
	sets    map[string]map[string]string // by the name of a set: the tags of its elements, by their keys
}

// object returns the name of the counter of a tag.
func (t *table) object(tag string) string {
	name := t.tallies.objects[tag]
	if name == "" {
		name = "rule" + strconv.Itoa(len(t.tallies.objects)) + t.gen
		t.tallies.objects[tag] = name
	}
	return name
}

// counted makes the elements of a set count by the tags of its ranges.
func (t *table) counted(s *set, ranges []Range) *set {
	s.counter = true
	tags := make(map[string]string, len(ranges))
	for _, r := range ranges {
		tags[string(r.From.AsSlice())] = r.Tag
	}
	t.tallies.sets[s.name] = tags
	return s
}

// oneTag returns the tag that all of the ranges have. False: there are several.
func oneTag(ranges []Range) (tag string, one bool) {
	for i, r := range ranges {
		if i == 0 {
			tag = r.Tag
		}
		if r.Tag != tag {
			return "", false
		}
	}
	return tag, true
}

// refusal writes the chain of a block's refusals, if they are counted, and returns
// what leads to it. It counts behind the look at what is never ours to refuse, so
// that only what is refused counts.
func (t *table) refusal(name string, f family, l list, final bool) string {
	tag, one := oneTag(l.ranges)
	if one && tag == "" {
		return l.to
	}
	c := t.chain(name + f.digit())
	suffix := finalSuffix
	if !final {
		suffix = ""
	}
	t.appeal(c, suffix)
	c.add(jump("implicit"))
	if !final {
		c.add(jump("admitted"))
	}
	if l.log {
		t.tell(c, tag)
	}
	if one {
		c.add(count(t.object(tag)), going(l.then))
		return c.name
	}
	s := t.set(addrSet(name+"_count"+f.digit(), f, l.ranges))
	c.add(addrIn(f, false, t.counted(s, l.ranges), false), going(l.then))
	c.add(going(l.then)) // never: the set has all that comes here
	return c.name
}

// Tallies returns what was counted by the tags of ranges since they were first in
// force, in packets of clients: what may pass, and what was refused. What changes
// of the rules in between does not matter, but that packets of the very moment can
// be missing. By the empty tag is what tags have counted that are no longer there.
func (r *Redirect) Tallies() (map[string]Count, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		return nil, net.ErrClosed
	}
	return r.tally()
}

func (r *Redirect) tally() (map[string]Count, error) {
	sums := make(map[string]Count, len(r.tallied))
	for tag, n := range r.tallied {
		sums[tag] = n
	}
	add := func(tag string, n Count) {
		if tag != "" {
			s := sums[tag]
			sums[tag] = Count{s.Packets + n.Packets, s.Bytes + n.Bytes}
		}
	}
	if len(r.tallies.objects) > 0 {
		counts, err := r.nf.counters()
		if err != nil {
			return nil, err
		}
		for tag, name := range r.tallies.objects {
			add(tag, counts[name])
		}
	}
	for name, tags := range r.tallies.sets {
		if err := r.nf.elements(name, func(e element) {
			if !e.end {
				add(tags[string(e.key)], e.count)
			}
		}); err != nil {
			return nil, err
		}
	}
	return sums, nil
}

// carryOver keeps what was counted, as the plan before is about to end.
func (r *Redirect) carryOver(before map[string]Count, now tallies) {
	kept := map[string]bool{"": true}
	for tag := range now.objects {
		kept[tag] = true
	}
	for _, tags := range now.sets {
		for _, tag := range tags {
			kept[tag] = true
		}
	}
	r.tallied, r.tallies = map[string]Count{}, now
	for tag, n := range before {
		if !kept[tag] {
			tag = ""
		}
		s := r.tallied[tag]
		r.tallied[tag] = Count{s.Packets + n.Packets, s.Bytes + n.Bytes}
	}
}

// counters returns the names of those that the table has.
func (t *table) counters() []string {
	return append(counterNames(), slices.Sorted(maps.Values(t.tallies.objects))...)
}

// staleObjects returns the counters that are there of plans before.
func (t *table) staleObjects(there []string) []string {
	have := t.counters()
	return stale(there, func(n string) bool { return slices.Contains(have, n) })
}
