package daemon

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tproxyd/tproxyd/internal/config"
	"github.com/tproxyd/tproxyd/internal/netns"
	"github.com/tproxyd/tproxyd/pkg/flow"
	"github.com/tproxyd/tproxyd/pkg/redirect"
	"github.com/tproxyd/tproxyd/pkg/routes"
	"golang.org/x/sys/unix"
)

// agreement is a gateway with two neighbours, without a daemon: what the table does
// with a packet is told by its counters, and is held to what the rules say.
//
//	lan0 ── neighbour ── lan1      10.6.0.0/15 and fd06::/16, marks by source
//	      \           /
//	        gateway ── out ── nobody
type agreement struct {
	t                  *testing.T
	rnd                *rand.Rand
	gateway, neighbour *netns.Namespace
	kernel             *redirect.Redirect
	macs               [2]flow.MAC
	groups             []string // directories of cgroups; the first one is the root
	mount              string
}

func newAgreement(t *testing.T) *agreement {
	a := &agreement{t: t, rnd: rand.New(rand.NewPCG(7, 8))}
	for _, n := range []**netns.Namespace{&a.gateway, &a.neighbour} {
		var err error
		if *n, err = netns.New(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup((*n).Close)
	}
	a.sh(a.gateway, "ip link set lo up")
	for i := range 2 {
		a.macs[i] = flow.MAC{2, 0, 0x5e, 0, 0x53, byte(1 + i)}
		a.sh(a.gateway, fmt.Sprintf("ip link add lan%d type veth peer name eth%[1]d address %s netns %s", i, a.macs[i], a.neighbour.Path()),
			fmt.Sprintf("ip link set lan%d address 02:00:5e:00:54:0%[1]d; ip link set lan%[1]d up; ip addr add fe80::%[1]d:1/64 dev lan%[1]d nodad", i))
		a.sh(a.neighbour, fmt.Sprintf("ip link set eth%d up; ip neigh add 10.6.0.%[1]d lladdr 02:00:5e:00:54:0%[1]d dev eth%[1]d; ip addr add 10.%d.0.9/32 dev eth%[1]d; ip addr add fd0%[2]d::9/128 dev eth%[1]d nodad", i, 6+i),
			fmt.Sprintf("ip neigh add fe80::%d:1 lladdr 02:00:5e:00:54:0%[1]d dev eth%[1]d", i),
			fmt.Sprintf("ip rule add from 10.%d.0.9 lookup 10%[2]d; ip route add default via 10.6.0.%[2]d dev eth%[2]d onlink table 10%[2]d", 6+i, i),
			fmt.Sprintf("ip -6 rule add from fd0%d::9 lookup 10%[2]d; ip -6 route add default via fe80::%[2]d:1 dev eth%[2]d table 10%[2]d", 6+i, i))
	}
	a.sh(a.gateway, "ip link add out type veth peer name other; ip link set out up; ip link set other up",
		"ip addr add 192.0.2.1/24 dev out; ip addr add 2001:db8::1/64 dev out nodad",
		"ip neigh add 192.0.2.2 lladdr 02:00:5e:00:55:01 dev out; ip neigh add 2001:db8::2 lladdr 02:00:5e:00:55:01 dev out",
		"ip route add default via 192.0.2.2; ip -6 route add default via 2001:db8::2",
		"ip route add 10.6.0.9 dev lan0; ip route add 10.7.0.9 dev lan1; ip -6 route add fd06::9 dev lan0; ip -6 route add fd07::9 dev lan1",
		"sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 net.ipv4.conf.all.rp_filter=0",
		"nft add table inet marks; nft 'add chain inet marks pre { type filter hook prerouting priority raw; }'",
		"nft 'add rule inet marks pre meta mark set th dport map { 80 : 0x1, 443 : 0x12, 5000 : 0x31 }'")
	a.mount = "/sys/fs/cgroup"
	if _, err := os.Stat(a.mount + "/cgroup.procs"); err != nil {
		a.mount = "/sys/fs/cgroup/unified"
	}
	a.groups = []string{"/"}
	s := fmt.Sprintf("/tproxyd-agree-%d", os.Getpid())
	for _, name := range []string{s, s + "/w.service", s + "/w.service/deep"} {
		dir := filepath.Join(a.mount, name)
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.Remove(dir) })
		a.groups = append(a.groups, name)
	}
	if err := a.gateway.Do(func() (err error) { a.kernel, err = redirect.Open(redirect.Options{}); return err }); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.kernel.Close(false) })
	return a
}

func (a *agreement) sh(n *netns.Namespace, lines ...string) {
	a.t.Helper()
	for _, l := range lines {
		var out []byte
		if err := n.Do(func() (err error) { out, err = exec.Command("sh", "-ec", l).CombinedOutput(); return err }); err != nil {
			a.t.Fatalf("%s: %v\n%s", l, err, out)
		}
	}
}

func (a *agreement) pick(words ...string) string { return words[a.rnd.IntN(len(words))] }

// rules returns rules with every condition, of which much overlaps.
func (a *agreement) rules() string {
	var b strings.Builder
	for range 2 + a.rnd.IntN(14) {
		action := a.pick("DIRECT", "DENY", "SOCKD5 @=203.0.113.1")
		b.WriteString(action + " " + a.pick("*", "*", "172.16.0.0/12", "172.16.0.0/15", "172.17.0.0/16", "172.16.0.0-172.17.0.99", "fd99::/16", "fd99:1::/32"))
		proto := a.pick("", "", " proto=tcp", " proto=udp")
		b.WriteString(a.pick("", "", " 80,443", " ge 443") + proto)
		b.WriteString(a.pick("", "", "", " src=10.6.0.0/16", " if=lan0", " if=lan1 src=10.7.0.0/16,fd07::/16", " uid=1,2", " uid=2 gid=3", " gid=3,4",
			" cgroup="+a.groups[1], " cgroup=w.service", " cgroup="+a.groups[3]+" uid=1", " cgroup=/ gid=4", " mark=0x1", " mark=0x10/0x30", " mark=0/0x1",
			" mac="+a.macs[0].String(), " mac="+a.macs[1].String()+",00:00:5e:00:53:77"))
		switch {
		case action == "DENY":
			b.WriteString(a.pick("", " reject=icmp", " reject=drop"))
		case action != "DIRECT" && proto != " proto=tcp":
			b.WriteString(a.pick("", "", " udp=deny", " udp=direct"))
		}
		b.WriteString(a.pick("", "", " log"))
		b.WriteString("\n")
	}
	return b.String() + a.pick("", "DEFAULT DIRECT\n", "DEFAULT DENY reject=drop\n")
}

// send sends the first packet of a flow, and returns the flow as the table sees it.
func (a *agreement) send() flow.Flow {
	a.t.Helper()
	dst := netip.AddrFrom4([4]byte{172, byte(16 + a.rnd.IntN(3)), byte(a.rnd.IntN(2)), byte(a.rnd.IntN(256))})
	domain := unix.AF_INET
	if a.rnd.IntN(3) == 0 {
		dst, domain = netip.AddrFrom16([16]byte{0: 0xfd, 1: 0x99, 3: byte(a.rnd.IntN(2)), 15: byte(a.rnd.IntN(256))}), unix.AF_INET6
	}
	port := []uint16{22, 80, 443, 5000}[a.rnd.IntN(4)]
	f := flow.Flow{Network: flow.Network(a.rnd.IntN(2)), Dst: netip.AddrPortFrom(dst, port)}
	ns, src, group := a.gateway, "", ""
	if from := a.rnd.IntN(4); from < 2 {
		ns = a.neighbour
		f.InIf, f.MAC = fmt.Sprintf("lan%d", from), a.macs[from]
		f.Mark = map[uint16]uint32{80: 0x1, 443: 0x12, 5000: 0x31}[port]
		if src = fmt.Sprintf("10.%d.0.9", 6+from); domain == unix.AF_INET6 {
			src = fmt.Sprintf("fd0%d::9", 6+from)
		}
	} else {
		group = a.groups[a.rnd.IntN(len(a.groups))]
		f.Owner = flow.Owner{Known: true, UID: a.rnd.Uint32N(3), GID: 2 + a.rnd.Uint32N(3), Cgroup: group}
		if src = "192.0.2.1"; domain == unix.AF_INET6 {
			src = "2001:db8::1"
		}
	}
	f.Src = netip.AddrPortFrom(netip.MustParseAddr(src), 0)
	if err := ns.Do(func() error {
		if group != "" && group != "/" { // a socket is of the group that its process is in
			defer os.WriteFile(a.mount+"/cgroup.procs", []byte("0"), 0)
			if err := os.WriteFile(filepath.Join(a.mount, group, "cgroup.procs"), []byte("0"), 0); err != nil {
				return err
			}
		}
		unix.RawSyscall(unix.SYS_SETFSGID, uintptr(f.Owner.GID), 0, 0)
		unix.RawSyscall(unix.SYS_SETFSUID, uintptr(f.Owner.UID), 0, 0)
		kind := unix.SOCK_STREAM
		if f.Network == flow.UDP {
			kind = unix.SOCK_DGRAM
		}
		fd, err := unix.Socket(domain, kind|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
		unix.RawSyscall(unix.SYS_SETFSUID, 0, 0, 0)
		unix.RawSyscall(unix.SYS_SETFSGID, 0, 0, 0)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		if err := unix.Bind(fd, sockaddr(f.Src)); err != nil {
			return err
		}
		if err = unix.Connect(fd, sockaddr(f.Dst)); f.Network == flow.UDP && err == nil {
			unix.Write(fd, []byte("x")) // a refusal is an error of the call
		}
		return nil
	}); err != nil {
		a.t.Fatal(err)
	}
	return f
}

func sockaddr(a netip.AddrPort) unix.Sockaddr {
	if a.Addr().Is4() {
		return &unix.SockaddrInet4{Port: int(a.Port()), Addr: a.Addr().As4()}
	}
	return &unix.SockaddrInet6{Port: int(a.Port()), Addr: a.Addr().As16()}
}

// counts returns the counters of DENY, and of what would be diverted. (What may pass
// is also what the kernel says by itself, to its neighbours.)
func (a *agreement) counts() [2]uint64 {
	a.t.Helper()
	c, err := a.kernel.Counters()
	if err != nil {
		a.t.Fatal(err)
	}
	return [2]uint64{c.Denied.Packets, c.Refused.Packets}
}

// TestKernelAgrees: what the kernel does with real packets is what the rules say,
// and it counts them for the rule that decides.
func TestKernelAgrees(t *testing.T) {
	a := newAgreement(t)
	for round := range 80 {
		text := a.rules()
		table, diags := routes.Parse("socks.cnf", strings.NewReader(text), routes.Options{})
		if diags.HasErrors() {
			t.Fatalf("%s\n%v", text, diags)
		}
		c := config.Default("")
		c.Intercept.Interfaces, c.Intercept.Local, c.Intercept.DNS = []string{"lan0", "lan1"}, true, false
		plan := kernelPlan(&Setup{Config: c, Table: table}, redirect.Ports{})
		plan.DivertDenied = round%4 == 0 // where rules name programs, what is denied of this host comes to us
		if err := a.kernel.Apply(plan); err != nil {
			t.Fatalf("%s\n%v", text, err)
		}
		for range 60 {
			before, tallies := a.counts(), a.tallies()
			f := a.send()
			after := a.counts()
			r := table.Match(f)
			var want [2]uint64
			action := r.ActionFor(f.Network)
			switch action {
			case routes.Direct:
			case routes.Deny:
				want[0] = 1
				if plan.DivertDenied && f.InIf == "" {
					want, action = [2]uint64{1: 1}, routes.Socks5
				}
			default:
				want[1] = 1
			}
			if got := [2]uint64{after[0] - before[0], after[1] - before[1]}; got != want {
				t.Fatalf("round %d: %+v: DENY and servers counted %v, want %v by %s: %s\n%s", round, f, got, want, r.Position(), r.Text, text)
			}
			counted := a.tallies()[tagOf(r)].Packets - tallies[tagOf(r)].Packets
			if action == routes.Deny && counted != 1 || action == routes.Direct && counted == 0 {
				t.Fatalf("round %d: %+v: counted %d times for %s: %s\n%s", round, f, counted, r.Position(), r.Text, text)
			}
		}
	}
}

func (a *agreement) tallies() map[string]redirect.Count {
	a.t.Helper()
	n, err := a.kernel.Tallies()
	if err != nil {
		a.t.Fatal(err)
	}
	return n
}
