package redirect

import (
	"net/netip"
	"testing"

	"github.com/google/nftables"
)

// bigPlan has n networks, a fifth of them IPv6, that do not touch.
func bigPlan(n int) Plan {
	p := worldPlan()
	p.Interfaces, p.Local = nil, true
	var direct []Range
	for i := range n / 5 * 4 {
		a := netip.PrefixFrom(netip.AddrFrom4([4]byte{byte(11 + i>>15), byte(i >> 7), byte(i << 1), 0}), 24)
		direct = append(direct, Range{From: a.Addr(), To: lastOf(a)})
	}
	for i := range n / 5 {
		a := netip.PrefixFrom(netip.AddrFrom16([16]byte{0xfd, 0, byte(i >> 7), byte(i << 1)}), 32)
		direct = append(direct, Range{From: a.Addr(), To: lastOf(a)})
	}
	p.Blocks = []Block{{Direct: direct}, {Proxy: ranges("0.0.0.0/0", "::/0")}}
	return p
}

// TestVerify: what a set has not is noticed, also next to what it has.
func TestVerify(t *testing.T) {
	t.Parallel()
	n := newNetns(t)
	r := n.open(Options{NoOwner: true})
	p := bigPlan(6000)
	n.do(func() {
		if err := r.Apply(p); err != nil {
			t.Error(err)
		}
	})
	tab, err := newTable(&p, "a", liveSets[0], r.alive != Marks{}, r.can.brief, nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.verify(tab); err != nil {
		t.Error(err)
	}
	for _, s := range tab.sets {
		if len(s.ranges) < chunk {
			continue
		}
		for _, e := range []nftables.SetElement{
			{Key: s.ranges[5].From.Next().AsSlice()}, {Key: s.ranges[5].To.AsSlice(), IntervalEnd: true},
			{Key: s.ranges[5].From.AsSlice(), IntervalEnd: true}, {Key: s.ranges[5].To.Next().AsSlice()},
		} {
			if has, err := r.nf.has(s.name, e); has || err != nil {
				t.Errorf("%s has %v, which was not given to it: %v", s.name, e, err)
			}
		}
		gone := s.ranges[chunk/2-1] // the last of a message
		if out, err := n.try("nft delete element inet " + tableName + " " + s.name + " '{ " + gone.text() + " }'"); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if err := r.verify(tab); err == nil {
			t.Errorf("%s: %s was taken out, and nobody noticed", s.name, gone.text())
		}
		n.run("nft add element inet " + tableName + " " + s.name + " '{ " + gone.text() + " }'")
	}
}

// BenchmarkApplyBig: 200,000 networks are put in force, in place of as many.
func BenchmarkApplyBig(b *testing.B) {
	n := newNetns(b)
	r := n.open(Options{})
	p := bigPlan(200_000)
	b.ReportAllocs()
	for b.Loop() {
		n.do(func() {
			if err := r.Apply(p); err != nil {
				b.Fatal(err)
			}
		})
	}
}
