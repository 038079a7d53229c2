package upstream

import (
	"bytes"
	"context"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// TestHealth lets time pass and looks at who is asked, in which order.
func TestHealth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &lab{hosts: map[string]behaviour{addrA: refuses, addrB: replies(0), addrC: replies(0)}}
		var log bytes.Buffer
		p := l.pool(t, Options{MaxFail: 2, BadExpire: time.Minute, Log: slog.New(slog.NewTextHandler(&log, nil))})
		step := func(what string, a behaviour, wantAsked, wantUp string) {
			t.Helper()
			if a != nil {
				l.set(addrA, a)
			}
			l.asked()
			again := &Server{Name: serverA.Name, Addr: serverA.Addr} // as after a reload
			connect(t, p, again, serverB, serverC)
			if got := l.asked(); got != wantAsked {
				t.Errorf("%s: asked %s, want %s", what, got, wantAsked)
			}
			if got := up(p, again, serverB, serverC); got != wantUp {
				t.Errorf("%s: up: %s, want %s", what, got, wantUp)
			}
		}
		step("first fault", nil, addrA+" "+addrB, "a b c")
		step("success between", replies(0), addrA, "a b c")
		step("first fault again", refuses, addrA+" "+addrB, "a b c")
		step("general failure between", replies(1), addrA+" "+addrB, "a b c")
		step("first fault again", refuses, addrA+" "+addrB, "a b c")
		step("destination's refusal between", replies(5), addrA, "a b c")
		step("first fault again", refuses, addrA+" "+addrB, "a b c")
		step("no descriptor between, which says nothing", exhausted, addrA+" "+addrB, "a b c")
		step("second fault in a row", refuses, addrA+" "+addrB, "b c")
		step("bad", nil, addrB, "b c")
		time.Sleep(time.Minute - time.Nanosecond)
		step("bad, and no probe has found it well", nil, addrB, "b c")
		time.Sleep(time.Nanosecond)
		step("expired, one more fault", nil, addrA+" "+addrB, "b c")
		step("bad again", nil, addrB, "b c")
		l.set(addrA, replies(0))
		time.Sleep(time.Second)
		step("a probe has found it well", nil, addrA, "a b c")

		for _, a := range []string{addrA, addrB, addrC} {
			l.set(a, refuses)
		}
		all := addrA + " " + addrB + " " + addrC
		step("all fail", nil, all, "a b c")
		step("all fail again", nil, all, "")
		step("all bad: still asked, in order", nil, all, "")
		l.set(addrC, replies(1))
		step("general failure while bad", nil, all, "c")
		step("the good one first, the bad ones in order", nil, addrC+" "+addrA+" "+addrB, "c")

		for line, want := range map[string]int{"asked last": 4, "is back": 2} {
			if got := strings.Count(log.String(), line); got != want {
				t.Errorf("%d lines %q, want %d:\n%s", got, line, want, &log)
			}
		}
	})
}

// TestTell: a server that comes and goes does not fill the log, and what was left
// out is told of.
func TestTell(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &lab{hosts: map[string]behaviour{addrA: refuses}}
		var log bytes.Buffer
		p := l.pool(t, Options{BadExpire: time.Nanosecond, Log: slog.New(slog.NewTextHandler(&log, nil))})
		change := func(n int) {
			for i := range n {
				l.set(addrA, []behaviour{refuses, replies(0)}[i%2])
				time.Sleep(time.Nanosecond)
				connect(t, p, serverA)
			}
		}
		told := func(what string, want map[string]int) {
			t.Helper()
			for line, n := range want {
				if got := strings.Count(log.String(), line); got != n {
					t.Errorf("%s: %d lines %q, want %d:\n%s", what, got, line, n, &log)
				}
			}
			log.Reset()
		}
		change(6)
		told("a few", map[string]int{"asked last": 3, "is back": 3, "comes and goes": 0})
		change(100)
		told("many", map[string]int{"asked last": 1, "is back": 1, "comes and goes": 1})
		time.Sleep(tellSpan)
		change(2)
		told("later", map[string]int{"asked last": 1, "is back": 1, "come and gone\" upstream=a changes=106": 1})
	})
}

// TestProbes: who is probed, how often, and what ends it.
func TestProbes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var probes atomic.Int32
		counted := func(b behaviour) behaviour {
			return func(ctx context.Context) (net.Conn, error) {
				probes.Add(1)
				return b(ctx)
			}
		}
		l := &lab{hosts: map[string]behaviour{addrA: counted(refuses), addrB: replies(0)}}
		p := l.pool(t, Options{})
		connect(t, p, serverA, serverB)
		probes.Store(0)
		time.Sleep(time.Minute)
		if n := probes.Load(); n < 60 || n > 120 {
			t.Errorf("%d probes of a server that is down, in a minute", n)
		}
		l.set(addrA, counted(says("\x05\x00")))
		time.Sleep(time.Second)
		if s := p.Status([]*Server{serverA})[0]; s.Up || !s.Trial {
			t.Errorf("well, and no flow has tried it: %+v", s)
		}
		time.Sleep(3 * time.Second)
		if up(p, serverA) != "a" {
			t.Error("not good after several probes")
		}
		probes.Store(0)
		time.Sleep(time.Minute)
		if n := probes.Load(); n != 0 {
			t.Errorf("%d probes of a server that is well", n)
		}

		// A server that greets and then fails is tried by one flow at a time.
		l.set(addrA, counted(says("\x05\x00", "garbage, no reply")))
		connect(t, p, serverA, serverB)
		probes.Store(0)
		time.Sleep(900 * time.Millisecond)
		if n := probes.Load(); n == 0 || up(p, serverA) != "" {
			t.Errorf("%d probes", n)
		}
		l.set(addrA, func(ctx context.Context) (net.Conn, error) { // slow, so that they meet
			probes.Add(1)
			time.Sleep(300 * time.Millisecond)
			return says("\x05\x00", "garbage, no reply")(ctx)
		})
		probes.Store(0)
		var wg sync.WaitGroup
		for range 20 {
			wg.Go(func() { connect(t, p, serverA, serverB) })
		}
		wg.Wait()
		if n := probes.Load(); n > 3 {
			t.Errorf("%d flows and probes tried it at once", n)
		}

		p.Configure(Options{Dial: l.dial, Interval: 10 * time.Second}, []*Server{serverB})
		synctest.Wait()
		probes.Store(0)
		l.set(addrB, counted(replies(0)))
		time.Sleep(time.Minute)
		if n := probes.Load(); n < 4 || n > 8 {
			t.Errorf("%d probes with an interval of 10 seconds, in a minute; none of a server that is not used", n)
		}
		l.set(addrB, counted(hangs))
		time.Sleep(20 * time.Second)
		if up(p, serverB) != "" {
			t.Error("no probe has found out that it hangs")
		}
	})
}

// TestPatience: who can go elsewhere does not wait for a silent server as long
// as for one that has nobody beside it.
func TestPatience(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		slow := func(b behaviour) behaviour {
			return func(ctx context.Context) (net.Conn, error) {
				time.Sleep(time.Millisecond)
				return b(ctx)
			}
		}
		l := &lab{hosts: map[string]behaviour{addrA: slow(replies(0)), addrB: slow(replies(0))}}
		p := l.pool(t, Options{})
		if got := connect(t, p, serverA, serverB); got != "a" {
			t.Fatal(got)
		}
		l.set(addrA, hangs)
		start := time.Now()
		if got := connect(t, p, serverA, serverB); got != "b" || time.Since(start) > 2*time.Second {
			t.Errorf("%s after %v", got, time.Since(start))
		}
		start = time.Now()
		if connect(t, p, serverA); time.Since(start) != 10*time.Second {
			t.Errorf("with nobody else: after %v", time.Since(start))
		}
	})
}

func TestBalance(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &lab{hosts: map[string]behaviour{addrA: replies(0), addrB: replies(0), addrC: replies(0)}}
		p := l.pool(t, Options{Rand: rand.New(rand.NewPCG(1, 2)).IntN})
		servers := []*Server{serverA, serverB, serverC}
		orders := map[string]int{}
		g := &Group{Servers: servers, Order: Random}
		order := func(r Request) (names string) {
			for _, s := range p.order(nil, g, r, nil) {
				names += s.Name
			}
			return names
		}
		const rounds = 600
		for range rounds {
			orders[order(Request{})]++
		}
		for _, names := range []string{"abc", "acb", "bac", "bca", "cab", "cba"} {
			if n := orders[names]; n < rounds/6*6/10 || n > rounds/6*14/10 {
				t.Errorf("order %s came %d times of %d", names, n, rounds)
			}
		}
		g.Order = RoundRobin
		if got := order(Request{}) + " " + order(Request{}) + " " + order(Request{}) + " " + order(Request{}); got != "abc bca cab abc" {
			t.Errorf("round robin: %s", got)
		}
		if servers[0] != serverA || servers[1] != serverB || servers[2] != serverC {
			t.Error("the caller's list was changed")
		}

		g.Order = LeastLoad
		share := map[string]int{}
		var carried []*Carried
		for range 30 {
			c, err := p.Connect(t.Context(), g, Request{To: target})
			if err != nil {
				t.Fatal(err)
			}
			share[c.Server.Name]++
			carried = append(carried, c)
		}
		if share["a"] != 10 || share["b"] != 10 || share["c"] != 10 {
			t.Errorf("least load: %v", share)
		}
		for _, c := range carried {
			if c.Conn.Close(); c.Server == serverB {
				c.Done()
			}
		}
		for range 10 {
			c, err := p.Connect(t.Context(), g, Request{To: target})
			if err != nil || c.Server != serverB {
				t.Fatalf("not the one without flows: %v, %v", c, err)
			}
			c.Conn.Close()
		}
		if n := p.Status(servers); n[0].Flows != 10 || n[1].Flows != 10 {
			t.Errorf("flows: %+v", n)
		}
	})
}

// TestHash: a server gets its share of clients and destinations, always the same
// ones, and the loss of another moves none of them.
func TestHash(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &lab{hosts: map[string]behaviour{addrA: replies(0), addrB: replies(0), addrC: replies(0)}}
		p := l.pool(t, Options{})
		all := &Group{Servers: []*Server{serverA, serverB, serverC}, Order: Hash}
		left := &Group{Servers: []*Server{serverC, serverA}, Order: Hash}
		share := map[string]int{}
		const rounds = 3000
		for i := range rounds {
			r := Request{To: target, Src: netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)})}
			first := p.order(nil, all, r, nil)[0]
			if again := p.order(nil, all, r, nil)[0]; again != first {
				t.Fatalf("%s and %s for the same client", first.Name, again.Name)
			}
			if first != serverB && p.order(nil, left, r, nil)[0] != first {
				t.Fatalf("a flow of %s moved with the loss of b", first.Name)
			}
			share[first.Name]++
		}
		for name, n := range share {
			if n < rounds/3*9/10 || n > rounds/3*11/10 {
				t.Errorf("%s has %d of %d", name, n, rounds)
			}
		}
	})
}

// TestLimits: a server that has what it may have is passed over and not blamed.
func TestLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		one := &Server{Name: "one", Addr: serverA.Addr, MaxFlows: 1}
		l := &lab{hosts: map[string]behaviour{addrA: replies(0), addrB: replies(0)}}
		p := l.pool(t, Options{})
		g := &Group{Servers: []*Server{one, serverB}}
		first, err := p.Connect(t.Context(), g, Request{To: target})
		if err != nil || first.Server != one {
			t.Fatalf("%v, %v", first, err)
		}
		defer first.Conn.Close()
		second, err := p.Connect(t.Context(), g, Request{To: target})
		if err != nil || second.Server != serverB {
			t.Fatalf("%v, %v", second, err)
		}
		second.Conn.Close()
		if _, err := p.Connect(t.Context(), &Group{Servers: []*Server{one}}, Request{To: target}); err == nil || !strings.Contains(err.Error(), "busy: 1 flows") {
			t.Error(err)
		}
		first.Done()
		if got := connect(t, p, one); got != "one" {
			t.Error(got)
		}
		if up(p, one) != "one" || p.Status([]*Server{one})[0].Faults != 0 {
			t.Error("it was blamed")
		}

		two := &Server{Name: "two", Addr: serverC.Addr, MaxHandshakes: 2}
		l.set(addrC, says("\x05\x00"))
		var wg sync.WaitGroup
		var busy atomic.Int32
		for range 5 {
			wg.Go(func() {
				if got := connect(t, p, two); strings.Contains(got, "busy: 2 handshakes") {
					busy.Add(1)
				}
			})
		}
		wg.Wait()
		if busy.Load() != 3 {
			t.Errorf("%d of 5 were turned away, want 3", busy.Load())
		}
	})
}

// TestLimitsOfHops: a flow through a chain is one of each of its servers, and who
// has enough of them is not at fault.
func TestLimitsOfHops(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hop := &Server{Name: "hop", Addr: serverA.Addr, MaxFlows: 1}
		chain := &Server{Name: "hop>last", Addr: serverB.Addr, Via: hop}
		l := &lab{hosts: map[string]behaviour{addrA: says(chosen5, granted, chosen5, granted)}}
		p := l.pool(t, Options{})
		g := &Group{Servers: []*Server{chain}}
		first, err := p.Connect(t.Context(), g, Request{To: target})
		if err != nil {
			t.Fatal(err)
		}
		defer first.Conn.Close()
		want := func(when string, flows int64) {
			t.Helper()
			for _, s := range p.Status([]*Server{hop, chain}) {
				if s.Flows != flows || !s.Up || s.Faults != 0 {
					t.Errorf("%s: %+v, want %d flows", when, s, flows)
				}
			}
		}
		want("carried", 1)
		if _, err := p.Connect(t.Context(), g, Request{To: target}); err == nil || !strings.Contains(err.Error(), "busy: 1 flows") {
			t.Error(err)
		}
		want("busy", 1)
		first.Done()
		want("over", 0)
		second, err := p.Connect(t.Context(), g, Request{To: target})
		if err != nil {
			t.Fatal(err)
		}
		second.Done()
		second.Conn.Close()
	})
}

// TestConnectTogether has many flows at once fail over, for the race detector.
func TestConnectTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &lab{hosts: map[string]behaviour{addrA: refuses, addrB: replies(0), addrC: says("EOF")}}
		p := l.pool(t, Options{})
		const flows = 50
		var wg sync.WaitGroup
		for i := range flows {
			wg.Go(func() {
				g := &Group{Servers: []*Server{serverA, serverC, serverB}, Order: Order(i % 2)}
				c, err := p.Connect(t.Context(), g, Request{To: target})
				if err != nil || c.Server != serverB {
					t.Errorf("%v, %v", c, err)
					return
				}
				c.Conn.Close()
				c.Done()
			})
		}
		wg.Wait()
		if got := p.Status([]*Server{serverB})[0]; got.Carried != flows || got.Faults != 0 || got.Flows != 0 {
			t.Errorf("%+v", got)
		}
	})
}

// measured is a connection of which the kernel says how far it leads.
type measured struct {
	net.Conn
	asked int
}

func (m *measured) RoundTrip() time.Duration {
	m.asked++
	return 100 * time.Microsecond
}

// TestAway: how busy this host is does not make a server far, and of one that
// is near the kernel is not asked for each flow.
func TestAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h, m := &health{}, &measured{}
		for range 100 {
			h.away(m, 10*worthwhile, true)
		}
		time.Sleep(tripAge + 1)
		for range 100 {
			h.away(m, 10*worthwhile, true)
		}
		if h.trip.best != 100*time.Microsecond || m.asked > 3 {
			t.Errorf("%v away; the kernel was asked %d times", h.trip.best, m.asked)
		}
	})
}
