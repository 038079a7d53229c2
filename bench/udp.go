package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"
)

// udpWays are the ways that the tables of datagrams compare.
func udpWays() []way { return []way{plain, udp} }

// moved is the number of datagrams that a load of them sent and had back.
func (r result) moved() float64 { return float64(2*r.Sent - r.Failed) }

// lost is the part of the datagrams that did not come back, in per cent.
func (r result) lost() float64 { return 100 * float64(r.Failed) / float64(max(r.Sent, 1)) }

// datagrams measures flows that have been there for a while.
func (b *bench) datagrams(ctx context.Context) error {
	t := b.report.table(fmt.Sprintf("UDP: echoes, %d in flight in all, a source port for each flow; an echo is two datagrams", udpWindow),
		"", "plain datagrams/s", "lost %", "tproxyd datagrams/s", "lost %", "CPU-s per million", "tproxyd / plain")
	for _, flows := range b.size.flows {
		if err := b.echoes(ctx, t, flows); err != nil {
			return err
		}
	}
	t.end()
	return nil
}

// echoes makes the rows of one number of flows, with a daemon that has no
// others.
func (b *bench) echoes(ctx context.Context, t *table, flows int) error {
	u, err := b.startUDP(ctx, udpWays(), "")
	if err != nil {
		return err
	}
	defer u.stop()
	for _, w := range udpWays() {
		for _, do := range []string{"hold", "warm"} {
			if _, err := u.order(w, order{Do: do, Flows: flows}); err != nil {
				return err
			}
		}
	}
	name := fmt.Sprintf("%d flows", flows)
	if flows == 1 {
		name = "1 flow"
	}
	for _, size := range []int{udpSmall, udpLarge} {
		var all [ways][]sample
		for range b.size.rounds {
			for _, w := range udpWays() {
				s, err := u.order(w, order{Do: "echo", Flows: flows, Size: size, Span: b.size.udp})
				if err != nil {
					return err
				}
				all[w] = append(all[w], s)
			}
		}
		rate := func(w way) spread { return over(all[w], func(s sample) float64 { return 2 * s.perSecond() }) }
		lost := func(w way) spread { return over(all[w], func(s sample) float64 { return s.lost() }) }
		t.row(fmt.Sprintf("%s, %d bytes", name, size), rate(plain), lost(plain), rate(udp), lost(udp),
			over(all[udp], func(s sample) float64 { return s.cpu.Seconds() / s.moved() * 1e6 }),
			rate(udp).median/rate(plain).median)
		if err := u.trouble(ctx, fmt.Sprintf("%s of %d bytes", name, size)); err != nil {
			return err
		}
	}
	return nil
}

// udpShortIdle is the limit of idle flows where their end is measured, too.
const udpShortIdle = 2 * time.Second

// newFlows measures flows of one datagram and its answer.
func (b *bench) newFlows(ctx context.Context) error {
	u, err := b.startUDP(ctx, udpWays(), fmt.Sprintf("TIMEOUT udp=%v\n", udpShortIdle))
	if err != nil {
		return err
	}
	defer u.stop()
	var all [ways][]sample
	var ended []sample // the same of tproxyd, with the time that their end took
	fds, err := b.gateway[udp].descriptors()
	if err != nil {
		return err
	}
	for range b.size.rounds {
		before, err := b.gateway[udp].cpu()
		if err != nil {
			return err
		}
		for _, w := range []way{udp, plain} { // plain while the flows of the other wait for their end
			s, err := u.order(w, order{Do: "new", Flows: b.size.fresh})
			if err != nil {
				return err
			}
			all[w] = append(all[w], s)
		}
		if err := b.settled(ctx, fds); err != nil {
			return err
		}
		after, err := b.gateway[udp].cpu()
		if err != nil {
			return err
		}
		last := all[udp][len(all[udp])-1]
		ended = append(ended, sample{last.result, after - before})
	}
	if err := u.trouble(ctx, "new flows"); err != nil {
		return err
	}
	t := b.report.table(fmt.Sprintf("UDP: new flows, a source port, one datagram and its answer each; %d, %d at a time", b.size.fresh, udpAtOnce),
		"", "flows/s", "CPU ms per flow", "with its end", "p50 ms", "p99 ms", "lost %")
	ms := func(runs []sample) spread {
		return over(runs, func(s sample) float64 { return s.cpu.Seconds() * 1e3 / float64(s.Count) })
	}
	for _, c := range []struct {
		name string
		w    way
		end  []sample
	}{{"plain", plain, all[plain]}, {"tproxyd", udp, ended}} {
		of := func(f func(sample) float64) spread { return over(all[c.w], f) }
		t.row(c.name, of(func(s sample) float64 { return s.perSecond() }), ms(all[c.w]), ms(c.end),
			of(func(s sample) float64 { return s.P50.Seconds() * 1e3 }),
			of(func(s sample) float64 { return s.P99.Seconds() * 1e3 }),
			of(func(s sample) float64 { return s.lost() }))
	}
	t.end()
	return nil
}

// settled waits until the daemon has no more descriptors than at first, but for
// a few, so that all flows have ended.
func (b *bench) settled(ctx context.Context, first int) error {
	const few = 20
	for end := time.Now().Add(2*udpShortIdle + patience); ; breathe() {
		switch n, err := b.gateway[udp].descriptors(); {
		case err != nil:
			return err
		case n <= first+few:
			return nil
		case time.Now().After(end) || ctx.Err() != nil:
			return fmt.Errorf("%d descriptors, %d at first: flows do not end: %w", n, first, errors.Join(context.Cause(ctx), os.ErrDeadlineExceeded))
		}
	}
}

// sessions measures what client sockets cost that send nothing.
func (b *bench) sessions(ctx context.Context) error {
	u, err := b.startUDP(ctx, []way{udp}, "")
	if err != nil {
		return err
	}
	defer u.stop()
	t := b.report.table("UDP: idle sessions, each a source port; established: was answered",
		"", "asked for", "established", "RSS KB", "descriptors", "bytes per session", "descriptors per session")
	var rss0 int64
	var fds0 int
	row := func(name string, o order) error {
		r, err := u.order(udp, o)
		if err != nil {
			return err
		}
		time.Sleep(20 * time.Millisecond * time.Duration(b.size.rounds*b.size.rounds)) // let it settle
		rss, err1 := b.gateway[udp].memory()
		fds, err2 := b.gateway[udp].descriptors()
		n := r.Count
		if o.Do == "warm" {
			n = o.Flows
		}
		cells := []any{name, float64(o.Flows), float64(n), float64(rss >> 10), float64(fds)}
		if o.Flows == 0 {
			rss0, fds0 = rss, fds
		} else if n > 0 {
			cells = append(cells, float64(rss-rss0)/float64(n), float64(fds-fds0)/float64(n))
		}
		t.row(cells...)
		return errors.Join(err1, err2)
	}
	most := 0
	for _, n := range b.size.sessions {
		most = max(most, n)
		if err := row("one datagram each", order{Do: "hold", Flows: n}); err != nil {
			return err
		}
	}
	if err := row(fmt.Sprintf("%d datagrams each", 1+udpTurns), order{Do: "warm", Flows: most}); err != nil {
		return err
	}
	t.end()
	return u.trouble(ctx, "idle sessions")
}
