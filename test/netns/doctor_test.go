package netns_test

import (
	"encoding/json"
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Topology: world. Each fault is planted on the gateway, found by doctor, and
// taken away again, after which nothing is found.

func TestDoctor(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	g := w.gateway
	one, _ := w.dante(t)
	d := serve(t, g, settings{routes: "SERVER one " + socks1At + "\nDIRECT 198.51.100.0/24\nSOCKD5 @=one *\n"})
	healthy := func(when string) {
		t.Helper()
		if r := d.cli(t, "doctor", "-c", d.config); r.code != 0 || r.out+r.err != "" {
			t.Fatalf("%s: exit %d\n%s%s", when, r.code, r.out, r.err)
		}
	}
	g.sysctl(t, "net.ipv4.conf.all.src_valid_mark", "0") // as it was on the machine that this runs on
	healthy("a healthy host")

	var silence func()
	const bridgeCalls = "/proc/sys/net/bridge/bridge-nf-call-iptables"
	for _, fault := range []struct {
		name        string
		plant, heal func()
		check, says string // a finding of this kind says this
	}{
		{"input chain",
			func() {
				g.nft(t, "table inet fw {\nchain in { type filter hook input priority 0; policy drop; ct state established accept; }\n}")
			},
			func() { g.nft(t, "delete table inet fw") }, "input", "nft insert rule inet fw in meta mark"},
		{"forward chain, as of docker",
			func() {
				g.nft(t, "table ip filter {\nchain FORWARD { type filter hook forward priority 0; policy drop; }\n}")
			},
			func() { g.nft(t, "delete table ip filter") }, "forward", "the chain FORWARD of table ip filter"},
		{"network in the pool",
			func() { g.ip(t, "addr add 198.18.7.1/24 dev lan0") }, func() { g.ip(t, "addr del 198.18.7.1/24 dev lan0") }, "pool", "198.18.7.1/24 has addresses"},
		{"mark of others",
			func() { g.ip(t, "rule add fwmark 0x4000/0x4000 lookup 99 pref 77") }, func() { g.ip(t, "rule del pref 77") }, "mark", "routing rule 77"},
		{"rp_filter with src_valid_mark",
			func() {
				g.sysctl(t, "net.ipv4.conf.all.rp_filter", "1")
				g.sysctl(t, "net.ipv4.conf.all.src_valid_mark", "1")
			},
			func() {
				g.sysctl(t, "net.ipv4.conf.all.rp_filter", "0")
				g.sysctl(t, "net.ipv4.conf.all.src_valid_mark", "0")
			},
			"rp_filter", "src_valid_mark=0"},
		{"no forwarding",
			func() { g.sysctl(t, "net.ipv6.conf.all.forwarding", "0") }, func() { g.sysctl(t, "net.ipv6.conf.all.forwarding", "1") },
			"forwarding", "sysctl -w net.ipv6.conf.all.forwarding=1"},
		{"interface down",
			func() { g.ip(t, "link set lan0 down") },
			func() {
				g.ip(t, "link set lan0 up", "addr replace "+lanAt6+"/64 dev lan0 nodad")
			}, "interface", "ip link set lan0 up"},
		{"networkd",
			func() {
				g.must(t, g.ns.Do(func() error {
					if err := os.MkdirAll("/run/systemd/netif", 0o755); err != nil {
						return err
					}
					return os.WriteFile("/run/systemd/netif/state", nil, 0o644)
				}))
			},
			func() { g.must(t, g.ns.Do(func() error { return os.Remove("/run/systemd/netif/state") })) },
			"networkd", "ManageForeignRoutingPolicyRules=no"},
		{"another router",
			func() { silence = w.client.announce(t, "eth0") }, func() { silence() }, "router", "on lan0: fe80::"},
		{"server down",
			func() { one.kill() },
			func() {
				startDanted(t, w.socks1, socks1At+":1080", openDante([]string{socks1At, socks1At6}, []string{socks1Out, socks1Out6}))
			}, "server", "server one does not greet: "},
		{"no state directory",
			func() { g.must(t, os.Rename(d.set.state, d.set.state+".away")) },
			func() { g.must(t, os.Rename(d.set.state+".away", d.set.state)) }, "state", "no such file"},
		{"bridges that call",
			func() { g.sysctl(t, "net.bridge.bridge-nf-call-iptables", "1"); g.ip(t, "link add br0 type bridge") },
			func() { g.ip(t, "link del br0") }, "bridge", "sysctl -w net.bridge.bridge-nf-call-iptables=0"},
	} {
		if _, err := os.Stat(bridgeCalls); err != nil && fault.check == "bridge" {
			continue // without br_netfilter no bridge calls anybody
		}
		fault.plant()
		r := d.cli(t, "doctor", "--json", "-c", d.config)
		var report struct {
			Findings []struct{ Check, What, Why, Mend string }
			Servers  []struct{ Server string }
		}
		if err := json.Unmarshal([]byte(r.out), &report); err != nil || r.code != 1 || len(report.Servers) != 1 || report.Servers[0].Server != "one" {
			t.Fatalf("%s: exit %d, %v\n%s%s", fault.name, r.code, err, r.out, r.err)
		}
		found := false
		for _, f := range report.Findings {
			found = found || f.Check == fault.check && strings.Contains(f.What+f.Mend, fault.says)
			if f.Check != fault.check || f.What == "" || f.Why == "" || f.Mend == "" {
				t.Errorf("%s: a finding that is of something else, or does not say all: %+v", fault.name, f)
			}
		}
		if !found {
			t.Errorf("%s is not found:\n%s", fault.name, r.out)
		}
		fault.heal()
	}
	healthy("after all of them")

	// Some need no mending, but a daemon that remembers, or a client.
	w.client.in(func() error {
		c, err := w.client.dial("tcp", "9.9.9.9:853", time.Second)
		if err == nil {
			c.Close()
		}
		return nil
	})
	for end := time.Now().Add(20 * time.Second); ; {
		g.dropRules(t)
		r := d.cli(t, "doctor", "-c", d.config).exit(t, 1)
		doh, healed := strings.Contains(r.out, "doh: clients seem to use DNS over HTTPS or TLS: "+clientAt+" asks Quad9"), strings.Contains(r.out, "healed: somebody else")
		if doh && healed {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("a client of Quad9 %v, changes of others %v:\n%s", doh, healed, r.out)
		}
	}
	d.stop(t)
	r := g.run(t, command{args: []string{tool(t, "prlimit"), "--nofile=1024:1024", d.bin, "doctor", "-c", d.config}}).exit(t, 1)
	if !strings.Contains(r.out, "descriptors: this host's default limit of descriptors is 1024") {
		t.Errorf("without a daemon:\n%s", r.out)
	}
	g.file(t, "broken.toml", "[intercept]\nmark = 7\n", 0o644)
	d.cli(t, "doctor", "-c", filepath.Join(g.dir, "broken.toml")).exit(t, 2)
}

// TestDoctorMends: with a firewall that drops, flows hang; what the finding says
// to add has them pass.
func TestDoctorMends(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.dante(t)
	g := w.gateway
	d := serve(t, g, settings{routes: "SERVER one " + socks1At + "\nDIRECT 198.51.100.0/24\nDIRECT 2001:db8:2::/64\nSOCKD5 @=one *\n", local: true})
	g.nft(t, `table inet fw {
	chain in { type filter hook input priority 0; policy drop; ct state established accept; iifname lo accept; icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept; }
	chain fw { type filter hook forward priority 0; policy drop; icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept; }
}`)
	try := func() (proxied, direct bool) {
		one, err := w.client.dial("tcp", outsideAt+":80", 700*time.Millisecond)
		if err == nil {
			one.Close()
		}
		two, derr := w.client.dial("tcp", insideAt+":80", 700*time.Millisecond)
		if derr == nil {
			two.Close()
		}
		return err == nil, derr == nil
	}
	if proxied, direct := try(); proxied || direct {
		t.Fatalf("a firewall that drops lets pass: proxied %v, direct %v", proxied, direct)
	}
	r := d.cli(t, "doctor", "-c", d.config).exit(t, 1)
	mends := regexp.MustCompile(`(?m)^  mend: (nft .*)$`).FindAllStringSubmatch(r.out, -1)
	if len(mends) != 2 {
		t.Fatalf("%d findings have a rule to add, want 2:\n%s", len(mends), r.out)
	}
	for _, m := range mends {
		g.run(t, command{args: []string{"sh", "-c", strings.ReplaceAll(strings.ReplaceAll(m[1], "{", "'{"), "}", "}'")}}).ok(t)
	}
	if proxied, direct := try(); !proxied || !direct {
		t.Errorf("after the mending: proxied %v, direct %v\n%s", proxied, direct, r.out)
	}
	d.cli(t, "doctor", "-c", d.config).ok(t)
}

// announce makes the machine a router that answers solicitations (RFC 4861
// section 6.2.6) on one of its interfaces, until stop is called.
func (h *host) announce(t testing.TB, name string) (stop func()) {
	t.Helper()
	end, ready := make(chan struct{}), make(chan error, 1)
	go h.in(func() error {
		i, err := net.InterfaceByName(name)
		if err != nil {
			ready <- err
			return err
		}
		fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.IPPROTO_ICMPV6)
		if err != nil {
			ready <- err
			return err
		}
		defer unix.Close(fd)
		all := netip.MustParseAddr("ff02::2").As16()
		ready <- errors.Join(
			unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_HOPS, 255),
			unix.SetsockoptInt(fd, unix.IPPROTO_IPV6, unix.IPV6_MULTICAST_IF, i.Index),
			unix.SetsockoptIPv6Mreq(fd, unix.IPPROTO_IPV6, unix.IPV6_JOIN_GROUP, &unix.IPv6Mreq{Multiaddr: all, Interface: uint32(i.Index)}),
			unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Usec: 50_000}))
		b := make([]byte, 1500)
		for {
			select {
			case <-end:
				return nil
			default:
			}
			if n, _, err := unix.Recvfrom(fd, b, 0); err != nil || n < 8 || b[0] != 133 {
				continue
			}
			advertisement := []byte{134, 0, 0, 0, 64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0} // half an hour
			unix.Sendto(fd, advertisement, 0, &unix.SockaddrInet6{Addr: netip.MustParseAddr("ff02::1").As16()})
		}
	})
	h.must(t, <-ready)
	return func() { close(end) }
}
