package redirect

import (
	"errors"
	"fmt"
	"net"
	"slices"

	nl "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// RouteProtocol is the originator (rtnetlink(7), rtm_protocol) of all our
// routing rules and routes. It is how Remove finds them.
const RouteProtocol = 174

// The preferences of our routing rules: behind the local table and the
// l3mdev and IPsec rules of others would be too late for the second, so they
// stand before everything but the local table (0, or 100 where Cilium moved it).
const (
	prefLan      = 170 // Lan mark, from a named interface: to our table
	prefLocal    = 171 // Local mark, from this host: to our table
	prefDirect   = 172 // Direct mark: on with the rules of others
	prefProhibit = 173 // Entered mark, or from a named interface: prohibited
	prefNext     = 174 // where prefDirect goes: does nothing
	prefNowhere  = 175 // Direct mark, in an enclosed namespace: unreachable
)

// Actions of a rule that are no type of route (fib_rules.h, FR_ACT_…).
const actNop = 3

// loIndex is the index of lo, the first interface of every network namespace.
const loIndex = 1

// policy is the routing side: rules and routes of both families, and what they
// need to know where a packet came from.
type policy struct {
	h       *netlink.Handle
	conf    *nl.Conn // for what the handle does not know
	without []string // interfaces of the plan that do not give the Entered mark
	off     bool     // lo has no IPv6, and so no routes of ours; it may get it back
}

// dialPolicy connects in the network namespace of the calling thread.
func dialPolicy() (*policy, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, fmt.Errorf("redirect: routing: %w", err)
	}
	conf, err := nl.Dial(unix.NETLINK_ROUTE, nil)
	if err != nil {
		h.Close()
		return nil, fmt.Errorf("redirect: routing: %w", err)
	}
	return &policy{h: h, conf: conf}, nil
}

func (p *policy) close() {
	p.h.Close()
	p.conf.Close()
}

func policyFamilies() []int { return []int{unix.AF_INET, unix.AF_INET6} }

// rules returns the rules of a plan for a family, in the order in which they
// are to be added: the guard last, when what it lets pass is known.
func (p *policy) rules(plan *Plan, fam int) []netlink.Rule {
	rule := func(pref int, mark uint32, iif string) netlink.Rule {
		r := *netlink.NewRule()
		r.Family, r.Priority, r.IifName, r.Protocol = fam, pref, iif, RouteProtocol
		if mark != 0 {
			mask := plan.Marks.Mask
			r.Mark, r.Mask = mark, &mask
		}
		return r
	}
	var rs []netlink.Rule
	for _, i := range sortedInterfaces(plan) {
		r := rule(prefLan, plan.Marks.Lan(), i)
		r.Table = plan.Table
		rs = append(rs, r)
	}
	if plan.Local {
		r := rule(prefLocal, plan.Marks.Local(), "lo")
		r.Table = plan.Table
		rs = append(rs, r)
	}
	if plan.Enclosed && fam == unix.AF_INET {
		r := rule(prefNowhere, plan.Marks.Direct(), "")
		r.Type = unix.RTN_UNREACHABLE
		rs = append(rs, r)
	}
	if len(plan.Interfaces) == 0 {
		return rs
	}
	next := rule(prefNext, 0, "")
	next.Type = actNop
	direct := rule(prefDirect, plan.Marks.Direct(), "")
	direct.Goto = prefNext
	rs = append(rs, next, direct)
	byName := sortedInterfaces(plan)
	if fam == unix.AF_INET {
		if len(p.without) < len(byName) {
			r := rule(prefProhibit, plan.Marks.Entered(), "")
			r.Type = unix.RTN_PROHIBIT
			rs = append(rs, r)
		}
		byName = p.without
	}
	for _, i := range byName {
		r := rule(prefProhibit, 0, i)
		r.Type = unix.RTN_PROHIBIT
		rs = append(rs, r)
	}
	return rs
}

func sortedInterfaces(p *Plan) []string {
	return slices.Compact(slices.Sorted(slices.Values(p.Interfaces)))
}

// route is the one of our table: everything is local, on lo.
func route(p *Plan, fam int) *netlink.Route {
	r := &netlink.Route{LinkIndex: loIndex, Table: p.Table, Type: unix.RTN_LOCAL, Family: fam, Protocol: RouteProtocol,
		Scope: netlink.SCOPE_HOST, Dst: allOf(fam)}
	if fam == unix.AF_INET6 {
		r.Scope = netlink.SCOPE_UNIVERSE
	}
	return r
}

// routes returns the routes of a plan.
func routes(p *Plan, fam int) []*netlink.Route {
	list := []*netlink.Route{route(p, fam)}
	if p.Enclosed {
		list = append(list, wayIn(fam))
	}
	return list
}

// missing is what ensure had to add.
type missing struct {
	rules, routes, entries int
	unmarked               error // why packets that enter get no mark
}

// ensure adds what of the plan's rules and routes is not there. The kernel
// itself compares: what exists is not added twice. Only selects the rules.
func (p *policy) ensure(plan *Plan, only func(pref int) bool) (m missing, err error) {
	if only(prefProhibit) {
		m.entries, p.without, m.unmarked = p.markEntries(plan)
	}
	for _, fam := range policyFamilies() {
		if len(plan.Interfaces) == 0 && !plan.Local {
			continue
		}
		added, err := p.addRoutes(plan, fam)
		m.routes += added
		if fam == unix.AF_INET6 {
			if noFamily(err) {
				continue
			}
			// By disable_ipv6 of lo. Without the routes the rules refuse.
			if p.off = errors.Is(err, unix.EACCES); p.off {
				err = nil
			}
		}
		if err != nil {
			return m, err
		}
		for _, r := range p.rules(plan, fam) {
			if !only(r.Priority) {
				continue
			}
			switch err := p.h.RuleAdd(&r); {
			case err == nil:
				m.rules++
			case !errors.Is(err, unix.EEXIST):
				return m, fmt.Errorf("redirect: routing rule %d: %w", r.Priority, err)
			}
		}
	}
	return m, nil
}

// addRoutes adds what of the plan's routes is not there, and returns how many
// it were.
func (p *policy) addRoutes(plan *Plan, fam int) (n int, err error) {
	if plan.Enclosed {
		if err := p.addSource(fam); err != nil {
			return 0, err
		}
	}
	for _, r := range routes(plan, fam) {
		switch err := p.h.RouteAdd(r); {
		case err == nil:
			n++
		case !errors.Is(err, unix.EEXIST):
			return n, fmt.Errorf("redirect: route in table %d: %w", r.Table, err)
		}
	}
	return n, nil
}

// loUp brings lo up: what is diverted is routed to it, and at boot or in a new
// namespace it can still be down.
func (p *policy) loUp() error {
	lo, err := p.h.LinkByIndex(loIndex)
	if err != nil {
		return fmt.Errorf("redirect: lo: %w", err)
	}
	if lo.Attrs().Flags&net.FlagUp != 0 {
		return nil
	}
	if err := p.h.LinkSetUp(lo); err != nil {
		return fmt.Errorf("redirect: lo is down and cannot be brought up: %w", err)
	}
	return nil
}

// noFamily says that the host has no IPv6 at all, so that nothing of it can
// leave either.
func noFamily(err error) bool {
	return errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP)
}

// replace puts our route back into the place where somebody put another.
func (p *policy) replace(plan *Plan, fam int) error {
	return p.h.RouteReplace(route(plan, fam))
}

func everyRule(int) bool     { return true }
func guardRules(p int) bool  { return p >= prefDirect }
func divertRules(p int) bool { return p < prefDirect }

// drop removes our rules and routes but for those of the plan; a nil plan has
// none.
func (p *policy) drop(plan *Plan) error {
	for _, fam := range policyFamilies() {
		list, err := p.h.RuleList(fam)
		if err != nil {
			if fam == unix.AF_INET6 && noFamily(err) {
				continue
			}
			return fmt.Errorf("redirect: routing rules: %w", err)
		}
		var want []netlink.Rule
		if plan != nil {
			want = p.rules(plan, fam)
		}
		// The guards go first: they must not outlive what lets DIRECT pass.
		slices.SortFunc(list, func(a, b netlink.Rule) int {
			if (a.Priority == prefProhibit) != (b.Priority == prefProhibit) {
				if a.Priority == prefProhibit {
					return -1
				}
				return 1
			}
			return a.Priority - b.Priority
		})
		for _, r := range list {
			if r.Protocol != RouteProtocol || slices.ContainsFunc(want, func(w netlink.Rule) bool { return sameRule(r, w) }) {
				continue
			}
			if err := p.h.RuleDel(&r); err != nil && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("redirect: delete routing rule %d: %w", r.Priority, err)
			}
		}
		routes, err := p.h.RouteListFiltered(fam, &netlink.Route{Table: unix.RT_TABLE_UNSPEC, Protocol: RouteProtocol},
			netlink.RT_FILTER_TABLE|netlink.RT_FILTER_PROTOCOL)
		if err != nil {
			return fmt.Errorf("redirect: routes: %w", err)
		}
		for _, r := range routes {
			if plan != nil && (r.Table == plan.Table && (len(plan.Interfaces) > 0 || plan.Local) || r.Table == unix.RT_TABLE_MAIN && plan.Enclosed) {
				continue
			}
			if r.Table == unix.RT_TABLE_MAIN { // that of an enclosed namespace
				if err := p.dropSource(fam); err != nil {
					return err
				}
			}
			if err := p.h.RouteDel(&r); err != nil && !errors.Is(err, unix.ESRCH) {
				return fmt.Errorf("redirect: delete route in table %d: %w", r.Table, err)
			}
		}
	}
	return p.unmarkEntries(plan)
}

// sameRule compares what the kernel tells of a rule with one that we want. It
// does not tell its type, but our preferences have one each.
func sameRule(have, want netlink.Rule) bool {
	mask := func(r netlink.Rule) uint32 {
		if r.Mask == nil {
			return 0
		}
		return *r.Mask
	}
	return have.Priority == want.Priority && have.Mark == want.Mark && mask(have) == mask(want) &&
		have.IifName == want.IifName && have.Table == want.Table && (have.Goto == want.Goto)
}
