package daemon

import (
	"context"
	"runtime"
	"runtime/debug"
	"time"
)

const (
	ebbCheck   = 2 * time.Second
	frugalFrom = 128 << 20 // bytes of heap; what is garbage of less is not worth the work
	ebbWorth   = 128       // flows and UDP sessions; fewer leave nothing worth the work
)

// frugal has the garbage of what is read and compiled collected early, until the
// function that it returns is called: beside rules with a million names, the
// same again for a moment, as much garbage as both would be too much.
func frugal() (end func()) {
	before := debug.SetGCPercent(12)
	return func() {
		debug.SetGCPercent(before)
		var m runtime.MemStats
		if runtime.ReadMemStats(&m); m.HeapInuse+m.HeapIdle-m.HeapReleased > frugalFrom {
			debug.FreeOSMemory()
		}
	}
}

// giveBack returns memory to the system whenever three quarters of the flows
// and sessions are gone that there were at the most. Go would keep it for
// minutes, and a part of it until the next crowd.
func (d *Daemon) giveBack(ctx context.Context) error {
	tick := time.NewTicker(ebbCheck)
	defer tick.Stop()
	most := 0
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		n := int(d.gateway.Stats().Live) + d.packets.Stats().Sessions
		most = max(most, n)
		if most >= ebbWorth && n <= most/4 {
			debug.FreeOSMemory()
			most = n
		}
	}
}
