package relay

import (
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

// A flow with a limit of its own goes by that, until it is decided otherwise.
func TestUDPOwnLimit(t *testing.T) {
	r := newUDPRig(t, UDPOptions{})
	r.SetLimits(9*time.Hour+time.Minute, 2*time.Hour) // 10 ticks, 2 ticks
	idle := map[uint16]time.Duration{443: 3 * time.Hour, 444: 30 * time.Hour, 53: 30 * time.Hour}
	r.decides(func(v *Verdict, _, dst netip.AddrPort) { v.Idle, v.Short = idle[dst.Port()], dst.Port() == 53 })
	flows := func(want string) {
		t.Helper()
		var got []uint16
		r.inside(func(sh *shard) {
			for k := range sh.flows {
				got = append(got, k.dst.Port())
			}
			if len(sh.timed) > 2 {
				t.Errorf("%d limits", len(sh.timed))
			}
		})
		slices.Sort(got)
		if fmt.Sprint(got) != want {
			t.Fatalf("flows to %v, want %s", got, want)
		}
	}
	for _, port := range []string{"442", "443", "444", "53"} {
		r.exchange(client1, "192.0.2.1:"+port)
	}
	r.check()
	r.tick(3)
	flows("[442 443 444]")
	r.carries(client1, "192.0.2.1:443", "more")
	r.tick(3)
	flows("[442 443 444]")
	r.tick(1)
	flows("[442 444]")
	r.tick(4)
	flows("[444]")
	r.inside(func(*shard) { idle[444] = 0 })
	r.Invalidate()
	r.carries(client1, "192.0.2.1:444", "more")
	r.check()
	r.tick(11)
	flows("[]")
	r.check()
}

// A flow ends after its limit without a datagram in either direction, its
// outlet and its session with the last of them.
func TestUDPIdle(t *testing.T) {
	r := newUDPRig(t, UDPOptions{})
	r.SetLimits(9*time.Hour+time.Minute, 2*time.Hour) // 10 ticks, 2 ticks
	r.decides(func(v *Verdict, _, dst netip.AddrPort) {
		v.Short = dst.Port() == 53
		v.Why = dst.Port()
		if dst.Port() == 9 {
			v.Way = nil
		}
	})
	o := r.exchange(client1, web)
	r.exchange(client1, "192.0.2.1:53")
	r.send(client1, "192.0.2.1:9", "refused")
	r.refuses("%s > 192.0.2.1:9: refused, 0", client1)
	flows := func(want int) {
		t.Helper()
		if n := r.Stats().Flows; n != want {
			t.Fatalf("%d flows, want %d", n, want)
		}
	}
	r.tick(2)
	flows(3)
	r.tick(1)
	flows(1)
	r.tick(6)
	r.server.answer(o, header(netip.MustParseAddrPort(web)), "late")
	r.reply("%s > %s: late", web, client1)
	r.tick(9)
	r.carries(client1, web, "more")
	r.tick(10)
	flows(1)
	none(t, r.ended)
	r.SetLimits(20*time.Hour, 0)
	r.tick(1)
	flows(1)
	r.SetLimits(time.Hour, 0)
	r.tick(1)
	flows(0)
	r.check()
	x := <-r.ended
	if x.Client.String() != client1 || x.Dst.String() != web || x.IfIndex != 7 || x.Flows != 3 || fmt.Sprint(x.Via) != "[server]" ||
		fmt.Sprint(x.Why) != "[443 53 9]" || x.UDPTraffic != (UDPTraffic{4, 3, 8 + 8 + 7 + 4, 6 + 6 + 4}) || x.Duration <= 0 {
		t.Errorf("%+v", x)
	}
	if s := r.Stats(); s.Sessions != 0 || s.Outlets != 0 || s.Evicted != 0 {
		t.Errorf("%+v", s)
	}
	r.exchange(client1, web)
}

// The clock of the real thing.
func TestUDPClock(t *testing.T) {
	r := newUDPRig(t, UDPOptions{tick: 5 * time.Millisecond})
	r.SetLimits(50*time.Millisecond, 0)
	begun := time.Now()
	r.exchange(client1, web)
	x := <-r.ended
	if d := time.Since(begun); d < 50*time.Millisecond || x.Duration < 50*time.Millisecond || x.Duration > d {
		t.Errorf("it ended after %v, and says %v", d, x.Duration)
	}
	if err := (tally{}).agrees(r.UDP); err != nil {
		t.Error(err)
	}
}

// At most so many flows there are; the one that was not used for the longest
// time makes room.
func TestUDPMaxFlows(t *testing.T) {
	r := newUDPRig(t, UDPOptions{MaxFlows: 3})
	dst := func(i int) string { return fmt.Sprintf("203.0.113.%d:1", i) }
	for i := range 3 {
		r.exchange(client1, dst(i))
		r.tick(1)
	}
	first := r.exchange(client1, dst(0))
	r.tick(1)
	r.exchange(client1, dst(3)) // in place of 1
	r.tick(1)
	r.exchange(client2, dst(4)) // in place of 2
	r.check()
	r.inside(func(sh *shard) {
		for i, there := range []bool{true, false, false, true} {
			f := sh.flows[flowKey{netip.MustParseAddrPort(client1), netip.MustParseAddrPort(dst(i))}]
			if (f != nil) != there {
				t.Errorf("%s: %v, want %v", dst(i), f != nil, there)
			}
		}
	})
	if o := r.exchange(client1, dst(0)); o != first {
		t.Error("the session has lost its outlet")
	}
	if s := r.Stats(); s.Flows != 3 || s.Evicted != 2 || s.Sessions != 2 || s.Opened != 2 {
		t.Errorf("%+v", s)
	}
}

func TestUDPMaxSessions(t *testing.T) {
	r := newUDPRig(t, UDPOptions{MaxSessions: 2})
	r.exchange("10.0.0.1:1", web)
	r.tick(1)
	r.exchange("10.0.0.1:2", web)
	r.exchange("10.0.0.1:2", game)
	r.tick(1)
	r.exchange("10.0.0.1:1", web)
	r.exchange("10.0.0.1:3", web)
	if s := r.Stats(); s.Sessions != 2 || s.Evicted != 2 || s.Outlets != 2 || s.Flows != 2 {
		t.Errorf("%+v", s)
	}
	if x := <-r.ended; x.Client.Port() != 2 || x.Flows != 2 {
		t.Errorf("%+v made room", x)
	}
	// The only flow of a session makes room for another of the same.
	r.exchange("10.0.0.1:1", web)
	one := newUDPRig(t, UDPOptions{MaxFlows: 1})
	one.exchange(client1, web)
	one.exchange(client1, game)
	if s := one.Stats(); s.Sessions != 1 || s.Opened != 2 || s.Evicted != 1 {
		t.Errorf("%+v", s)
	}
}

// Of an outlet that is closed by one event of a turn another one may follow.
func TestUDPClosedInTurn(t *testing.T) {
	r := newUDPRig(t, UDPOptions{MaxFlows: 1})
	for range 10 {
		o := r.exchange(client1, web)
		hold := make(chan struct{})
		r.shards[0].post(func() { <-hold })
		r.send(client2, web, "makes the other end")
		r.server.answer(o, header(netip.MustParseAddrPort(web)), "late")
		close(hold)
		r.server.expect(web, "makes the other end")
		r.check()
	}
	none(t, r.src.replies)
}

// What is not carried any longer since its flow had to make room within one
// batch is counted.
func TestUDPEvictedInBatch(t *testing.T) {
	r := newUDPRig(t, UDPOptions{MaxFlows: 2})
	var ds []flow.Datagram
	for i := range 10 {
		ds = append(ds, datagram(client1, fmt.Sprintf("203.0.113.%d:1", i%5), fmt.Sprint(i)))
	}
	r.src.put(ds...)
	r.settle()
	s := r.Stats()
	if got := s.UpDatagrams + s.Dropped["limit"]; got != 10 || s.Dropped["limit"] == 0 {
		t.Errorf("%d of 10 datagrams are accounted for: %+v", got, s)
	}
	r.check()
}

// A client socket that asks the whole world goes on; its own oldest flows make
// room.
func TestUDPMaxSessionFlows(t *testing.T) {
	r := newUDPRig(t, UDPOptions{})
	r.exchange(client2, web)
	r.decides(func(v *Verdict, _, _ netip.AddrPort) { v.Way = nil; v.Refusal = RefuseSilently })
	const more = 100
	for i := range maxSessionFlows + more {
		r.src.put(datagram(client1, fmt.Sprintf("203.%d.%d.%d:1", i>>16, i>>8&255, i&255), ""))
	}
	eventually(t, "all are served", func() bool { return r.Stats().Refused == maxSessionFlows+more })
	r.check()
	if s := r.Stats(); s.Flows != maxSessionFlows+1 || s.Evicted != more || s.Dropped["limit"] != 0 || s.Sessions != 2 {
		t.Errorf("%+v", s)
	}
}

// Sockets are for those that were used last. What has none goes by the raw
// sender of the source.
func TestUDPMaxSockets(t *testing.T) {
	r := newUDPRig(t, UDPOptions{MaxSockets: 2})
	r.exchange("10.0.0.1:1", web)
	r.tick(1)
	r.exchange("10.0.0.1:2", web)
	for range ownSocketAfter {
		r.exchange("10.0.0.1:1", web)
	}
	r.exchange("10.0.0.1:3", web)
	r.check()
	if x := <-r.ended; x.Client.Port() != 1 && x.Client.Port() != 2 {
		t.Errorf("%+v", x)
	}
	if s := r.Stats(); s.Sockets != 2 || s.Outlets != 2 || s.Evicted != 1 {
		t.Errorf("%+v", s)
	}
	// The one that needs a second outlet has nobody else to take it from.
	one := newUDPRig(t, UDPOptions{MaxSockets: 1})
	one.decides(func(v *Verdict, _, dst netip.AddrPort) { v.Way.Key = dst.String() })
	one.exchange(client1, web)
	one.exchange(client1, game)
	if s := one.Stats(); s.Sockets != 1 || s.Evicted != 1 || s.Flows != 1 {
		t.Errorf("%+v", s)
	}
}

// TestSharedSockets: what UDP has of the descriptors TCP cannot have, and the other
// way round, but for what is kept for UDP.
func TestSharedSockets(t *testing.T) {
	e := newEngine(t, Options{Loops: 1})
	e.maxConns, e.kept = 8, 2
	r := newUDPRig(t, UDPOptions{MaxSockets: 6, Beside: e})
	for i := range 5 {
		r.exchange(fmt.Sprintf("10.0.0.1:%d", 1+i), web)
	}
	if s := r.Stats(); s.Sockets != 5 || s.Evicted != 0 || e.Stats().MaxConns != 5 {
		t.Fatalf("alone: %+v, %d for TCP", s, e.Stats().MaxConns)
	}
	for i := range 6 {
		if e.admit(i < 3) != (i < 5) {
			t.Errorf("5 left for TCP: %d of them", i)
		}
	}
	if e.release(false); e.admit(true) {
		t.Error("more clients than half of what is left")
	}
	if !e.admit(false) {
		t.Error("no room for a connection that was dialled")
	}
	r.exchange("10.0.0.1:6", web)
	if s := r.Stats(); s.Sockets != 5 || s.Evicted != 1 {
		t.Errorf("all taken: %+v", s)
	}
	for range 5 {
		e.release(false)
	}
	r.exchange("10.0.0.1:7", web)
	if s := r.Stats(); s.Sockets != 6 || s.Evicted != 1 || e.Stats().MaxConns != 4 {
		t.Errorf("TCP has ended: %+v, %d for TCP", s, e.Stats().MaxConns)
	}
	r.Close()
	if n := e.Stats().MaxConns; n != 8 {
		t.Errorf("UDP has ended, and %d sockets are left for TCP", n)
	}
}

// A loop whose neighbour has many sockets keeps its flows.
func TestUDPSocketsOfLoops(t *testing.T) {
	a, b := newInjector(t), newInjector(t)
	r := newUDPRig(t, UDPOptions{MaxSockets: 8, Sources: [][]flow.PacketSource{{a}, {b}}})
	r.decides(func(v *Verdict, _, dst netip.AddrPort) {
		if dst.Port() == 9 {
			v.Way = nil
		}
	})
	for i := range 10 {
		a.put(datagram(fmt.Sprintf("10.0.0.1:%d", 1+i), web, "of one"))
		r.server.expect(web, "of one")
	}
	for i := range 10 {
		b.put(datagram(client2, fmt.Sprintf("203.0.113.%d:9", i), "refused"))
		<-r.refused
	}
	before := r.Stats().Evicted
	b.put(datagram(client2, web, "of the other"))
	r.server.expect(web, "of the other")
	if s := r.Stats(); s.Evicted != before || s.Sockets > 8 {
		t.Errorf("%d flows were evicted in vain: %+v", s.Evicted-before, s)
	}
	r.check()
}
