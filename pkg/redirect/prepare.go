package redirect

import (
	"errors"
	"fmt"
	"maps"
	"reflect"
	"runtime"
	"slices"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// prepared is a table whose sets are in the kernel already, while the rules of
// another one are in force.
type prepared struct {
	plan  Plan // but for Readmit
	flush bool // it has one
	alive bool
	epoch uint64
	table *table
}

// Prepare does beforehand what takes long of the Apply of a plan: it loads the sets,
// and what is in force stays. Admit does not wait for its end, as for that of Apply,
// but for 5,000 elements at most. The plan's Readmit only says whether there will be
// one. Nothing is lost if something else changes the table before that Apply, which
// then does all of it, and tells what is wrong with a plan, too.
func (r *Redirect) Prepare(p Plan) {
	if p.check() != nil {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || r.lent || r.plan == nil {
		return
	}
	if err := r.prepare(&p); err != nil {
		r.log.Debug("a plan cannot be prepared", "err", err)
	}
}

var errOvertaken = errors.New("redirect: the table was changed meanwhile")

func (r *Redirect) prepare(p *Plan) error {
	there, err := r.presence()
	if err != nil {
		return err
	}
	if r.prepared != nil { // of a plan that was not applied
		r.dropUnused(r.prepared.table, there)
		r.prepared = nil
		if there, err = r.presence(); err != nil {
			return err
		}
	}
	groups, err := r.findNamed(p)
	if err != nil {
		return err
	}
	n := &prepared{plan: *p, flush: p.Readmit != nil, alive: r.beAlive(p), epoch: r.epoch}
	n.plan.Readmit = nil
	n.table, err = r.load(p, there, groups, n.alive, n.flush, func(f func()) error {
		r.mu.Unlock()
		f()
		runtime.Gosched() // who waits comes first
		r.mu.Lock()
		if r.closed || r.lent || r.epoch != n.epoch {
			return errOvertaken
		}
		return nil
	})
	if err == nil {
		r.prepared = n
	}
	return err
}

// isFor tells whether this is what load would make. Large lists are compared by where
// they are, if that is the same.
func (n *prepared) isFor(p *Plan, alive, flush bool, groups cgroups, epoch uint64) bool {
	if n == nil {
		return false
	}
	bare := *p
	bare.Readmit = nil
	return n.epoch == epoch && n.flush == flush && n.alive == alive && slices.Equal(n.table.cgroups, groups) && reflect.DeepEqual(n.plan, bare)
}

// presence asks what of our table is in the kernel.
func (r *Redirect) presence() (there present, err error) {
	if there.chains, err = r.nf.names(unix.NFT_MSG_GETCHAIN); err != nil {
		return there, fmt.Errorf("redirect: chains: %w", err)
	}
	if there.sets, err = r.nf.names(unix.NFT_MSG_GETSET); err != nil {
		return there, fmt.Errorf("redirect: sets: %w", err)
	}
	counters, err := r.nf.counters()
	if err != nil {
		return there, fmt.Errorf("redirect: counters: %w", err)
	}
	there.counters = slices.Collect(maps.Keys(counters))
	return there, nil
}

// load makes the table of a plan, and adds its sets to what is there. What it does
// for itself, and not to the kernel, it does in pause, which it calls before each
// transaction.
func (r *Redirect) load(p *Plan, there present, groups cgroups, alive, flush bool, pause func(func()) error) (*table, error) {
	gen, err := there.generation()
	if err != nil {
		return nil, err
	}
	live := there.live()
	if flush {
		live = nextLive(live)
	}
	var t *table
	var made error
	listener, brief := r.logs.group, r.can.brief
	var parts [][]netlink.Message
	err = pause(func() {
		if t, made = newTable(p, gen, live, alive, brief, groups, listener); made != nil {
			return
		}
		var sets []netlink.Message
		sets, made = t.setMessages()
		parts = slices.Collect(slices.Chunk(sets, atOnce))
	})
	if made != nil {
		return nil, made
	}
	for _, part := range parts {
		if err == nil {
			err = r.nf.commit(part)
		}
		if err == nil {
			err = pause(func() {})
		}
	}
	if err == nil {
		err = r.verify(t)
	}
	if err != nil {
		if !r.closed && !r.lent {
			r.dropUnused(t, there) // if that fails too, the next plan takes them away
		}
		return nil, err
	}
	return t, nil
}
