package daemon

import (
	"context"
	"runtime/debug"
	"time"
)

const (
	ebbCheck = 2 * time.Second
	ebbWorth = 128 // flows and UDP sessions; fewer leave nothing worth the work
)

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
