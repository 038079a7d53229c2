package daemon

import (
	"maps"
	"strings"

	"github.com/tproxyd/tproxyd/internal/gateway"
	"github.com/tproxyd/tproxyd/pkg/fakedns"
	"github.com/tproxyd/tproxyd/pkg/redirect"
	"github.com/tproxyd/tproxyd/pkg/relay"
)

// counts are the counters of a process and of all those before it that were taken
// over. A successor adds them to its own, so that they only grow; the process that
// was taken over goes on to say what it still counts. (What is counted of servers
// goes over with what is known of them, and the table's own counters stay there.)
// Of the figures in it only what counts up is added.
type counts struct {
	Reloads reloadCount
	Rules   []RuleStatus
	Gone    RuleStatus
	Flows   gateway.Stats
	DNS     fakedns.Stats
	Relay   relay.Stats
	UDP     relay.UDPStats
	Healed  redirect.Healed
}

// counts reads all of them; the error is the kernel's, without which the rest is
// there. Of rules each one of the plan in force is there.
func (d *Daemon) counts(reloads reloadCount) (c counts, err error) {
	c = counts{Reloads: reloads, Flows: d.gateway.Stats(), DNS: d.names.Stats(), Relay: d.engine.Stats(), UDP: d.packets.Stats(), Healed: d.kernel.Healed()}
	tallies, err := d.tallies()
	for _, r := range d.gateway.Rules() {
		rs := RuleStatus{Flows: r.Flows, Up: r.Up, Down: r.Down, rule: r.Rule, list: r.List}
		tag := ""
		if r.Rule != nil {
			tag = tagOf(r.Rule)
		}
		rs.Packets, rs.Bytes = tallies[tag].Packets, tallies[tag].Bytes
		delete(tallies, tag) // of rules with the same words the first one is meant
		if r.Rule == nil {
			c.Gone = rs
			continue
		}
		rs.Position, rs.Text, rs.Action = r.Rule.Position(), r.Rule.Text, r.Rule.Action.String()
		c.Rules = append(c.Rules, rs)
	}
	d.before.count(&c)
	return c, err
}

// tallies are what the kernel has counted of rules in this process's time.
func (d *Daemon) tallies() (map[string]redirect.Count, error) {
	if last := d.lastTallies.Load(); last != nil { // the kernel is another process's
		return maps.Clone(*last), nil
	}
	return d.kernel.Tallies()
}

// some returns c with those rules alone that have counted something; beyond maxTold
// of them they are as if they were gone.
func (c counts) some() counts {
	var list []RuleStatus
	for _, r := range c.Rules {
		switch {
		case r.Flows|r.Up|r.Down|r.Packets|r.Bytes == 0:
		case len(list) < maxTold:
			list = append(list, r)
		default:
			c.Gone.add(r)
		}
	}
	c.Rules = list
	return c
}

// words are what a rule is recognized by in another process, as by gateway.Plan.
func (r *RuleStatus) words() [2]string {
	return [2]string{r.Position[:max(0, strings.LastIndexByte(r.Position, ':'))], r.Text}
}

// add adds what o has counted.
func (c *counts) add(o *counts) {
	sum := func(pairs ...*uint64) { // a counter of c, and the same of o
		for i := 0; i < len(pairs); i += 2 {
			*pairs[i] += *pairs[i+1]
		}
	}
	p, q := &c.DNS.Pool, &o.DNS.Pool
	t, v := &c.UDP.UDPTraffic, &o.UDP.UDPTraffic
	sum(
		&c.Reloads.Done, &o.Reloads.Done, &c.Reloads.Refused, &o.Reloads.Refused,
		&c.Flows.Proxied, &o.Flows.Proxied, &c.Flows.Direct, &o.Flows.Direct, &c.Flows.Up, &o.Flows.Up, &c.Flows.Down, &o.Flows.Down,
		&c.DNS.Synthetic, &o.DNS.Synthetic, &c.DNS.Local, &o.DNS.Local, &c.DNS.Remote, &o.DNS.Remote,
		&c.DNS.Refused, &o.DNS.Refused, &c.DNS.Failed, &o.DNS.Failed, &c.DNS.Dropped, &o.DNS.Dropped,
		&p.Evicted, &q.Evicted, &p.Full, &q.Full, &p.Unowned, &q.Unowned, &p.StoreErrors, &q.StoreErrors,
		&c.Relay.Accepted, &o.Relay.Accepted, &c.Relay.Refused, &o.Relay.Refused, &c.Relay.Shortages, &o.Relay.Shortages,
		&c.UDP.Opened, &o.UDP.Opened, &c.UDP.Associations, &o.UDP.Associations, &c.UDP.Evicted, &o.UDP.Evicted, &c.UDP.Refused, &o.UDP.Refused,
		&t.UpDatagrams, &v.UpDatagrams, &t.DownDatagrams, &v.DownDatagrams, &t.Up, &v.Up, &t.Down, &v.Down,
		&c.Healed.Tables, &o.Healed.Tables, &c.Healed.Rules, &o.Healed.Rules, &c.Healed.Routes, &o.Healed.Routes, &c.Healed.Marks, &o.Healed.Marks,
	)
	for reason, n := range o.Flows.Refused {
		c.Flows.Refused[reason] += n
	}
	for reason, n := range o.UDP.Dropped {
		c.UDP.Dropped[reason] += n
	}
	c.Gone.add(o.Gone)
	left := map[[2]string]RuleStatus{}
	for _, r := range o.Rules {
		n := left[r.words()]
		n.add(r)
		left[r.words()] = n
	}
	for i := range c.Rules {
		if len(left) == 0 {
			break
		}
		w := c.Rules[i].words()
		c.Rules[i].add(left[w]) // of rules with the same words the first one is meant
		delete(left, w)
	}
	for _, r := range left {
		c.Gone.add(r)
	}
}
