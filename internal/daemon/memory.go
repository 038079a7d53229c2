package daemon

import (
	"context"
	"runtime"
	"runtime/debug"
	"runtime/metrics"
	"time"
)

const (
	ebbCheck   = 400 * time.Millisecond
	frugalFrom = 128 << 20 // bytes of heap; what is garbage of less is not worth the work
	ebbWorth   = 128       // flows and sessions; fewer leave nothing worth the work
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

// giveBack returns memory to the system when a crowd has come, or gone. Go would
// keep for minutes what handshakes left as garbage, and a part of it until the next
// crowd.
func (d *Daemon) giveBack(ctx context.Context) error {
	tick := time.NewTicker(ebbCheck)
	defer tick.Stop()
	var c crowd
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
		tcp, udp := d.engine.Stats(), d.packets.Stats()
		if c.calm(tcp.Streams+udp.Sessions, tcp.Accepted+udp.Opened, inUse) {
			debug.FreeOSMemory()
			c.kept = inUse()
		}
	}
}

// crowd tells when memory is worth giving back.
type crowd struct {
	most  int    // flows and sessions that there were since it last was
	begun uint64 // of them, since the start
	kept  int    // bytes in use after it was given back
}

// calm is asked each ebbCheck with the flows and sessions that there are and that
// have begun since the start. It is true where three quarters have gone of the most
// that there were, and where few come and more memory is in use than was kept, by
// a quarter.
func (c *crowd) calm(n int, begun uint64, inUse func() int) bool {
	fresh := int(begun - c.begun)
	c.begun, c.most = begun, max(c.most, n)
	ebbed := c.most >= ebbWorth && n <= c.most/4
	if !ebbed && (fresh > n/16 || inUse() <= c.kept+c.kept/4) {
		return false
	}
	c.most = n
	return true
}

// inUse returns how many bytes Go holds of the system, but for its own tables.
func inUse() int {
	s := []metrics.Sample{
		{Name: "/memory/classes/heap/objects:bytes"}, {Name: "/memory/classes/heap/unused:bytes"},
		{Name: "/memory/classes/heap/free:bytes"}, {Name: "/memory/classes/heap/stacks:bytes"},
	}
	metrics.Read(s)
	n := 0
	for _, x := range s {
		n += int(x.Value.Uint64())
	}
	return n
}
