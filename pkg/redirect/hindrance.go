package redirect

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
)

// Hindrances looks for what of the host's own set-up would stop what a Plan
// with these marks diverts, in the network namespace of the calling thread. Each
// is a sentence that says what it is and what to do. It changes nothing; what it
// cannot read it does not report.
func Hindrances(m Marks) []string {
	return append(append(inputChains(m), bridgeCalls()...), foreignMarks(m)...)
}

// inputChains finds filters of others on the way to this host: diverted packets
// go through their input chains.
func inputChains(m Marks) (list []string) {
	c, err := nftables.New()
	if err != nil {
		return nil
	}
	chains, err := c.ListChains()
	if err != nil {
		return nil
	}
	for _, ch := range chains {
		if ch.Hooknum == nil || *ch.Hooknum != *nftables.ChainHookInput || ch.Type != nftables.ChainTypeFilter ||
			ch.Table.Name == tableName || ch.Table.Family == nftables.TableFamilyARP || ch.Table.Family == nftables.TableFamilyBridge {
			continue
		}
		rules, err := c.GetRules(ch.Table, ch)
		if err != nil {
			continue
		}
		stops := ch.Policy != nil && *ch.Policy == nftables.ChainPolicyDrop
		if n := len(rules); n > 0 && refusesAll(rules[n-1].Exprs) {
			stops = true
		}
		for _, r := range rules {
			stops = stops && !asksMark(r.Exprs, m.Mask)
		}
		if stops {
			list = append(list, fmt.Sprintf("the chain %s of table %s %s drops what it does not know, diverted packets too: let it accept those with mark %#x/%#x and %#x/%#x",
				ch.Name, familyName(ch.Table.Family), ch.Table.Name, m.Lan(), m.Mask, m.Local(), m.Mask))
		}
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
func bridgeCalls() (list []string) {
	links, err := netlink.LinkList()
	if err != nil || !slices.ContainsFunc(links, func(l netlink.Link) bool { return l.Type() == "bridge" }) {
		return nil
	}
	for _, name := range []string{"bridge-nf-call-iptables", "bridge-nf-call-ip6tables"} {
		if b, err := os.ReadFile("/proc/sys/net/bridge/" + name); err == nil && bytes.Equal(bytes.TrimSpace(b), []byte("1")) {
			list = append(list, fmt.Sprintf("net.bridge.%s is 1, so packets that a bridge only passes on go through our table too: set it to 0", name))
		}
	}
	return list
}

// foreignMarks finds routing rules of others that go by bits of the mark that
// are ours.
func foreignMarks(m Marks) (list []string) {
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
				list = append(list, fmt.Sprintf("the routing rule %d of others goes by mark %#x/%#x, which has bits of ours (%#x): choose other bits by [intercept] mark",
					r.Priority, r.Mark, mask, m.Mask))
			}
		}
	}
	return list
}
