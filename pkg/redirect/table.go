package redirect

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/google/nftables"
)

// tableName is the nftables table of ours, of family inet.
const tableName = "tproxyd"

// liveTime is how long an admitted address that is in use stays admitted after
// its last packet: what RFC 5382, REQ-5 asks of those who keep TCP flows.
const liveTime = 2*time.Hour + 4*time.Minute

// The counters of the table.
const (
	countDiverted  = "diverted"
	countDatagrams = "datagrams"
	countDNS       = "dns"
	countDirect    = "direct"
	countAnswers   = "answers"
	countDenied    = "denied"
	countRefused   = "refused"
	countGuard     = "guard"
)

func counterNames() []string {
	return []string{countDiverted, countDatagrams, countDNS, countDirect, countAnswers, countDenied, countRefused, countGuard}
}

// chain is a base chain if it has a type.
type chain struct {
	name  string
	kind  nftables.ChainType
	hook  *nftables.ChainHook
	rules []rule
}

func (c *chain) add(r ...statement) { c.rules = append(c.rules, r) }

// table is what a plan means, in the terms of nftables.
type table struct {
	sets   []*set
	chains []*chain
	gen    string // ends the names of the sets that each plan has of its own
	live   string // which of liveSets is in use
	alive  bool   // output asks for the mark of this name
	brief  bool   // flows of ours are remembered briefly

	cgroups cgroups // that the plan names, as they are
	named   []*namedCgroups
	tallies tallies // what is counted by tags
	appeals []rule  // see Plan.DivertDenied; their last statement is to be added

	told     map[string]int // tags of Plan.Log, with a number for each; see newTable
	listener uint16
}

// newTable makes the table of a checked plan. Gen tells the sets of one plan
// from those of the plan before, so that both can be there for a moment; live is
// one of liveSets. Alive says that there is the table of that name, and listener
// where what Plan.Log asks for is told; 0: nowhere. Brief says that the kernel knows
// how to remember flows briefly.
func newTable(p *Plan, gen, live string, alive, brief bool, groups cgroups, listener uint16) (*table, error) {
	t := &table{gen: "_" + gen, live: live, alive: alive, brief: brief, cgroups: groups, tallies: tallies{map[string]string{}, map[string]map[string]string{}}}
	if p.DivertDenied {
		m := p.Marks
		t.appeals = []rule{{mark(m, m.Local()), proto(tcp)}, {mark(m, m.Local()), proto(udp)}}
	}
	if t.listener = listener; listener != 0 {
		t.told = make(map[string]int, len(p.Log))
		for i, tag := range p.Log {
			t.told[tag] = i
		}
	}
	for _, f := range []family{ip4, ip6} {
		for q := partAddr; q <= partPort; q++ {
			t.sets = append(t.sets, dynamicSet(admittedSet, f, q))
		}
	}
	t.ends(p)
	t.implicit(p)
	t.notes(p)
	t.take(p)
	if err := t.decide(p); err != nil {
		return nil, err
	}
	t.ways(p)
	for _, f := range []family{ip4, ip6} {
		for q := partAddr; q <= partPort; q++ {
			t.sets = append(t.sets, dynamicSet(live, f, q)) // the last to be made, see ruleMessages
		}
	}
	return t, nil
}

// finalSuffix ends the names of the chains that ask nobody whether a packet was
// let in.
const finalSuffix = "_final"

func (t *table) chain(name string) *chain {
	c := &chain{name: name}
	t.chains = append(t.chains, c)
	return c
}

func (t *table) base(name string, kind nftables.ChainType, hook *nftables.ChainHook) *chain {
	c := &chain{name: name, kind: kind, hook: hook}
	t.chains = append(t.chains, c)
	return c
}

func (t *table) set(s *set) *set {
	s.name += t.gen
	t.sets = append(t.sets, s)
	return s
}

// ends writes the chains that end a packet's way: direct and the two that
// reject. Rejects clear the mark first: with sysctl fwmark_reflect the answer
// has the mark of the question, and a divert mark may not leave. And they clear
// a connection mark of Own, since output keeps errors about what ends at us; what
// stands there instead says that it did so once, and so is none of others.
func (t *table) ends(p *Plan) {
	m := p.Marks
	direct := t.chain("direct")
	if p.Local {
		// A mark that is as it was spares the packet a second routing decision.
		if t.alive {
			direct.add(mark(m, m.Local()), proto(udp), setMark(m, m.Alive()), count(countDirect), accept())
		}
		direct.add(mark(m, m.Local()), setMark(m, 0), count(countDirect), accept())
	}
	direct.add(setMark(m, m.Direct()), count(countDirect), accept())

	refuse := t.chain("refuse")
	refuse.add(ctMark(m, m.Own()), setCtMark(m, m.Lan()))
	refuse.add(setMark(m, 0), count(countRefused))
	refuse.add(proto(tcp), rejectReset())
	t.nowhere(p, refuse)
	refuse.add(proto(udp), rejectPort())
	refuse.add(rejectProhibited())
}

// ICMP messages that report an error, and those that IPv6 hosts find their
// neighbours and groups with (RFC 4861, 2710, 3810).
func icmpErrors(kind l4) []byte {
	if kind == icmp {
		return []byte{3, 11, 12}
	}
	return []byte{1, 2, 3, 4}
}

func neighbourhood() []byte { return []byte{130, 131, 132, 133, 134, 135, 136, 137, 143} }

// implicit lets pass what is never ours to stop or take.
func (t *table) implicit(p *Plan) {
	m := p.Marks
	for _, f := range []family{ip4, ip6} {
		for q := partAddr; q <= partPort; q++ {
			c := t.chain("keep" + f.digit() + q.suffix())
			t.tell(c, "")
			c.add(keep(f, q, dynamicSet(t.live, f, q), liveTime)) // if the set is full, the next rule is run all the same
			c.add(going("direct"))
		}
	}
	c := t.chain("implicit")
	c.add(append(foreignReply(m), going("direct"))...)
	c.add(icmpType(icmp, icmpErrors(icmp)...), going("direct"))
	c.add(icmpType(icmpv6, slices.Concat(icmpErrors(icmpv6), neighbourhood())...), going("direct"))
	c.add(toUs(), going("direct"))
	t.links(p, c)
	for _, f := range []family{ip4, ip6} {
		var servers []netip.AddrPort
		for _, s := range p.Servers {
			if s = netip.AddrPortFrom(s.Addr().Unmap().WithZone(""), s.Port()); familyOf(s.Addr()) == f {
				servers = append(servers, s)
			}
		}
		slices.SortFunc(servers, netip.AddrPort.Compare)
		if servers = slices.Compact(servers); len(servers) > 0 {
			c.add(serverIn(f, t.set(serverSet("servers"+f.digit(), f, servers))), going("direct"))
		}
	}
	c = t.chain("admitted")
	for _, f := range []family{ip4, ip6} {
		for _, kind := range []string{admittedSet, t.live} {
			for q := partAddr; q <= partPort; q++ {
				c.add(partIn(f, q, dynamicSet(kind, f, q)), going("keep"+f.digit()+q.suffix()))
			}
		}
	}
}

// unless writes the chain that a verdict of a block leads to, and that of a
// final block: what is to be stopped or taken goes on to then, unless it is
// never ours or was let in. A flow of UDP that was diverted stays so if its
// address is let in meanwhile: the kernel would not translate its source, and
// would look for its socket first, see ConnectUDP.
func (t *table) unless(m Marks, name, then string) {
	for _, suffix := range []string{"", finalSuffix} {
		c := t.chain(name + suffix)
		if name != "take" {
			t.appeal(c, suffix)
		}
		c.add(jump("implicit"))
		if suffix == "" {
			if name == "take" {
				c.add(proto(udp), ctMark(m, m.Own()), going(then))
			}
			c.add(jump("admitted"))
		}
		c.add(going(then))
	}
}

// appeal has what is about to be denied of this host itself taken, as far as user
// space may know better.
func (t *table) appeal(c *chain, suffix string) {
	for _, r := range t.appeals {
		c.add(append(slices.Clone(r), going("take"+suffix))...)
	}
}

// decide writes the blocks, and what is denied for want of a block.
func (t *table) decide(p *Plan) error {
	for _, d := range []struct {
		name    string
		rejects []rule
	}{
		{"", []rule{{proto(tcp), rejectReset()}, {rejectProhibited()}}},
		{"_icmp", []rule{{rejectProhibited()}}},
		{"_drop", []rule{{drop()}}},
	} {
		denied := t.chain("deny" + d.name)
		t.unless(p.Marks, "denied"+d.name, denied.name)
		denied.add(ctMark(p.Marks, p.Marks.Own()), setCtMark(p.Marks, p.Marks.Lan()))
		denied.add(setMark(p.Marks, 0), count(countDenied))
		for i, r := range d.rejects {
			if i == len(d.rejects)-1 && d.name != "_drop" {
				t.nowhere(p, denied)
			}
			denied.add(r...)
		}
	}

	// What a name stands for is nobody's address: nothing may pass.
	synthetic := t.chain("synthetic")
	for _, d := range p.Ports.diverted() {
		synthetic.add(proto(d.proto), going("take"))
	}
	synthetic.add(going("refuse"))

	c := t.chain("decide")
	for _, s := range p.Synthetic {
		c.add(daddr(s), going("synthetic"))
	}
	for i := range p.Blocks {
		if err := t.block(p.Marks, c, i, &p.Blocks[i]); err != nil {
			return fmt.Errorf("redirect: block %d: %w", i, err)
		}
	}
	c.add(going("denied"))
	return nil
}

// block writes the rules of one block: for each family and each list one, with
// all conditions in front. Where the lists hold every address of the family the
// longest needs no set, for it is what the others leave.
func (t *table) block(m Marks, c *chain, n int, b *Block) error {
	name := func(what string) string { return fmt.Sprintf("b%d_%s", n, what) }
	suffix := ""
	if b.Final {
		suffix = finalSuffix
	}
	common, alternatives := t.conditions(m, &b.Client, name)
	conditions := product(t.protocols(b, name("ports")), alternatives)
	switch len(b.Ifs) {
	case 0:
	case 1:
		common = append(common, iif(b.Ifs[0]))
	default:
		unique := slices.Compact(slices.Sorted(slices.Values(b.Ifs)))
		common = append(common, iifIn(t.set(ifSet(name("ifs"), unique))))
	}
	if len(conditions) == 0 {
		return nil // no packet meets them
	}
	src := prefixRanges(b.Src)
	for _, f := range []family{ip4, ip6} {
		var before []statement
		if len(b.Src) > 0 {
			sources := normal(src, f)
			if len(sources) == 0 {
				continue
			}
			before = []statement{addrIn(f, true, t.set(addrSet(name("src"+f.digit()), f, sources)), false)}
		}
		before = append(before, common...)
		lists := []list{
			{"direct", "direct", "", normal(b.Direct, f), false},
			{"deny", "denied" + suffix, "deny", normal(b.Deny, f), false},
			{"icmp", "denied_icmp" + suffix, "deny_icmp", normal(b.ICMP, f), false},
			{"drop", "denied_drop" + suffix, "deny_drop", normal(b.Drop, f), false},
			{"proxy", "take" + suffix, "", normal(b.Proxy, f), false},
		}
		whole, err := covers(f, lists[0].ranges, lists[1].ranges, lists[2].ranges, lists[3].ranges, lists[4].ranges)
		if err != nil {
			return err
		}
		lists = t.logged(lists)
		rest := -1
		if whole {
			for i, l := range lists {
				if _, one := oneTag(l.ranges); !one && l.name == "direct" {
					continue // its set counts
				}
				if rest < 0 || len(l.ranges) > len(lists[rest].ranges) {
					rest = i
				}
			}
		}
		ends := make([][]statement, len(lists))
		for i, l := range lists {
			if len(l.ranges) == 0 {
				continue
			}
			tag, one := oneTag(l.ranges)
			end := []statement{going(l.to)}
			switch {
			case l.then != "":
				end[0] = going(t.refusal(name(l.name), f, l, b.Final))
			case l.log:
				// What is told pays for that, and nothing else does.
				c := t.chain(name(l.name) + f.digit())
				t.tell(c, tag)
				c.add(count(t.object(tag)), going(l.to))
				end[0] = going(c.name)
			case l.name == "direct" && one && tag != "":
				end = []statement{count(t.object(tag)), going(l.to)}
			}
			if ends[i] = end; i == rest {
				continue
			}
			s := t.set(addrSet(name(l.name+f.digit()), f, l.ranges))
			if l.name == "direct" && !one {
				t.counted(s, l.ranges)
			}
			for _, cond := range conditions {
				c.add(slices.Concat(cond, before, []statement{addrIn(f, false, s, len(b.Src) > 0)}, end)...)
			}
		}
		if rest >= 0 {
			for _, cond := range conditions {
				r := slices.Concat(cond, before)
				if len(b.Src) == 0 {
					r = append(r, isFamily(f))
				}
				c.add(append(r, ends[rest]...)...)
			}
		}
	}
	return nil
}

// list is one of a block's, in one family.
type list struct {
	name   string
	to     string // where its packets go
	then   string // of a refusal: where they go on behind the look at what is never refused
	ranges []Range
	log    bool // they have one tag, which is to be told of
}

// logged makes lists of their own of what is to be told of, behind the others.
func (t *table) logged(lists []list) []list {
	for i, l := range lists { // as they were
		told := func(r Range) bool { _, ok := t.told[r.Tag]; return ok && r.Tag != "" }
		if l.name == "proxy" || !slices.ContainsFunc(l.ranges, told) {
			continue
		}
		of := map[int][]Range{}
		var rest []Range
		for _, r := range l.ranges {
			if told(r) {
				of[t.told[r.Tag]] = append(of[t.told[r.Tag]], r)
			} else {
				rest = append(rest, r)
			}
		}
		lists[i].ranges = rest
		for _, n := range slices.Sorted(maps.Keys(of)) {
			lists = append(lists, list{fmt.Sprintf("%s_log%d", l.name, n), l.to, l.then, of[n], true})
		}
	}
	return lists
}

// protocols returns the alternatives that a block's networks and ports make.
func (t *table) protocols(b *Block, name string) [][]statement {
	var protos []l4
	switch b.Networks {
	case TCP:
		protos = []l4{tcp}
	case UDP:
		protos = []l4{udp}
	default:
		protos = []l4{tcp, udp}
	}
	ports := normalPorts(b.Ports)
	if len(ports) == 0 {
		if b.Networks == Any {
			return [][]statement{nil}
		}
		return [][]statement{{proto(protos[0])}}
	}
	var alternatives [][]statement
	match := func(p l4) statement { return dport(p, ports[0].From) }
	if len(ports) > 1 || ports[0].From != ports[0].To {
		s := t.set(portSet(name, ports))
		match = func(p l4) statement { return dportIn(p, s) }
	}
	for _, p := range protos {
		alternatives = append(alternatives, []statement{match(p)})
	}
	return alternatives
}

// normalPorts returns the ranges sorted and merged.
func normalPorts(ports []PortRange) []PortRange {
	rs := slices.Clone(ports)
	slices.SortFunc(rs, func(a, b PortRange) int { return int(a.From) - int(b.From) })
	merged := rs[:0]
	for _, r := range rs {
		if n := len(merged); n > 0 && int(r.From) <= int(merged[n-1].To)+1 {
			merged[n-1].To = max(merged[n-1].To, r.To)
			continue
		}
		merged = append(merged, r)
	}
	return merged
}
