package redirect

import "testing"

// Where IPv6 is switched off on lo no route of ours can be there: IPv4 goes on,
// and IPv6 is refused until it is back.
func TestIPv6SwitchedOff(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.gateway.run("sysctl -qw net.ipv6.conf.lo.disable_ipv6=1")
	p := w.start(worldPlan())
	heard := w.heal()
	refused := func() {
		t.Helper()
		w.expect(w.client, asked{"tcp 203.0.113.5:80", "proxy 203.0.113.5:80 lan"}, asked{"tcp 198.51.100.5:80", "server 198.51.100.5:80"},
			asked{"ping 2001:db8:a::5", "prohibited"}, asked{"udp [2001:db8:a::5]:7000", "EACCES"})
		w.leaked()
		w.apply(p) // as a reload does
	}
	refused()
	w.gateway.run("sysctl -qw net.ipv6.conf.lo.disable_ipv6=0")
	heard("route")
	w.works()
	w.gateway.run("sysctl -qw net.ipv6.conf.lo.disable_ipv6=1")
	refused()
}

// Engines of containers switch IPv6 off where they give none.
func TestEnclosedWithoutIPv6(t *testing.T) {
	t.Parallel()
	n := newNetns(t)
	n.run("sysctl -qw net.ipv6.conf.all.disable_ipv6=1")
	w := &world{t: t, gateway: n}
	w.start(enclosedPlan())
	w.expect(n,
		asked{"tcp 203.0.113.5:80", "proxy 203.0.113.5:80 lo"},
		asked{"udp 203.0.113.5:7000", "proxy 203.0.113.5:7000 lo hello"},
		asked{"udp 192.0.0.8:53", "dns 192.0.0.8:53 lo hello"},
		asked{"tcp [2001:db8:a::5]:80", "EADDRNOTAVAIL"})
	w.r.Close(true)
	w.unlisten()
	w.expect(n, asked{"tcp 203.0.113.5:80", "ECONNREFUSED"})
	if err := n.remove(); err != nil {
		t.Fatal(err)
	}
}
