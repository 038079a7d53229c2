package relay

import (
	"net/netip"
	"testing"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

// What there is goes on by sockets of its own, from the same outlet, while
// somebody else reads the sources; and can be undone.
func TestUDPDetach(t *testing.T) {
	families(t, func(t *testing.T, at, dst string) {
		var s flowSockets
		r := newUDPRig(t, UDPOptions{FlowSocket: s.open})
		c, other := r.client(at), r.client(at)
		o := c.asks(dst, "question")
		if c.own(dst) {
			t.Fatal("one datagram, and a socket of its own: the test shows nothing")
		}
		r.Detach()
		if !c.own(dst) {
			t.Fatal("the flow has no socket of its own")
		}
		for range 3 {
			if now := c.asks(dst, "more"); now != o {
				t.Errorf("the outlet was %v and is %v", o, now)
			}
			r.server.answer(o, header(netip.MustParseAddrPort(dst)), "answer")
			c.hears(dst, "answer")
		}
		r.send(other.addr, dst, "for somebody else")
		r.settle()
		if s := r.Stats(); s.Sessions != 1 {
			t.Error("the sources are still read")
		}
		r.Attach()
		r.server.expect(dst, "for somebody else")
		r.Inject([][]flow.Datagram{{datagram(other.addr, dst, "read by somebody else")}})
		r.server.expect(dst, "read by somebody else")
		if s := r.Stats(); s.Sessions != 2 || s.Flows != 2 {
			t.Errorf("%+v", s)
		}
		// What came before, and is of no flow, is returned.
		third := r.client(at)
		r.inside(func(sh *shard) {
			r.src.put(datagram(third.addr, dst, "unknown"), datagram(c.addr, dst, "known"))
			rest := sh.letGo()
			if len(rest) != 1 || string(rest[0].Data) != "unknown" || rest[0].IfIndex != 7 {
				t.Errorf("left: %v", rest)
			}
		})
		if now := r.server.expect(dst, "known"); now != o {
			t.Errorf("the outlet was %v and is %v", o, now)
		}
		r.Attach()
	})
}
