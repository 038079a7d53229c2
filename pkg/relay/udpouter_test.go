package relay

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
)

// An outlet that leads through another relay has something before each header on
// its way out, and wants it in what comes back. Each of its control connections
// ends it.
func TestUDPOuter(t *testing.T) {
	outer := []byte("outer:")
	var far []*net.TCPConn
	r := newUDPRig(t, UDPOptions{})
	conns := r.controls()
	dial := r.open
	r.opensBy(func(ctx context.Context, o *Outlet) error {
		for range 2 {
			if err := dial(ctx, o); err != nil {
				return err
			}
			far = append(far, <-conns)
		}
		o.Outer = outer
		o.Inner = func(b []byte) (int, bool) { return len(outer), bytes.HasPrefix(b, outer) }
		return nil
	})
	got := func(dst string, texts ...string) (outlet netip.AddrPort) {
		t.Helper()
		for _, text := range texts {
			b := make([]byte, 1<<16)
			n, from, err := r.server.ReadFromUDPAddrPort(b)
			if err != nil {
				t.Fatal(err)
			}
			if want := string(outer) + string(header(netip.MustParseAddrPort(dst))) + text; string(b[:n]) != want {
				t.Fatalf("the server got %q, want %q", b[:n], want)
			}
			outlet = from
		}
		return outlet
	}
	for i := range 2 {
		r.send(client1, web, "one", "two", "three") // of one length and not
		o := got(web, "one", "two", "three")
		r.send(client1, game, "other")
		got(game, "other")
		answer := append(bytes.Clone(outer), header(netip.MustParseAddrPort(web))...)
		r.server.answer(o, answer, "answer")
		r.reply("%s > %s: answer", web, client1)
		r.server.answer(o, header(netip.MustParseAddrPort(web)), "it has gone round the relay")
		r.dropped(DropStranger, i+1)
		far[2*i+i].Close() // the first one, then the second one
		eventually(t, "the outlet ends", func() bool { return r.Stats().Outlets == 0 })
	}
}

// What goes before the header is no room for data.
func TestUDPOuterTooBig(t *testing.T) {
	r := newUDPRig(t, UDPOptions{})
	n := r.narrow("127.0.0.1:0")
	outer := strings.Repeat("o", 10)
	r.decides(func(v *Verdict, _, _ netip.AddrPort) {
		v.Way = &Way{Key: "outer", Open: func(context.Context, any) (o Outlet, err error) {
			err = n.Do(func() (err error) { o, err = outletTo(r.server.addr); return err })
			o.Outer, o.Inner = []byte(outer), func([]byte) (int, bool) { return len(outer), true }
			return o, err
		}}
	})
	take := func(text string) {
		t.Helper()
		b := make([]byte, 1<<16)
		n, _, err := r.server.ReadFromUDPAddrPort(b)
		if want := outer + string(header(netip.MustParseAddrPort(web))) + text; err != nil || string(b[:n]) != want {
			t.Fatalf("%d bytes, want %d: %v", n, len(want), err)
		}
	}
	fits := 1500 - 28 - len(outer) - len(header(netip.MustParseAddrPort(web)))
	for _, text := range []string{"begin", strings.Repeat("x", fits), strings.Repeat("x", fits+1)} {
		r.send(client1, web, text)
		take(text)
	}
	want(t, r.tooBig, fmt.Sprintf("%s > %s: %d, %d", client1, web, fits+1, fits+28))
}
