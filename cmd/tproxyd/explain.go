package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/tproxyd/tproxyd/internal/daemon"
	"github.com/tproxyd/tproxyd/pkg/flow"
	"github.com/tproxyd/tproxyd/pkg/routes"
)

func explainCommand(e *env) *cobra.Command {
	var src source
	var from, inIf, proto string
	var asJSON bool
	c := &cobra.Command{
		Use:   "explain [-c FILE | --routes FILE] [--src ADDR] [--if IF] [--proto tcp|udp] [--json] DEST:PORT",
		Short: "Say what becomes of a flow, and why",
		Long: `Say what becomes of a flow: the answer to the DNS question, what the kernel does,
the rule with its line, the servers in their order. DEST is a name or an
address. Nothing is sent. The last line is the verdict: DIRECT, DENY, or an
action with its servers as they are written in the rule.`,
		Example: "  tproxyd explain www.example.org:80\n  tproxyd explain --routes socks.cnf --src 10.1.2.3 '[2001:db8::1]:443'",
		Args:    cobra.ExactArgs(1),
	}
	src.flags(c)
	c.Flags().StringVar(&from, "src", "", "`ADDR` of the client")
	c.Flags().StringVar(&inIf, "if", "", "interface `IF` that the flow enters by")
	c.Flags().StringVar(&proto, "proto", "tcp", "tcp or udp")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	c.RunE = func(_ *cobra.Command, args []string) error {
		f, err := parseFlow(args[0], from, inIf, proto)
		if err != nil {
			return err
		}
		setup, err := src.load(e)
		if err != nil {
			return err
		}
		x := explain(setup, f)
		if asJSON {
			enc := json.NewEncoder(e.stdout)
			enc.SetIndent("", "  ")
			enc.SetEscapeHTML(false) // a>b is a chain
			return failed(enc.Encode(x))
		}
		fmt.Fprint(e.stdout, x.text())
		return nil
	}
	return c
}

// parseFlow reads a destination and what the options say of its flow.
func parseFlow(dest, src, inIf, proto string) (f flow.Flow, err error) {
	f.InIf = inIf
	switch proto {
	case "tcp":
	case "udp":
		f.Network = flow.UDP
	default:
		return f, fmt.Errorf("--proto: %q is neither tcp nor udp", proto)
	}
	if src != "" {
		a, err := netip.ParseAddr(src)
		if err != nil {
			return f, fmt.Errorf("--src: %q is not an address", src)
		}
		f.Src = netip.AddrPortFrom(a.Unmap().WithZone(""), 0)
	}
	host, service, err := net.SplitHostPort(dest)
	if err != nil {
		return f, fmt.Errorf("%q is not DEST:PORT, as www.example.org:80 or [2001:db8::1]:443", dest)
	}
	port, err := strconv.ParseUint(service, 10, 16)
	if err != nil || port == 0 {
		n, err := net.LookupPort(proto, service)
		if err != nil || n == 0 {
			return f, fmt.Errorf("%q is neither a port nor a service", service)
		}
		port = uint64(n)
	}
	if a, err := netip.ParseAddr(host); err == nil {
		f.Dst = netip.AddrPortFrom(a.Unmap().WithZone(""), uint16(port))
		return f, nil
	}
	f.Name = strings.ToLower(strings.TrimSuffix(host, "."))
	f.Dst = netip.AddrPortFrom(netip.Addr{}, uint16(port))
	if f.Name == "" || strings.ContainsAny(f.Name, " /*") {
		return f, errors.New("the destination has no name or address")
	}
	return f, nil
}

// explanation is the whole decision for one flow.
type explanation struct {
	Flow    string   `json:"flow"`
	DNS     string   `json:"dns,omitempty"`    // what the question for the name is answered with
	Kernel  string   `json:"kernel,omitempty"` // what the packet filter does
	Rule    string   `json:"rule"`             // with its file and line
	Servers []string `json:"servers,omitempty"`
	Order   string   `json:"order,omitempty"`
	Notes   []string `json:"notes,omitempty"`
	Verdict string   `json:"verdict"`

	question bool // to port 53, where that is answered here
}

// explain follows a flow through the same decisions that the daemon makes.
// Without a configuration there is no interception, and nothing is said of it.
func explain(s *daemon.Setup, f flow.Flow) explanation {
	x := explanation{Flow: describe(f)}
	x.question = s.Config != nil && s.Config.Intercept.DNS && f.Dst.Port() == dnsPort
	if x.question {
		x.note("port 53 of an intercepted host is never a flow: with dns = true its questions are answered here")
	}
	if f.Name == "" {
		x.address(s, f)
	} else {
		x.name(s, f)
	}
	switch {
	case s.Config == nil:
		x.Kernel = ""
	case x.question:
		x.Kernel = "diverted to be answered as DNS, whatever the rules say"
	}
	return x
}

// name explains a flow to a name.
func (x *explanation) name(s *daemon.Setup, f flow.Flow) {
	v := s.Table.Name(f.Name, f, s.LocalNames())
	switch v.Kind {
	case routes.Refused, routes.NXDomain:
		x.DNS = fmt.Sprintf("answered %v: %s", v.Kind, v.Why)
		x.decide(f, v.Rule)
	case routes.Real:
		x.DNS = "resolved here, real addresses: " + v.Why
		x.note("the flow has no name, so its address decides; the verdict is for an address that only catch-all rules match")
		f.Name = ""
		x.decide(f, s.Table.Match(f))
	case routes.RealDirect:
		x.DNS = "resolved here, real addresses, which enter the kernel's DIRECT set: " + v.Why
		r := s.Table.Match(f)
		if r.ActionFor(f.Network) == routes.Direct {
			x.Kernel = "DIRECT by the set of admitted addresses, never in user space"
			x.addressRule(s.Table, f, r)
		} else {
			x.note("this port is not DIRECT and the flow has no name, so its address decides; the verdict is for an address that only catch-all rules match")
			f.Name = ""
			r = s.Table.Match(f)
		}
		x.decide(f, r)
	case routes.LocalFirst:
		x.DNS = "resolved here if it can be, else a synthetic address: " + v.Why
		x.note("the verdict is for the synthetic address; if the name resolves here its address decides")
		x.decide(f, s.Table.Match(f))
	default:
		x.DNS = "a synthetic address: " + v.Why
		r := s.Table.Match(f)
		x.Kernel = synthetic + here(f, r)
		x.addressRule(s.Table, f, r)
		x.decide(f, r)
	}
}

// addressRule says that a name which is DIRECT is so only at addresses that no
// earlier rule takes.
func (x *explanation) addressRule(t *routes.Table, f flow.Flow, r *routes.Rule) {
	if before := t.AddressRule(r, f.Network); r.ActionFor(f.Network) == routes.Direct && before != nil {
		x.note("an address that an earlier rule names is not DIRECT, as by " + before.Position() + ": " + before.Text)
	}
}

const dnsPort = 53

// synthetic is what the kernel does with a flow to a synthetic address.
const synthetic = "diverted to user space, as every synthetic address"

// here is what user space does with a flow that a rule decides, if it does not
// ask the rule's servers to carry it.
func here(f flow.Flow, r *routes.Rule) string {
	switch {
	case r.ActionFor(f.Network) == routes.Direct:
		return "; this host resolves the name and dials it"
	case r.ActionFor(f.Network) == routes.Deny && f.Network == flow.UDP:
		return "; each datagram is refused there with ICMP admin-prohibited"
	case r.ActionFor(f.Network) == routes.Deny:
		return "; refused there with a reset"
	case !carried(f, r):
		return "; each datagram is refused there with ICMP port unreachable"
	}
	return ""
}

// carried tells whether a server of the rule will be asked to carry the flow.
// What is a question goes as DNS over TCP where UDP has no way.
func carried(f flow.Flow, r *routes.Rule) bool {
	return f.Network != flow.UDP || r.CarriesUDP() || f.Dst.Port() == dnsPort
}

// address explains a flow to a real (or synthetic) address.
func (x *explanation) address(s *daemon.Setup, f flow.Flow) {
	if s.Config != nil && (s.Config.DNS.Pool4.Contains(f.Dst.Addr()) || s.Config.DNS.Pool6.Contains(f.Dst.Addr())) {
		x.Kernel = synthetic
		x.Rule = "the address is synthetic: the name that owns it decides; without one the flow is refused"
		x.Verdict = "DENY"
		return
	}
	var own []netip.Prefix
	if s.Config != nil {
		own = ownPrefixes()
	}
	rule, implicit := s.Table.MatchAll(f, own)
	if implicit != "" {
		x.Kernel = "DIRECT in nftables, never in user space"
		x.Rule, x.Verdict = "implicit: "+implicit, "DIRECT"
		return
	}
	switch a := rule.ActionFor(f.Network); {
	case a == routes.Direct:
		x.Kernel = "DIRECT in nftables, never in user space"
	case a == routes.Deny && f.Network == flow.UDP:
		x.Kernel = "refused in nftables, each datagram with ICMP admin-prohibited"
	case a == routes.Deny:
		x.Kernel = "refused in nftables at the first packet"
	default:
		x.Kernel = "diverted to user space" + here(f, rule)
	}
	x.decide(f, rule)
}

// decide takes over the rule as the verdict.
func (x *explanation) decide(f flow.Flow, r *routes.Rule) {
	x.Rule = r.Position() + ": " + r.Text
	action := r.ActionFor(f.Network)
	x.Verdict = action.String()
	if action == routes.Direct || action == routes.Deny {
		return
	}
	if !carried(f, r) {
		x.note("no server of the rule carries UDP (udp=off, tls, a chain without udp=chain, or another protocol)")
		x.Verdict = routes.Deny.String()
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
	if action == routes.Socks4 && f.Name != "" {
		x.note("SOCKS4 takes no names: this host looks it up when the flow is carried")
	}
	x.Order = "the next one if a server is at fault"
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
	case routes.Random:
		x.Order = "a random order for each " + each + " (BALANCE), " + x.Order
	case routes.RoundRobin:
		x.Order = "each " + each + " begins with the next one (roundrobin), " + x.Order
	case routes.Hash:
		x.Order = "the same client and destination begin with the same one (hash), " + x.Order
	case routes.LeastLoad:
		x.Order = "each " + each + " begins with the one that carries the fewest flows (leastload), " + x.Order
	}
	x.Verdict += " " + strings.Join(x.Servers, ",")
}

// reached notes how a server is reached, if that takes more than to connect to it
// and to ask it.
func (x *explanation) reached(c routes.Chain, a routes.Action) {
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

func (x *explanation) note(s string) { x.Notes = append(x.Notes, s) }

func (x *explanation) text() string {
	var b strings.Builder
	line := func(key, value string) {
		if value != "" {
			fmt.Fprintf(&b, "%s: %s\n", key, value)
		}
	}
	line("flow", x.Flow)
	line("dns", x.DNS)
	line("kernel", x.Kernel)
	line("rule", x.Rule)
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
	return s
}
