package redirect

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// Hindrance is something of the host's own set-up that stops packets which a
// Plan has us take or let pass.
type Hindrance struct {
	Check string // a word for its kind: input, forward, bridge, mark, rp_filter, pool
	What  string // what it is
	Why   string // what it does to flows
	Mend  string // a command line, or what to change
}

// String returns all of it as one sentence.
func (h Hindrance) String() string { return h.What + ": " + h.Why + "; mend it by: " + h.Mend }

// Hindrances looks for what of the host's own set-up would stop what a Plan
// with these marks diverts, in the network namespace of the calling thread. It
// changes nothing; what it cannot read it does not report.
func Hindrances(m Marks) []Hindrance {
	return slices.Concat(inputChains(m), bridgeCalls(), foreignMarks(m))
}

// DirectHindrances is the same for packets of named interfaces that are DIRECT,
// which the host forwards: filters of others, and reverse paths that go by marks.
func DirectHindrances(m Marks, interfaces []string) []Hindrance {
	return append(forwardChains(m, interfaces), reversePaths(interfaces)...)
}

// SyntheticHindrances looks for networks that this host is in, or has a route
// to, where addresses stand for names: what is sent to them is refused, and hosts
// in such a network ask for a neighbour of that address instead of sending to us.
func SyntheticHindrances(pools ...netip.Prefix) (list []Hindrance) {
	found := func(pool netip.Prefix, what string) {
		list = append(list, Hindrance{
			Check: "pool",
			What:  fmt.Sprintf("%s has addresses of the synthetic pool %s", what, pool),
			Why:   "what is sent there is taken for a name's, and refused; in a network that has the pool no name can be reached",
			Mend:  "name a prefix that is used nowhere by [dns] pool4 or pool6 in tproxyd.toml",
		})
	}
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return nil
	}
	routes, err := netlink.RouteList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return nil
	}
	for _, pool := range pools {
		for _, a := range addrs {
			if p, err := netip.ParsePrefix(a.String()); err == nil && p.Overlaps(pool) {
				found(pool, "the network of this host's address "+p.String())
			}
		}
		for _, r := range routes {
			if r.Dst == nil || r.Type != unix.RTN_UNICAST || r.Protocol == unix.RTPROT_KERNEL {
				continue
			}
			p, err := netip.ParsePrefix(r.Dst.String())
			if err == nil && p.Bits() >= pool.Bits() && pool.Contains(p.Addr()) {
				found(pool, "the route to "+p.String())
			}
		}
	}
	return list
}

// filters calls f for each base chain of others that filters at a hook, with
// its rules and those of all chains that it can lead to.
func filters(hook *nftables.ChainHook, f func(ch *nftables.Chain, own, all []*nftables.Rule)) {
	c, err := nftables.New()
	if err != nil {
		return
	}
	chains, err := c.ListChains()
	if err != nil {
		return
	}
	for _, ch := range chains {
		if ch.Hooknum == nil || *ch.Hooknum != *hook || ch.Type != nftables.ChainTypeFilter ||
			ch.Table.Name == tableName || ch.Table.Family == nftables.TableFamilyARP || ch.Table.Family == nftables.TableFamilyBridge {
			continue
		}
		own, err := c.GetRules(ch.Table, ch)
		if err != nil {
			continue
		}
		all, seen := slices.Clone(own), map[string]bool{ch.Name: true}
		for i := 0; i < len(all); i++ {
			for _, e := range all[i].Exprs {
				v, ok := e.(*expr.Verdict)
				if !ok || v.Chain == "" || seen[v.Chain] {
					continue
				}
				seen[v.Chain] = true
				if more, err := c.GetRules(ch.Table, &nftables.Chain{Name: v.Chain, Table: ch.Table}); err == nil {
					all = append(all, more...)
				}
			}
		}
		f(ch, own, all)
	}
}

// stops tells whether a chain ends in refusing what no rule accepted.
func stops(ch *nftables.Chain, own []*nftables.Rule) bool {
	if ch.Policy != nil && *ch.Policy == nftables.ChainPolicyDrop {
		return true
	}
	return len(own) > 0 && refusesAll(own[len(own)-1].Exprs)
}

// inputChains finds filters of others on the way to this host: diverted packets
// go through their input chains.
func inputChains(m Marks) (list []Hindrance) {
	filters(nftables.ChainHookInput, func(ch *nftables.Chain, own, all []*nftables.Rule) {
		if !stops(ch, own) || slices.ContainsFunc(all, func(r *nftables.Rule) bool { return asksMark(r.Exprs, m.Mask) }) {
			return
		}
		list = append(list, Hindrance{
			Check: "input",
			What:  fmt.Sprintf("the chain %s of table %s %s drops what it does not know", ch.Name, familyName(ch.Table.Family), ch.Table.Name),
			Why:   "diverted packets pass through it, so flows that should be proxied hang",
			Mend: fmt.Sprintf("nft insert rule %s %s %s meta mark and %#x == { %#x, %#x } accept",
				familyName(ch.Table.Family), ch.Table.Name, ch.Name, m.Mask, m.Lan(), m.Local()),
		})
	})
	return list
}

// forwardChains finds filters of others that packets which are DIRECT go
// through. One that names an interface of ours is taken to know what it does.
func forwardChains(m Marks, interfaces []string) (list []Hindrance) {
	if len(interfaces) == 0 {
		return nil
	}
	filters(nftables.ChainHookForward, func(ch *nftables.Chain, own, all []*nftables.Rule) {
		if !stops(ch, own) || slices.ContainsFunc(all, func(r *nftables.Rule) bool {
			return asksMark(r.Exprs, m.Mask) || accepts(r.Exprs) && asksInterface(r.Exprs, interfaces)
		}) {
			return
		}
		at := fmt.Sprintf("%s %s %s", familyName(ch.Table.Family), ch.Table.Name, ch.Name)
		list = append(list, Hindrance{
			Check: "forward",
			What:  fmt.Sprintf("the chain %s of table %s %s drops what it does not know", ch.Name, familyName(ch.Table.Family), ch.Table.Name),
			Why:   "flows that are DIRECT are forwarded through it and hang",
			Mend:  fmt.Sprintf("nft insert rule %s ct state established,related accept; nft insert rule %s meta mark and %#x == %#x accept", at, at, m.Mask, m.Direct()),
		})
	})
	return list
}

// accepts tells whether a rule ends in letting pass.
func accepts(exprs []expr.Any) bool {
	return slices.ContainsFunc(exprs, func(e expr.Any) bool {
		v, ok := e.(*expr.Verdict)
		return ok && v.Kind == expr.VerdictAccept
	})
}

// asksInterface tells whether a rule is for packets that enter by one of the
// interfaces.
func asksInterface(exprs []expr.Any, interfaces []string) bool {
	for i, e := range exprs {
		meta, ok := e.(*expr.Meta)
		if !ok || meta.SourceRegister || meta.Key != expr.MetaKeyIIFNAME && meta.Key != expr.MetaKeyIIF || i+1 == len(exprs) {
			continue
		}
		cmp, ok := exprs[i+1].(*expr.Cmp)
		if !ok || cmp.Op != expr.CmpOpEq {
			return true // a set, or a wildcard
		}
		for _, name := range interfaces {
			if string(bytes.TrimRight(cmp.Data, "\x00")) == name {
				return true
			}
			if l, err := netlink.LinkByName(name); err == nil && len(cmp.Data) == 4 && binary.NativeEndian.Uint32(cmp.Data) == uint32(l.Attrs().Index) {
				return true
			}
		}
	}
	return false
}

// reversePaths finds interfaces whose reverse path is looked up by marks. Our
// own are laid out for it; those of others (wg-quick sets src_valid_mark) are not.
func reversePaths(interfaces []string) (list []Hindrance) {
	read := func(name, key string) bool {
		b, err := os.ReadFile("/proc/sys/net/ipv4/conf/" + name + "/" + key)
		b = bytes.TrimSpace(b)
		return err == nil && len(b) > 0 && b[0] != '0'
	}
	for _, name := range interfaces {
		marked := read("all", "src_valid_mark") || read(name, "src_valid_mark")
		if !marked || !read("all", "rp_filter") && !read(name, "rp_filter") {
			continue
		}
		list = append(list, Hindrance{
			Check: "rp_filter",
			What:  fmt.Sprintf("rp_filter and src_valid_mark are both on for %s", name),
			Why:   "where packets came from is looked up by their marks, also by rules of others for these, and what they lead elsewhere is dropped without a trace",
			Mend:  fmt.Sprintf("sysctl -w net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.%s.rp_filter=0, or src_valid_mark=0 for both", name),
		})
	}
	return list
}

// refusesAll tells whether a rule drops or rejects without a condition.
func refusesAll(exprs []expr.Any) bool {
	for _, e := range exprs {
		switch e := e.(type) {
		case *expr.Counter, *expr.Log:
		case *expr.Reject:
			return true
		case *expr.Verdict:
			return e.Kind == expr.VerdictDrop
		default:
			return false
		}
	}
	return false
}

// asksMark tells whether a rule looks at bits of the packet mark that are ours.
func asksMark(exprs []expr.Any, mask uint32) bool {
	marked := false
	for _, e := range exprs {
		switch e := e.(type) {
		case *expr.Meta:
			marked = e.Key == expr.MetaKeyMARK && !e.SourceRegister
		case *expr.Match: // of iptables-nft
			if e.Name == "mark" {
				return true
			}
		case *expr.Bitwise:
			if marked && len(e.Mask) == 4 && binary.NativeEndian.Uint32(e.Mask)&mask != 0 {
				return true
			}
		}
	}
	return false
}

func familyName(f nftables.TableFamily) string {
	switch f {
	case nftables.TableFamilyIPv4:
		return "ip"
	case nftables.TableFamilyIPv6:
		return "ip6"
	}
	return "inet"
}

// bridgeCalls finds bridges that show their packets to the IP tables: what is
// only bridged would be taken.
func bridgeCalls() (list []Hindrance) {
	links, err := netlink.LinkList()
	if err != nil || !slices.ContainsFunc(links, func(l netlink.Link) bool { return l.Type() == "bridge" }) {
		return nil
	}
	for _, name := range []string{"bridge-nf-call-iptables", "bridge-nf-call-ip6tables"} {
		if b, err := os.ReadFile("/proc/sys/net/bridge/" + name); err == nil && bytes.Equal(bytes.TrimSpace(b), []byte("1")) {
			list = append(list, Hindrance{
				Check: "bridge",
				What:  fmt.Sprintf("net.bridge.%s is 1", name),
				Why:   "packets that a bridge only passes on go through the tables of IP, where TPROXY breaks them",
				Mend:  fmt.Sprintf("sysctl -w net.bridge.%s=0", name),
			})
		}
	}
	return list
}

// foreignMarks finds routing rules of others that go by bits of the mark that
// are ours.
func foreignMarks(m Marks) (list []Hindrance) {
	for _, f := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		rules, err := netlink.RuleList(f)
		if err != nil {
			continue
		}
		for _, r := range rules {
			if r.Mark == 0 || r.Invert || r.Protocol == RouteProtocol {
				continue
			}
			mask := uint32(0xffffffff)
			if r.Mask != nil {
				mask = *r.Mask
			}
			if mask&m.Mask != 0 {
				list = append(list, Hindrance{
					Check: "mark",
					What:  fmt.Sprintf("the routing rule %d of others goes by mark %#x/%#x", r.Priority, r.Mark, mask),
					Why:   fmt.Sprintf("it has bits of ours (%#x), so it may route packets that are not meant, and miss those that are", m.Mask),
					Mend:  fmt.Sprintf("choose other bits: [intercept] mark = \"VALUE/MASK\" in tproxyd.toml, with a mask outside of %#x", mask),
				})
			}
		}
	}
	return list
}
