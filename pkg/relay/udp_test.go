package relay

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"
)

const (
	client1 = "10.0.0.1:1111"
	client2 = "10.0.0.1:2222"
	web     = "203.0.113.1:443"
	game    = "203.0.113.2:7000"
)

// A client socket has one outlet for all that it sends to by one way; another
// socket of the same host has one of its own.
func TestUDPOneOutlet(t *testing.T) {
	r := newUDPRig(t, UDPOptions{})
	first := r.exchange(client1, web)
	for _, dst := range []string{game, web, "203.0.113.2:7001"} {
		if o := r.exchange(client1, dst); o != first {
			t.Errorf("%s left by %s, not by %s", dst, o, first)
		}
	}
	if o := r.exchange(client2, web); o == first {
		t.Error("two client sockets have one outlet")
	}
	s := r.Stats()
	if s.Sessions != 2 || s.Flows != 4 || s.Outlets != 2 || s.Sockets != 2 || s.Opened != 2 || s.Associations != 2 ||
		s.UDPTraffic != (UDPTraffic{5, 5, 5 * 8, 5 * 6}) {
		t.Errorf("%+v", s)
	}
}

// Each destination of a session is decided by itself: one goes by a server, one
// by another, one directly, one not at all.
func TestUDPWays(t *testing.T) {
	r := newUDPRig(t, UDPOptions{})
	other, direct := newRelayServer(t, "127.0.0.1:0"), newRelayServer(t, "[::1]:0")
	r.decides(func(v *Verdict, _, dst netip.AddrPort) {
		switch dst.Port() {
		case 1:
			v.Way = &Way{Key: "other", Open: func(context.Context, any) (Outlet, error) { return outletTo(other.addr) }}
		case 2, 3:
			v.Header = nil
			v.Way = &Way{Key: "direct " + dst.String(), Open: func(context.Context, any) (Outlet, error) {
				o, err := outletTo(direct.addr)
				o.Via = nil
				return o, err
			}}
		case 4:
			v.Way, v.Refusal = nil, RefuseProhibited
		}
	})
	outlets := []netip.AddrPort{r.exchange(client1, web)}
	r.send(client1, "203.0.113.9:1", "by the other")
	o := other.expect("203.0.113.9:1", "by the other")
	other.answer(o, header(netip.MustParseAddrPort("203.0.113.9:1")), "answer")
	r.reply("203.0.113.9:1 > %s: answer", client1)
	outlets = append(outlets, o)
	for _, dst := range []string{"203.0.113.9:2", "203.0.113.9:3"} {
		r.send(client1, dst, string(header(netip.AddrPort{}))+"bare")
		o, _, text := direct.next()
		if text != "bare" {
			t.Errorf("%q", text)
		}
		direct.answer(o, nil, "anything")
		r.reply("%s > %s: anything", dst, client1)
		outlets = append(outlets, o)
	}
	r.send(client1, "203.0.113.9:4", "denied")
	r.refuses("%s > 203.0.113.9:4: denied, %d", client1, RefuseProhibited)
	slices.SortFunc(outlets, netip.AddrPort.Compare)
	if len(slices.Compact(outlets)) != 4 {
		t.Errorf("outlets %v", outlets)
	}
	if s := r.Stats(); s.Sessions != 1 || s.Outlets != 4 || s.Flows != 5 || s.Refused != 1 {
		t.Errorf("%+v", s)
	}
	r.inside(func(sh *shard) {
		for _, s := range sh.sessions {
			if len(s.via) != 2 {
				t.Errorf("it remembers %v", s.via)
			}
		}
	})
}

// What a session's end tells of is bounded, and each thing is told once.
func TestUDPNote(t *testing.T) {
	var list []any
	for i := range 100 {
		note(&list, i/3)
		note(&list, nil)
	}
	if fmt.Sprint(list) != "[0 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15]" {
		t.Error(list)
	}
}

// Two names on one port have outlets of their own, since a server may answer by
// an address; whatever the answer comes from, it leaves from the address asked.
func TestUDPNames(t *testing.T) {
	r := newUDPRig(t, UDPOptions{})
	a, b := netip.MustParseAddr("198.18.0.1"), netip.MustParseAddr("198.18.0.2")
	r.names[a], r.names[b] = "a.example", "b.example"
	ask := func(dst, to string) netip.AddrPort {
		t.Helper()
		r.send(client1, dst, "hello")
		return r.server.expect(to, "hello")
	}
	first := ask("198.18.0.1:443", "a.example:443")
	second := ask("198.18.0.2:443", "b.example:443")
	if first == second {
		t.Fatal("two names on one port share an outlet")
	}
	if o := ask("198.18.0.2:80", "b.example:80"); o != first {
		t.Error("another port of a name has another outlet")
	}
	if o := ask(web, web); o != first {
		t.Error("an address has another outlet than a name")
	}
	for _, x := range []struct {
		outlet netip.AddrPort
		head   []byte
		from   string
	}{
		{first, nameHeader("a.example", 443), "198.18.0.1:443"},
		{second, nameHeader("b.example", 443), "198.18.0.2:443"},
		{first, header(netip.MustParseAddrPort("192.0.2.1:443")), "198.18.0.1:443"},
		{second, header(netip.MustParseAddrPort("192.0.2.1:443")), "198.18.0.2:443"},
		{second, header(netip.MustParseAddrPort("[2001:db8::1]:443")), "198.18.0.2:443"},
		{first, nameHeader("alias.example", 80), "198.18.0.2:80"},
		{first, header(netip.MustParseAddrPort(web)), web}, // was asked itself
	} {
		r.server.answer(x.outlet, x.head, "answer")
		r.reply("%s > %s: answer", x.from, client1)
	}
	r.server.answer(first, nameHeader("a.example", 8080), "nobody asked this port")
	r.dropped(DropStranger, 1)
	if o := ask("203.0.113.1:9000", "203.0.113.1:9000"); o != first {
		t.Error("an address has another outlet than a name")
	}
	r.server.answer(second, header(netip.MustParseAddrPort("203.0.113.1:9000")), "it was asked by the other outlet")
	r.dropped(DropStranger, 2)
}

// Who was not asked may answer if the client could have asked it by the same
// outlet.
func TestUDPThirdParties(t *testing.T) {
	r := newUDPRig(t, UDPOptions{})
	r.decides(func(v *Verdict, _, dst netip.AddrPort) {
		switch dst.Port() {
		case 1:
			v.Way = nil
		case 2:
			v.Way.Key = "another"
		}
	})
	o := r.exchange(client1, game)
	r.carries(client1, "203.0.113.9:2", "by another way")
	for i, from := range []string{"203.0.113.9:1", "203.0.113.8:2", "203.0.113.9:2", "203.0.113.9:0", "[2001:db8::9]:9"} {
		r.server.answer(o, header(netip.MustParseAddrPort(from)), "let me in")
		r.dropped(DropStranger, i+1)
	}
	for i, garbage := range []string{"", "a", "rubbish, and rather a lot of it", "n\x00\x01\xbb", "n\xffshort"} {
		r.server.answer(o, nil, garbage)
		r.dropped(DropMalformed, i+1)
	}
	r.server.answer(o, header(netip.MustParseAddrPort("203.0.113.9:9")), "peer")
	r.reply("203.0.113.9:9 > %s: peer", client1)
	if p := r.exchange(client1, "203.0.113.9:9"); p != o {
		t.Error("a third party is asked by another outlet than it came by")
	}
	r.settle()
	none(t, r.src.replies)
	r.check()
	r.close()
	if x := <-r.ended; x.Flows != 3 {
		t.Errorf("%d destinations, who was not let in was counted", x.Flows)
	}
}

// dropped waits until so many have been dropped for a reason.
func (r *udpRig) dropped(why Drop, n int) {
	r.t.Helper()
	eventually(r.t, why.String(), func() bool { return r.Stats().Dropped[why.String()] >= uint64(n) })
	if got := r.Stats().Dropped[why.String()]; got != uint64(n) {
		r.t.Fatalf("%d dropped as %s, want %d", got, why, n)
	}
}

func TestUDPRefusals(t *testing.T) {
	r := newUDPRig(t, UDPOptions{})
	for _, why := range []Refusal{RefusePort, RefuseHost, RefuseNet, RefuseProhibited, RefuseSilently} {
		r.decides(func(v *Verdict, _, _ netip.AddrPort) { v.Way, v.Refusal = nil, why })
		r.Invalidate()
		r.settle()
		r.send(client1, web, "one", "two")
		if why != RefuseSilently {
			r.refuses("%s > %s: one, %d", client1, web, why)
			r.refuses("%s > %s: two, %d", client1, web, why)
		}
	}
	r.settle()
	none(t, r.refused)
	if s := r.Stats(); s.Refused != 10 || s.UpDatagrams != 10 || s.Flows != 1 || s.Outlets != 0 {
		t.Errorf("%+v", s)
	}
}

// What waits for an outlet that cannot be opened is refused, and so is what
// comes in the same tick; then it is tried again.
func TestUDPNotOpened(t *testing.T) {
	r := newUDPRig(t, UDPOptions{})
	let := make(chan error)
	r.opensBy(held(let))
	r.send(client1, web, "one", "two")
	r.send(client1, game, "three")
	r.settle()
	let <- failure(RefuseNet)
	for _, x := range []string{web + ": one", web + ": two", game + ": three"} {
		r.refuses("%s > %s, %d", client1, x, RefuseNet)
	}
	want[any](t, r.opens, nil)
	r.send(client1, web, "again")
	r.refuses("%s > %s: again, %d", client1, web, RefuseNet)
	none(t, r.opens)
	if s := r.Stats(); s.Outlets != 0 || s.Sockets != 0 || s.Refused != 4 || s.Associations != 0 {
		t.Errorf("%+v", s)
	}
	r.tick(1)
	r.opensBy(nil)
	r.exchange(client1, web)
}

// A flow of another kind of refusal after a failure is told what it is.
func TestUDPFailedThenDenied(t *testing.T) {
	r := newUDPRig(t, UDPOptions{})
	r.opensBy(func(context.Context, *Outlet) error { return failure(RefuseHost) })
	r.send(client1, web, "one")
	r.refuses("%s > %s: one, %d", client1, web, RefuseHost)
	r.decides(func(v *Verdict, _, _ netip.AddrPort) { v.Way, v.Refusal = nil, RefuseProhibited })
	r.Invalidate()
	r.send(client1, web, "two")
	r.refuses("%s > %s: two, %d", client1, web, RefuseProhibited)
	r.decides(nil)
	r.opensBy(nil)
	r.Invalidate()
	r.exchange(client1, web) // without waiting for the tick
}

// What waits for an outlet is bounded, in datagrams for each and in bytes for
// all.
func TestUDPQueue(t *testing.T) {
	const most = 50_000
	r := newUDPRig(t, UDPOptions{MaxQueued: most})
	let := make(chan error)
	r.opensBy(held(let))
	var texts []string
	for i := range maxOutletQueue + 6 {
		texts = append(texts, strings.Repeat("x", i))
	}
	r.send(client1, web, texts[:30]...)
	r.send(client1, game, texts[30:]...)
	r.dropped(DropQueue, 6)
	r.check()
	long := strings.Repeat("y", most/3)
	r.send(client2, web, long, long, long, "short")
	r.dropped(DropQueue, 7) // since the other session has some
	r.check()
	let <- nil
	let <- nil
	first, second := 0, 0
	for range maxOutletQueue + 3 {
		switch _, to, text := r.server.next(); {
		case len(text) > 1000 || text == "short":
			second++
		case text != texts[first] || to == game != (first >= 30):
			t.Fatalf("%d. for %s: %d bytes", first, to, len(text))
		default:
			first++
		}
	}
	if first != maxOutletQueue || second != 3 {
		t.Errorf("%d and %d came", first, second)
	}
	r.settle()
	if n := r.queued.Load(); n != 0 {
		t.Errorf("%d bytes are still in queues", n)
	}
	r.opensBy(nil)
	r.exchange(client1, web)
}

// Opening ends when nobody wants the outlet any longer, and when it is open.
func TestUDPOpeningEnds(t *testing.T) {
	r := newUDPRig(t, UDPOptions{MaxFlows: 1})
	left, open := make(chan bool, 1), make(chan bool, 1)
	r.opensBy(func(ctx context.Context, _ *Outlet) error {
		<-ctx.Done()
		left <- true
		return ctx.Err()
	})
	r.send(client1, web, "one")
	<-r.opens
	r.opensBy(func(ctx context.Context, _ *Outlet) error {
		context.AfterFunc(ctx, func() { open <- true })
		return nil
	})
	r.carries(client1, game, "two") // evicts
	want(t, left, true)
	want(t, open, true)
}

// An outlet that nobody wants any longer when it is open is closed again.
func TestUDPLeftWhileOpening(t *testing.T) {
	r := newUDPRig(t, UDPOptions{MaxFlows: 1})
	made := make(chan struct{})
	r.opensBy(func(context.Context, *Outlet) error { // deaf to its context
		select {
		case <-made:
		case <-t.Context().Done():
		}
		return nil
	})
	r.send(client1, web, "one")
	<-r.opens
	r.send(client1, game, "two") // evicts
	<-r.opens
	r.dropped(DropOutlet, 1)
	r.check()
	made <- struct{}{}
	made <- struct{}{}
	r.server.expect(game, "two")
	if s := r.Stats(); s.Associations != 1 || s.Evicted != 1 {
		t.Errorf("%+v", s)
	}
}
