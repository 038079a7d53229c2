package daemon

import (
	"context"
	"net"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
)

// This file is about taking flows and questions, and when a process that takes over
// may say that it does.

// take serves flows, first those that wait for it.
func (d *Daemon) take(ctx context.Context, g *errgroup.Group) *part {
	p := newPart(ctx, g)
	for _, ln := range d.flows.Listeners() {
		p.task("tcp", func(ctx context.Context) error { return d.engine.Serve(ctx, ln, d.gateway.Handle) })
	}
	p.task("udp", d.packets.Watch)
	d.packets.Attach()
	d.packets.Inject(d.unanswered.datagrams)
	d.unanswered.datagrams = nil
	p.task("kernel's log", func(ctx context.Context) error { return d.kernel.Logged(ctx, d.logged) })
	p.task("kernel", func(ctx context.Context) error {
		return d.kernel.Heal(ctx, func(what string) {
			if what == "cgroup" {
				d.log.Info("cgroups that rules name have come or gone, and the table follows")
				return
			}
			if name, ok := strings.CutPrefix(what, "link "); ok {
				d.log.Info("interface is up", "interface", name)
				return
			}
			d.log.Warn("put right what somebody else changed", "what", what)
		})
	})
	return p
}

// takeQuestions serves questions too, first those that wait. It may give names
// addresses that the process before this one would not know, so that one must not
// go on afterwards.
func (d *Daemon) takeQuestions(p *part) {
	left := d.unanswered
	d.unanswered = unanswered{}
	if d.dns == nil {
		return
	}
	for i, pc := range d.dns.UDP {
		p.task("dns", func(ctx context.Context) error { return d.names.ServeUDP(ctx, pc, left.of(i == 0)...) })
	}
	for i, ln := range d.dns.TCP.Listeners() {
		if i > 0 {
			left.streams = nil
		}
		streams := left.streams
		p.task("dns", func(ctx context.Context) error { return d.names.ServeTCP(ctx, ln, streams...) })
	}
}

// settleTime is how long a process that takes over serves flows before it says so:
// what it lacks, as a descriptor, shows at once, and the one before it goes on.
const settleTime = 20 * time.Millisecond

// settled tells whether nothing has ended the daemon by then.
func settled(ctx context.Context) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(settleTime):
		return true
	}
}

// claim makes this process the one that serves.
func (d *Daemon) claim() {
	if u, ok := d.socket.(*net.UnixListener); ok {
		u.SetUnlinkOnClose(true)
	}
	if d.before != nil {
		d.inherited = false
		d.before.call.say(wordServing) // if it is gone already, it is not missed
		d.before.call.SetDeadline(time.Time{})
	}
}
