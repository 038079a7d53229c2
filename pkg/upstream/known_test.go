package upstream

import (
	"encoding/json"
	"testing"
	"testing/synctest"
	"time"
)

// TestAdopt: the pool of another process goes on with what one knew: a server that
// is bad is asked last and probed, and what was counted counts on.
func TestAdopt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &lab{hosts: map[string]behaviour{addrA: refuses, addrB: replies(0), addrC: replies(5)}}
		first := l.pool(t, Options{BadExpire: time.Minute})
		connect(t, first, serverA, serverB)
		first.Adopt(nil) // nothing to be taken over
		b, err := json.Marshal(first.Known())
		if err != nil {
			t.Fatal(err)
		}
		before := first.Status([]*Server{serverA, serverB})
		first.Close()

		var known []Known
		if err := json.Unmarshal(b, &known); err != nil {
			t.Fatal(err)
		}
		a, other := &Server{Name: serverA.Name, Addr: serverA.Addr}, &Server{Name: serverB.Name, Addr: serverC.Addr}
		next := New(Options{Dial: first.options.Load().Dial, BadExpire: time.Minute}, []*Server{a, serverB, other})
		defer next.Close()
		next.Adopt(known)
		if got := up(next, a, serverB, other); got != "b b" {
			t.Errorf("up: %s", got)
		}
		after := next.Status([]*Server{a, serverB, other})
		for i, s := range before {
			n := after[i]
			if n.Carried != s.Carried || n.Faults != s.Faults || n.Setup != s.Setup || n.Answered.Count != s.Answered.Count || n.Failed.Count != s.Failed.Count || n.Failed.Buckets[30] != s.Failed.Buckets[30] {
				t.Errorf("before %+v, after %+v", s, n)
			}
		}
		if after[0].Faults != 1 || after[1].Carried != 1 || after[2].Carried != 0 {
			t.Errorf("counted: %+v", after)
		}
		l.asked()
		connect(t, next, a, serverB)
		if got := l.asked(); got != addrB {
			t.Errorf("asked %s, want the server alone that is well", got)
		}
		l.set(addrA, replies(0))
		time.Sleep(2 * time.Second)
		connect(t, next, a, serverB)
		if got := up(next, a); got != "a" {
			t.Error("what is well again was not found out")
		}
	})
}
