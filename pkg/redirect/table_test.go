package redirect

import (
	"net/netip"
	"os"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/tproxyd/tproxyd/pkg/flow"
)

var testMarks = Marks{Value: 0x7000, Mask: 0xf000}

func ranges(texts ...string) (rs []Range) {
	for _, t := range texts {
		if from, to, ok := strings.Cut(t, "-"); ok {
			rs = append(rs, Range{From: netip.MustParseAddr(from), To: netip.MustParseAddr(to)})
			continue
		}
		p := netip.MustParsePrefix(t)
		rs = append(rs, Range{From: p.Masked().Addr(), To: lastOf(p.Masked())})
	}
	return rs
}

func tagged(tag string, texts ...string) []Range {
	rs := ranges(texts...)
	for i := range rs {
		rs[i].Tag = tag
	}
	return rs
}

func prefixes(texts ...string) (ps []netip.Prefix) {
	for _, t := range texts {
		ps = append(ps, netip.MustParsePrefix(t))
	}
	return ps
}

// fullPlan uses everything that a plan can say.
func fullPlan() Plan {
	return Plan{
		Interfaces: []string{"lan0", "wlan1"},
		Local:      true,
		DNS:        true,
		Ports:      Ports{TCP: 1081, UDP: 1082, DNSTCP: 1053, DNSUDP: 1054},
		Marks:      testMarks,
		Table:      7470,
		Synthetic:  prefixes("198.18.0.0/15", "fd74:7072:6f78::/96", "100.64.0.0/16", "fd00::1/128"),
		Servers:    []netip.AddrPort{netip.MustParseAddrPort("192.0.2.9:1080"), netip.MustParseAddrPort("[2001:db8::9]:1080"), netip.MustParseAddrPort("192.0.2.9:1080")},
		Blocks: []Block{
			{Networks: TCP, Ports: []PortRange{{80, 80}, {443, 443}, {8000, 8999}}, Src: prefixes("10.0.0.0/8", "10.1.0.0/16"),
				Ifs: []string{"lan0", "wlan1"}, Direct: ranges("203.0.113.0/24"), Deny: ranges("198.51.100.1-198.51.100.9")},
			{Networks: UDP, Ports: []PortRange{{123, 123}}, Direct: ranges("0.0.0.0/0", "::/0")},
			{Ports: []PortRange{{65000, 65535}}, Ifs: []string{"lan0"}, Src: prefixes("2001:db8:1::/48"), Deny: ranges("::/0")},
			{Networks: UDP, Deny: ranges("203.0.113.128/25")},
			{Client: Client{UIDs: []uint32{0, 1000, 0}, GIDs: []uint32{5}}, Direct: ranges("203.0.113.7/32"), Drop: ranges("::/0"), ICMP: ranges("203.0.113.8/32")},
			{Networks: TCP, Client: Client{MACs: []flow.MAC{{0, 0, 0x5e, 0, 0x53, 2}, {0, 0, 0x5e, 0, 0x53, 1}}, Marks: []PacketMark{{0x10, 0xffffffff}, {0, 0xff}, {0x7000, 0xf000}}},
				Direct: ranges("0.0.0.0/0"), Deny: ranges("::/0")},
			{Client: Client{Cgroups: []string{"nothing.service"}}, Direct: ranges("0.0.0.0/0")},  // there is none
			{Client: Client{Marks: []PacketMark{{0x7000, 0xf000}}}, Direct: ranges("0.0.0.0/0")}, // nobody can meet it
			{Direct: ranges("10.0.0.0/8", "192.168.0.0/16", "255.255.255.240/28", "fd00::/8"), Deny: ranges("2001:db8:bad::/48"),
				Proxy: ranges("0.0.0.0-9.255.255.255", "11.0.0.0-192.167.255.255", "192.169.0.0-255.255.255.239")},
			{Networks: TCP, Ports: []PortRange{{9, 9}}, Direct: tagged("a", "203.0.113.0/25"), Deny: append(tagged("b", "198.51.100.0/25"), tagged("c", "198.51.100.128/25")...)},
			{Networks: TCP, Ports: []PortRange{{8, 8}}, Direct: append(tagged("a", "0.0.0.0/1"), tagged("b", "128.0.0.0/1")...), Drop: tagged("a", "::/0")},
			{Networks: TCP, Ports: []PortRange{{7, 7}}, Direct: append(tagged("a", "0.0.0.0/2"), tagged("told", "64.0.0.0/2")...), Deny: tagged("told", "128.0.0.0/2"),
				ICMP: tagged("also", "192.0.0.0/2", "::/0")},
			{Proxy: ranges("::/0")},
		},
		Log: []string{"", "told", "also"},
	}
}

var (
	suffixes = regexp.MustCompile(`(?m)^\tflags ?[a-z,]*\n\n?|^# progname.*\n`)
	numbers  = regexp.MustCompile(`packets \d+ bytes \d+`)
)

func (n *netns) table() string {
	n.t.Helper()
	out := suffixes.ReplaceAllString(n.run("nft list table inet "+tableName+" | sed 's/ # progname .*//'"), "")
	return numbers.ReplaceAllString(out, "packets 0 bytes 0")
}

// What Apply puts into the kernel is what nft makes of Text.
func TestTextIsWhatApplyDoes(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(*Plan){
		"everything": func(p *Plan) {},
		"closed":     func(p *Plan) { *p = p.Closed() },
		"lan only":   func(p *Plan) { p.Local = false },
		"local only": func(p *Plan) { p.Interfaces = nil },
		"no dns":     func(p *Plan) { p.DNS = false },
		"no udp":     func(p *Plan) { p.Ports.UDP = 0 },
		"udp only":   func(p *Plan) { p.Ports.TCP = 0 },
		"nothing":    func(p *Plan) { *p = Plan{Marks: p.Marks, Table: p.Table} },
		"enclosed": func(p *Plan) {
			*p = enclosedPlan()
			p.Keep = []Kept{{"eth0", prefixes("10.0.0.0/8", "2001:db8::/64")}, {"eth1", nil}}
		},
		"odd mask": func(p *Plan) { p.Marks = Marks{Value: 0x80000000, Mask: 0x80010100} },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			p := fullPlan()
			change(&p)
			text, err := Text(p)
			if err != nil {
				t.Fatal(err)
			}
			byNft := newNetns(t)
			file := t.TempDir() + "/table.nft"
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			byNft.run("nft -f " + file)
			byUs := newNetns(t)
			r := byUs.open(Options{})
			if err := r.Apply(p); err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(byNft.table(), byUs.table()); diff != "" {
				t.Errorf("nft -f (-) and Apply (+) differ:\n%s", diff)
			}
		})
	}
}
