package redirect

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"
)

// TestLend: another Redirect (in a process of its own, as a rule) goes on where
// the first one was, with the same table, what is admitted, and the table that
// ends with its owner; and the first one can go on if the other one fails.
func TestLend(t *testing.T) {
	n := newNetns(t)
	gatewayLinks(n)
	marks := Marks{Value: 0x7000, Mask: 0xf000}
	var old, next *Redirect
	var udp *UDPListener
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	n.do(func() {
		var err error
		old, err = Open(Options{})
		must(err)
		udp, err = ListenUDP(marks, 2)
		must(err)
	})
	defer udp.Close()
	plan := Plan{Interfaces: []string{"lan0"}, Local: true, Ports: Ports{UDP: udp.Port(), TCP: udp.Port()}, Marks: marks, Table: 7470}
	must(old.Apply(plan))
	must(old.Admit([]Admission{{Addr: netip.MustParseAddr("192.0.2.77"), Timeout: time.Hour}}))
	before := n.run("nft list tables; nft list table inet tproxyd_alive; nft list set inet tproxyd dyn4 | sed 's/timeout 1h.*//; s/timeout 59.*//'")

	hold, err := old.Lend()
	must(err)
	if _, err := old.Counters(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("what is lent can be used: %v", err)
	}
	must(old.TakeBack())
	must(hold.Close())
	must(old.Apply(plan))
	if _, err := old.Counters(); err != nil {
		t.Errorf("what was taken back cannot be used: %v", err)
	}

	hold, err = old.Lend()
	must(err)
	n.do(func() { next, err = Open(Options{Taken: &hold}) })
	must(err)
	must(hold.Close())
	must(next.Apply(plan))
	old.Release()
	if after := n.run("nft list tables; nft list table inet tproxyd_alive; nft list set inet tproxyd dyn4 | sed 's/timeout 1h.*//; s/timeout 59.*//'"); after != before {
		t.Errorf("before:\n%s\nafter:\n%s", before, after)
	}
	if list, err := next.Admitted(); err != nil || len(list) != 1 || list[0].Addr != netip.MustParseAddr("192.0.2.77") {
		t.Errorf("admitted: %v %v", list, err)
	}
	if len(next.admitted.until) != 1 {
		t.Errorf("if the table is removed, it comes back without what was admitted: %v", next.admitted.until)
	}
	n.do(func() {
		if _, err := Open(Options{}); !errors.Is(err, ErrInUse) {
			t.Errorf("a third one: %v", err)
		}
	})

	files, err := udp.Files()
	must(err)
	defer closeFiles(files)
	var taken *UDPListener
	n.do(func() { taken, err = TakeUDP(marks, []*os.File{files[3], files[0], files[2], files[1]}) })
	must(err)
	defer taken.Close()
	if taken.Port() != udp.Port() || len(taken.Shards()) != 2 {
		t.Errorf("port %d of %d shards, was %d", taken.Port(), len(taken.Shards()), udp.Port())
	}
	for _, part := range [][]*os.File{nil, files[:1], files[:3], {files[0], files[2]}} {
		u, err := TakeUDP(marks, part)
		if v6 := len(files) == 4; err == nil && v6 && len(part) == 3 || err != nil && len(part) == 1 || err == nil && part == nil {
			t.Errorf("%d sockets: %v", len(part), err)
		}
		if err == nil {
			u.Close()
		}
	}
	if _, err := TakeTCP(marks, files[:2]); err == nil {
		t.Error("UDP sockets were taken for listeners")
	}
	must(next.Close(true))
	must(old.Close(true))
	if out := n.run("nft list tables"); out != "table inet tproxyd\n" {
		t.Errorf("at the end there is: %s", out)
	}
	must(n.remove())
}
