package redirect

import (
	"errors"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// atOnce is how many messages go into one transaction where more than one is
// allowed. The time that one takes grows faster than its size: for 100,000
// prefixes one takes 1.2 seconds, ten take 0.5, and so do forty, of which each is
// soon over for who waits, see Prepare.
const atOnce = 5

// present is what of our table is in the kernel.
type present struct {
	chains   []string
	sets     []string
	counters []string
}

// generation returns the suffix that the sets of the next plan can have. One
// generation is in force, and one may be what was not finished.
func (h present) generation() (string, error) {
	for _, g := range []string{"a", "b", "c"} {
		if !slices.ContainsFunc(h.sets, func(s string) bool { return strings.HasSuffix(s, "_"+g) }) {
			return g, nil
		}
	}
	return "", errors.New("redirect: the table has three generations of sets")
}

// live returns which of liveSets is in use, the first if none is.
func (h present) live() string {
	second := func(s string) bool { return strings.HasPrefix(s, liveSets[1]) }
	if slices.ContainsFunc(h.sets, second) {
		return liveSets[1]
	}
	return liveSets[0]
}

// nextLive returns the other one of liveSets.
func nextLive(live string) string {
	if live == liveSets[0] {
		return liveSets[1]
	}
	return liveSets[0]
}

// stale returns the names that are not among those wanted.
func stale(have []string, want func(string) bool) []string {
	return slices.DeleteFunc(slices.Clone(have), want)
}

// setMessages returns what adds the sets of the table, with their elements. It
// comes before the transaction of the rules, since a set of intervals finds
// nothing until its transaction is over (the kernel builds what it searches
// last), while the rules are in force a moment before. As no rule looks into
// them yet it may be any number of transactions.
func (t *table) setMessages() ([]netlink.Message, error) {
	nt := &nftables.Table{Name: tableName, Family: nftables.TableFamilyINet}
	return record(func(c *nftables.Conn) error {
		for i, s := range t.sets {
			if s.dynamic {
				continue // with the rules
			}
			ns := s.lib(nt, uint32(i+1))
			if err := c.AddSet(ns, nil); err != nil {
				return err
			}
			for e := range s.pieces() {
				if err := c.SetAddElements(ns, e); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// unset returns the transaction that takes back setMessages, for those of its
// sets that are new.
func (t *table) unset(names []string) ([]netlink.Message, error) {
	nt := &nftables.Table{Name: tableName, Family: nftables.TableFamilyINet}
	return record(func(c *nftables.Conn) error {
		for _, s := range t.sets {
			if slices.Contains(names, s.name) {
				c.DelSet(&nftables.Set{Name: s.name, Table: nt})
			}
		}
		return nil
	})
}

// dynamic is what becomes of the dynamic sets: first they are emptied, or not,
// then elements are added. The live ones are empty if they have the other name.
type dynamic struct {
	flush    bool
	elements []setElements
}

// ruleMessages returns the transaction that puts the table in force, whose sets
// are there, in place of the rules that are there, without a moment in which
// neither is.
func (t *table) ruleMessages(there present, d dynamic) ([]netlink.Message, error) {
	nt := &nftables.Table{Name: tableName, Family: nftables.TableFamilyINet}
	anonymous := uint32(len(t.sets)) // the sets of setMessages can be in the same transaction
	var objects []netlink.Message
	if t.brief {
		var err error
		if objects, err = briefMessages(); err != nil {
			return nil, err
		}
	}
	msgs, err := record(func(c *nftables.Conn) error {
		if len(there.chains) > 0 {
			c.FlushTable(nt)
		}
		for _, n := range t.counters() {
			c.AddObj(&nftables.NamedObj{Table: nt, Name: n, Type: nftables.ObjTypeCounter, Obj: &expr.Counter{}})
		}
		// In this transaction, so that of two live sets only one is ever there.
		for i, s := range t.sets {
			if s.dynamic {
				if err := c.AddSet(s.lib(nt, uint32(i+1)), nil); err != nil {
					return err
				}
			}
		}
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
		for _, n := range t.staleObjects(there.counters) {
			c.DeleteObject(&nftables.NamedObj{Table: nt, Name: n, Type: nftables.ObjTypeCounter})
		}
		if d.flush {
			for _, s := range t.sets {
				if s.timeout && !s.dynamic {
					c.FlushSet(s.lib(nt, 1))
				}
			}
		}
		for _, e := range d.elements {
			for els := range slices.Chunk(e.elements, chunk) {
				if err := c.SetAddElements(e.set.lib(nt, 1), els); err != nil {
					return err
				}
			}
		}
		return nil
	})
	return append(objects, msgs...), err
}

// deleteTable and newTableMessage are the end and the beginning of the table.
func deleteTable() netlink.Message                 { return deleteNamed(tableName) }
func newTableMessage(flags uint32) netlink.Message { return newNamed(tableName, flags) }

func deleteNamed(table string) netlink.Message {
	return nfMessage(unix.NFT_MSG_DELTABLE, 0, stringAttr(unix.NFTA_TABLE_NAME, table))
}

func newNamed(table string, flags uint32) netlink.Message {
	return nfMessage(unix.NFT_MSG_NEWTABLE, netlink.Create,
		stringAttr(unix.NFTA_TABLE_NAME, table), u32Attr(unix.NFTA_TABLE_FLAGS, flags))
}
