package relay

import (
	"net/netip"
	"sync/atomic"
	"testing"
)

// TestUDPList: each flow is told with what moved in it, and ends alone when it is
// killed; the client's next datagram begins another.
func TestUDPList(t *testing.T) {
	r := newUDPRig(t, UDPOptions{})
	var up, down atomic.Uint64
	r.decides(func(v *Verdict, _, dst netip.AddrPort) {
		v.Why, v.Up, v.Down = dst.Port(), &up, &down
		if dst.Port() == 9 {
			v.Way = nil
		}
	})
	r.exchange(client1, web)
	r.exchange(client1, web)
	r.exchange(client2, game)
	r.send(client2, "203.0.113.9:9", "refused")
	r.refuses("%s > 203.0.113.9:9: refused, %d", client2, RefusePort)

	find := func(client, dst string) UDPFlow {
		t.Helper()
		var found []UDPFlow
		for _, f := range r.List() {
			if f.Client.String() == client && f.Dst.String() == dst {
				found = append(found, f)
			}
		}
		if len(found) != 1 {
			t.Fatalf("%d flows of %s to %s", len(found), client, dst)
		}
		return found[0]
	}
	if n := len(r.List()); n != 2 {
		t.Errorf("%d flows, want the 2 that are carried", n)
	}
	f := find(client1, web)
	if f.UDPTraffic != (UDPTraffic{2, 2, 2 * 8, 2 * 6}) || f.Why != f.Dst.Port() || f.Start.IsZero() {
		t.Errorf("%+v", f)
	}
	if up.Load() != 3*8+7 || down.Load() != 3*6 {
		t.Errorf("counted %d up and %d down", up.Load(), down.Load())
	}
	other := find(client2, game)
	if other.ID == f.ID || f.ID == 0 {
		t.Errorf("IDs %d and %d", f.ID, other.ID)
	}
	if r.Kill(f.ID) != 1 || r.Kill(f.ID) != 0 {
		t.Error("a flow is killed once")
	}
	if list := r.List(); len(list) != 1 || list[0].ID != other.ID {
		t.Errorf("left: %+v", list)
	}
	r.exchange(client1, web)
	if again := find(client1, web); again.ID == f.ID || again.UpDatagrams != 1 {
		t.Errorf("%+v", again)
	}
	r.Close()
	if r.List() != nil || r.Kill(other.ID) != 0 {
		t.Error("flows after Close")
	}
}
