package relay

import (
	"net/netip"
	"time"
)

// UDPFlow is what one client socket and one destination say to each other.
type UDPFlow struct {
	ID      uint64 // see UDPOptions.ID
	Client  netip.AddrPort
	Dst     netip.AddrPort
	IfIndex int // of the interface that the session's first datagram came in by
	Start   time.Time
	Why     any // of its Verdict
	Via     any // of its Outlet; nil if that is still being opened
	UDPTraffic
}

// List returns the flows that are being carried, in no order; those that are
// refused are not among them. It waits for each loop to come to it, and must not
// be called by a function that was handed in.
func (u *UDP) List() []UDPFlow {
	var all []UDPFlow
	for _, sh := range u.shards {
		sh.ask(func() {
			for _, f := range sh.flows {
				if f.verdict.Way == nil {
					continue
				}
				l := UDPFlow{ID: f.id, Client: f.s.client, Dst: f.dst, IfIndex: f.s.ifIndex, Start: f.start, Why: f.verdict.Why, UDPTraffic: f.moved}
				if o := f.out; o != nil && o.fd >= 0 {
					l.Via = f.s.viaOf(o.key)
				}
				all = append(all, l)
			}
		})
	}
	return all
}

// Kill ends flows; the client's next datagram begins another. It returns how many
// of these there were. As with List, no function that was handed in may call it.
func (u *UDP) Kill(ids ...uint64) int {
	want := make(map[uint64]bool, len(ids))
	for _, id := range ids {
		want[id] = true
	}
	n := 0
	for _, sh := range u.shards {
		sh.ask(func() {
			for _, f := range sh.flows {
				if want[f.id] && f.verdict.Way != nil {
					n++
					sh.closeFlow(f)
				}
			}
		})
	}
	return n
}

// ask has the loop run f and waits for it. A loop that has ended has no flows.
func (sh *shard) ask(f func()) {
	done := make(chan struct{})
	if sh.post(func() { defer close(done); f() }) {
		<-done
	}
}
