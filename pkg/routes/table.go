package routes

import (
	"cmp"
	"crypto/sha256"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

// Table is a set of rules, ready to decide. It is immutable and safe for
// concurrent use.
type Table struct {
	rules     []*Rule // the last one is the DEFAULT
	servers   []*Server
	proxyName []Chain
	resolves  *resolves
	limits    Limits
	health    Health

	*index // where a flow's destination finds the rules that it can match

	programs []*Rule  // the first ones, which are in no index: see Rule.Program
	named    []string // by them

	byInterface bool
	byClient    bool
	byWho       bool // by what flow.Flow has of Mark, MAC and Owner
	cgroups     []string

	firstDirectName int // index of the first rule that makes a name of its own DIRECT
	sum             [sha256.Size]byte
	sources         []source // see Reread
	listFiles       []string
}

// build makes the Table of what was parsed.
func (p *parser) build() *Table {
	t := &Table{
		servers: p.servers, proxyName: p.proxyName, resolves: newResolves(p.resolves), limits: p.limits, health: p.health,
		sources: p.reader.sources, listFiles: p.files,
	}
	last := p.defaultRule
	if last == nil {
		last = &Rule{Text: "DEFAULT DENY", Default: true}
	}
	last.dest = dest{prefixes: []netip.Prefix{all4, all6}, anyName: true}
	t.programs = p.programs
	for _, r := range p.programs {
		t.named = append(t.named, r.Program)
	}
	t.rules = append(slices.Concat(p.programs, p.excluded, p.rules), last)
	t.firstDirectName = slices.IndexFunc(t.rules, func(r *Rule) bool { return r.Action == Direct && r.ownName() })
	if t.firstDirectName < 0 {
		t.firstDirectName = len(t.rules)
	}
	for i, r := range t.rules {
		r.Index = i
		t.byInterface = t.byInterface || len(r.Ifs) > 0
		t.byClient = t.byClient || r.byClient()
		t.byWho = t.byWho || r.own() || len(r.Marks) > 0 || len(r.MACs) > 0
		t.cgroups = append(t.cgroups, r.Cgroups...)
	}
	slices.Sort(t.cgroups)
	t.cgroups = slices.Compact(t.cgroups)
	t.index = newIndex(t.rules, p.names)
	left := maxSearch
	for _, r := range t.rules {
		if p.diags.wrong[r.number] {
			continue // who knows what it shall match
		}
		p.diags.current = r.number
		at := token{line: r.Line, col: r.col}
		if by := p.coveredBy(t, r, &left); by != nil {
			p.diags.add(r.File, at, Warning, "E22", "rule can never match: covered by %s: %s", by.Position(), by.Text)
		}
		if why := alwaysDirect(r); why != "" {
			p.diags.add(r.File, at, Warning, "E22", "rule can never match: %s addresses are DIRECT before all rules", why)
		}
		if by := t.resolvedHere(r, &left); by != nil {
			p.diags.add(r.File, at, Warning, "E22", "rule can never match: %s has its names resolved here, and then the address decides", by.position())
		}
	}
	p.reader.sum.Sum(t.sum[:0])
	return t
}

// Rules returns the rules in the order in which they apply; the last one is
// the DEFAULT. The slice must not be changed.
func (t *Table) Rules() []*Rule { return t.rules }

// Servers returns the servers of SERVER lines and those that rules spell out.
// The slice must not be changed.
func (t *Table) Servers() []*Server { return t.servers }

// ProxyName returns the list of PROXY_NAME; nil: there is none.
func (t *Table) ProxyName() []Chain { return t.proxyName }

// Limits returns what TIMEOUT lines state.
func (t *Table) Limits() Limits { return t.limits }

// Health returns what HEALTH lines state.
func (t *Table) Health() Health { return t.health }

// Sum returns a digest of what was read, comments and blanks aside: two tables
// with the same sum decide alike.
func (t *Table) Sum() [sha256.Size]byte { return t.sum }

// UsesInterfaces tells whether a rule asks by which interface a flow entered, or
// for what is only known of flows that entered by one, or by none.
func (t *Table) UsesInterfaces() bool { return t.byInterface || t.byWho || len(t.programs) > 0 }

// UsesWho tells whether a rule asks for what a Flow has of Mark, MAC and Owner.
func (t *Table) UsesWho() bool { return t.byWho }

// Programs returns what the rules ask for that Flow.Program is: paths, or last parts
// of paths. Such rules come before all others, make DIRECT what they match, and say
// nothing of names, whoever asks for them. The slice must not be changed.
func (t *Table) Programs() []string { return t.named }

// Cgroups returns what the rules ask for by cgroup=, each once and sorted.
func (t *Table) Cgroups() []string { return t.cgroups }

// Asked is what a table asks of a client beyond its address.
type Asked struct {
	interfaces, who bool
	cgroups         []string
}

// Asks returns what the table asks of a client.
func (t *Table) Asks() Asked { return Asked{t.UsesInterfaces(), t.byWho, t.cgroups} }

// Has tells whether who was asked a is known well enough for what other asks.
func (a Asked) Has(other Asked) bool {
	return (a.interfaces || !other.interfaces) && (a.who || !other.who) &&
		!slices.ContainsFunc(other.cgroups, func(c string) bool { return !slices.Contains(a.cgroups, c) })
}

// DependsOnClient tells whether a rule asks who the client is.
func (t *Table) DependsOnClient() bool { return t.byClient }

// FirstHops returns the servers that this host itself connects to, each once.
func (t *Table) FirstHops() []*Server {
	var list []*Server
	seen := map[*Server]bool{}
	add := func(chains []Chain) {
		for _, c := range chains {
			if !seen[c[0]] {
				seen[c[0]] = true
				list = append(list, c[0])
			}
		}
	}
	for _, r := range t.rules {
		add(r.Servers)
	}
	add(t.proxyName)
	return list
}

// Match returns the rule that decides a flow: the first one that matches. The
// DEFAULT matches everything, so it is never nil. A flow with a name has no
// address (R3). A flow with neither is matched by catch-alls alone. The name
// must be lower case, without a final dot.
func (t *Table) Match(f flow.Flow) *Rule {
	if f.Program != "" {
		for _, r := range t.programs {
			if r.runs(f.Program) {
				return r
			}
		}
	}
	best := t.rules[len(t.rules)-1]
	if f.Name == "" {
		return t.matchAddr(&f, best)
	}
	best = first(t.anyName, &f, best)
	best = first(t.exact(f.Name), &f, best)
	for rest := f.Name; t.below; {
		i := strings.IndexByte(rest, '.')
		if i < 0 {
			break
		}
		rest = rest[i+1:]
		best = first(t.under(rest), &f, best)
	}
	return best
}

func (t *Table) matchAddr(f *flow.Flow, best *Rule) *Rule {
	addr := f.Dst.Addr()
	if !addr.IsValid() {
		return first(t.anyAddr, f, best)
	}
	n, _ := t.prefixes.Lookup(addr.Unmap().WithZone(""))
	for ; n != nil; n = n.parent {
		best = first(t.groups[n.group], f, best)
	}
	return best
}

// first returns the first rule of the list that matches, or best if that comes
// before it.
func first(list []*Rule, f *flow.Flow, best *Rule) *Rule {
	for _, r := range list {
		if r.Index >= best.Index {
			break
		}
		if r.matchesPort(f) && r.matchesClient(f) {
			return r
		}
	}
	return best
}

// about tells whether the rule decides flows of a network at all.
func (r *Rule) about(n flow.Network) bool {
	switch r.Protocols {
	case OnlyTCP:
		return n == flow.TCP
	case OnlyUDP:
		return n == flow.UDP
	}
	return true
}

func (r *Rule) matchesPort(f *flow.Flow) bool {
	if !r.about(f.Network) {
		return false
	}
	if len(r.Ports) == 0 {
		return true
	}
	port := f.Dst.Port()
	for _, p := range r.Ports {
		if port < p.From {
			return false
		}
		if port <= p.To {
			return true
		}
	}
	return false
}

// implicitPrefix is what is DIRECT before all rules.
type implicitPrefix struct {
	prefix netip.Prefix
	why    string
}

// The implicit rules: what is DIRECT before all rules, and why.
var implicitPrefixes = []implicitPrefix{
	{netip.MustParsePrefix("127.0.0.0/8"), "loopback"},
	{netip.MustParsePrefix("::1/128"), "loopback"},
	{netip.MustParsePrefix("169.254.0.0/16"), "link-local"},
	{netip.MustParsePrefix("fe80::/10"), "link-local"},
	{netip.MustParsePrefix("224.0.0.0/4"), "multicast"},
	{netip.MustParsePrefix("ff00::/8"), "multicast"},
	{netip.MustParsePrefix("255.255.255.255/32"), "broadcast"},
}

// Implicit returns the rules that apply before all others, as the language
// would write them. Own are the host's addresses.
func (t *Table) Implicit(own []netip.Prefix) []string {
	var list []string
	for _, i := range implicitPrefixes {
		list = append(list, "DIRECT "+i.prefix.String()+"  # "+i.why)
	}
	for _, p := range own {
		list = append(list, "DIRECT "+p.Addr().String()+"  # this host")
	}
	for _, s := range t.FirstHops() {
		if s.Addr.IsValid() {
			list = append(list, "DIRECT "+s.Addr.String()+" eq "+strconv.Itoa(int(s.Port))+" proto=tcp  # server "+s.Name)
		}
	}
	return list
}

// MatchAll is Match for a flow to a real address, with the implicit rules in
// front. If one of these decides, implicit says which, and the rule is nil.
func (t *Table) MatchAll(f flow.Flow, own []netip.Prefix) (r *Rule, implicit string) {
	if addr := f.Dst.Addr().Unmap(); f.Name == "" && addr.IsValid() {
		for _, i := range implicitPrefixes {
			if i.prefix.Contains(addr) {
				return nil, i.why + " addresses are always DIRECT"
			}
		}
		for _, p := range own {
			if p.Addr() == addr {
				return nil, "this host's own addresses are always DIRECT"
			}
		}
		for _, s := range t.FirstHops() {
			if s.Addr == addr && s.Port == f.Dst.Port() && f.Network == flow.TCP {
				return nil, "server " + s.Name + " is always DIRECT at its port"
			}
		}
	}
	return t.Match(f), ""
}

// candidates returns the rules that a flow to name can match on some port and
// protocol, in order, up to the first that no client and no port escapes.
func (t *Table) candidates(name string) []*Rule {
	var out []*Rule
	t.ofName(name, func(list []*Rule) {
		for _, r := range list {
			out = append(out, r)
			if !r.conditional() {
				break
			}
		}
	})
	slices.SortFunc(out, func(a, b *Rule) int { return cmp.Compare(a.Index, b.Index) })
	out = slices.Compact(out)
	for i, r := range out {
		if !r.conditional() {
			return out[:i+1]
		}
	}
	return out
}
