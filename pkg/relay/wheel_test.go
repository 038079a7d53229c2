package relay

import (
	"context"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

type timed struct {
	name  string
	entry entry[timed]
}

func newTimed(name string) *timed {
	x := &timed{name: name}
	x.entry.owner = x
	return x
}

func TestWheel(t *testing.T) {
	var w wheel[timed]
	x, y, z := newTimed("x"), newTimed("y"), newTimed("z")
	got := map[uint32][]string{}
	turn := func(n uint32) {
		for range n {
			for _, o := range w.advance(nil) {
				got[w.now] = append(got[w.now], o.name)
			}
		}
	}
	w.add(&x.entry, 3)
	w.add(&y.entry, 3)
	w.add(&z.entry, 3+3*wheelSlots) // the same slot, three turns later
	turn(2)
	w.remove(&y.entry)
	w.remove(&y.entry)
	turn(2)
	w.add(&x.entry, 1) // past: the next tick
	w.add(&x.entry, 9) // later: stays
	w.add(&y.entry, 100)
	w.add(&y.entry, 50) // earlier: comes forward
	turn(4 * wheelSlots)
	want := map[uint32][]string{3: {"x"}, 5: {"x"}, 50: {"y"}, 3 + 3*wheelSlots: {"z"}}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

// The wheel against a plain search, over the wrap of the tick counter.
func TestWheelAgainstSearch(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	w := wheel[timed]{now: ^uint32(0) - 2000}
	due := map[*timed]uint32{}
	var all []*timed
	for range 200 {
		all = append(all, newTimed(""))
	}
	for range 4000 {
		for range 3 {
			x := all[rnd.IntN(len(all))]
			if rnd.IntN(4) == 0 {
				w.remove(&x.entry)
				delete(due, x)
				continue
			}
			at := w.now + 1 + rnd.Uint32N(1500)
			w.add(&x.entry, at)
			if old, in := due[x]; !in || int32(at-old) < 0 {
				due[x] = at
			}
		}
		for _, x := range w.advance(nil) {
			if at, in := due[x]; !in || at != w.now {
				t.Fatalf("tick %d: due is %d, %v", w.now, at, in)
			}
			delete(due, x)
		}
		for _, at := range due {
			if at == w.now {
				t.Fatalf("tick %d: one is missing", w.now)
			}
		}
	}
}

func TestClockCount(t *testing.T) {
	c := clock[timed]{tick: time.Second}
	for _, tt := range []struct {
		in   time.Duration
		want uint32
	}{
		{-time.Second, 0}, {0, 0}, {1, 1}, {time.Second, 1}, {time.Second + 1, 2}, {1 << 62, 1 << 30},
	} {
		if got := c.count(tt.in); got != tt.want {
			t.Errorf("count(%v) = %d, want %d", tt.in, got, tt.want)
		}
	}
}

func TestLimitsCurrent(t *testing.T) {
	type out struct {
		Limit uint32
		Cause Cause
	}
	for _, tt := range []struct {
		name       string
		l          limits
		half, dead bool
		want       out
	}{
		{"none", limits{}, false, false, out{0, IdleTimeout}},
		{"open", limits{idle: 10, half: 5}, false, false, out{10, IdleTimeout}},
		{"half-closed", limits{idle: 10, half: 5}, true, false, out{5, HalfClosedTimeout}},
		{"half-closed, no idle", limits{half: 5}, true, false, out{5, HalfClosedTimeout}},
		{"half-closed, idle shorter", limits{idle: 3, half: 5}, true, false, out{3, IdleTimeout}},
		{"half-closed, no limit for it", limits{idle: 3}, true, false, out{3, IdleTimeout}},
		{"dead", limits{half: 5}, false, true, out{5, HalfClosedTimeout}},
		{"dead, no limits", limits{}, false, true, out{deadTicks, HalfClosedTimeout}},
		{"dead, idle shorter", limits{idle: 3}, true, true, out{3, IdleTimeout}},
	} {
		limit, cause := tt.l.current(tt.half, tt.dead)
		if d := cmp.Diff(tt.want, out{limit, cause}); d != "" {
			t.Errorf("%s: %s", tt.name, d)
		}
	}
}

// A flow that is silent for its limit ends after it, at most two ticks later;
// activity puts the end off.
func TestClock(t *testing.T) {
	const tick, idle = time.Second, 5 * time.Minute
	for _, tt := range []struct {
		name   string
		active []time.Duration // after the start
	}{
		{"silent", nil},
		{"between two ticks", []time.Duration{1500 * time.Millisecond}},
		{"once", []time.Duration{4 * time.Minute}},
		{"just before the end", []time.Duration{299 * time.Second, 590 * time.Second}},
		{"for hours", []time.Duration{4 * time.Minute, 8 * time.Minute, 12 * time.Minute, 16 * time.Minute, 20 * time.Minute}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				type flow struct {
					mu     sync.Mutex
					limits limits
					timer  entry[flow]
				}
				c := clock[flow]{tick: tick}
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				f := &flow{limits: limits{idle: c.count(idle)}}
				f.timer.owner = f
				c.wheel.add(&f.timer, f.limits.due(f.limits.idle))
				ended := make(chan struct{})
				start := time.Now()
				go c.run(ctx, func(f *flow, now uint32) {
					f.mu.Lock()
					defer f.mu.Unlock()
					if f.limits.reached(f.limits.idle, now) {
						close(ended)
						return
					}
					c.wheel.add(&f.timer, f.limits.due(f.limits.idle))
				}, func(uint32) {})
				last := start
				for _, at := range tt.active {
					time.Sleep(time.Until(start.Add(at)))
					synctest.Wait()
					last = time.Now()
					f.mu.Lock()
					f.limits.last = c.now()
					f.mu.Unlock()
				}
				<-ended
				if d := time.Since(last); d < idle || d > idle+2*tick {
					t.Errorf("ended %v after the last activity", d)
				}
				cancel()
				synctest.Wait()
			})
		})
	}
}
