package redirect

import (
	"context"
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// Heal puts back whatever is taken away, and until then nothing leaks.
func TestHeal(t *testing.T) {
	t.Parallel()
	for _, noOwner := range []bool{false, true} {
		t.Run(fmt.Sprintf("owner %v", !noOwner), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.gateway.run("sysctl -qw net.ipv6.conf.lan0.keep_addr_on_down=1 net.ipv4.conf.wan0.rp_filter=2")
			p := worldPlan()
			p.Ports = w.listen()
			w.r = w.gateway.open(Options{NoOwner: noOwner})
			w.apply(p)
			heard := w.heal()
			// A link-local address does not come back with its interface, and anycast ones late.
			noise := regexp.MustCompile(`(?m) # handle \d+| id \d+|^32766.*\n|^(local fe80::|anycast ).*\n`)
			state := func() string { return sameNames(noise.ReplaceAllString(w.gateway.state(), "")) }
			before := state()
			for _, c := range healing() {
				if c.only == ownerOnly && noOwner || c.only == noOwnerOnly && !noOwner {
					continue
				}
				was := w.r.Healed()
				stop := w.traffic(w.client, wait/10, asked{"tcp 203.0.113.5:80", ""}, asked{"tcp [2001:db8:a::5]:80", ""}, asked{"udp 203.0.113.5:7000", ""})
				w.gateway.run(c.does)
				if c.what != "" {
					heard(c.what)
				}
				stop()
				got := w.r.Healed()
				n := Healed{got.Tables - was.Tables, got.Rules - was.Rules, got.Routes - was.Routes, got.Marks - was.Marks}
				if strings.Contains(c.does, "route flush") && n.Routes > 1 {
					n.Routes = 1 // it looks again, and flushes again
				}
				if n != c.want {
					t.Errorf("%s: healed is %+v, want %+v", c.does, n, c.want)
				}
				w.works()
				if diff := cmp.Diff(before, state()); !strings.Contains(c.does, "rp_filter=0") && diff != "" {
					t.Fatalf("%s: before (-) and healed (+):\n%s", c.does, diff)
				}
			}
		})
	}
}

// harm is what somebody does, and what is heard of it.
type harm struct {
	does string
	only int // where the table has an owner, or none
	what string
	want Healed
}

const (
	anyOwner = iota
	ownerOnly
	noOwnerOnly
)

func healing() []harm {
	return []harm{
		{"nft flush ruleset && nft list tables", noOwnerOnly, "table", Healed{Tables: 1}},
		{"nft delete table inet tproxyd", noOwnerOnly, "table", Healed{Tables: 1}},
		{"nft flush chain inet tproxyd lan", noOwnerOnly, "table", Healed{Tables: 1}},
		{"nft insert rule inet tproxyd decide accept", noOwnerOnly, "table", Healed{Tables: 1}},
		{"nft flush chain inet tproxyd lan || nft flush ruleset || nft delete table inet tproxyd || true", ownerOnly, "", Healed{}},
		{"ip rule del pref 170", anyOwner, "rule", Healed{Rules: 1}},
		{"ip rule del pref 173", anyOwner, "rule", Healed{Rules: 1}},
		{"ip -6 rule del pref 170", anyOwner, "rule", Healed{Rules: 1}},
		{"ip -6 rule del pref 172", anyOwner, "rule", Healed{Rules: 1}},
		{"ip -6 rule del pref 173", anyOwner, "rule", Healed{Rules: 1}},
		{"ip route flush table 7470", anyOwner, "route", Healed{Routes: 1}},
		{"ip -6 route flush table 7470", anyOwner, "route", Healed{Routes: 1}},
		{"ip route replace unicast default via 192.0.2.2 table 7470", anyOwner, "route", Healed{Routes: 1}},
		{"tc qdisc del dev lan0 clsact", anyOwner, "mark", Healed{Marks: 1}},
		{"tc filter del dev lan0 ingress", anyOwner, "mark", Healed{Marks: 1}},
		{"sysctl -qw net.ipv4.conf.wan0.rp_filter=0", anyOwner, "rule", Healed{Rules: 1}}, // by name now
		{"sysctl -qw net.ipv4.conf.wan0.rp_filter=2", anyOwner, "mark", Healed{Marks: 1, Rules: 1}},
		{"ip link set lan0 down; ip link set lan0 up", anyOwner, "link lan0", Healed{}},
	}
}

// works asks for one of each, and that nothing has leaked.
func (w *world) works() {
	w.t.Helper()
	w.expect(w.client,
		asked{"tcp 203.0.113.5:80", "proxy 203.0.113.5:80 lan"}, asked{"tcp [2001:db8:a::5]:80", "proxy [2001:db8:a::5]:80 lan"},
		asked{"tcp 198.51.100.5:80", "server 198.51.100.5:80"}, asked{"tcp [2001:db8:b::5]:80", "server [2001:db8:b::5]:80"},
		asked{"udp 198.51.100.5:53", "dns 198.51.100.5:53 lan hello"})
	w.leaked()
}

// heal runs Heal until the test ends. What it returns waits for an event.
func (w *world) heal() func(what string) {
	ctx, cancel := context.WithCancel(context.Background())
	events := make(chan string, 100)
	done := make(chan error)
	go func() { done <- w.r.Heal(ctx, func(what string) { events <- what }) }()
	w.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			w.t.Errorf("Heal: %v", err)
		}
	})
	return func(what string) {
		w.t.Helper()
		for late := time.After(5 * time.Second); ; {
			select {
			case got := <-events:
				if got == what {
					return
				}
			case <-late:
				w.t.Errorf("%s was not put right", what)
				return
			}
		}
	}
}

// What cannot be put back at first, for want of memory for one, is tried again.
func TestHealAgain(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := worldPlan()
	p.Ports = w.listen()
	w.r = w.gateway.open(Options{NoOwner: true})
	w.apply(p)
	heard := w.heal()
	w.r.mu.Lock()
	nf := w.r.nf
	w.r.nf = &nfnl{fd: -1, buf: nf.buf} // nothing can be asked of the kernel
	w.r.mu.Unlock()
	w.gateway.run("nft delete table inet tproxyd")
	for failed := false; !failed; time.Sleep(10 * time.Millisecond) {
		w.r.mu.Lock()
		failed = w.r.failed.table
		w.r.mu.Unlock()
	}
	w.r.mu.Lock()
	w.r.nf = nf
	w.r.mu.Unlock()
	heard("table")
	w.works()
}

// Without anybody to put things right: whichever of the three guards is taken
// away, the others hold. The next Apply puts it back.
func TestGuards(t *testing.T) {
	t.Parallel()
	for _, filter := range []string{"0", "2"} {
		t.Run("rp_filter "+filter, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.gateway.run("sysctl -qw net.ipv4.conf.all.rp_filter=" + filter)
			p := worldPlan()
			p.Local = true
			p.Ports = w.listen()
			w.r = w.gateway.open(Options{NoOwner: true})
			w.apply(p)
			for _, c := range []struct {
				does  string
				local bool // routing guards nothing of this host's own
			}{
				{"nft flush ruleset", false},
				{"nft flush chain inet tproxyd lan", false},
				{"nft flush chain inet tproxyd postrouting", true},
				{"ip rule del pref 170; ip -6 rule del pref 170; ip rule del pref 171; ip -6 rule del pref 171", true},
				{"ip rule del pref 173; ip -6 rule del pref 173", true},
				{"ip route flush table 7470; ip -6 route flush table 7470", true},
				{"ip rule flush; ip -6 rule flush; ip rule add pref 32766 lookup main; ip -6 rule add pref 32766 lookup main", true},
				{"tc qdisc del dev lan0 clsact; true", true},
			} {
				w.gateway.run(c.does)
				from := []*netns{w.client}
				if c.local {
					from = append(from, w.gateway)
				}
				for _, n := range from {
					// One datagram each, and what opens a connection: no waiting.
					n.run(`for a in 203.0.113.5 2001:db8:a::5 198.18.3.4; do for p in tcp udp; do timeout 0.3 bash -c "echo x > /dev/$p/$a/80" 2>/dev/null & done; done; wait`)
				}
				if n := w.seen(); n != 0 {
					t.Fatalf("%s: %d packets of proxied destinations came to the server", c.does, n)
				}
				w.apply(p)
				w.works()
			}
		})
	}
}
