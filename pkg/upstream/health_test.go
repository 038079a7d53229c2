package upstream

import (
	"bytes"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// TestHealth lets time pass and looks at who is asked, in which order.
func TestHealth(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &lab{hosts: map[string]behaviour{addrA: refuses, addrB: replies(0), addrC: replies(0)}}
		var log bytes.Buffer
		p := New(Options{Dial: l.dial, MaxFail: 2, BadExpire: time.Minute, Log: slog.New(slog.NewTextHandler(&log, nil))})
		step := func(what string, a behaviour, wantAsked, wantUp string) {
			t.Helper()
			if a != nil {
				l.hosts[addrA] = a
			}
			again := *serverA // as after a reload
			connect(t, p, &again, serverB, serverC)
			if got := l.asked(); got != wantAsked {
				t.Errorf("%s: asked %s, want %s", what, got, wantAsked)
			}
			if got := up(p, &again, serverB, serverC); got != wantUp {
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
		step("bad to the end", nil, addrB, "b c")
		time.Sleep(time.Nanosecond)
		step("expired, one more fault", nil, addrA+" "+addrB, "b c")
		step("bad again", nil, addrB, "b c")
		time.Sleep(time.Minute)
		step("expired, back", replies(0), addrA, "a b c")

		l.hosts[addrA], l.hosts[addrB], l.hosts[addrC] = refuses, refuses, refuses
		all := addrA + " " + addrB + " " + addrC
		step("all fail", nil, all, "a b c")
		step("all fail again", nil, all, "")
		step("all bad: still asked, in order", nil, all, "")
		l.hosts[addrC] = replies(1)
		step("general failure while bad", nil, all, "c")
		step("the good one first, the bad ones in order", nil, addrC+" "+addrA+" "+addrB, "c")

		for line, want := range map[string]int{"asked last": 4, "is back": 2} {
			if got := strings.Count(log.String(), line); got != want {
				t.Errorf("%d lines %q, want %d:\n%s", got, line, want, &log)
			}
		}
	})
}

func TestBalance(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &lab{hosts: map[string]behaviour{addrA: replies(0), addrB: replies(0), addrC: replies(0)}}
		p := New(Options{Dial: l.dial, Rand: rand.New(rand.NewPCG(1, 2)).IntN})
		servers := []*Server{serverA, serverB, serverC}
		const rounds = 600
		share := map[string]int{}
		for range rounds {
			conn, s, err := p.Connect(t.Context(), servers, true, target)
			if err != nil {
				t.Fatal(err)
			}
			conn.Close()
			share[s.Name]++
		}
		for _, s := range servers {
			if n := share[s.Name]; n < rounds/3*8/10 || n > rounds/3*12/10 {
				t.Errorf("%s carries %d of %d flows", s.Name, n, rounds)
			}
		}

		orders := map[string]int{}
		order := func() (names string) {
			for _, s := range p.order(nil, servers, true, nil) {
				names += s.Name
			}
			return names
		}
		for range rounds {
			orders[order()]++
		}
		for _, names := range []string{"abc", "acb", "bac", "bca", "cab", "cba"} {
			if n := orders[names]; n < rounds/6*6/10 || n > rounds/6*14/10 {
				t.Errorf("order %s came %d times of %d", names, n, rounds)
			}
		}
		if servers[0] != serverA || servers[1] != serverB || servers[2] != serverC {
			t.Error("the caller's list was shuffled")
		}

		p.bad(serverA, syscall.ECONNREFUSED)
		for range 100 {
			if names := order(); names[2] != 'a' {
				t.Fatalf("a is bad, yet the order is %s", names)
			}
		}
	})
}

// TestConnectTogether has many flows at once fail over, for the race detector.
func TestConnectTogether(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &lab{hosts: map[string]behaviour{addrA: refuses, addrB: replies(0), addrC: says("EOF")}}
		p := New(Options{Dial: l.dial})
		const flows = 50
		var wg sync.WaitGroup
		for i := range flows {
			wg.Go(func() {
				conn, s, err := p.Connect(t.Context(), []*Server{serverA, serverC, serverB}, i%2 == 0, target)
				if err != nil || s != serverB {
					t.Errorf("%v, %v", s, err)
					return
				}
				conn.Close()
			})
		}
		wg.Wait()
		if got := p.Status([]*Server{serverB})[0]; got.Carried != flows || got.Faults != 0 {
			t.Errorf("%+v", got)
		}
	})
}
