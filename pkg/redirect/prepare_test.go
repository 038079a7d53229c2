package redirect

import (
	"fmt"
	"maps"
	"net/netip"
	"regexp"
	"slices"
	"testing"
	"time"
)

// A plan of many prefixes is prepared and applied while addresses are let in, and
// what was prepared is what comes into force. What is prepared in vain goes.
func TestPrepare(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := w.start(worldPlan())
	var many []Range
	for i := range 40_000 {
		a := netip.AddrFrom4([4]byte{byte(16 + i>>16), byte(i >> 8), byte(i), 0})
		many = append(many, Range{From: a, To: a})
	}
	p.Blocks = []Block{{Direct: append(many, ranges("198.51.100.0/25")...)}, {Proxy: ranges("0.0.0.0/0", "::/0")}}
	generations := func() []string {
		list := map[string]bool{}
		for _, m := range regexp.MustCompile(`set b\d+_\w*(_[abc]) `).FindAllStringSubmatch(w.gateway.run("nft -t list table inet tproxyd"), -1) {
			list[m[1]] = true
		}
		return slices.Sorted(maps.Keys(list))
	}
	is := func(what string, want ...string) {
		t.Helper()
		if got := generations(); !slices.Equal(got, want) {
			t.Errorf("%s there are %v, want %v", what, got, want)
		}
	}
	is("at first", "_a")

	stop, admitted := make(chan struct{}), make(chan int)
	var most time.Duration
	go func() {
		n := 0
		for ; ; n++ {
			select {
			case <-stop:
				admitted <- n
				return
			default:
			}
			began := time.Now()
			if err := w.r.Admit([]Admission{{Addr: netip.MustParseAddr(fmt.Sprintf("203.0.%d.%d", n>>8&255, n&255)), Timeout: time.Minute}}); err != nil {
				t.Error(err)
			}
			most = max(most, time.Since(began))
		}
	}()
	began := time.Now()
	w.r.Prepare(p)
	took := time.Since(began)
	close(stop)
	if n := <-admitted; n < 2 {
		t.Errorf("%d addresses let in meanwhile", n)
	} else {
		t.Logf("prepared in %v, with %d addresses let in, each in %v at most", took, n, most)
	}
	is("prepared", "_a", "_b")
	w.expect(w.client, asked{"tcp 16.0.0.0:80", "proxy 16.0.0.0:80 lan"})
	began = time.Now()
	w.apply(p)
	t.Logf("applied in %v", time.Since(began))
	is("applied", "_b")
	w.works4()

	other := p
	other.Blocks = slices.Concat([]Block{{Networks: TCP, Ports: []PortRange{{80, 80}}, Deny: ranges("198.51.100.0/25")}}, p.Blocks)
	w.r.Prepare(other)
	w.r.Prepare(p)
	is("prepared twice", "_a", "_b")
	w.apply(other)
	is("another was applied", "_c")
	w.expect(w.client, asked{"tcp 198.51.100.5:80", "ECONNREFUSED"})

	w.r.Prepare(p)
	w.r.mu.Lock()
	there, err := w.r.presence()
	if err == nil {
		err = w.r.dropUnused(w.r.prepared.table, there) // as if by somebody else
	}
	w.r.mu.Unlock()
	if err != nil {
		t.Fatal(err)
	}
	is("what was prepared is gone", "_c")
	w.apply(p)
	w.works4()
}
