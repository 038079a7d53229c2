package routes

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

// Surroundings are what a decision depends on beside the rules. The zero value
// is that of rules alone: nothing is intercepted, and nothing is said of it.
type Surroundings struct {
	Intercepted bool           // the packet filter has a part in it
	DNS         bool           // port 53 is answered here and never a flow
	Synthetic   []netip.Prefix // addresses that stand for names
	Own         []netip.Prefix // this host's addresses
	Local       LocalNames
}

// Explanation is the whole decision for one flow, in words and for programs.
// What does not apply is empty. The names of its JSON do not change.
type Explanation struct {
	Flow    string `json:"flow"`             // all that was said of it
	Network string `json:"network"`          // tcp or udp
	Host    string `json:"host"`             // the name or the address
	Port    uint16 `json:"port"`             //
	DNS     string `json:"dns,omitempty"`    // what the question for the name is answered with, and why
	Answer  string `json:"answer,omitempty"` // the same as one of NameKind's words
	Kernel  string `json:"kernel,omitempty"` // what the packet filter does
	Place   *Place `json:"place,omitempty"`  // where in it, of a flow to a real address

	Rule     string `json:"rule"`           // with its file and line
	File     string `json:"file,omitempty"` // empty: no line states it
	Line     int    `json:"line,omitempty"`
	Text     string `json:"text,omitempty"`     // of the rule, as written
	Implicit string `json:"implicit,omitempty"` // why it is DIRECT before all rules

	Near     []NearRule `json:"near,omitempty"`      // rules that nearly decided it
	NearMore int        `json:"near_more,omitempty"` // and how many are left out

	Action  string   `json:"action"`
	Servers []string `json:"servers,omitempty"` // in the order of the rule
	Balance string   `json:"balance,omitempty"`
	Order   string   `json:"order,omitempty"` // in which they are asked
	Notes   []string `json:"notes,omitempty"`
	Verdict string   `json:"verdict"` // DIRECT, DENY, or the action with its servers

	question bool // to port 53, where that is answered here
}

// NearRule is a Near for programs.
type NearRule struct {
	Rule string `json:"rule"` // FILE:LINE: text
	File string `json:"file"`
	Line int    `json:"line"`
	Why  string `json:"why"`
}

// Explain follows a flow through the same decisions that are made of it. The
// name must be lower case, without a final dot. It is slow, and asks nobody.
func (t *Table) Explain(f flow.Flow, s Surroundings) Explanation {
	to := f.Target()
	x := Explanation{Flow: describe(f), Network: f.Network.String(), Host: to.Host(), Port: to.Port}
	x.question = s.DNS && f.Dst.Port() == dnsPort
	if x.question {
		x.note("port 53 of an intercepted host is never a flow: with dns = true its questions are answered here")
	}
	if f.Name == "" {
		x.address(t, &s, f)
	} else {
		x.name(t, &s, f)
	}
	x.Action, _, _ = strings.Cut(x.Verdict, " ")
	switch {
	case !s.Intercepted:
		x.Kernel, x.Place = "", nil
	case x.question:
		x.Kernel, x.Place = "diverted to be answered as DNS, whatever the rules say", nil
	}
	return x
}

// name explains a flow to a name.
func (x *Explanation) name(t *Table, s *Surroundings, f flow.Flow) {
	v := t.Name(f.Name, f, s.Local)
	x.Answer = v.Kind.String()
	switch v.Kind {
	case Refused, NXDomain:
		x.DNS = fmt.Sprintf("answered %v: %s", v.Kind, v.Why)
		x.decide(t, f, v.Rule)
	case Real:
		x.DNS = "resolved here, real addresses: " + v.Why
		x.note("the flow has no name, so its address decides; the verdict is for an address that only catch-all rules match")
		f.Name, x.Kernel = "", byAddress
		x.decide(t, f, t.Match(f))
	case RealDirect:
		x.DNS = "resolved here, real addresses, which enter the kernel's DIRECT set: " + v.Why
		r := t.matchPacket(f)
		if own := t.Match(f); r.ActionFor(f.Network) != Direct && own.Program != "" {
			r, x.Kernel = own, found
		} else if r.ActionFor(f.Network) == Direct {
			x.Kernel = "DIRECT by the set of admitted addresses, never in user space"
			x.addressRule(t, f, r)
		} else {
			x.note("this port is not DIRECT and the flow has no name, so its address decides; the verdict is for an address that only catch-all rules match")
			f.Name, x.Kernel = "", byAddress
			r = t.Match(f)
		}
		x.decide(t, f, r)
	case LocalFirst:
		x.DNS = "resolved here if it can be, else a synthetic address: " + v.Why
		x.note("the verdict is for the synthetic address; if the name resolves here its address decides")
		r := t.Match(f)
		x.Kernel = synthetic + here(f, r)
		x.decide(t, f, r)
	default:
		x.DNS = "a synthetic address: " + v.Why
		r := t.Match(f)
		x.Kernel = synthetic + here(f, r)
		x.addressRule(t, f, r)
		x.decide(t, f, r)
	}
}

// addressRule says that a name which is DIRECT is so only at addresses that no
// earlier rule takes.
func (x *Explanation) addressRule(t *Table, f flow.Flow, r *Rule) {
	if before := t.AddressRule(r, f.Network); r.ActionFor(f.Network) == Direct && before != nil {
		x.note("an address that an earlier rule names is not DIRECT, as by " + before.Position() + ": " + before.Text)
	}
}

const dnsPort = 53

// synthetic is what the kernel does with a flow to a synthetic address.
const synthetic = "diverted to user space, as every synthetic address"

// byAddress is what the kernel does with a flow to a name that is resolved here.
const byAddress = "what the rules say of its address"

// found is what the kernel does with a flow of a program of EXCLUDE-MODULE.
const found = "diverted to user space, which finds the program; this host dials for it"

// matchPacket is Match by what a packet shows.
func (t *Table) matchPacket(f flow.Flow) *Rule {
	f.Program = ""
	return t.Match(f)
}

// here is what user space does with a flow that a rule decides, if it does not
// ask the rule's servers to carry it.
func here(f flow.Flow, r *Rule) string {
	switch {
	case r.ActionFor(f.Network) == Direct:
		return "; this host resolves the name and dials it"
	case f.Network == flow.UDP && r.ActionFor(f.Network) == Deny && r.drops():
		return "; each datagram is dropped there"
	case r.ActionFor(f.Network) == Deny && f.Network == flow.UDP:
		return "; each datagram is refused there with ICMP admin-prohibited"
	case r.ActionFor(f.Network) == Deny:
		return "; refused there with a reset"
	case !carried(f, r):
		return "; each datagram is refused there with ICMP port unreachable"
	}
	return ""
}

// drops tells whether what the rule denies hears nothing of it.
func (r *Rule) drops() bool { return r.Action == Deny && r.Reject == RejectDrop }

// carried tells whether a server of the rule will be asked to carry the flow.
// What is a question goes as DNS over TCP where UDP has no way.
func carried(f flow.Flow, r *Rule) bool {
	return f.Network != flow.UDP || r.CarriesUDP() || f.Dst.Port() == dnsPort
}

// address explains a flow to a real (or synthetic) address.
func (x *Explanation) address(t *Table, s *Surroundings, f flow.Flow) {
	if slices.ContainsFunc(s.Synthetic, func(p netip.Prefix) bool { return p.Contains(f.Dst.Addr()) }) {
		x.Kernel = synthetic
		x.Rule = "the address is synthetic: the name that owns it decides; without one the flow is refused"
		x.Verdict = "DENY"
		return
	}
	rule, implicit := t.MatchAll(f, s.Own)
	if implicit != "" {
		x.Kernel = "DIRECT in nftables, never in user space"
		x.Rule, x.Implicit, x.Verdict = "implicit: "+implicit, implicit, "DIRECT"
		return
	}
	by := t.matchPacket(f)
	if rule.Program != "" && by.ActionFor(f.Network) != Direct {
		x.Kernel = found
		x.decide(t, f, rule)
		return
	}
	rule = by
	place := t.Place(f)
	x.Place = &place
	switch a := rule.ActionFor(f.Network); {
	case a == Deny && f.InIf == "" && len(t.programs) > 0:
		x.Kernel, x.Place = "diverted to user space, which looks for the program"+here(f, rule), nil
	case a == Direct:
		x.Kernel = "DIRECT in nftables, never in user space"
	case a == Deny && rule.drops():
		x.Kernel = "dropped in nftables, without a word"
	case a == Deny && f.Network == flow.TCP && place.List == "icmp":
		x.Kernel = "refused in nftables at the first packet, with ICMP admin-prohibited"
	case a == Deny && f.Network == flow.UDP:
		x.Kernel = "refused in nftables, each datagram with ICMP admin-prohibited"
	case a == Deny:
		x.Kernel = "refused in nftables at the first packet"
	default:
		x.Kernel = "diverted to user space" + here(f, rule)
	}
	x.decide(t, f, rule)
}

// decide takes over the rule as the verdict.
func (x *Explanation) decide(t *Table, f flow.Flow, r *Rule) {
	x.Rule, x.File, x.Line, x.Text = r.Position()+": "+r.Text, r.File, r.Line, r.Text
	near, more := t.Near(f, r)
	for _, n := range near {
		x.Near = append(x.Near, NearRule{n.Rule.Position() + ": " + n.Rule.Text, n.Rule.File, n.Rule.Line, n.Why})
	}
	x.NearMore = more
	action := r.ActionFor(f.Network)
	x.Verdict = action.String()
	if action == Direct || action == Deny {
		return
	}
	if !carried(f, r) {
		x.note("no server of the rule carries UDP (udp=off, tls, a chain without udp=chain, or another protocol)")
		x.Verdict = Deny.String()
		return
	}
	var off []string
	for _, c := range r.Servers {
		x.Servers = append(x.Servers, c.String())
		if !c.CarriesUDP(action) {
			off = append(off, c.String())
		}
		x.reached(c, action)
	}
	if action == Socks4 && f.Name != "" {
		x.note("SOCKS4 takes no names: this host looks it up when the flow is carried")
	}
	x.Balance, x.Order = r.Balance.String(), "the next one if a server is at fault"
	each := "flow"
	if f.Network == flow.UDP && !x.question {
		x.Order = "by UDP ASSOCIATE, the next one if a server is at fault or carries no UDP"
		each = "client socket"
		if len(off) > 0 {
			x.note("never asked to carry UDP, by udp=off, tls, a chain without udp=chain, or another protocol: " + strings.Join(off, ", "))
		}
		if f.Dst.Port() == dnsPort {
			x.note("where no server carries UDP a question goes through them as DNS over TCP")
		} else {
			x.note("where no server carries UDP each datagram is refused with ICMP port unreachable")
		}
	}
	switch r.Balance {
	case Random:
		x.Order = "a random order for each " + each + " (BALANCE), " + x.Order
	case RoundRobin:
		x.Order = "each " + each + " begins with the next one (roundrobin), " + x.Order
	case Hash:
		x.Order = "the same client and destination begin with the same one (hash), " + x.Order
	case LeastLoad:
		x.Order = "each " + each + " begins with the one that carries the fewest flows (leastload), " + x.Order
	}
	x.Verdict += " " + strings.Join(x.Servers, ",")
}

// reached notes how a server is reached, if that takes more than to connect to it
// and to ask it.
func (x *Explanation) reached(c Chain, a Action) {
	for i, s := range c {
		var how []string
		if i > 0 {
			how = append(how, "through "+c[i-1].Name)
		}
		if s.TLS {
			how = append(how, "by TLS")
		}
		if s.If != "" {
			how = append(how, "by interface "+s.If)
		}
		if s.Source.IsValid() {
			how = append(how, "from "+s.Source.String())
		}
		if p := c.Protocol(i, a); p != a {
			how = append(how, "in "+p.String())
		}
		if how != nil {
			x.note(s.Name + " is reached " + strings.Join(how, ", "))
		}
	}
}

func (x *Explanation) note(s string) { x.Notes = append(x.Notes, s) }

// String returns the explanation as lines, the verdict last.
func (x *Explanation) String() string {
	var b strings.Builder
	line := func(key, value string) {
		if value != "" {
			fmt.Fprintf(&b, "%s: %s\n", key, value)
		}
	}
	line("flow", x.Flow)
	line("dns", x.DNS)
	line("kernel", x.Kernel)
	if p := x.Place; p != nil && p.Block >= 0 {
		line("block", p.String())
	}
	line("rule", x.Rule)
	if x.NearMore > 0 {
		line("near", fmt.Sprintf("%d rules more, in front of these", x.NearMore))
	}
	for _, n := range x.Near {
		line("near", n.Rule+" ("+n.Why+")")
	}
	if len(x.Servers) > 0 {
		line("servers", strings.Join(x.Servers, ", ")+"; "+x.Order)
	}
	for _, n := range x.Notes {
		line("note", n)
	}
	line("verdict", x.Verdict)
	return b.String()
}

func describe(f flow.Flow) string {
	s := f.Network.String() + " to " + f.Target().String()
	if f.Src.IsValid() {
		s += " from " + f.Src.Addr().String()
	}
	if f.InIf != "" {
		s += " by " + f.InIf
	}
	if f.MAC != (flow.MAC{}) {
		s += " of neighbour " + f.MAC.String()
	}
	if f.Mark != 0 {
		s += fmt.Sprintf(" with mark %#x", f.Mark)
	}
	if o := f.Owner; o.Known {
		for _, id := range []struct {
			what string
			is   uint32
		}{{"user", o.UID}, {"group", o.GID}} {
			if id.is != nobody {
				s += fmt.Sprintf(" of %s %d", id.what, id.is)
			}
		}
		if o.Cgroup != "" {
			s += " in cgroup " + o.Cgroup
		}
	}
	if f.Program != "" {
		s += " by program " + f.Program
	}
	return s
}
