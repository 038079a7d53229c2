package redirect

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestTallies: what is let pass and refused is counted by the tags of ranges, over
// changes of the plan too, and what is never ours to refuse is not.
func TestTallies(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	plan := worldPlan()
	blocks := func(deny ...Range) []Block {
		return []Block{
			{Networks: UDP, Direct: append(tagged("net", "198.51.100.0/25"), tagged("far", "2001:db8:b::/64")...)},
			{Direct: append(tagged("one", "198.51.100.0/26"), tagged("two", "198.51.100.64/26", "2001:db8:b::/64")...),
				Deny: append(tagged("three", "198.51.100.128/25", "10.7.0.0/16"), deny...), ICMP: tagged("five", "203.0.113.6/32")},
			{Proxy: ranges("0.0.0.0/0", "::/0")},
		}
	}
	plan.Blocks = blocks(tagged("four", "198.51.101.0/24")...)
	w.start(plan)
	packets := func(want map[string]uint64) {
		t.Helper()
		counts, err := w.r.Tallies()
		if err != nil {
			t.Fatal(err)
		}
		got := map[string]uint64{}
		for tag, n := range counts {
			if n.Packets > 0 {
				got[tag] = n.Packets
			}
			if n.Bytes < n.Packets*28 {
				t.Errorf("%s: %+v", tag, n)
			}
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("wanted (-), got (+):\n%s", diff)
		}
	}
	ask := func() {
		w.expect(w.client,
			asked{"udp 198.51.100.5:7000", "server hello"}, asked{"udp [2001:db8:b::5]:7000", "server hello"}, asked{"udp [2001:db8:b::5]:7000", "server hello"},
			asked{"ping 198.51.100.5", "answer"}, asked{"ping 198.51.100.70", "answer"}, asked{"ping 2001:db8:b::70", "answer"},
			asked{"tcp 198.51.100.200:80", "ECONNREFUSED"}, asked{"udp 198.51.101.1:7000", "EHOSTUNREACH"}, asked{"udp 198.51.101.255:7000", "EHOSTUNREACH"},
			asked{"tcp 203.0.113.6:80", "EHOSTUNREACH"}, asked{"tcp 203.0.113.5:80", "proxy 203.0.113.5:80 lan"})
		if got := ping(w.client, "10.7.1.1"); got != "answer" { // DENY, but this host's own
			t.Error(got)
		}
	}
	ask()
	packets(map[string]uint64{"net": 1, "far": 2, "one": 1, "two": 2, "three": 1, "four": 2, "five": 1})
	plan.Ports = PortsOf(w.tcp, w.udp, w.dns)
	w.apply(plan)
	ask()
	packets(map[string]uint64{"net": 2, "far": 4, "one": 2, "two": 4, "three": 2, "four": 4, "five": 2})
	plan.Blocks = blocks()
	w.apply(plan)
	w.expect(w.client, asked{"ping 198.51.100.5", "answer"})
	packets(map[string]uint64{"net": 2, "far": 4, "one": 3, "two": 4, "three": 2, "": 4, "five": 2})
}
