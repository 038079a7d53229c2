package redirect

import (
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// chunk is how many elements go into one message: the length of an attribute is
// a number of 16 bits, and what does not fit is cut off without an error.
const chunk = 1000

// present is what of our table is in the kernel.
type present struct {
	chains []string
	sets   []string
}

// generation returns the suffix that the sets of the next plan can have.
func (h present) generation() string {
	for _, s := range h.sets {
		if strings.HasSuffix(s, "_a") {
			return "b"
		}
	}
	return "a"
}

// stale returns the names that are not among those wanted.
func stale(have []string, want func(string) bool) []string {
	return slices.DeleteFunc(slices.Clone(have), want)
}

// messages returns the transaction that makes the table t of what is there,
// without a moment in which neither is in force. Readmit, if not nil, replaces
// the elements of the dynamic sets.
func (t *table) messages(there present, readmit []setElements) ([]netlink.Message, error) {
	nt := &nftables.Table{Name: tableName, Family: nftables.TableFamilyINet}
	anonymous := uint32(0)
	return record(func(c *nftables.Conn) error {
		if len(there.chains) > 0 {
			c.FlushTable(nt)
		}
		for _, n := range counterNames() {
			c.AddObj(&nftables.NamedObj{Table: nt, Name: n, Type: nftables.ObjTypeCounter, Obj: &expr.Counter{}})
		}
		for i, s := range t.sets {
			ns := s.lib(nt, uint32(i+1))
			if err := c.AddSet(ns, nil); err != nil {
				return err
			}
			for e := range slices.Chunk(s.elements, chunk) {
				if err := c.SetAddElements(ns, e); err != nil {
					return err
				}
			}
		}
		anonymous = uint32(len(t.sets))
		chains := make([]*nftables.Chain, len(t.chains))
		accept := nftables.ChainPolicyAccept
		for i, ch := range t.chains {
			chains[i] = &nftables.Chain{Name: ch.name, Table: nt}
			if ch.kind != "" {
				chains[i].Type, chains[i].Hooknum = ch.kind, ch.hook
				chains[i].Priority, chains[i].Policy = nftables.ChainPriorityMangle, &accept
			}
			c.AddChain(chains[i])
		}
		for i, ch := range t.chains {
			for _, r := range ch.rules {
				var exprs []expr.Any
				for _, s := range r {
					exprs = append(exprs, s.exprs...)
					if s.anon != nil {
						anonymous++
						ns := s.anon.lib(nt, anonymous)
						if err := c.AddSet(ns, s.anon.elements); err != nil {
							return err
						}
						exprs = append(exprs, &expr.Lookup{SourceRegister: reg1, SetName: ns.Name, SetID: ns.ID})
					}
				}
				c.AddRule(&nftables.Rule{Table: nt, Chain: chains[i], Exprs: exprs})
			}
		}
		for _, n := range stale(there.chains, func(n string) bool {
			return slices.ContainsFunc(t.chains, func(c *chain) bool { return c.name == n })
		}) {
			c.DelChain(&nftables.Chain{Name: n, Table: nt})
		}
		for _, n := range stale(there.sets, func(n string) bool {
			return slices.ContainsFunc(t.sets, func(s *set) bool { return s.name == n })
		}) {
			c.DelSet(&nftables.Set{Name: n, Table: nt})
		}
		if readmit != nil {
			for _, f := range []family{ip4, ip6} {
				for q := partAddr; q <= partPort; q++ {
					for _, kind := range []string{admittedSet, liveSet} {
						if s := dynamicSet(kind, f, q).lib(nt, 1); slices.Contains(there.sets, s.Name) {
							c.FlushSet(s)
						}
					}
				}
			}
			for _, e := range readmit {
				for els := range slices.Chunk(e.elements, chunk) {
					if err := c.SetAddElements(e.set.lib(nt, 1), els); err != nil {
						return err
					}
				}
			}
		}
		return nil
	})
}

// anew puts the making of the table in front of its content, and the end of
// the table before, if there is one.
func anew(exists bool, flags uint32, content []netlink.Message) []netlink.Message {
	var msgs []netlink.Message
	if exists {
		msgs = append(msgs, nfMessage(unix.NFT_MSG_DELTABLE, 0, stringAttr(unix.NFTA_TABLE_NAME, tableName)))
	}
	return append(append(msgs, newTableMessage(flags)), content...)
}

func newTableMessage(flags uint32) netlink.Message {
	return nfMessage(unix.NFT_MSG_NEWTABLE, netlink.Create,
		stringAttr(unix.NFTA_TABLE_NAME, tableName), u32Attr(unix.NFTA_TABLE_FLAGS, flags))
}
