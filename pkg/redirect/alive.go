package redirect

import (
	"errors"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// A listener that is gone is noticed by tproxy, in prerouting. For this host's
// own datagrams over IPv4 that is too late to refuse them: see the package
// comment. So on their way out they are asked whether there is still a process
// that would take them: a second table, which the kernel removes with the socket
// that made it, marks them, and output refuses what it would divert without that
// mark. On a kernel without owners of tables there is no such table, and output
// does not ask.

// aliveName is that table, of family inet.
const aliveName = "tproxyd_alive"

// wantsAlive reports whether this host's own datagrams are diverted.
func (p *Plan) wantsAlive() bool {
	return p.Local && (p.Ports.UDP != 0 || p.DNS && p.Ports.DNSUDP != 0)
}

// beAlive makes the table that ends with this process, if the plan wants it, and
// reports whether it is there.
func (r *Redirect) beAlive(p *Plan) bool {
	if !r.can.own || !p.wantsAlive() {
		return false
	}
	if r.alive == p.Marks {
		return true
	}
	msgs, err := aliveMessages(p.Marks)
	if err == nil {
		if r.alive != (Marks{}) {
			r.nf.commit([]netlink.Message{deleteNamed(aliveName)})
		}
		err = r.nf.commit(msgs)
	}
	if err != nil {
		r.alive = Marks{}
		r.log.Warn("the table "+aliveName+" cannot be made: if this process dies, this host's own datagrams over IPv4 get no answer", "err", err)
		return false
	}
	r.alive = p.Marks
	return true
}

// aliveMessages makes the table anew.
func aliveMessages(m Marks) ([]netlink.Message, error) {
	rest, err := record(func(c *nftables.Conn) error {
		nt := &nftables.Table{Name: aliveName, Family: nftables.TableFamilyINet}
		accept, before := nftables.ChainPolicyAccept, *nftables.ChainPriorityMangle-1
		ch := c.AddChain(&nftables.Chain{Name: "output", Table: nt, Type: nftables.ChainTypeFilter,
			Hooknum: nftables.ChainHookOutput, Priority: &before, Policy: &accept})
		var r nftables.Rule
		for _, s := range (rule{proto(udp), markNot(m, m.Own()), setMark(m, m.Alive())}) {
			r.Exprs = append(r.Exprs, s.exprs...)
		}
		r.Table, r.Chain = nt, ch
		c.AddRule(&r)
		return nil
	})
	return append([]netlink.Message{newNamed(aliveName, flagOwner)}, rest...), err
}

// unAlive removes the table, if it is there.
func (r *Redirect) unAlive() error {
	if r.alive == (Marks{}) {
		return nil
	}
	r.alive = Marks{}
	err := r.nf.commit([]netlink.Message{deleteNamed(aliveName)})
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	return err
}

// unheard writes the chain of this host's own datagrams while nobody is there to
// take them: the rest goes where it always does.
func (t *table) unheard(p *Plan) {
	c := t.chain("unheard")
	if p.DNS {
		c.add(dport(udp, 53), going("refuse"))
	}
	c.add(jump("decide"))
	c.add(going("refuse"))
}
