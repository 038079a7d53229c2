package routes

import (
	"net/netip"
	"slices"
	"strings"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

// Client is what a rule asks of who a flow is from: all that it names, and one
// of what each list has. The zero value asks nothing.
type Client struct {
	Src   []netip.Prefix // masked; empty: any
	Ifs   []string       // interfaces that the flow entered by; empty: any, and this host's own flows too
	Marks []Mark         // of its packets as they come, whoever sends them; empty: any
	MACs  []flow.MAC     // of the neighbour that it came from; empty: any

	// Of the process, so that only this host's own flows match; empty: any.
	UIDs, GIDs []uint32
	Cgroups    []string // "/a/b": that path of cgroup v2; "a.service", "a/b": wherever there is one of that name; and what is below
}

// Mark is a value of some bits of a packet mark; Value is within Mask.
type Mark struct{ Value, Mask uint32 }

// anyone tells whether nothing is asked.
func (c *Client) anyone() bool {
	return len(c.Src) == 0 && len(c.Ifs) == 0 && len(c.Marks) == 0 && len(c.MACs) == 0 && !c.own()
}

// own tells whether it is asked which process of this host it is.
func (c *Client) own() bool { return len(c.UIDs) > 0 || len(c.GIDs) > 0 || len(c.Cgroups) > 0 }

// matchesClient tells whether f is from whom the rule asks for. A process, a
// mark or an address that is not known is none that is asked for.
func (c *Client) matchesClient(f *flow.Flow) bool {
	if len(c.Ifs) > 0 && !slices.Contains(c.Ifs, f.InIf) {
		return false
	}
	if len(c.Src) > 0 {
		src := f.Src.Addr().Unmap()
		if !slices.ContainsFunc(c.Src, func(p netip.Prefix) bool { return p.Contains(src) }) {
			return false
		}
	}
	if len(c.Marks) > 0 && !slices.ContainsFunc(c.Marks, func(m Mark) bool { return f.Mark&m.Mask == m.Value }) {
		return false
	}
	if len(c.MACs) > 0 && !slices.Contains(c.MACs, f.MAC) {
		return false
	}
	if !c.own() {
		return true
	}
	o := &f.Owner
	return o.Known &&
		(len(c.UIDs) == 0 || slices.Contains(c.UIDs, o.UID)) &&
		(len(c.GIDs) == 0 || slices.Contains(c.GIDs, o.GID)) &&
		(len(c.Cgroups) == 0 || slices.ContainsFunc(c.Cgroups, func(p string) bool { return InCgroup(o.Cgroup, p) }))
}

// InCgroup tells whether a path of cgroup v2 is what cgroup= names, or below it.
func InCgroup(path, cgroup string) bool {
	if cgroup == "/" {
		return path != ""
	}
	if strings.HasPrefix(cgroup, "/") {
		return strings.HasPrefix(path, cgroup) && endsLabel(path, len(cgroup))
	}
	for at := 0; at < len(path); {
		i := strings.Index(path[at:], cgroup)
		if i < 0 {
			return false
		}
		i += at
		if (i == 0 || path[i-1] == '/') && endsLabel(path, i+len(cgroup)) {
			return true
		}
		at = i + 1
	}
	return false
}

// endsLabel tells whether a label of the path ends before i.
func endsLabel(path string, i int) bool { return i == len(path) || path[i] == '/' }

func (c *Client) equal(d *Client) bool {
	return slices.Equal(c.Src, d.Src) && slices.Equal(c.Ifs, d.Ifs) && slices.Equal(c.Marks, d.Marks) && slices.Equal(c.MACs, d.MACs) &&
		slices.Equal(c.UIDs, d.UIDs) && slices.Equal(c.GIDs, d.GIDs) && slices.Equal(c.Cgroups, d.Cgroups)
}

// noStricterThan tells whether everybody whom d asks for is asked for by c.
func (c *Client) noStricterThan(d *Client) bool {
	return within(d.Src, c.Src, func(inner, outer netip.Prefix) bool { return contains(outer, inner) }) &&
		within(d.Ifs, c.Ifs, same) && within(d.MACs, c.MACs, same) && within(d.UIDs, c.UIDs, same) && within(d.GIDs, c.GIDs, same) &&
		within(d.Cgroups, c.Cgroups, InCgroup) &&
		within(d.Marks, c.Marks, func(inner, outer Mark) bool {
			return outer.Mask&^inner.Mask == 0 && inner.Value&outer.Mask == outer.Value
		})
}

func same[T comparable](a, b T) bool { return a == b }

// within tells whether each of the inner ones is in one of the outer ones; no
// outer ones are everything.
func within[T any](inner, outer []T, in func(inner, outer T) bool) bool {
	if len(outer) == 0 {
		return true
	}
	return len(inner) > 0 && !slices.ContainsFunc(inner, func(i T) bool {
		return !slices.ContainsFunc(outer, func(o T) bool { return in(i, o) })
	})
}
