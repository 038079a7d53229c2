package redirect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/tproxyd/tproxyd/pkg/flow"
)

func TestParseMarks(t *testing.T) {
	for _, c := range []struct {
		in   string
		want [6]uint32 // Lan, Local, Direct, Own, Entered, Alive; zero: an error
	}{
		{"0x7000/0xf000", [6]uint32{0x7000, 0x8000, 0x9000, 0xa000, 0xb000, 0xc000}},
		{"0xf000/0xf000", [6]uint32{0xf000, 0x1000, 0x2000, 0x3000, 0x4000, 0x5000}},
		{"1/7", [6]uint32{1, 2, 3, 4, 5, 6}},
		{"0x80000000/0x80010100", [6]uint32{0x80000000, 0x80000100, 0x80010000, 0x80010100, 0x100, 0x10000}},
		{"0/7", [6]uint32{}}, {"8/7", [6]uint32{}}, {"1/3", [6]uint32{}}, {"1", [6]uint32{}}, {"x/7", [6]uint32{}}, {"", [6]uint32{}}, {"1/0x100000007", [6]uint32{}},
	} {
		m, err := ParseMarks(c.in)
		if (err != nil) != (c.want == [6]uint32{}) {
			t.Errorf("%s: %v", c.in, err)
		}
		if err != nil {
			continue
		}
		if got := [6]uint32{m.Lan(), m.Local(), m.Direct(), m.Own(), m.Entered(), m.Alive()}; got != c.want {
			t.Errorf("%s: %#x, want %#x", c.in, got, c.want)
		}
		if again, err := ParseMarks(m.String()); err != nil || again != m {
			t.Errorf("%s: its text is read as %s, %v", m, again, err)
		}
	}
}

func TestNormalRanges(t *testing.T) {
	for _, c := range []struct{ in, want []Range }{
		{nil, nil},
		{ranges("10.0.0.0/8", "10.1.0.0/16"), ranges("10.0.0.0/8")},
		{ranges("10.1.0.0/16", "10.0.0.0/16"), ranges("10.0.0.0/15")},
		{ranges("10.0.0.1/32", "10.0.0.3/32"), ranges("10.0.0.1/32", "10.0.0.3/32")},
		{ranges("255.255.255.255/32", "0.0.0.0/0", "::/0"), ranges("0.0.0.0/0")},
		{ranges("10.0.0.0-10.0.0.9", "10.0.0.5-10.0.0.7", "10.0.0.10-10.0.0.12"), ranges("10.0.0.0-10.0.0.12")},
	} {
		if diff := cmp.Diff(c.want, normal(c.in, ip4), cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" && len(c.want)+len(normal(c.in, ip4)) > 0 {
			t.Errorf("%v: %s", c.in, diff)
		}
	}
}

func TestCovers(t *testing.T) {
	for _, c := range []struct {
		a, b  []Range
		whole bool
		err   error
	}{
		{ranges("0.0.0.0/0"), nil, true, nil},
		{nil, nil, false, nil},
		{ranges("0.0.0.0/1"), ranges("128.0.0.0/1"), true, nil},
		{ranges("0.0.0.0/1"), ranges("128.0.0.1-255.255.255.255"), false, nil},
		{ranges("0.0.0.0-255.255.255.254"), nil, false, nil},
		{ranges("0.0.0.0/1"), ranges("127.255.255.255/32"), false, errOverlap},
		{ranges("0.0.0.0/0"), ranges("255.255.255.255/32"), false, errOverlap},
	} {
		whole, err := covers(ip4, c.a, c.b)
		if whole != c.whole || !errors.Is(err, c.err) {
			t.Errorf("%v and %v: %v, %v", c.a, c.b, whole, err)
		}
	}
}

// The checksum is what the words of the pseudo header and of the datagram add
// up to, one by one (RFC 768).
func TestPutHeader(t *testing.T) {
	for _, addrs := range [][2]string{{"192.0.2.1", "198.51.100.2"}, {"2001:db8::1", "2001:db8:ffff::2"}} {
		src, dst := netip.MustParseAddr(addrs[0]), netip.MustParseAddr(addrs[1])
		for n := range 70 {
			payload := make([]byte, n)
			for i := range payload {
				payload[i] = byte(0xff - i*7)
			}
			var b [maxHeader]byte
			k := putHeader(&b, src, dst, 53, 40000, payload)
			whole := slices.Concat(src.AsSlice(), dst.AsSlice(), []byte{0, 17, byte((n + 8) >> 8), byte(n + 8)}, b[k-headerUDP:k], payload, make([]byte, n%2))
			sum := uint32(0)
			for i := 0; i < len(whole); i += 2 {
				sum += uint32(binary.BigEndian.Uint16(whole[i:]))
			}
			for sum > 0xffff {
				sum = sum>>16 + sum&0xffff
			}
			if sum != 0xffff {
				t.Fatalf("%s, %d bytes: the sum is %#x", src, n, sum)
			}
			if got := binary.BigEndian.Uint16(b[k-4:]); int(got) != n+8 {
				t.Errorf("%s, %d bytes: the length is %d", src, n, got)
			}
		}
	}
}

func TestExpand(t *testing.T) {
	a := mustAddr("192.0.2.1")
	for _, c := range []struct {
		scopes []Scope
		want   []admission
	}{
		{nil, []admission{{addr: a}}},
		{[]Scope{{}}, []admission{{a, tcp, 0}}},
		{[]Scope{{Network: flow.UDP, Ports: PortRange{0, 65535}}}, []admission{{a, udp, 0}}},
		{[]Scope{{Ports: PortRange{80, 81}}, {Network: flow.UDP, Ports: PortRange{443, 443}}}, []admission{{a, tcp, 80}, {a, tcp, 81}, {a, udp, 443}}},
		{[]Scope{{Ports: PortRange{81, 80}}}, nil}, {[]Scope{{Ports: PortRange{0, 80}}}, nil}, {[]Scope{{Ports: PortRange{1, 257}}}, nil},
	} {
		got, err := Admission{Addr: netip.AddrFrom16(a.As16()), Scopes: c.scopes}.expand()
		if (err != nil) != (c.want == nil) || !slices.Equal(got, c.want) {
			t.Errorf("%v: %v, %v", c.scopes, got, err)
		}
	}
}

// What is admitted for long stays as long, and what has ended is forgotten.
func TestAdmissionsEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s admissions
		s.clear()
		add := func(addr string, d time.Duration) int {
			t.Helper()
			es, err := s.add([]Admission{{Addr: mustAddr(addr), Timeout: d}}, time.Now())
			if err != nil {
				t.Fatal(err)
			}
			return len(es)
		}
		if add("192.0.2.1", time.Hour) != 1 || add("192.0.2.1", time.Minute) != 0 || add("192.0.2.1", 2*time.Hour) != 1 {
			t.Error("a shorter time counts, or a longer one does not")
		}
		add("192.0.2.2", 0)
		time.Sleep(time.Second)
		if got := s.all(time.Now()); len(got) != 1 || len(got[0].elements) != 1 || got[0].elements[0].Timeout != 2*time.Hour-time.Second {
			t.Errorf("there is %+v", got)
		}
		for i := range 3000 {
			add(fmt.Sprintf("198.51.%d.%d", i>>8, i&255), time.Second)
			time.Sleep(time.Second)
		}
		if len(s.until) > 1100 {
			t.Errorf("%d are remembered, of which one lasts", len(s.until))
		}
	})
}
