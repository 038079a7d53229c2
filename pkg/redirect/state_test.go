package redirect

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// state is everything of a namespace that Remove must leave as it found it.
func (n *netns) state() string {
	n.t.Helper()
	out := n.run("nft -a list ruleset; (ip rule; ip -6 rule) | sort; (ip route show table all; ip -6 route show table all) | sort; tc qdisc; " +
		"for i in lan0 wan0; do tc filter show dev $i ingress; done")
	return regexp.MustCompile(`expires \d+sec|table inet tproxyd # handle \d+|packets \d+ bytes \d+`).ReplaceAllString(out, "")
}

// foreign is what others have in the kernel and keep.
func foreign() []string {
	return []string{
		"nft add table inet other", "nft add chain inet other in '{ type filter hook input priority 0; }'", "nft add table ip tproxyd",
		"ip rule add pref 90 fwmark 0x1/0x1 lookup 7470", "ip rule add pref 170 fwmark 0x2/0x2 lookup 7470", "ip -6 rule add pref 173 iif wan0 lookup main",
		"ip route add 192.0.2.128/25 dev lan0 table 7471", "tc qdisc add dev wan0 clsact",
	}
}

// sysctls is the rest of what could be changed.
func (n *netns) sysctls() string {
	n.t.Helper()
	return n.run("cd /proc/sys/net && grep -rs . ipv4 ipv6 netfilter | grep -v -e nf_conntrack_count -e secret -e fastopen_key")
}

func gatewayLinks(n *netns) {
	n.batch("link add lan0 type veth peer name wlan1", "link add wan0 type veth peer name wan1",
		"link set lan0 up", "link set wlan1 up", "link set wan0 up")
}

// remove is Remove. What the test has just let go of can be in the hands of a
// child of another test that has not yet called exec, for a moment.
func (n *netns) remove() (err error) {
	for range 100 {
		n.do(func() { err = Remove() })
		if !errors.Is(err, ErrInUse) {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	return err
}

func TestRemove(t *testing.T) {
	t.Parallel()
	for name, end := range map[string]func(*testing.T, *netns, *Redirect){
		"open":            func(t *testing.T, n *netns, r *Redirect) { r.Close(false) },
		"closed":          func(t *testing.T, n *netns, r *Redirect) { r.Close(true) },
		"killed":          func(t *testing.T, n *netns, r *Redirect) { r.release() },
		"killed, flushed": func(t *testing.T, n *netns, r *Redirect) { r.release(); n.run("nft delete table inet tproxyd") },
	} {
		for _, noOwner := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s, owner %v", name, !noOwner), func(t *testing.T) {
				t.Parallel()
				n := newNetns(t)
				gatewayLinks(n)
				n.run(foreign()...)
				if noOwner { // one half with classifiers, one without
					n.run("sysctl -qw net.ipv4.conf.all.rp_filter=1")
				}
				before := n.state() + n.sysctls()
				r := n.open(Options{NoOwner: noOwner})
				if err := r.Apply(fullPlan()); err != nil {
					t.Fatal(err)
				}
				if strings.HasPrefix(before, n.state()) {
					t.Error("Apply has done nothing")
				}
				n.do(func() {
					if err := Remove(); !errors.Is(err, ErrInUse) {
						t.Errorf("Remove while it is in use: %v", err)
					}
				})
				end(t, n, r)
				for range 2 {
					if err := n.remove(); err != nil {
						t.Fatal(err)
					}
					if diff := cmp.Diff(strings.Split(before, "\n"), strings.Split(n.state()+n.sysctls(), "\n")); diff != "" {
						t.Errorf("before (-) and after (+):\n%s", diff)
					}
				}
			})
		}
	}
}

// One redirector for a namespace, however each of them holds it; the next one
// takes over what is there, without a moment without a table.
func TestOneForANamespace(t *testing.T) {
	t.Parallel()
	for _, noOwner := range []bool{false, true} {
		n := newNetns(t)
		gatewayLinks(n)
		second := func() (r *Redirect, err error) {
			n.do(func() { r, err = Open(Options{NoOwner: noOwner}) })
			return r, err
		}
		r := n.open(Options{NoOwner: noOwner})
		for _, when := range []string{"opened", "applied"} {
			if _, err := second(); !errors.Is(err, ErrInUse) {
				t.Errorf("owner %v, %s: a second Open: %v", !noOwner, when, err)
			}
			if err := r.Apply(fullPlan()); err != nil {
				t.Fatal(err)
			}
		}
		before := n.table()
		r.release()
		next, err := second()
		for i := 0; errors.Is(err, ErrInUse) && i < 100; i++ { // as for remove
			time.Sleep(5 * time.Millisecond)
			next, err = second()
		}
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(before, n.table()); diff != "" {
			t.Errorf("owner %v: the next Open has changed the table:\n%s", !noOwner, diff)
		}
		if err := errors.Join(next.Apply(fullPlan()), next.Close(false)); err != nil {
			t.Error(err)
		}
	}
}

// A table of another kind, of a process that is gone, is taken over too.
func TestOwnerAfterNoOwner(t *testing.T) {
	t.Parallel()
	for _, first := range []bool{false, true} {
		n := newNetns(t)
		gatewayLinks(n)
		r := n.open(Options{NoOwner: first})
		if err := r.Apply(fullPlan()); err != nil {
			t.Fatal(err)
		}
		table := func() string { return aliveOnly.ReplaceAllString(sameNames(n.table()), "") }
		before := table()
		r.Close(true)
		r = n.open(Options{NoOwner: !first})
		err := r.Apply(fullPlan())
		for i := 0; errors.Is(err, unix.EPERM) && i < 100; i++ { // as for remove
			time.Sleep(5 * time.Millisecond)
			err = r.Apply(fullPlan())
		}
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(before, table()); diff != "" {
			t.Errorf("no owner %v: the table is another now:\n%s", first, diff)
		}
	}
}

// aliveOnly are the rules that there are only where tables have owners.
var aliveOnly = regexp.MustCompile(`(?m)^.*0x0000c000.*\n`)

// sameNames makes the names of all generations of sets one, and their order that
// of the names.
func sameNames(s string) string {
	s = regexp.MustCompile(`_[abc]\b`).ReplaceAllString(s, "_x")
	s = regexp.MustCompile(`\bgroup \d+`).ReplaceAllString(s, "group") // the first that is free
	sets := oneSet.FindAllString(s, -1)
	slices.Sort(sets)
	return oneSet.ReplaceAllStringFunc(s, func(string) (set string) {
		set, sets = sets[0], sets[1:]
		return set
	})
}

var oneSet = regexp.MustCompile(`(?ms)^\s*set [^\n]* \{$.*?^\s*\}$`)

func TestApplyTwice(t *testing.T) {
	t.Parallel()
	for _, noOwner := range []bool{false, true} {
		n := newNetns(t)
		gatewayLinks(n)
		r := n.open(Options{NoOwner: noOwner})
		p := fullPlan()
		if err := r.Apply(p); err != nil {
			t.Fatal(err)
		}
		list := func() string {
			blocks := strings.Split(strings.TrimSuffix(sameNames(n.table()), "}\n"), "\n\n") // a chain or a set each
			for i := range blocks {
				blocks[i] = strings.TrimSpace(blocks[i])
			}
			slices.Sort(blocks)
			return strings.Join(blocks, "\n\n") + n.run("(ip rule; ip -6 rule) | sort; (ip route show table all; ip -6 route show table all) | sort; tc qdisc")
		}
		first := list()
		for i := range 2 {
			if err := r.Apply(p); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(first, list()); diff != "" {
				t.Errorf("owner %v: Apply number %d changed something:\n%s", !noOwner, i+2, diff)
			}
		}
		// A plan with less, and back: nothing of the other stays.
		less := Plan{Interfaces: []string{"wlan1"}, Marks: Marks{Value: 0x100, Mask: 0xf00}, Table: 7480, Blocks: []Block{{Direct: ranges("0.0.0.0/0")}}}
		if err := r.Apply(less); err != nil {
			t.Fatal(err)
		}
		if out := list(); ofFullPlan.MatchString(out) {
			t.Errorf("owner %v: of the plan before there is still:\n%s", !noOwner, out)
		}
		if err := r.Apply(p); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(first, list()); diff != "" {
			t.Errorf("owner %v: after another plan:\n%s", !noOwner, diff)
		}
	}
}

// ofFullPlan matches what only fullPlan has: its table, an interface, its mark.
// Four digits alone could be part of a link-local address.
var ofFullPlan = regexp.MustCompile(`(table|lookup) 7470\b|"lan0"|0x7000|0x00007000`)

// A plan that cannot be is refused, and what is there stays.
func TestApplyRefuses(t *testing.T) {
	t.Parallel()
	n := newNetns(t)
	gatewayLinks(n)
	r := n.open(Options{})
	if err := r.Apply(fullPlan()); err != nil {
		t.Fatal(err)
	}
	before := n.state()
	for name, change := range map[string]func(*Plan){
		"marks":     func(p *Plan) { p.Marks.Value = 0x10000 },
		"table":     func(p *Plan) { p.Table = 254 },
		"interface": func(p *Plan) { p.Interfaces = []string{"lan 0"} },
		"lo":        func(p *Plan) { p.Interfaces = []string{"lo"} },
		"server":    func(p *Plan) { p.Servers = []netip.AddrPort{{}} },
		"range": func(p *Plan) {
			p.Blocks = []Block{{Direct: []Range{{From: mustAddr("10.0.0.2"), To: mustAddr("10.0.0.1")}}}}
		},
		"families": func(p *Plan) {
			p.Blocks = []Block{{Direct: []Range{{From: mustAddr("10.0.0.2"), To: mustAddr("::1")}}}}
		},
		"ports":     func(p *Plan) { p.Blocks = []Block{{Ports: []PortRange{{2, 1}}}} },
		"two lists": func(p *Plan) { p.Blocks = []Block{{Direct: ranges("10.0.0.0/8"), Deny: ranges("10.1.0.0/16")}} },
		"readmit":   func(p *Plan) { p.Readmit = []Admission{{}} },
	} {
		p := fullPlan()
		change(&p)
		if err := r.Apply(p); err == nil {
			t.Errorf("%s: no error", name)
		}
		if diff := cmp.Diff(before, n.state()); diff != "" {
			t.Fatalf("%s: the kernel was changed:\n%s", name, diff)
		}
	}
}

// traffic asks the same things again and again until stop is called, which
// tells how often and what was answered otherwise than wanted.
func (w *world) traffic(from *netns, patience time.Duration, want ...asked) (stop func() (int, []string)) {
	ctx, cancel := context.WithCancel(w.t.Context())
	var all sync.WaitGroup
	var mu sync.Mutex
	rounds, wrong := 0, []string{}
	all.Go(func() {
		for ctx.Err() == nil {
			for _, a := range want {
				f := strings.Fields(a.what)
				got := askFor(from, f[0], f[1], patience)
				mu.Lock()
				if a.got != "" && !strings.HasPrefix(got, a.got) {
					wrong = append(wrong, a.what+": "+got)
				}
				rounds++
				mu.Unlock()
			}
		}
	})
	return func() (int, []string) {
		cancel()
		all.Wait()
		return rounds, wrong
	}
}

func TestApplyUnderTraffic(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	p := w.start(worldPlan())
	kept := []*flowing{w.dial("203.0.113.5:80"), w.dial("[2001:db8:a::5]:80"), w.dial("198.51.100.5:80"), w.dial("[2001:db8:b::5]:80")}
	stop := w.traffic(w.client, wait,
		asked{"tcp 203.0.113.5:80", "proxy"}, asked{"tcp [2001:db8:a::5]:80", "proxy"},
		asked{"udp 203.0.113.5:7000", "proxy"}, asked{"udp 198.51.100.200:7000", "EHOSTUNREACH"}, asked{"udp 198.51.100.5:53", "dns"},
		asked{"tcp 198.51.100.5:80", "server"}, asked{"tcp [2001:db8:b::5]:80", "server"}, asked{"udp 198.51.100.5:7000", "server"})
	for i := range 10 {
		p.Blocks[0].Ports = []PortRange{{7001, uint16(7010 + i)}}
		w.apply(p)
		for _, c := range kept {
			c.echo(t)
		}
	}
	rounds, wrong := stop()
	if rounds < 20 || len(wrong) > 0 {
		t.Errorf("%d questions, wrong answers: %v", rounds, wrong)
	}
	w.leaked()
}

func TestInterfaceName(t *testing.T) {
	t.Parallel()
	n := newNetns(t)
	n.run("ip link add lan0 index 77 type veth peer name lan9")
	r := n.open(Options{})
	name := func(index int, want string) {
		t.Helper()
		if got := r.InterfaceName(index); got != want {
			t.Errorf("interface %d is %q, want %q", index, got, want)
		}
	}
	name(77, "lan0")
	n.run("ip link set lan0 down; ip link set lan0 name lan1")
	name(77, "lan1")
	for _, i := range []int{-1, 0, 1, 78} {
		name(i, "")
	}
	r.Close(false)
	name(77, "")
}

func TestAbilities(t *testing.T) {
	t.Parallel()
	for _, a := range Abilities() {
		if a.State != "yes" && !strings.HasPrefix(a.State, "no: ") {
			t.Errorf("%s: %s", a.Name, a.State)
		}
		if a.Name != "nftables table owner" && a.State != "yes" {
			t.Errorf("%s: %s", a.Name, a.State)
		}
	}
}

// flowing is a connection through the gateway that repeats what is said.
type flowing struct{ c net.Conn }

func (w *world) dial(addr string) *flowing {
	w.t.Helper()
	var c net.Conn
	var err error
	w.client.do(func() { c, err = (&net.Dialer{Timeout: wait}).Dial("tcp", addr) })
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { c.Close() })
	f := &flowing{c}
	c.SetDeadline(time.Now().Add(20 * time.Second))
	b := make([]byte, 200)
	if _, err := c.Read(b); err != nil { // who it is
		w.t.Fatal(err)
	}
	return f
}

// try says something, and returns what goes wrong.
func (f *flowing) try() error {
	if _, err := f.c.Write([]byte("x")); err != nil {
		return err
	}
	_, err := f.c.Read(make([]byte, 1))
	return err
}

func (f *flowing) echo(t *testing.T) {
	t.Helper()
	if err := f.try(); err != nil {
		t.Errorf("%s: %v", f.c.RemoteAddr(), err)
	}
}
