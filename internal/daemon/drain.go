package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"time"

	"github.com/tproxyd/tproxyd/internal/handover"
	"github.com/tproxyd/tproxyd/pkg/routes"
)

// This file is what remains of a daemon after another one has taken over: it
// carries on what it has, and tells the other one how much that is.

// Carrier is a process that has been taken over and still carries flows.
type Carrier struct {
	Pid      int `json:"pid"`
	Flows    int `json:"flows"`        // of TCP
	Sessions int `json:"udp_sessions"` // of UDP
}

// report is what such a process says, itself first, then those before it; or what it
// has counted; or its answer to a question.
type report struct {
	Carriers []Carrier `json:",omitempty"`
	Counts   *counts   `json:",omitempty"`
	Answer   *answer   `json:",omitempty"`
}

// ruling is what it is told: after a reload the rules in force, as decidedBy, and
// with a normal stop of the successor to end as well; or it is asked something.
type ruling struct {
	Rules string
	Stop  bool      `json:",omitempty"`
	Ask   *question `json:",omitempty"`
}

// question is about the flows that it, and those before it, still carry.
type question struct {
	Number uint64
	Within time.Duration // how long the answer is waited for
	Kill   []uint64      // flows to end; nil: which there are
}

type answer struct {
	Number uint64       // of the question
	Flows  []FlowStatus `json:",omitempty"` // maxTold of them at most
	Killed int          `json:",omitempty"`
}

const maxTold = 100_000 // flows, or rules, in a message

// errDrained ends a daemon that has nothing left to carry.
var errDrained = errors.New("daemon: taken over, and nothing is carried any longer")

const (
	drainStep = 250 * time.Millisecond // between two looks at what is left
	countStep = 2 * time.Second        // between two words about what was counted
)

// drain carries on what there is until it has ended, or the limit is over, or ctx
// ends. It returns errDrained.
func (d *Daemon) drain(ctx context.Context, c *call) error {
	defer c.Close()
	c.SetDeadline(time.Time{})
	d.servers.Close() // its probes and what it has ready; what it connects still is
	rules, stopped := make(chan string, 1), make(chan struct{}, 1)
	asked := make(chan *question)
	over, ended := make(chan struct{}), make(chan struct{})
	go func() { // ends with the connection; over ends what it waits for
		defer close(ended)
		for {
			var r ruling
			if _, err := c.Receive(&r); err != nil {
				return
			}
			if r.Stop {
				stopped <- struct{}{}
				return
			}
			if r.Ask != nil {
				select {
				case asked <- r.Ask:
				case <-over:
				}
				continue
			}
			select {
			case <-rules: // a newer one counts
			default:
			}
			rules <- r.Rules
		}
	}()
	defer func() { close(over); c.Close(); <-ended }()
	if c.Rules != d.setup.decidedBy() {
		d.obey(c.Rules)
	}
	limit := time.NewTimer(c.Drain)
	defer limit.Stop()
	tick := time.NewTicker(drainStep)
	defer tick.Stop()
	say := func(r report) {
		c.SetWriteDeadline(time.Now().Add(stepLimit))
		c.Send(handover.Message{Body: r}) // if it is gone, nobody wants to know
	}
	d.mu.Lock()
	reloads := d.reloads // there are no more
	d.mu.Unlock()
	tell := func() {
		n, _ := d.counts(reloads)
		n = n.some()
		say(report{Counts: &n})
	}
	defer tell() // what it ends with
	moved := func() uint64 {
		up, down := d.before.bytes()
		t, u := d.gateway.Stats(), d.packets.Stats()
		return up + down + t.Up + t.Down + u.Up + u.Down
	}
	last := uint64(0)
	count := time.NewTicker(countStep)
	defer count.Stop()
	told, cut := "", ""
	for {
		r := d.left()
		if text, err := json.Marshal(r); err == nil && string(text) != told {
			told = string(text)
			say(r)
		}
		if own := r.Carriers[0]; own.Flows == 0 && own.Sessions == 0 && len(r.Carriers) == 1 && d.before.ended() {
			d.log.Info("nothing is carried any longer")
			return errDrained
		}
		select {
		case <-ctx.Done():
			return errDrained
		case <-stopped:
			d.log.Info("the process that took over was stopped, and with it this one")
			return errDrained
		case <-limit.C:
			d.log.Warn("what is still carried is cut: the time to carry it on is over", "flows", r.Carriers[0].Flows, "udp_sessions", r.Carriers[0].Sessions)
			return errDrained
		case sum := <-rules:
			d.obey(sum)
		case <-count.C:
			if now := moved(); now != last {
				last = now
				tell()
			}
		case q := <-asked:
			say(report{Answer: d.answer(q)})
		case <-tick.C:
			select {
			case <-ended: // whoever serves next leaves there by which rules
				if sum := d.setup.decided(); sum != "" && sum != d.setup.decidedBy() && sum != cut {
					d.obey(sum)
					cut = sum
				}
			default:
			}
		}
	}
}

// left is what this process carries, and those before it.
func (d *Daemon) left() report {
	own := Carrier{Pid: pid, Flows: d.engine.Stats().Clients, Sessions: d.packets.Stats().Sessions}
	return report{Carriers: append([]Carrier{own}, d.before.carriers()...)}
}

// answer says which flows there are, or ends some.
func (d *Daemon) answer(q *question) *answer {
	a := &answer{Number: q.Number}
	if q.Kill != nil {
		a.Killed = d.kill(q.Kill, q.Within/2)
		return a
	}
	a.Flows = d.carried(q.Within / 2)
	a.Flows = a.Flows[max(0, len(a.Flows)-maxTold):]
	return a
}

// obey puts the rules in force by which the successor decides, for what is still
// carried (R11): proxied flows keep their server, what is DIRECT and should not be
// any longer is cut. If the files do not say these rules to this version, it
// cannot know, and cuts all that is DIRECT.
func (d *Daemon) obey(sum string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.before.tell(sum)
	defer frugal()()
	for _, read := range []func() (*Setup, routes.Diagnostics){d.setup.again, d.setup.relisted} {
		next, diags := read()
		if diags.HasErrors() || next.decidedBy() != sum {
			continue
		}
		if plan, err := next.plan(); err == nil {
			d.follow(next, plan)
			d.setup = next
			d.log.Info("the rules changed for what is still carried")
			return
		}
	}
	n := d.gateway.CutDirect()
	d.packets.Close()
	d.log.Warn("the rules changed, and are not those that this version reads: what it carries without a server, and of UDP, is cut", "flows", n)
}
