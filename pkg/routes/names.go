package routes

import (
	"cmp"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

// NameKind is what the question for a name is answered with.
type NameKind uint8

// The kinds of answers.
const (
	Synthetic  NameKind = iota // an address that stands for the name
	Real                       // its real addresses; the address then decides
	RealDirect                 // the same, and they are let pass because of the name
	LocalFirst                 // its real addresses if it has any, else a synthetic one
	Refused                    // REFUSED
	NXDomain                   // no such name
)

// String returns the kind in words.
func (k NameKind) String() string {
	return [...]string{"synthetic", "real", "real, DIRECT", "real or synthetic", "REFUSED", "NXDOMAIN"}[k]
}

// NameVerdict is what becomes of a name, and why.
type NameVerdict struct {
	Kind NameKind
	Rule *Rule  // the first rule that a flow to the name can match
	Why  string // in words
}

// LocalNames says which names belong to this host's network (R15).
type LocalNames struct {
	Search []string // the host's search list: lower case, no final dot
	None   bool     // no name is local: a command or a container on its own
}

// localSuffixes never exist in the world's DNS, or differ from house to house
// (RFC 6762, RFC 8375, and by custom).
var localSuffixes = []string{"local", "lan", "home.arpa", "internal"}

// has tells whether a name stays local, and why.
func (l LocalNames) has(name string) (why string) {
	switch {
	case l.None:
		return ""
	case !strings.Contains(name, "."):
		return "a single label stays local"
	case privateReverse(name):
		return "the reverse zones of private networks stay local"
	}
	for _, list := range [][]string{localSuffixes, l.Search} {
		for _, s := range list {
			if name == s || below(name, s) {
				return "." + s + " stays local"
			}
		}
	}
	return ""
}

// privateReverse tells whether a name is in the reverse zone of a network that
// means something else everywhere (RFC 6303).
func privateReverse(name string) bool {
	if zone, ok := strings.CutSuffix(name, ".in-addr.arpa"); ok {
		labels := strings.Split(zone, ".")
		slices.Reverse(labels)
		var b [4]byte
		for i, l := range labels {
			n, err := strconv.ParseUint(l, 10, 8)
			if err != nil || i > 3 {
				return false
			}
			b[i] = byte(n)
		}
		a := netip.AddrFrom4(b)
		return a.IsPrivate() || a.IsLoopback() || a.IsLinkLocalUnicast() || b[0] == 100 && b[1]&0xc0 == 64
	}
	zone, ok := strings.CutSuffix(name, ".ip6.arpa")
	if !ok || len(zone) < 3 {
		return false
	}
	// fc00::/7, fe80::/10, ::1: the last nibbles of the name are the first ones
	// of the address.
	switch last := zone[len(zone)-3:]; last {
	case "c.f", "d.f":
		return true
	case "e.f":
		return len(zone) >= 5 && strings.Contains("89ab", zone[len(zone)-5:len(zone)-4])
	}
	return zone == "1"+strings.Repeat(".0", 31)
}

// Name says what the question for a name is answered with, for a client of
// which Src and InIf count (R1, R4, R5, R15). The name must be lower case,
// without a final dot.
func (t *Table) Name(name string, client flow.Flow, local LocalNames) NameVerdict {
	v := t.nameVerdict(name, client, local)
	switch line := t.resolves.of(name); {
	case line == nil || line.via == nil || v.Kind == Refused || v.Kind == NXDomain:
	case v.Kind == Synthetic:
		v.Why += "; if this host has to ask for it, it asks " + line.asks()
	default:
		v.Why += "; asked is " + line.asks()
	}
	return v
}

func (t *Table) nameVerdict(name string, client flow.Flow, local LocalNames) NameVerdict {
	line := t.resolves.of(name)
	mode := ResolveRemote
	if line != nil {
		mode = line.mode
	}
	all := t.candidates(name)
	rules := forClient(all, &client)
	v := NameVerdict{Rule: rules[0]}
	explicit := slices.ContainsFunc(rules, (*Rule).ownName)
	if line != nil && mode == ResolveLocal {
		v.Kind, v.Why = Real, line.position()+" says local"
		return v
	}
	if why := local.has(name); why != "" && line == nil && !explicit {
		v.Kind, v.Why = Real, why
		return v
	}
	var proxied, direct *Rule
	for _, r := range rules {
		switch {
		case r.Action.proxied() && proxied == nil:
			proxied = r
		case r.Action == Direct && direct == nil:
			direct = r
		}
	}
	switch {
	case proxied == nil && direct == nil:
		v.Why = "every rule that it can match is DENY"
		for _, r := range rules {
			switch r.Reject {
			case RejectRefused:
				v.Kind, v.Rule, v.Why = Refused, r, r.Position()+" says reject=dns-refused"
				return v
			case RejectNXDomain:
				v.Kind, v.Rule, v.Why = NXDomain, r, r.Position()+" says reject=dns-nxdomain"
				return v
			}
		}
	case proxied == nil && line != nil && mode == ResolveRemote:
		v.Why = line.position() + " says remote"
	case proxied == nil && !t.admissible(all, rules):
		v.Why = "DIRECT, dialled by this host, since its rules differ by client or by too many ports for the kernel's set"
	case proxied == nil:
		v.Kind, v.Why = RealDirect, "every rule that it can match is DIRECT or DENY"
	case line != nil && mode == ResolveLocalFirst:
		v.Kind, v.Why = LocalFirst, line.position()+" says local-then-remote"
	case line != nil:
		v.Why = line.position() + " says remote"
	case slices.ContainsFunc(rules, func(r *Rule) bool { return r.Action.proxied() && r.ownName() }):
		v.Why = "it has a rule of its own with servers"
	case t.proxyName != nil:
		v.Kind, v.Why = LocalFirst, "PROXY_NAME: without a rule of its own it is resolved here if it can be"
	default:
		v.Why = proxied.Position() + " has servers"
	}
	return v
}

// Scope is a part of what an address can be asked.
type Scope struct {
	Network flow.Network
	Ports   PortRange
}

// maxScopePorts is how many ports the kernel's set of admitted addresses names
// one by one.
const maxScopePorts = 256

// admissible tells whether what is DIRECT of a name can be let pass by its
// addresses: the kernel's set knows no client, and few ports of each. All are
// the rules that the name can match, mine those of them that the client can.
// A DIRECT rule for every address needs no set, the kernel has it anyway; and
// what is final the kernel asks before the set.
func (t *Table) admissible(all, mine []*Rule) bool {
	if !slices.ContainsFunc(mine, (*Rule).NeedsAdmission) {
		return true
	}
	for _, r := range all {
		if r.byClient() && !(t.final(r) && r.anyAddress()) {
			return false
		}
	}
	mine = slices.DeleteFunc(slices.Clone(mine), func(r *Rule) bool { return t.final(r) && r.anyAddress() })
	return !slices.ContainsFunc(directScopes(mine), Scope.tooWide)
}

// NeedsAdmission tells whether the rule makes flows DIRECT by their names of which
// the kernel does not know that by their addresses.
func (r *Rule) NeedsAdmission() bool { return r.Action == Direct && !r.anyAddress() }

func (s Scope) whole() bool { return s.Ports == PortRange{0, 65535} }

func (s Scope) tooWide() bool {
	return !s.whole() && (s.Ports.From == 0 || int(s.Ports.To)-int(s.Ports.From) >= maxScopePorts)
}

// directScopes returns what is DIRECT if these rules, in order, decide. What
// udp= makes DIRECT of a rule with servers is not in it, as nothing that is by
// name needs it: such a name stays synthetic for its TCP, and what the rule
// says of addresses the kernel has in its blocks.
func directScopes(rules []*Rule) (scopes []Scope) {
	for _, network := range []flow.Network{flow.TCP, flow.UDP} {
		rest := []PortRange{{0, 65535}}
		for _, r := range rules {
			if !r.about(network) {
				continue
			}
			var taken []PortRange
			taken, rest = splitPorts(rest, r.Ports)
			if r.Action == Direct {
				for _, p := range taken {
					scopes = append(scopes, Scope{network, p})
				}
			}
		}
	}
	return scopes
}

// splitPorts splits a set of ports into what is in by and what is not; an
// empty by is every port. Both are sorted and disjoint.
func splitPorts(set, by []PortRange) (in, out []PortRange) {
	if len(by) == 0 {
		return set, nil
	}
	for _, s := range set {
		from := int(s.From)
		for _, b := range by {
			if int(b.To) < from || b.From > s.To {
				continue
			}
			if int(b.From) > from {
				out = append(out, PortRange{uint16(from), b.From - 1})
				from = int(b.From)
			}
			to := min(b.To, s.To)
			in = append(in, PortRange{uint16(from), to})
			from = int(to) + 1
		}
		if from <= int(s.To) {
			out = append(out, PortRange{uint16(from), s.To})
		}
	}
	return in, out
}

// DirectScopes returns what may pass to addr because it is an address of a
// name that is DIRECT: what the rules, asked with the name and the address,
// call DIRECT (R1). Empty scopes with ok mean everything. Ok is false if
// nothing needs to be let pass.
func (t *Table) DirectScopes(name string, client flow.Flow, addr netip.Addr, local LocalNames) (scopes []Scope, ok bool) {
	if t.Name(name, client, local).Kind != RealDirect {
		return nil, false
	}
	addr = addr.Unmap()
	// What is final and matches the address is left out: the kernel asks it
	// first, and knows all that it asks for.
	node, _ := t.prefixes.Lookup(addr)
	rules := slices.DeleteFunc(t.candidates(name), func(r *Rule) bool { return t.final(r) && t.hasRule(node, r) })
	for n := node; n != nil; n = n.parent {
		for _, r := range t.groups[n.group] {
			if !t.final(r) {
				rules = append(rules, r)
			}
		}
	}
	slices.SortFunc(rules, func(a, b *Rule) int { return a.Index - b.Index })
	rules = forEveryone(slices.Compact(rules))
	if !slices.ContainsFunc(rules, (*Rule).NeedsAdmission) {
		return nil, false // the kernel lets it pass by its rules, if at all
	}
	if !slices.ContainsFunc(rules, func(r *Rule) bool { return r.Action != Direct }) {
		return nil, true
	}
	// Where an address rule has cut a piece out of what the name rules allow,
	// what is left can be too many ports: let pass less rather than more.
	scopes = slices.DeleteFunc(directScopes(rules), Scope.tooWide)
	return scopes, len(scopes) > 0
}

// hasRule tells whether a rule is one of those for an address that found n.
func (t *Table) hasRule(n *prefixNode, r *Rule) bool {
	for ; n != nil; n = n.parent {
		if _, ok := slices.BinarySearchFunc(t.groups[n.group], r.Index, func(e *Rule, i int) int { return cmp.Compare(e.Index, i) }); ok {
			return true
		}
	}
	return false
}

// AddressRule returns the first rule before r that takes addresses, but not
// all of them, from a name of which flows of the network are DIRECT by r; nil:
// there is none.
func (t *Table) AddressRule(r *Rule, n flow.Network) *Rule {
	for _, e := range t.rules[:r.Index] {
		if e.about(n) && e.ActionFor(n) != Direct && slices.ContainsFunc(e.dest.prefixes, func(p netip.Prefix) bool { return p.Bits() > 0 }) {
			return e
		}
	}
	return nil
}

// forEveryone returns what decides in the worst case for a client that is not
// known: DIRECT if it must ask who the client is does not count, all else does.
func forEveryone(rules []*Rule) []*Rule {
	out := make([]*Rule, 0, 8)
	for _, r := range rules {
		if r.Action == Direct && r.byClient() {
			continue
		}
		out = append(out, r)
		if !r.partial() {
			break
		}
	}
	return out
}

// forClient returns those of the rules, which are in order, that the client
// can match, up to the first that takes all of its flows.
func forClient(rules []*Rule, client *flow.Flow) []*Rule {
	out := make([]*Rule, 0, 8)
	for _, r := range rules {
		if !r.matchesClient(client) {
			continue
		}
		out = append(out, r)
		if !r.partial() {
			break
		}
	}
	return out
}

// CarrierRule returns the first rule with servers that a flow of the client to
// the name can match on any port (R5); nil: there is none. Denied tells that
// every rule that it can match is DENY, so that nobody is to hear of the name
// (R4).
func (t *Table) CarrierRule(name string, client flow.Flow) (r *Rule, denied bool) {
	rules := forClient(t.candidates(name), &client)
	if i := slices.IndexFunc(rules, func(r *Rule) bool { return r.Action.proxied() }); i >= 0 {
		return rules[i], false
	}
	return nil, !slices.ContainsFunc(rules, func(r *Rule) bool { return r.Action != Deny })
}
