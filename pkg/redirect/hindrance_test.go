package redirect

import (
	"os"
	"strings"
	"testing"
)

func TestHindrances(t *testing.T) {
	t.Parallel()
	m := Marks{Value: 0x7000, Mask: 0xf000}
	for name, tt := range map[string]struct {
		lines []string
		want  string // part of the only message; empty: none
	}{
		"nothing":           {nil, ""},
		"policy drop":       {[]string{"nft add table inet f", "nft add chain inet f in '{ type filter hook input priority 0; policy drop; }'"}, "chain in of table inet f"},
		"reject at the end": {[]string{"nft add table ip f", "nft add chain ip f in '{ type filter hook input priority 0; }'", "nft add rule ip f in tcp dport 22 accept", "nft add rule ip f in counter reject"}, "chain in of table ip f"},
		"reject of some":    {[]string{"nft add table ip f", "nft add chain ip f in '{ type filter hook input priority 0; }'", "nft add rule ip f in tcp dport 22 reject"}, ""},
		"let in by mark":    {[]string{"nft add table inet f", "nft add chain inet f in '{ type filter hook input priority 0; policy drop; }'", "nft add rule inet f in meta mark and 0xf000 == 0x8000 accept"}, ""},
		"let in by mark, further on": {[]string{"nft add table inet f", "nft add chain inet f in '{ type filter hook input priority 0; policy drop; }'", "nft add chain inet f more",
			"nft add rule inet f in jump more", "nft add rule inet f more meta mark and 0xf000 == 0x8000 accept"}, ""},
		"other hook":        {[]string{"nft add table inet f", "nft add chain inet f fw '{ type filter hook forward priority 0; policy drop; }'"}, ""},
		"mark of others":    {[]string{"ip rule add fwmark 0x4000/0x4000 lookup 99 pref 77"}, "routing rule 77"},
		"mark of others, 6": {[]string{"ip -6 rule add fwmark 0x1 lookup 99 pref 78"}, "routing rule 78"},
		"bridge": {[]string{"ip link add br0 type bridge", "sysctl -qw net.bridge.bridge-nf-call-iptables=1 net.bridge.bridge-nf-call-ip6tables=0"},
			"bridge-nf-call-iptables is 1"},
		"bridge without calls": {[]string{"ip link add br0 type bridge", "sysctl -qw net.bridge.bridge-nf-call-iptables=0 net.bridge.bridge-nf-call-ip6tables=0"}, ""},
		"mark beside ours":     {[]string{"ip rule add fwmark 0x10/0xff lookup 99"}, ""},
	} {
		if _, err := os.Stat("/proc/sys/net/bridge"); err != nil && strings.HasPrefix(name, "bridge") {
			continue // without br_netfilter no bridge calls anybody
		}
		t.Run(name, func(t *testing.T) {
			n := newNetns(t)
			n.run(tt.lines...)
			var got []Hindrance
			n.do(func() { got = Hindrances(m) })
			if (tt.want == "") != (len(got) == 0) || tt.want != "" && (len(got) != 1 || !strings.Contains(got[0].String(), tt.want)) {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

func TestDirectHindrances(t *testing.T) {
	t.Parallel()
	m := Marks{Value: 0x7000, Mask: 0xf000}
	const chain = "nft add chain inet f fw '{ type filter hook forward priority 0; policy drop; }'"
	for name, tt := range map[string]struct {
		lines []string
		want  string // the kinds
	}{
		"nothing":             {nil, ""},
		"policy drop":         {[]string{"nft add table inet f", chain}, "forward"},
		"by interface":        {[]string{"nft add table inet f", chain, "nft add rule inet f fw iifname lan0 accept"}, ""},
		"another interface":   {[]string{"nft add table inet f", chain, "nft add rule inet f fw iifname lan1 accept"}, "forward"},
		"by index":            {[]string{"nft add table inet f", chain, "nft add rule inet f fw iif lan0 accept"}, ""},
		"by mark":             {[]string{"nft add table inet f", chain, "nft add rule inet f fw meta mark and 0xf000 == 0x9000 accept"}, ""},
		"interface, dropped":  {[]string{"nft add table inet f", chain, "nft add rule inet f fw iifname lan0 drop"}, "forward"},
		"rp_filter":           {[]string{"sysctl -qw net.ipv4.conf.all.rp_filter=1 net.ipv4.conf.all.src_valid_mark=1"}, "rp_filter"},
		"rp_filter alone":     {[]string{"sysctl -qw net.ipv4.conf.all.rp_filter=1"}, ""},
		"src_valid_mark, one": {[]string{"sysctl -qw net.ipv4.conf.lan0.rp_filter=2 net.ipv4.conf.lan0.src_valid_mark=1"}, "rp_filter"},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNetns(t)
			n.run(append([]string{"ip link add lan0 type veth peer name x", "sysctl -qw net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.lan0.rp_filter=0"}, tt.lines...)...)
			var got []Hindrance
			n.do(func() { got = DirectHindrances(m, []string{"lan0"}) })
			if (tt.want == "") != (len(got) == 0) || tt.want != "" && got[0].Check != tt.want {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}

func TestSyntheticHindrances(t *testing.T) {
	t.Parallel()
	pools := prefixes("198.18.0.0/15", "fd74:7072:6f78::/96")
	for name, tt := range map[string]struct{ line, want string }{
		"elsewhere":          {"ip addr add 198.17.0.1/16 dev lan0", ""},
		"address":            {"ip addr add 198.18.0.1/30 dev lan0", "198.18.0.1/30 has addresses of the synthetic pool"},
		"address, 6":         {"ip addr add fd74:7072:6f78::1/64 dev lan0", "fd74:7072:6f78::1/64 has addresses of the synthetic pool"},
		"network around it":  {"ip addr add 198.1.2.3/8 dev lan0", "198.1.2.3/8 has addresses of the synthetic pool"},
		"route":              {"ip route add 198.19.0.0/24 dev lan0", "route to 198.19.0.0/24 has addresses of the synthetic pool"},
		"route around it":    {"ip route add 128.0.0.0/1 dev lan0", ""},
		"route that refuses": {"ip route add blackhole 198.18.0.0/15", ""},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNetns(t)
			n.run("ip link add lan0 type veth peer name x", "ip link set lan0 up", tt.line)
			var got []Hindrance
			n.do(func() { got = SyntheticHindrances(pools...) })
			if (tt.want == "") != (len(got) == 0) || tt.want != "" && (len(got) != 1 || !strings.Contains(got[0].String(), tt.want)) {
				t.Errorf("got %q, want %q", got, tt.want)
			}
		})
	}
}
