package routes

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

// to makes a flow from "[tcp|udp ]DEST:PORT[ from SRC][ by IF]".
func to(t testing.TB, text string) (f flow.Flow) {
	t.Helper()
	words := strings.Fields(text)
	if words[0] == "udp" || words[0] == "tcp" {
		if words[0] == "udp" {
			f.Network = flow.UDP
		}
		words = words[1:]
	}
	if ap, err := netip.ParseAddrPort(words[0]); err == nil {
		f.Dst = ap
	} else {
		name, port, _ := strings.Cut(words[0], ":")
		f.Name = name
		f.Dst = netip.MustParseAddrPort("198.18.0.9:" + port)
	}
	for i := 1; i+1 < len(words); i += 2 {
		switch words[i] {
		case "from":
			f.Src = netip.AddrPortFrom(netip.MustParseAddr(words[i+1]), 40000)
		case "by":
			f.InIf = words[i+1]
		default:
			t.Fatalf("%q", text)
		}
	}
	return f
}

func TestMatch(t *testing.T) {
	table := mustParse(t,
		"LIST home 10.7.0.0/16 fd07::/16",                          // 1
		"LIST sites *.list.example exact.list.example 203.0.113.7", // 2
		"DENY 10.9.9.9",                               // 3
		"DIRECT 10.0.0.0 255.0.0.0",                   // 4
		"DENY * eq 25",                                // 5
		"DENY * 135-139,445",                          // 6
		"SOCKD5 @=10.0.4.1 *.private-net.example",     // 7
		"DENY www.public.example",                     // 8
		"SOCKD5 @=10.0.4.2 .public.example neq 22",    // 9
		"DIRECT * src=$home proto=udp",                // 10
		"DENY 0.0.0.0/0 lt 10 by=name",                // 11
		"SOCKD5 @=10.0.4.3 * gt 60000 if=br0,br1",     // 12
		"DIRECT $sites",                               // 13
		"DENY 192.0.2.10-192.0.2.20",                  // 14
		"SOCKD5 @=10.0.4.4 0.0.0.0 0.0.0.0 eq 80",     // 15
		"SOCKD5 @=10.0.4.5 ::/0 http,https proto=tcp", // 16
		"DIRECT 2001:db8::/32 by=address",             // 17
		"DIRECT * ge 50000 by=address",                // 18
	)
	for text, line := range map[string]int{
		"10.9.9.9:1":                           3,
		"10.9.9.8:1":                           4,
		"udp 10.9.9.8:1":                       4,
		"11.0.0.1:25":                          5,
		"mail.example:25":                      5,
		"[2001:db8::1]:25":                     5,
		"11.0.0.1:135":                         6,
		"11.0.0.1:139":                         6,
		"11.0.0.1:140":                         0,
		"11.0.0.1:445":                         6,
		"a.private-net.example:1":              7,
		"a.b.c.private-net.example:1":          7,
		"private-net.example:99":               0,
		"aprivate-net.example:99":              0,
		"www.public.example:99":                8,
		"ftp.public.example:99":                9,
		"ftp.public.example:22":                0,
		"udp 11.0.0.1:99 from 10.7.1.1":        10,
		"udp 11.0.0.1:99 from ::ffff:10.7.1.1": 10,
		"udp [2001:db9::1]:99 from fd07::1":    10,
		"11.0.0.1:99 from 10.7.1.1":            0,
		"udp 11.0.0.1:99 from 10.8.1.1":        0,
		"udp some.example:99 from 10.7.1.1":    10,
		"some.example:9":                       11,
		"11.0.0.1:9":                           0,
		"some.example:60001 by br1":            12,
		"some.example:60001 by br2":            0,
		"some.example:60000 by br1":            0,
		"11.0.0.1:60001 by br0":                12,
		"a.list.example:1000":                  13,
		"exact.list.example:1000":              13,
		"203.0.113.7:1000":                     13,
		"192.0.2.9:1000":                       0,
		"192.0.2.10:1000":                      14,
		"192.0.2.20:1000":                      14,
		"192.0.2.21:1000":                      0,
		"11.0.0.1:80":                          15,
		"[::ffff:11.0.0.1]:80":                 15,
		"some.example:80":                      15,
		"udp some.example:80":                  15,
		"[2001:db8::1]:80":                     16,
		"[2001:db8::1]:443":                    16,
		"some.example:443":                     16,
		"11.0.0.1:443":                         0,
		"udp [2001:db8::1]:443":                17,
		"[2001:db8::1]:444":                    17,
		"[2001:db9::1]:50000":                  18,
		"11.0.0.1:65535":                       18,
		"some.example:65535":                   0,
		"10.0.0.1:25":                          4,
	} {
		want := "DEFAULT"
		if line > 0 {
			want = fmt.Sprintf("socks.cnf:%d", line)
		}
		if got := table.Match(to(t, text)).Position(); got != want {
			t.Errorf("%s: %s, want %s", text, got, want)
		}
	}
	// An address that is not known is matched by catch-alls alone.
	if r := table.Match(flow.Flow{Dst: netip.AddrPortFrom(netip.Addr{}, 80)}); r.Position() != "socks.cnf:15" {
		t.Error(r.Position())
	}
}

func TestDefault(t *testing.T) {
	table := mustParse(t, "DEFAULT DIRECT log tag=rest", "DENY 10.0.0.0/8")
	r := table.Match(to(t, "11.0.0.1:1"))
	if r.Action != Direct || !r.Log || r.Tag != "rest" || r.Position() != "socks.cnf:1" || r.Index != 1 {
		t.Errorf("%+v", r)
	}
	if r = table.Match(to(t, "10.0.0.1:1")); r.Action != Deny {
		t.Error("DEFAULT is not last")
	}
}

func TestImplicit(t *testing.T) {
	table := mustParse(t, "SOCKD5 @=10.0.4.1 10.0.0.0/8", "DENY *")
	own := []netip.Prefix{netip.MustParsePrefix("10.0.0.1/32")}
	for text, want := range map[string]string{
		"127.0.0.1:1": "loopback", "[::1]:1": "loopback", "169.254.1.1:1": "link-local", "[fe80::1]:1": "link-local",
		"224.0.0.1:1": "multicast", "[ff02::1]:1": "multicast", "255.255.255.255:1": "broadcast",
		"10.0.0.1:22": "own", "10.0.4.1:1080": "server 10.0.4.1", "10.0.4.1:1081": "", "udp 10.0.4.1:1080": "", "10.0.0.2:22": "",
	} {
		r, why := table.MatchAll(to(t, text), own)
		if !strings.Contains(why, want) || (want == "") != (why == "") || (r == nil) != (why != "") {
			t.Errorf("%s: %v, %q; want %q", text, r, why, want)
		}
	}
	if l := table.Implicit(own); !slices.Contains(l, "DIRECT 10.0.4.1 eq 1080 proto=tcp  # server 10.0.4.1") || !slices.Contains(l, "DIRECT 10.0.0.1  # this host") {
		t.Error(l)
	}
}

func TestCovered(t *testing.T) {
	for rules, want := range map[string]string{
		"DIRECT 10.0.0.0/8\nDENY 10.1.0.0/16":                                  "2:1 E22",
		"DIRECT 10.1.0.0/16\nDENY 10.0.0.0/8":                                  "",
		"DIRECT *\n DENY www.example.org":                                      "2:2 E22",
		"DIRECT *.example.org\nDENY www.example.org\nDENY *.a.example.org":     "2:1 E22 3:1 E22",
		"DIRECT *.example.org\nDENY example.org":                               "",
		"DIRECT * proto=tcp\nDENY * proto=udp":                                 "",
		"DIRECT * 1-100\nDENY * 50-60\nDENY * 50-101":                          "2:1 E22",
		"DIRECT * src=10.0.0.0/8\nDENY * src=10.1.0.0/16\nDENY * src=11.0.0.1": "2:1 E22",
		"DIRECT * if=a,b\nDENY * if=a\nDENY * if=a,c":                          "2:1 E22",
		"DIRECT * by=name\nDENY 10.0.0.0/8\nDENY www.example.org":              "3:1 E22",
		"DIRECT 0.0.0.0/0\nDENY *":                                             "",
		"DIRECT 0.0.0.0/0\nDIRECT ::/0\nDENY *":                                "3:1 E22",
		"DIRECT 10.0.0.0/9\nDIRECT 10.128.0.0/9\nDENY 10.0.0.0/8":              "", // together; not looked for
	} {
		if _, ds := parse(rules, nil); strings.Join(short(ds), " ") != want {
			t.Errorf("%q: %v, want %q", rules, short(ds), want)
		}
	}
}

// reference is Match in the plainest way.
func reference(t *Table, f flow.Flow) *Rule {
	for _, r := range t.rules {
		if !r.matchesPort(&f) || !r.matchesClient(&f) {
			continue
		}
		hit := false
		if f.Name != "" {
			hit = r.dest.anyName || slices.Contains(slices.Collect(r.dest.names.all()), f.Name) ||
				slices.ContainsFunc(slices.Collect(r.dest.suffixes.all()), func(s string) bool { return strings.HasSuffix(f.Name, "."+s) })
		} else {
			hit = slices.ContainsFunc(r.dest.prefixes, func(p netip.Prefix) bool { return p.Contains(f.Dst.Addr()) })
		}
		if hit {
			return r
		}
	}
	panic("the DEFAULT matches everything")
}

// randomRules returns rules in which much overlaps.
func randomRules(rnd *rand.Rand, n int) string {
	var b strings.Builder
	pick := func(words ...string) string { return words[rnd.IntN(len(words))] }
	for range n {
		action := pick("DIRECT ", "DENY ", "SOCKD5 @=192.0.2.1 ")
		b.WriteString(action)
		switch rnd.IntN(8) {
		case 0:
			b.WriteString("*")
		case 1:
			b.WriteString(pick("*.a.example", "b.a.example", ".example", "*.b.a.example", "c.example"))
		case 2:
			fmt.Fprintf(&b, "fd00:%x::/%d", rnd.IntN(4), pickBits(rnd, 0, 16, 30, 31, 32, 128))
		case 3:
			from := rnd.IntN(200)
			fmt.Fprintf(&b, "10.0.0.%d-10.0.%d.%d", from, rnd.IntN(3), from+rnd.IntN(50))
		default:
			fmt.Fprintf(&b, "10.%d.%d.0/%d", rnd.IntN(4), rnd.IntN(4), pickBits(rnd, 0, 7, 8, 14, 15, 16, 23, 24, 32))
		}
		b.WriteString(pick("", "", "", " 80,443", " 1-1023", " ne 22", " ge 1024"))
		proto := pick("", "", "", " proto=tcp", " proto=udp")
		b.WriteString(proto)
		if action[0] == 'S' && proto != " proto=tcp" {
			b.WriteString(pick("", "", "", " udp=deny", " udp=direct", " udp=socks"))
		}
		b.WriteString(pick("", "", "", "", " src=10.7.0.0/16", " if=a", " if=a,b src=10.7.1.0/24,fd07::/16",
			" uid=1", " uid=1,2 gid=3", " gid=3", " cgroup=/s", " cgroup=w.service", " cgroup=/s/x,u uid=2", " mark=0x1", " mark=0x10/0x30,2",
			" mac=00:00:5e:00:53:01", " mac=00:00:5e:00:53:01,00:00:5e:00:53:02 if=a", " src=10.6.0.0/16 uid=1"))
		if action[:2] == "DE" {
			b.WriteString(pick("", "", " reject=icmp", " reject=drop", " reject=reset", " reject=dns-refused"))
		}
		b.WriteString("\n")
	}
	if rnd.IntN(2) == 0 {
		b.WriteString("DEFAULT DIRECT\n")
	}
	return b.String()
}

func pickBits(rnd *rand.Rand, n ...int) int { return n[rnd.IntN(len(n))] }

func randomFlow(rnd *rand.Rand) (f flow.Flow) {
	f.Network = flow.Network(rnd.IntN(2))
	f.Src = netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, byte(6 + rnd.IntN(2)), byte(rnd.IntN(3)), 1}), 1)
	f.InIf = []string{"", "a", "b", "c"}[rnd.IntN(4)]
	f.Mark = []uint32{0, 1, 2, 0x10, 0x11, 0x30}[rnd.IntN(6)]
	if f.InIf == "" {
		f.Owner = flow.Owner{Known: true, UID: rnd.Uint32N(3), GID: 2 + rnd.Uint32N(2), Cgroup: []string{"/", "/s", "/s/x", "/s/x/y", "/u/w.service", "/t/u/z"}[rnd.IntN(6)]}
	} else {
		f.MAC = flow.MAC{2: 0x5e, 4: 0x53, 5: byte(rnd.IntN(3))}
	}
	dst := netip.AddrFrom4([4]byte{10, byte(rnd.IntN(5)), byte(rnd.IntN(5)), byte(rnd.IntN(256))})
	switch rnd.IntN(4) {
	case 0:
		dst = netip.AddrFrom16([16]byte{0: 0xfd, 3: byte(rnd.IntN(5)), 15: byte(rnd.IntN(2))})
	case 1:
		f.Name = []string{"a.example", "b.a.example", "c.b.a.example", "c.example", "example", "x.y.z"}[rnd.IntN(6)]
	}
	f.Dst = netip.AddrPortFrom(dst, []uint16{22, 80, 443, 1023, 1024, 5000}[rnd.IntN(6)])
	return f
}

func TestMatchIsFirstMatch(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	for range 300 {
		table := mustParse(t, randomRules(rnd, 1+rnd.IntN(30)))
		for range 200 {
			f := randomFlow(rnd)
			if got, want := table.Match(f), reference(table, f); got != want {
				t.Fatalf("%+v: %s, want %s", f, got.Position(), want.Position())
			}
		}
	}
}

// outcome is what becomes of a flow in the packet filter.
type outcome struct {
	action Action
	reject Reject // of DENY
	rule   *Rule  // nil: not told
}

// kernelDecides returns what the packet filter does with a flow, and whether
// the block that says so is final.
func kernelDecides(blocks []Block, f flow.Flow) (a Action, final bool) {
	for i := range blocks {
		if o, ok := kernelAction(blocks[i:i+1], f); ok {
			return o.action, blocks[i].Final
		}
	}
	return Deny, false
}

// kernelAction decides a flow as the packet filter would.
func kernelAction(blocks []Block, f flow.Flow) (o outcome, ok bool) {
	for _, b := range blocks {
		r := Rule{Protocols: b.Network, Ports: b.Ports, Client: b.Client}
		if !r.matchesPort(&f) || !r.matchesClient(&f) {
			continue
		}
		n := 0
		for i, list := range [][]Range{b.Direct, b.Proxy, b.Deny, b.ICMP, b.Drop} {
			for _, r := range list {
				if r.From.BitLen() == f.Dst.Addr().BitLen() && !f.Dst.Addr().Less(r.From) && !r.To.Less(f.Dst.Addr()) {
					n++
					o = []outcome{{action: Direct}, {action: Socks5}, {}, {reject: RejectICMP}, {reject: RejectDrop}}[i]
					if i != 1 {
						o.rule = r.Rule
					}
				}
			}
		}
		if n > 0 {
			return o, n == 1
		}
	}
	return o, false
}

// wanted is the outcome that the rules want.
func wanted(r *Rule, n flow.Network) outcome {
	switch a := r.ActionFor(n); {
	case a == Direct:
		return outcome{action: a, rule: r}
	case a != Deny:
		return outcome{action: Socks5}
	case r.Action == Deny && (r.Reject == RejectICMP || r.Reject == RejectDrop):
		return outcome{Deny, r.Reject, r}
	default:
		return outcome{Deny, RejectReset, r}
	}
}

// otherAction decides a packet that is neither TCP nor UDP as the packet filter
// would: such a packet has no ports and is in no block of one of the two.
func otherAction(blocks []Block, f flow.Flow) (outcome, bool) {
	return kernelAction(slices.DeleteFunc(slices.Clone(blocks), func(b Block) bool { return b.Network != AnyProtocol || len(b.Ports) > 0 }), f)
}

// otherRule is the first rule for such a packet.
func otherRule(t *Table, f flow.Flow) *Rule {
	return reference(&Table{rules: slices.DeleteFunc(slices.Clone(t.rules), (*Rule).partial)}, f)
}

// checkKernel compares what the kernel would do with Match, for flows at the
// edges of the rules' ranges and for random ones.
func checkKernel(t testing.TB, table *Table, random int) {
	t.Helper()
	blocks := table.Kernel()
	rnd := rand.New(rand.NewPCG(3, 4))
	check := func(f flow.Flow) {
		f.Name = ""
		if !f.Dst.Addr().IsValid() {
			return
		}
		got, ok := kernelAction(blocks, f)
		if want := table.Match(f); !ok || got != wanted(want, f.Network) {
			t.Fatalf("%+v: the kernel says %v (%v), the rules %v by %s", f, got, ok, wanted(want, f.Network), want.Position())
		}
		// What is neither TCP nor UDP no rule with servers carries, nor lets pass.
		other, ok := otherAction(blocks, f)
		if want := otherRule(table, f); !ok || other != wanted(want, flow.TCP) {
			t.Fatalf("%+v, neither TCP nor UDP: the kernel says %v (%v), the rules %v by %s", f, other, ok, want.Action, want.Position())
		}
	}
	for _, r := range table.rules {
		for _, p := range r.dest.prefixes[:min(len(r.dest.prefixes), 20)] {
			for _, a := range []netip.Addr{p.Addr(), p.Addr().Prev(), lastOf(p), lastOf(p).Next()} {
				f := randomFlow(rnd)
				f.Dst = netip.AddrPortFrom(a, f.Dst.Port())
				check(f)
			}
		}
	}
	for range random {
		check(randomFlow(rnd))
	}
}

func TestKernelDecidesAsMatch(t *testing.T) {
	rnd := rand.New(rand.NewPCG(5, 6))
	for range 500 {
		checkKernel(t, mustParse(t, randomRules(rnd, 1+rnd.IntN(40))), 200)
	}
}

// TestKernelBlocksOfUDP: where rules do otherwise with UDP, and only there, a
// block for it stands in front of the one for all else.
func TestKernelBlocksOfUDP(t *testing.T) {
	for rules, want := range map[string]string{
		"SOCKD5 @=192.0.2.1 10.1.0.0/16 udp=direct\nDENY 10.0.0.0/15": "udp direct [{10.1.0.0 10.1.255.255}] deny [{10.0.0.0 10.0.255.255}] proxy []" +
			"; any direct [] deny [{10.0.0.0 10.0.255.255}] proxy [{10.1.0.0 10.1.255.255}]",
		"SOCKD5 @=192.0.2.1 10.1.0.0/16 udp=deny\nDIRECT 10.1.0.0": "udp direct [] deny [{10.1.0.0 10.1.255.255}] proxy []; any direct [] deny [] proxy [{10.1.0.0 10.1.255.255}]",
		"SOCKD5 @=192.0.2.1 10.1.0.0/16 proto=udp udp=deny":        "udp direct [] deny [{10.1.0.0 10.1.255.255}] proxy []",
		"SOCKD5 @=192.0.2.1 10.1.0.0/16 proto=udp":                 "udp direct [] deny [] proxy [{10.1.0.0 10.1.255.255}]",
		"SOCKD5 @=192.0.2.1 10.1.0.0/16 udp=socks":                 "any direct [] deny [] proxy [{10.1.0.0 10.1.255.255}]",
		"SOCKD5 @=192.0.2.1 10.1.0.0/16 proto=tcp":                 "tcp direct [] deny [] proxy [{10.1.0.0 10.1.255.255}]",
	} {
		var got []string
		blocks := mustParse(t, rules+"\nDENY * eq 1").Kernel()
		for _, b := range blocks[:len(blocks)-2] {
			got = append(got, fmt.Sprint([]string{"any", "tcp", "udp"}[b.Network], " direct ", b.Direct, " deny ", b.Deny, " proxy ", b.Proxy))
		}
		if got := strings.Join(got, "; "); got != want {
			t.Errorf("%q:\n got %s\nwant %s", rules, got, want)
		}
	}
}

// TestKernelKeepsLogApart: however many ranges a list has, those of a rule that says
// log are told apart from others.
func TestKernelKeepsLogApart(t *testing.T) {
	var rules []string
	for i := range maxApart {
		rules = append(rules, fmt.Sprintf("DIRECT 10.%d.%d.0/25", i/256, i%256), fmt.Sprintf("DIRECT 10.%d.%d.128/25", i/256, i%256))
	}
	rules[6] += " log"
	b := mustParse(t, rules...).Kernel()[0]
	var logged []string
	for _, r := range b.Direct {
		if r.Rule != nil {
			logged = append(logged, r.String()+" "+r.Rule.Text)
		}
	}
	if got := fmt.Sprint(len(b.Direct), logged); got != "3 [{10.0.3.0 10.0.3.127} DIRECT 10.0.3.0/25 log]" {
		t.Error(got)
	}
}

func TestKernelBlocks(t *testing.T) {
	table := mustParse(t, "DENY 10.1.2.3", "SOCKD5 @=192.0.2.1 www.example.org", "SOCKD5 @=192.0.2.1 10.1.0.0/16", "DIRECT 10.0.0.0/8", "DENY * eq 25", "SOCKD5 @=192.0.2.1 *")
	blocks := table.Kernel()
	if len(blocks) != 3 || len(blocks[0].Rules) != 3 || len(blocks[2].Rules) != 2 {
		t.Fatalf("%d blocks: %+v", len(blocks), blocks)
	}
	want := "[{10.0.0.0 10.0.255.255} {10.2.0.0 10.255.255.255}] [{10.1.2.3 10.1.2.3}] [{10.1.0.0 10.1.2.2} {10.1.2.4 10.1.255.255}]"
	if got := fmt.Sprint(blocks[0].Direct, blocks[0].Deny, blocks[0].Proxy); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

func TestMatchAllocatesNothing(t *testing.T) {
	table := bigTable(t, 1000)
	named, addr := to(t, "www.h500.example.org:80 from 10.7.0.1"), to(t, "11.0.5.5:80 from 10.7.0.1")
	if n := testing.AllocsPerRun(100, func() { table.Match(named); table.Match(addr) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// bigTable has n rules, half for names and half for networks.
func bigTable(tb testing.TB, n int) *Table {
	var b strings.Builder
	b.WriteString("DENY * eq 25\n")
	for i := range n / 2 {
		fmt.Fprintf(&b, "SOCKD5 @=192.0.2.1 *.h%d.example.org\n", i)
		fmt.Fprintf(&b, "DIRECT %d.%d.%d.0/24\n", 11+i>>16, i>>8&255, i&255)
	}
	b.WriteString("SOCKD5 @=192.0.2.2 *\n")
	return mustParse(tb, b.String())
}

func BenchmarkMatch(b *testing.B) {
	for _, n := range []int{1, 1000, 100_000} {
		table := bigTable(b, n)
		for _, bb := range []struct{ name, flow string }{{"name", "www.h400.example.org:80"}, {"address", "11.0.200.9:80"}, {"default", "www.elsewhere.example:80"}} {
			f := to(b, bb.flow)
			b.Run(fmt.Sprintf("%s/%d", bb.name, n), func(b *testing.B) {
				b.ReportAllocs()
				for b.Loop() {
					table.Match(f)
				}
			})
		}
	}
}

func BenchmarkParse(b *testing.B) {
	for _, n := range []int{1000, 100_000} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			for b.Loop() {
				bigTable(b, n)
			}
		})
	}
}

func BenchmarkKernel(b *testing.B) {
	table := bigTable(b, 200_000)
	for b.Loop() {
		table.Kernel()
	}
}
