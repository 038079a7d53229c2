package relay

import (
	"net/netip"
	"runtime"
	"testing"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

// TestUDPMemory holds sessions and flows to what UDPMaxMemory counts them as,
// with the half of it left that the garbage collector waits for.
func TestUDPMemory(t *testing.T) {
	const sessions, each = 256, 16
	r := newUDPRig(t, UDPOptions{})
	r.exchange(client1, game) // what is made once is there
	before := heapInUse()
	put := func(dsts int) {
		n := 0
		for i := range sessions {
			client := netip.AddrPortFrom(netip.MustParseAddr("192.0.2.7"), uint16(10000+i))
			for j := range dsts {
				r.src.put(flow.Datagram{Data: []byte("x"), Src: client, Dst: netip.AddrPortFrom(netip.MustParseAddr("203.0.113.77"), uint16(1000+j))})
				n++
			}
		}
		for range n {
			r.server.next()
		}
	}
	put(1)
	first := heapInUse()
	put(each)
	all := heapInUse()
	if n := (first - before) / sessions; n > sessionMemory/2+flowMemory/2 && !raceDetector {
		t.Errorf("a session with one flow takes %d bytes", n)
	}
	if n := (all - first) / (sessions * (each - 1)); n > flowMemory/2 && !raceDetector {
		t.Errorf("a flow takes %d bytes", n)
	}
	t.Logf("a session with its first flow %d bytes, a flow %d bytes", (first-before)/sessions, (all-first)/(sessions*(each-1)))
}

func heapInUse() int {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc)
}
