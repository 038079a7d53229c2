package redirect

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// TestLogged: of each flow that a tag of Plan.Log decides the first packet is told,
// once, of those let in by name too, and of nothing else.
func TestLogged(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	plan := worldPlan()
	plan.Local = true
	plan.Blocks = []Block{
		{Direct: append(tagged("pass", "198.51.100.0/26", "2001:db8:b::/64"), tagged("quiet", "198.51.100.64/26")...),
			Deny: append(tagged("deny", "198.51.100.128/26"), tagged("silence", "198.51.100.192/26")...), Drop: tagged("drop", "2001:db8:b:ffff::/64")},
		{Proxy: ranges("0.0.0.0/0", "::/0")},
	}
	plan.Log = []string{"pass", "deny", "drop", ""}
	w.start(plan)
	if err := w.r.Admit([]Admission{{Addr: netip.MustParseAddr(byName4), Timeout: time.Hour}}); err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var told []string
	ctx, stop := context.WithCancel(context.Background())
	ended := make(chan error)
	go func() {
		ended <- w.r.Logged(ctx, func(l Logged) {
			mu.Lock()
			defer mu.Unlock()
			told = append(told, fmt.Sprintf("%q %v %v>%v:%d %s", l.Tag, l4(l.Protocol), l.Src.Addr(), l.Dst.Addr(), l.Dst.Port(), w.r.InterfaceName(l.IfIndex)))
			if (l.Protocol == byte(tcp) || l.Protocol == byte(udp)) != (l.Src.Port() != 0) {
				t.Errorf("%+v", l)
			}
		})
	}()
	w.expect(w.client, asked{"tcp 198.51.100.5:80", "server 198.51.100.5:80"}, asked{"udp 198.51.100.6:7000", "server hello"},
		asked{"tcp [2001:db8:b::5]:80", "server [2001:db8:b::5]:80"}, asked{"ping 2001:db8:b::70", "answer"}, asked{"tcp 198.51.100.70:80", "server 198.51.100.70:80"},
		asked{"tcp 198.51.100.130:80", "ECONNREFUSED"}, asked{"udp 198.51.100.131:7000", "EHOSTUNREACH"}, asked{"tcp 198.51.100.200:80", "ECONNREFUSED"},
		asked{"tcp " + byName4 + ":80", "server " + byName4 + ":80"}, asked{"tcp 203.0.113.5:80", "proxy 203.0.113.5:80 lan"})
	w.expect(w.gateway, asked{"tcp 198.51.100.7:80", "server 198.51.100.7:80"}, asked{"tcp 198.51.100.130:80", "ECONNREFUSED"})
	w.client.do(func() { // three datagrams of one flow, which nobody answers
		c, err := net.Dial("udp", "[2001:db8:b:ffff::1]:7000")
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		for range 3 {
			c.Write([]byte("x"))
		}
	})
	want := []string{
		`"" tcp 10.7.1.2>203.0.113.77:80 lan0`, `"deny" tcp 10.7.1.2>198.51.100.130:80 lan0`, `"deny" tcp 192.0.2.1>198.51.100.130:80 `, `"deny" udp 10.7.1.2>198.51.100.131:7000 lan0`,
		`"drop" udp 2001:db8:1::2>2001:db8:b:ffff::1:7000 lan0`, `"pass" ipv6-icmp 2001:db8:1::2>2001:db8:b::70:0 lan0`,
		`"pass" tcp 10.7.1.2>198.51.100.5:80 lan0`, `"pass" tcp 192.0.2.1>198.51.100.7:80 `, `"pass" tcp 2001:db8:1::2>2001:db8:b::5:80 lan0`, `"pass" udp 10.7.1.2>198.51.100.6:7000 lan0`,
	}
	sorted := func() []string {
		mu.Lock()
		defer mu.Unlock()
		return slices.Sorted(slices.Values(told))
	}
	for end := time.Now().Add(wait); len(sorted()) < len(want) && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
	}
	// The next plan tells of something else, by the same Redirect.
	plan.Log = []string{"quiet"}
	w.apply(plan)
	w.expect(w.client, asked{"tcp 198.51.100.5:80", "server 198.51.100.5:80"}, asked{"tcp 198.51.100.71:80", "server 198.51.100.71:80"})
	want = append(want, `"quiet" tcp 10.7.1.2>198.51.100.71:80 lan0`)
	for end := time.Now().Add(wait); len(sorted()) < len(want) && time.Now().Before(end); {
		time.Sleep(10 * time.Millisecond)
	}
	stop()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff(want, sorted()); diff != "" {
		t.Errorf("wanted (-), told (+):\n%s", diff)
	}
	counts, err := w.r.Tallies()
	if err != nil || counts["pass"].Packets == 0 || counts["deny"].Packets != 3 || counts["silence"].Packets != 1 {
		t.Errorf("%v %v", counts, err)
	}
}

// TestLogGroup: each of two redirectors listens for itself, as at a takeover.
func TestLogGroup(t *testing.T) {
	t.Parallel()
	n := newNetns(t)
	n.do(func() {
		a, b := dialLogs(), dialLogs()
		defer b.close()
		if a.err != nil || b.err != nil || a.group != logGroup || b.group != logGroup+1 {
			t.Errorf("%+v %+v", a, b)
		}
		a.close()
		eventually(t, "the group is free", func() error {
			c := dialLogs()
			defer c.close()
			if c.err == nil && c.group != logGroup {
				return fmt.Errorf("it has group %d", c.group)
			}
			return c.err
		})
	})
}

// TestLoggedPacket: the head of a packet is read, also behind what stands in front
// of ports, and what is cut short is no reason to fail.
func TestLoggedPacket(t *testing.T) {
	v4 := []byte{0x46, 0, 0, 40, 0, 0, 0, 0, 64, 17, 0, 0, 192, 0, 2, 1, 192, 0, 2, 2, 1, 1, 1, 1, 0x12, 0x34, 0, 53}
	later := append([]byte(nil), v4...)
	later[7] = 9
	v6 := append([]byte{0x60, 0, 0, 0, 0, 40, 0, 64}, append(append(netip.MustParseAddr("2001:db8::1").AsSlice(), netip.MustParseAddr("2001:db8::2").AsSlice()...),
		44, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0, 1, 0, 0, 0, 0, 0, 80, 1, 0)...)
	for _, tt := range []struct {
		packet []byte
		want   string
	}{
		{v4, "17 192.0.2.1:4660 192.0.2.2:53"}, {v4[:26], "17 192.0.2.1:0 192.0.2.2:0"}, {later, "17 192.0.2.1:0 192.0.2.2:0"},
		{v6, "6 [2001:db8::1]:80 [2001:db8::2]:256"}, {v6[:50], "44 [2001:db8::1]:0 [2001:db8::2]:0"}, {v6[:58], "6 [2001:db8::1]:0 [2001:db8::2]:0"},
		{v4[:19], ""}, {v6[:39], ""}, {nil, ""},
	} {
		var e Logged
		got := ""
		if e.packet(tt.packet) {
			got = fmt.Sprintf("%d %v %v", e.Protocol, e.Src, e.Dst)
		}
		if got != tt.want {
			t.Errorf("%x: %s, want %s", tt.packet, got, tt.want)
		}
	}
}
