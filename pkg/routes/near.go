package routes

import (
	"cmp"
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

// Near is a rule that nearly decided a flow, and why it did not.
type Near struct {
	Rule *Rule
	Why  string
}

// maxNear is how many of them Table.Near returns.
const maxNear = 8

// Near returns the rules that nearly decided a flow: those in front of decider,
// the rule of Match, that are about its destination but not about all else of it,
// or that miss its name by a label; then the first one behind, other than the
// DEFAULT, that would decide without decider. They are in the order of the file;
// more is how many of those in front are left out, the first ones.
func (t *Table) Near(f flow.Flow, decider *Rule) (list []Near, more int) {
	about, beside := t.around(&f)
	slices.SortFunc(about, func(a, b *Rule) int { return cmp.Compare(a.Index, b.Index) })
	about = slices.Compact(about) // a range is many prefixes
	for _, r := range about {
		if r.Index < decider.Index {
			if why := r.unmet(&f); why != "" {
				list = append(list, Near{r, why})
			}
		}
	}
	for r, why := range beside {
		if r.Index < decider.Index && r.unmet(&f) == "" && !slices.Contains(about, r) {
			list = append(list, Near{r, why})
		}
	}
	slices.SortFunc(list, func(a, b Near) int { return cmp.Compare(a.Rule.Index, b.Rule.Index) })
	if more = len(list) - maxNear; more > 0 {
		list = list[more:]
	}
	for _, r := range about {
		if r.Index > decider.Index && !r.Default && r.unmet(&f) == "" {
			list = append(list, Near{r, "it comes behind, and would decide without " + decider.Position()})
			break
		}
	}
	return list, max(more, 0)
}

// around returns the rules that are about a flow's destination, and those that
// are about what is beside it, with what makes the difference.
func (t *Table) around(f *flow.Flow) (about []*Rule, beside map[*Rule]string) {
	beside = map[*Rule]string{}
	if f.Name == "" {
		return t.aroundAddress(f, beside), beside
	}
	about = slices.Concat(t.programs, t.anyName, t.exact(f.Name))
	for rest := f.Name; ; {
		i := strings.IndexByte(rest, '.')
		if i < 0 {
			break
		}
		rest = rest[i+1:]
		about = append(about, t.under(rest)...)
		for _, r := range t.exact(rest) {
			beside[r] = fmt.Sprintf("it is about %s alone, not about names below it", rest)
		}
	}
	for _, r := range t.under(f.Name) {
		beside[r] = fmt.Sprintf("it is about names below %s, not about itself", f.Name)
	}
	for _, r := range t.anyAddr {
		if r.By == ByAddress {
			beside[r] = "by=address, and the flow has a name"
		}
	}
	return about, beside
}

func (t *Table) aroundAddress(f *flow.Flow, beside map[*Rule]string) (about []*Rule) {
	for _, r := range t.anyName {
		if r.By == ByName {
			beside[r] = "by=name, and the flow has none"
		}
	}
	addr := f.Dst.Addr().Unmap().WithZone("")
	about = slices.Clone(t.programs)
	if !addr.IsValid() {
		return append(about, t.anyAddr...)
	}
	n, _ := t.prefixes.Lookup(addr)
	for ; n != nil; n = n.parent {
		about = append(about, t.groups[n.group]...)
	}
	for _, r := range t.anyAddr {
		switch v4, v6 := r.anyAddressOf(); {
		case v4 && !v6 && addr.Is6():
			beside[r] = "it is about IPv4 alone"
		case v6 && !v4 && addr.Is4():
			beside[r] = "it is about IPv6 alone"
		}
	}
	return about
}

// unmet says what a rule asks for that a flow does not have, the destination
// aside; empty: nothing.
func (r *Rule) unmet(f *flow.Flow) string {
	var all []string
	if !r.about(f.Network) {
		all = append(all, "it is about "+strings.ToUpper((1-f.Network).String())+" alone")
	} else if !r.matchesPort(f) {
		all = append(all, fmt.Sprintf("port %d is not %s", f.Dst.Port(), joined(r.Ports, PortRange.String)))
	}
	switch {
	case r.Program == "" || r.runs(f.Program):
	case f.InIf != "":
		all = append(all, "it is about a program of this host, and the flow enters by "+f.InIf)
	case f.Program == "":
		all = append(all, "its program is not known")
	default:
		all = append(all, "its program is "+f.Program)
	}
	return strings.Join(append(all, r.Client.unmet(f)...), "; ")
}

// unmet says what is asked of a client that a flow's is not.
func (c *Client) unmet(f *flow.Flow) (all []string) {
	not := func(is, asked string) { all = append(all, is+", and not "+asked) }
	if len(c.Ifs) > 0 && !slices.Contains(c.Ifs, f.InIf) {
		is := "it is this host's own"
		if f.InIf != "" {
			is = "it enters by " + f.InIf
		}
		not(is, "by "+strings.Join(c.Ifs, ","))
	}
	if src := f.Src.Addr().Unmap(); len(c.Src) > 0 && !slices.ContainsFunc(c.Src, func(p netip.Prefix) bool { return p.Contains(src) }) {
		is := "its source is not known"
		if src.IsValid() {
			is = "its source is " + src.String()
		}
		not(is, "of "+joined(c.Src, netip.Prefix.String))
	}
	if len(c.Marks) > 0 && !slices.ContainsFunc(c.Marks, func(m Mark) bool { return f.Mark&m.Mask == m.Value }) {
		not(fmt.Sprintf("its mark is %#x", f.Mark), joined(c.Marks, Mark.String))
	}
	if len(c.MACs) > 0 && !slices.Contains(c.MACs, f.MAC) {
		is := "its neighbour is not known"
		if f.MAC != (flow.MAC{}) {
			is = "its neighbour is " + f.MAC.String()
		}
		not(is, joined(c.MACs, flow.MAC.String))
	}
	return append(all, c.unmetOwner(&f.Owner)...)
}

// unmetOwner says what is asked of a process that o is not.
func (c *Client) unmetOwner(o *flow.Owner) (all []string) {
	if !c.own() {
		return nil
	}
	if !o.Known {
		return []string{"it is about processes of this host, and the flow's is not known"}
	}
	id := func(what string, has uint32, asked []uint32) {
		if len(asked) == 0 || slices.Contains(asked, has) {
			return
		}
		is := fmt.Sprintf("its %s is %d", what, has)
		if has == nobody {
			is = "its " + what + " is not known"
		}
		all = append(all, is+", and not "+joined(asked, idText))
	}
	id("user", o.UID, c.UIDs)
	id("group", o.GID, c.GIDs)
	if len(c.Cgroups) > 0 && !slices.ContainsFunc(c.Cgroups, func(p string) bool { return InCgroup(o.Cgroup, p) }) {
		is := "its cgroup is not known"
		if o.Cgroup != "" {
			is = "its cgroup is " + o.Cgroup
		}
		all = append(all, is+", and not in "+joined(c.Cgroups, strings.Clone))
	}
	return all
}

// idText writes a user or a group.
func idText(id uint32) string {
	if id == nobody {
		return "one that this host does not have"
	}
	return strconv.FormatUint(uint64(id), 10)
}

// String returns the mark as the language writes it.
func (m Mark) String() string {
	if m.Mask == 1<<32-1 {
		return fmt.Sprintf("%#x", m.Value)
	}
	return fmt.Sprintf("%#x/%#x", m.Value, m.Mask)
}

// String returns the range as the language writes it.
func (p PortRange) String() string {
	if p.From == p.To {
		return strconv.Itoa(int(p.From))
	}
	return fmt.Sprintf("%d-%d", p.From, p.To)
}

// joined writes a list, the first of it if it is long.
func joined[T any](list []T, text func(T) string) string {
	const most = 6
	var words []string
	for _, v := range list[:min(len(list), most)] {
		words = append(words, text(v))
	}
	s := strings.Join(words, ",")
	if n := len(list) - most; n > 0 {
		s += fmt.Sprintf(" and %d more", n)
	}
	return s
}
