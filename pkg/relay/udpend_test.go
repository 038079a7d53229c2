package relay

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/tproxyd/tproxyd/pkg/flow"
	"golang.org/x/sys/unix"
)

// The end of its control connection ends an outlet, and so does a word by it.
// The next datagram opens another, preferably where the last one was.
func TestUDPControlEnds(t *testing.T) {
	for _, end := range []string{"closes", "resets", "speaks"} {
		t.Run(end, func(t *testing.T) {
			r := newUDPRig(t, UDPOptions{})
			far := r.controls()
			first := r.exchange(client1, web)
			r.exchange(client1, game)
			want[any](t, r.opens, nil)
			c := <-far
			switch end {
			case "closes":
				c.Close()
			case "resets":
				c.SetLinger(0)
				c.Close()
			case "speaks":
				mustWrite(t, c, "!")
			}
			eventually(t, "the outlet ends", func() bool { return r.Stats().Outlets == 0 })
			r.check()
			if end == "speaks" {
				if n, err := c.Read(make([]byte, 1)); n != 0 || err == nil {
					t.Error("the control connection is still open")
				}
			}
			if second := r.exchange(client1, game); second == first {
				t.Error("the outlet lives on")
			}
			want[any](t, r.opens, "server")
			if s := r.Stats(); s.Sessions != 1 || s.Flows != 2 || s.Associations != 2 || s.Outlets != 1 {
				t.Errorf("%+v", s)
			}
			c = <-far
			r.close()
			mustEOF(t, c)
		})
	}
}

// A control connection that has ended before it is looked at ends its outlet
// too.
func TestUDPControlEndedBefore(t *testing.T) {
	r := newUDPRig(t, UDPOptions{})
	far := r.controls()
	dial := r.open
	r.opensBy(func(ctx context.Context, o *Outlet) error {
		err := dial(ctx, o)
		c := <-far
		c.Close()
		eventually(t, "the end is seen", func() bool { return !o.Control[0].Quiet() })
		return err
	})
	r.carries(client1, web, "hello") // it is sent before the end is served, or not at all
	eventually(t, "the outlet ends", func() bool { return r.Stats().Outlets == 0 })
}

// Where nobody reads any longer the kernel says so: what had not been sent is
// sent by another outlet.
func TestUDPServerGone(t *testing.T) {
	r := newUDPRig(t, UDPOptions{})
	r.exchange(client1, web)
	addr := r.server.addr
	r.server.Close()
	r.send(client1, web, "lost")
	eventually(t, "the outlet ends", func() bool { return r.Stats().Outlets == 0 })
	r.server = newRelayServer(t, addr.String())
	r.exchange(client1, web)
	if s := r.Stats(); s.Refused != 0 || s.Associations != 2 || s.Sessions != 1 {
		t.Errorf("%+v", s)
	}
}

// Of a destination without a server the client is told what it said itself.
func TestUDPDirectRefused(t *testing.T) {
	r := newUDPRig(t, UDPOptions{})
	r.decides(func(v *Verdict, _, _ netip.AddrPort) { v.Header = nil })
	r.server.Close()
	r.send(client1, web, "hello")
	r.refuses("%s > %s: , %d", client1, web, RefusePort)
	eventually(t, "the outlet ends", func() bool { return r.Stats().Outlets == 0 })
}

// A reload decides every flow anew, at once. Those that go on as they did keep
// their outlet.
func TestUDPInvalidate(t *testing.T) {
	r := newUDPRig(t, UDPOptions{})
	o := r.exchange(client1, web)
	r.exchange(client1, game)
	r.exchange(client2, web)
	r.decides(func(v *Verdict, client, dst netip.AddrPort) {
		switch {
		case client.String() == client2:
			v.Way.Key = "another"
		case dst.String() == game:
			v.Way = nil
		}
	})
	r.Invalidate()
	r.settle()
	if s := r.Stats(); s.Sessions != 1 || s.Flows != 1 || s.Outlets != 1 {
		t.Errorf("%+v", s)
	}
	r.server.answer(o, header(netip.MustParseAddrPort(game)), "too late")
	r.dropped(DropStranger, 1)
	r.send(client1, game, "more")
	r.refuses("%s > %s: more, %d", client1, game, RefusePort)
	if p := r.exchange(client1, web); p != o {
		t.Error("what goes on as it did has another outlet")
	}
	r.exchange(client2, web)
	r.decides(nil)
	r.Invalidate()
	r.settle()
	if p := r.exchange(client1, game); p != o {
		t.Error("what is carried again has an outlet of its own")
	}
	r.check()
}

// A flow that is denied while it is being decided about is not carried, in
// neither direction, whatever the loop serves first.
func TestUDPInvalidateAtOnce(t *testing.T) {
	r := newUDPRig(t, UDPOptions{})
	deny := func(v *Verdict, _, _ netip.AddrPort) { v.Way = nil }
	o := r.exchange(client1, web)
	// The loop has the answer and the reload before it has this datagram.
	r.src.hook(func() {
		r.server.answer(o, header(netip.MustParseAddrPort(web)), "answer")
		r.decides(deny)
		r.epoch.Add(1)
	})
	r.send(client1, web, "more")
	r.refuses("%s > %s: more, %d", client1, web, RefusePort)
	r.settle()
	none(t, r.src.replies)

	// An outlet is open, and what waits for it may no longer go.
	r.decides(nil)
	r.Invalidate()
	let := make(chan error)
	r.opensBy(held(let))
	r.send(client1, web, "waits")
	r.settle()
	r.src.hook(func() {
		let <- nil
		sh := r.shards[0]
		eventually(t, "it is open", func() bool { sh.mu.Lock(); defer sh.mu.Unlock(); return len(sh.posted) > 0 })
		r.decides(deny)
		r.Invalidate()
	})
	r.send(client2, web, "refused")
	r.refuses("%s > %s: refused, %d", client2, web, RefusePort)
	r.settle()
	r.check()
	r.server.nothing()
	r.dropped(DropOutlet, 1)
}

// Close ends what is open, what is being opened and what waits for it.
func TestUDPClose(t *testing.T) {
	r := newUDPRig(t, UDPOptions{})
	for i := range 100 {
		r.carries(fmt.Sprintf("10.0.0.1:%d", 1+i), web, "hello")
	}
	r.opensBy(held(nil))
	for i := range 100 {
		r.send(fmt.Sprintf("10.0.0.2:%d", 1+i), web, "hello", "hello")
	}
	eventually(t, "all wait", func() bool { return r.Stats().UpDatagrams == 300 })
	r.close()
	if len(r.ended) != 200 {
		t.Errorf("%d sessions ended", len(r.ended))
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	r.Invalidate()
	r.SetLimits(time.Second, 0)
	if s := r.Stats(); s.Dropped["outlet"]+s.Refused != 200 {
		t.Errorf("%+v", s)
	}
}

// Close may come at any moment.
func TestUDPCloseBeside(t *testing.T) {
	for i := range 50 {
		r := newUDPRig(t, UDPOptions{tick: 100 * time.Microsecond})
		for k := range 20 {
			r.send(fmt.Sprintf("10.0.0.1:%d", 1+k), web, "hello")
		}
		time.Sleep(time.Duration(i) * 20 * time.Microsecond)
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		if err := (tally{}).agrees(r.UDP); err != nil {
			t.Error(err)
		}
	}
}

// An outlet can be a goroutine. It ends when that closes its end, and what it
// said before is delivered.
func TestUDPPair(t *testing.T) {
	r := newUDPRig(t, UDPOptions{})
	pairs := make(chan *os.File, 10)
	r.decides(func(v *Verdict, _, _ netip.AddrPort) {
		v.Way = &Way{Key: "pair", Open: func(context.Context, any) (Outlet, error) {
			p, f, err := PacketPair()
			pairs <- f
			return Outlet{Socket: p}, err
		}}
	})
	dst := header(netip.MustParseAddrPort(web))
	b := make([]byte, 1<<16)
	for range 2 {
		r.send(client1, web, "one", "two", "two", "three")
		f := <-pairs
		for _, text := range []string{"one", "two", "two", "three"} {
			if n, err := f.Read(b); string(b[:n]) != string(dst)+text || err != nil {
				t.Fatalf("%q, %v", b[:n], err)
			}
		}
		done := make(chan struct{})
		r.src.hook(func() { // so that all of it is there at once
			for _, text := range []string{"1", "2", "3"} {
				if _, err := f.Write(append(dst, text...)); err != nil {
					t.Error(err)
				}
			}
			f.Close()
			close(done)
		})
		r.send(client2, game, "wakes the loop")
		<-done
		for _, text := range []string{"1", "2", "3"} {
			r.reply("%s > %s: %s", web, client1, text)
		}
		g := <-pairs
		eventually(t, "the outlet ends", func() bool { return r.Stats().Outlets == 1 })
		g.Close()
		eventually(t, "the other ends", func() bool { return r.Stats().Outlets == 0 })
	}
	// The other way round.
	r.send(client1, web, "one")
	f := <-pairs
	defer f.Close()
	f.Read(b)
	r.Close()
	if _, err := f.Read(b); err == nil {
		t.Error("the goroutine does not see the end")
	}
}

// A source that fails is no longer read, which Watch tells; the others are.
func TestUDPSourceFails(t *testing.T) {
	a, b := newInjector(t), newInjector(t)
	r := newUDPRig(t, UDPOptions{Sources: [][]flow.PacketSource{{a, b}}})
	a.fail = errors.New("broken")
	a.put(datagram(client1, web, "never"))
	r.settle()
	if err := r.Watch(t.Context()); err == nil || err.Error() != "broken" {
		t.Errorf("Watch: %v", err)
	}
	ended, end := context.WithCancel(t.Context())
	end()
	if err := r.Watch(ended); err != nil {
		t.Errorf("Watch until its context ends: %v", err)
	}
	a.fail = nil
	a.put(datagram(client1, web, "never"))
	b.put(datagram(client2, game, "hello"))
	o := r.server.expect(game, "hello")
	r.server.answer(o, header(netip.MustParseAddrPort(game)), "answer")
	want(t, b.replies, game+" > "+client2+": answer")
	if s := r.Stats(); s.UpDatagrams != 1 || s.Flows != 1 {
		t.Errorf("%+v", s)
	}
	r.inside(func(sh *shard) { sh.sources = sh.sources[1:] }) // for the tally
}

func TestUDPOptionsWrong(t *testing.T) {
	if _, err := NewUDP(UDPOptions{}); err == nil {
		t.Error("nothing is needed")
	}
	r := newUDPRig(t, UDPOptions{})
	before := openFDs(t)
	o := r.o
	bad := newInjector(t)
	unix.Close(bad.fd)
	bad.fd = -1
	o.Sources = [][]flow.PacketSource{{newInjector(t)}, {bad}}
	if _, err := NewUDP(o); !errors.Is(err, unix.EBADF) {
		t.Errorf("a source that cannot be watched: %v", err)
	}
	if n := openFDs(t) - 1; n > before {
		t.Errorf("%d descriptors, %d before", n, before)
	}
}

// An event of what was read long ago is no word of the peer, and does not end
// what waits for one.
func TestWhenEnded(t *testing.T) {
	r := newUDPRig(t, UDPOptions{})
	far := r.controls()
	var o Outlet
	if err := r.open(t.Context(), &o); err != nil {
		t.Fatal(err)
	}
	defer o.Control[0].Close()
	c, late := o.Control[0], <-far
	mustWrite(t, late, "reply")
	mustRead(t, c, "reply")
	ended := make(chan bool, 10)
	c.whenEnded(func() { ended <- true })
	for range 3 {
		c.event(c.l, unix.EPOLLIN)
		c.event(c.l, unix.EPOLLIN|unix.EPOLLOUT)
	}
	none(t, ended)
	late.Close()
	want(t, ended, true)
	c.event(c.l, unix.EPOLLIN)
	c.whenEnded(func() { ended <- true }) // at once
	want(t, ended, true)
	o.Control[0].Close()
	c.whenEnded(func() { ended <- true })
	want(t, ended, true)
	none(t, ended)
}
