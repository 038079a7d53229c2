package gateway

import (
	"net/netip"
	"testing"

	"github.com/tproxyd/tproxyd/pkg/flow"
	"github.com/tproxyd/tproxyd/pkg/socks"
)

// What comes back through a chain has the header of each relay on its way, and of
// no other.
func TestFromHops(t *testing.T) {
	address := func(s string) flow.Target {
		a := netip.MustParseAddrPort(s)
		return flow.Target{Addr: a.Addr(), Port: a.Port()}
	}
	name := func(s string) flow.Target { return flow.Target{Name: s, Port: 9} }
	b, c, mapped := address("192.0.2.2:9"), address("[2001:db8::3]:9"), address("[::ffff:192.0.2.2]:9")
	for _, test := range []struct {
		name      string
		hops, got []flow.Target
		ok        bool
	}{
		{"one", []flow.Target{b}, []flow.Target{b}, true},
		{"two", []flow.Target{b, c}, []flow.Target{b, c}, true},
		{"of both families", []flow.Target{mapped}, []flow.Target{b}, true},
		{"a name that has become an address", []flow.Target{name("b.example")}, []flow.Target{b}, true},
		{"a name", []flow.Target{name("b.example")}, []flow.Target{name("b.example")}, true},
		{"another name", []flow.Target{name("b.example")}, []flow.Target{name("c.example")}, false},
		{"a name in place of an address", []flow.Target{b}, []flow.Target{name("b.example")}, false},
		{"another address", []flow.Target{b}, []flow.Target{address("192.0.2.3:9")}, false},
		{"another port", []flow.Target{b}, []flow.Target{address("192.0.2.2:10")}, false},
		{"another order", []flow.Target{b, c}, []flow.Target{c, b}, false},
		{"one too few", []flow.Target{b, c}, []flow.Target{b}, false},
		{"none", []flow.Target{b}, nil, false},
	} {
		var d []byte
		for _, hop := range test.got {
			d, _ = socks.AppendUDPHeader(d, hop)
		}
		if n, ok := fromHops(append(d, 1, 2, 3), test.hops); ok != test.ok || ok && n != len(d) {
			t.Errorf("%s: %d of %d, %v", test.name, n, len(d), ok)
		}
	}
}
