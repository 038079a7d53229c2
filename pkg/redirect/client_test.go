package redirect

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/tproxyd/tproxyd/pkg/flow"
	"golang.org/x/sys/unix"
)

// testCgroup makes a cgroup for a test below another, or below the root with a name
// that no other process takes, and returns its path.
func testCgroup(t *testing.T, parent, name string) string {
	t.Helper()
	if parent == "" {
		name = fmt.Sprintf("tproxyd-test-%s-%d", name, os.Getpid())
	}
	name = parent + "/" + name
	mount, err := cgroupMount()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(mount, name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Remove(dir); err != nil {
			t.Error(err)
		}
	})
	return name
}

// mac returns the link-layer address of an interface.
func (n *netns) mac(name string) flow.MAC {
	n.t.Helper()
	words := strings.Fields(n.run("ip -o link show " + name))
	hw, err := net.ParseMAC(words[slices.Index(words, "link/ether")+1])
	if err != nil {
		n.t.Fatal(err)
	}
	return flow.MAC(hw)
}

// dialAs connects as a user and a group.
func (n *netns) dialAs(uid, gid int, network, addr string, local ...net.Addr) (c net.Conn, err error) {
	n.do(func() {
		unix.RawSyscall(unix.SYS_SETFSGID, uintptr(gid), 0, 0)
		unix.RawSyscall(unix.SYS_SETFSUID, uintptr(uid), 0, 0)
		defer unix.RawSyscall(unix.SYS_SETFSGID, 0, 0, 0)
		defer unix.RawSyscall(unix.SYS_SETFSUID, 0, 0, 0)
		d := net.Dialer{Timeout: wait}
		if local != nil {
			d.LocalAddr = local[0]
		}
		if c, err = d.Dial(network, addr); err == nil && network[:3] == "udp" {
			c.Write([]byte("hello"))
		}
	})
	return c, err
}

// inCgroup says what a process in a cgroup gets from a TCP port.
func (n *netns) inCgroup(path, host, port string) string {
	mount, _ := cgroupMount()
	out, _ := n.try(fmt.Sprintf("sh -c 'echo $$ >%s/cgroup.procs; exec bash -c \"exec 3<>/dev/tcp/%s/%s && head -n1 <&3\"' 2>&1", mount+path, host, port))
	switch {
	case strings.Contains(out, "refused"):
		return "ECONNREFUSED"
	case strings.Contains(out, "No route"):
		return "EHOSTUNREACH"
	}
	return strings.TrimSpace(out)
}

// TestClientConditions: who a packet is from decides, by real packets.
func TestClientConditions(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	hw := w.client.mac("eth0")
	outer := testCgroup(t, "", "outer")
	inner := testCgroup(t, outer, "web.service")
	all := ranges("0.0.0.0/0", "::/0")
	p := worldPlan()
	p.Local = true
	p.Blocks = []Block{
		{Client: Client{UIDs: []uint32{1000, 1001}, GIDs: []uint32{7}}, Direct: all},
		{Client: Client{UIDs: []uint32{1000}}, Deny: all},
		{Client: Client{UIDs: []uint32{1002}}, ICMP: all},
		{Client: Client{UIDs: []uint32{1003}}, Drop: all},
		{Client: Client{Cgroups: []string{"web.service"}}, Direct: all},
		{Client: Client{Cgroups: []string{outer}}, Deny: all},
		{Client: Client{Marks: []PacketMark{{0x20, 0xff}}}, Direct: all},
		{Client: Client{MACs: []flow.MAC{hw}}, Ports: []PortRange{{80, 80}}, Direct: all},
		{Client: Client{MACs: []flow.MAC{{1: 1}}}, Deny: all},
		{Proxy: all},
	}
	p.Who = &Who{Cgroups: []string{"web.service", outer, "absent.slice"}}
	w.start(p)

	for _, tt := range []struct {
		uid, gid  int
		tcp, tcp6 string
	}{
		{0, 0, "proxy 203.0.113.6:80 lo", "proxy [2001:db8:a::6]:80 lo"},
		{1000, 7, "server 203.0.113.6:80", "server [2001:db8:a::6]:80"},
		{1001, 7, "server 203.0.113.6:80", "server [2001:db8:a::6]:80"},
		{1001, 8, "proxy 203.0.113.6:80 lo", "proxy [2001:db8:a::6]:80 lo"},
		{1000, 8, "ECONNREFUSED", "ECONNREFUSED"},
		{1002, 8, "EHOSTUNREACH", "EACCES"},
	} {
		for addr, want := range map[string]string{"203.0.113.6:80": tt.tcp, "[2001:db8:a::6]:80": tt.tcp6} {
			got := ""
			if c, err := w.gateway.dialAs(tt.uid, tt.gid, "tcp", addr); err != nil {
				got = errName(err)
			} else {
				got = strings.TrimSpace(hear(c, ""))
				c.Close()
			}
			if got != want {
				t.Errorf("%d:%d to %s: %s, want %s", tt.uid, tt.gid, addr, got, want)
			}
		}
	}
	if got := w.gateway.inCgroup(inner, "203.0.113.6", "80"); got != "server 203.0.113.6:80" {
		t.Errorf("in the inner cgroup: %s", got)
	}
	if got := w.gateway.inCgroup(outer, "203.0.113.6", "80"); got != "ECONNREFUSED" {
		t.Errorf("in the outer cgroup: %s", got)
	}
	w.expect(w.client,
		asked{"tcp 203.0.113.6:80", "server 203.0.113.6:80"}, asked{"tcp [2001:db8:a::6]:80", "server [2001:db8:a::6]:80"}, // by its MAC
		asked{"tcp 203.0.113.6:7000", "proxy 203.0.113.6:7000 lan"})
	w.gateway.run("nft add table inet other", "nft 'add chain inet other pre { type filter hook prerouting priority raw; }'",
		"nft add rule inet other pre tcp dport 7000 meta mark set 0x0120")
	w.expect(w.client, asked{"tcp 203.0.113.6:7000", "server 203.0.113.6:7000"})
}

// TestWho: what the kernel notes of whose flows are diverted.
func TestWho(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	hw := w.client.mac("eth0")
	w.gateway.run("nft add table inet other", "nft 'add chain inet other pre { type filter hook prerouting priority raw; }'",
		"nft add rule inet other pre iifname lan0 meta mark set 0x0120")
	outer := testCgroup(t, "", "who")
	inner := testCgroup(t, outer, "inner")
	p := worldPlan()
	p.Local = true
	p.Who = &Who{Cgroups: []string{outer, "/"}}
	w.start(p)
	who := func(network string, src, dst net.Addr, inIf string) flow.Flow {
		t.Helper()
		f := flow.Flow{InIf: inIf, Src: netip.MustParseAddrPort(src.String()), Dst: netip.MustParseAddrPort(dst.String())}
		if network == "udp" {
			f.Network = flow.UDP
		}
		if err := w.r.Who(&f); err != nil {
			t.Errorf("%s %v to %v: %v", network, src, dst, err)
		}
		return f
	}
	for _, to := range []string{"203.0.113.6:80", "[2001:db8:a::6]:80", "203.0.113.6:53", "[2001:db8:a::6]:53", "198.18.0.7:80", "[fd74:7072:6f78::7]:80"} {
		for _, network := range []string{"tcp", "udp"} {
			c, err := w.gateway.dialAs(1000, 7, network, to)
			if err != nil {
				t.Fatal(err)
			}
			hear(c, "")
			if got, want := who(network, c.LocalAddr(), c.RemoteAddr(), "").Owner, (flow.Owner{Known: true, UID: 1000, GID: 7, Cgroup: "/"}); got != want {
				t.Errorf("%s %s: %+v, want %+v", network, to, got, want)
			}
			c.Close()
			c, err = w.client.dialAs(1000, 7, network, to)
			if err != nil {
				t.Fatal(err)
			}
			hear(c, "")
			f := who(network, c.LocalAddr(), c.RemoteAddr(), "lan0")
			if f.Owner.Known || f.Mark != 0x0120 || f.MAC != hw {
				t.Errorf("%s %s from the client: %+v", network, to, f)
			}
			c.Close()
		}
	}
	// The innermost of those that are named.
	mount, _ := cgroupMount()
	for _, path := range []string{outer, inner} {
		out := w.gateway.run("sh -c 'echo $$ >" + mount + path + "/cgroup.procs; exec bash -c \"exec 3<>/dev/tcp/203.0.113.6/80; ss -Htn state established dst 203.0.113.6:80\"'")
		fields := strings.Fields(out)
		if len(fields) < 4 {
			t.Fatal(out)
		}
		src, dst := net.TCPAddrFromAddrPort(netip.MustParseAddrPort(fields[2])), net.TCPAddrFromAddrPort(netip.MustParseAddrPort(fields[3]))
		if got := who("tcp", src, dst, "").Owner; got.Cgroup != outer || got.UID != 0 {
			t.Errorf("in %s: %+v", path, got)
		}
	}
	// Who has the same addresses and ports after another is not taken for it.
	for _, uid := range []int{1000, 1001} {
		var c net.Conn
		eventually(t, "the port is free", func() (err error) {
			c, err = w.gateway.dialAs(uid, uid, "tcp4", "203.0.113.6:80", &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 4711})
			return err
		})
		if got := who("tcp", c.LocalAddr(), c.RemoteAddr(), "").Owner.UID; got != uint32(uid) {
			t.Errorf("%d has the port of another: %d", uid, got)
		}
		c.(*net.TCPConn).SetLinger(0)
		c.Close()
	}
	f := flow.Flow{Src: netip.MustParseAddrPort("192.0.2.1:1"), Dst: netip.MustParseAddrPort("203.0.113.6:80")}
	if err := w.r.Who(&f); !errors.Is(err, ErrNotNoted) {
		t.Errorf("of a flow that there is not: %v", err)
	}
}
