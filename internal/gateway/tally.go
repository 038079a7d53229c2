package gateway

import (
	"sync/atomic"

	"github.com/tproxyd/tproxyd/pkg/routes"
)

// tally counts what a rule decided in user space. A reload leaves it to the rule
// that stands in the same file with the same words.
type tally struct {
	flows    atomic.Uint64
	up, down atomic.Uint64         // bytes of TCP flows that have ended, and of UDP
	heir     atomic.Pointer[tally] // that counts since the rule is gone; nil: the rule is there
}

func (t *tally) add(up, down uint64) {
	if h := t.heir.Load(); h != nil {
		t = h
	}
	t.up.Add(up)
	t.down.Add(down)
}

// bequeath leaves what was counted, and what will be, to another.
func (t *tally) bequeath(heir *tally) {
	t.heir.Store(heir)
	heir.flows.Add(t.flows.Swap(0))
	heir.up.Add(t.up.Swap(0))
	heir.down.Add(t.down.Swap(0))
}

// ruleWords are what a rule is recognized by in another plan.
type ruleWords struct{ file, text string }

func wordsOf(r *routes.Rule) ruleWords { return ruleWords{r.File, r.Text} }

// follow has p, which is not in force yet, go on with what old has counted, and
// gone with what only old has rules for. Of rules with the same words the first
// one is meant: the others decide nothing. Where both are plans that have
// followed one another before, nothing of theirs is written to.
func (p *Plan) follow(old *Plan, gone *tally) {
	at := map[ruleWords]*tally{}
	for _, r := range old.table.Rules() {
		if w := wordsOf(r); at[w] == nil {
			at[w] = old.tallies[r.Index]
		}
	}
	kept := map[*tally]bool{}
	for _, r := range p.table.Rules() {
		w := wordsOf(r)
		t := at[w]
		if t == nil {
			p.tallies[r.Index].heir.Store(nil) // it is back
			continue
		}
		delete(at, w)
		kept[t] = true
		if p.tallies[r.Index] != t {
			p.tallies[r.Index] = t
		}
	}
	for _, t := range old.tallies {
		if !kept[t] {
			t.bequeath(gone)
		}
	}
}

// RuleStats is what a rule has decided in user space since it was first read.
type RuleStats struct {
	Rule  *routes.Rule // nil: all those that are not in force any longer
	List  string       // its list, as List.Name, or its only server; empty: it has none
	Flows uint64       // decided; DENY is among them
	Up    uint64       // bytes from clients
	Down  uint64       // bytes to clients
}

// Rules returns what each rule in force has decided, in the order of the table,
// and last what those did that are gone. The values need not be of one instant.
func (g *Gateway) Rules() []RuleStats {
	type bytes struct{ up, down uint64 }
	var list []RuleStats
	g.mu.Lock()
	defer g.mu.Unlock() // what ends leaves the living and is counted at once
	p := g.plan.Load()
	living := map[*tally]bytes{}
	for l := range g.live {
		up, down := l.bytes()
		t := l.tally
		if h := t.heir.Load(); h != nil {
			t = h
		}
		b := living[t]
		living[t] = bytes{b.up + up, b.down + down}
	}
	count := func(r *routes.Rule, to string, t *tally) {
		b := living[t]
		list = append(list, RuleStats{r, to, t.flows.Load(), t.up.Load() + b.up, t.down.Load() + b.down})
	}
	for i, r := range p.table.Rules() {
		to := listName(r)
		if s := p.groups[i].Servers; len(s) == 1 {
			to = s[0].Name
		}
		count(r, to, p.tallies[i])
	}
	count(nil, "", &g.gone)
	return list
}
