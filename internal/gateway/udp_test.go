package gateway_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tproxyd/tproxyd/internal/socksserver"
	"github.com/tproxyd/tproxyd/pkg/flow"
	"github.com/tproxyd/tproxyd/pkg/relay"
	"github.com/tproxyd/tproxyd/pkg/socks"
)

const clientAt = "10.7.0.1:4000"

// TestDecideUDP: what becomes of the datagrams of one flow, and what is counted
// and pinned meanwhile.
func TestDecideUDP(t *testing.T) {
	const servers = "SERVER a 192.0.2.1:1080\nSERVER b 192.0.2.2:1080\n"
	v4, v6, named := "203.0.113.5:7000", "[2001:db8::5]:7000", wwwAt+":7000"
	header := func(t flow.Target) string {
		b, err := socks.AppendUDPHeader(nil, t)
		if err != nil {
			panic(err)
		}
		return string(b)
	}
	v4Header := header(flow.Target{Addr: netip.MustParseAddr("203.0.113.5"), Port: 7000})
	const denied, refused = relay.RefuseProhibited, relay.RefusePort
	for _, tt := range []struct {
		rules, dst string
		ifIndex    int
		prepare    func(*lab)

		refusal relay.Refusal
		counted string // reason; empty: there is a way
		header  string
		named   bool
		short   bool
		idle    time.Duration
		rule    string // empty: none was asked
	}{
		{rules: "DENY *", dst: v4, refusal: denied, counted: "denied", rule: "socks.cnf:1"},
		{rules: "DIRECT 10.0.0.0/8", dst: v4, refusal: denied, counted: "denied", rule: "DEFAULT"},
		{rules: "DENY *.example.org\nDIRECT *", dst: named, refusal: denied, counted: "denied", rule: "socks.cnf:1"},
		{rules: "DENY * proto=udp\nDIRECT *", dst: v4, refusal: denied, counted: "denied", rule: "socks.cnf:1"},
		{rules: "DENY * proto=tcp\nDIRECT *", dst: v4, rule: "socks.cnf:2"},
		{rules: "DENY * eq 7000\nDIRECT *", dst: v4, refusal: denied, counted: "denied", rule: "socks.cnf:1"},
		{rules: "DIRECT *", dst: "127.198.9.9:7000", refusal: refused, counted: "unowned"},
		{rules: "DIRECT *", dst: v4, prepare: func(l *lab) { l.own = netip.MustParseAddr("203.0.113.5") }, refusal: refused, counted: "loop"},

		{rules: "DIRECT *", dst: v4, rule: "socks.cnf:1"},
		{rules: "DIRECT *", dst: named, rule: "socks.cnf:1"},
		{rules: servers + "SOCKD5 @=a *", dst: v4, header: v4Header, rule: "socks.cnf:3"},
		{rules: servers + "SOCKD5 @=a *", dst: "[::ffff:203.0.113.5]:7000", header: v4Header, rule: "socks.cnf:3"},
		{rules: servers + "SOCKD5 @=a *", dst: v6, header: header(flow.Target{Addr: netip.MustParseAddr("2001:db8::5"), Port: 7000}), rule: "socks.cnf:3"},
		{rules: servers + "SOCKD5 @=a *", dst: named, header: header(flow.Target{Name: "www.example.org", Port: 7000}), named: true, rule: "socks.cnf:3"},
		{rules: servers + "DENY 127.198.0.0/16\nSOCKD5 @=a *", dst: named, header: header(flow.Target{Name: "www.example.org", Port: 7000}), named: true, rule: "socks.cnf:4"},
		{rules: servers + "SOCKD5 @=a *", dst: "203.0.113.5:53", header: header(flow.Target{Addr: netip.MustParseAddr("203.0.113.5"), Port: 53}), short: true, rule: "socks.cnf:3"},
		{rules: "DIRECT *", dst: "203.0.113.5:53", short: true, rule: "socks.cnf:1"},
		{rules: servers + "SOCKD5 @=a * udp=deny\nDIRECT *", dst: v4, refusal: denied, counted: "denied", rule: "socks.cnf:3"},
		{rules: servers + "SOCKD5 @=a * udp=direct\nDENY *", dst: v4, rule: "socks.cnf:3"},
		{rules: servers + "SOCKD5 @=a *.example.org udp=direct\nDENY *", dst: named, rule: "socks.cnf:3"},
		{rules: servers + "SOCKD5 @=a *.example.org udp=deny\nDIRECT *", dst: named, refusal: denied, counted: "denied", rule: "socks.cnf:3"},

		{rules: "DENY * if=guest\nDIRECT *", dst: v4, ifIndex: 1, rule: "socks.cnf:2"},
		{rules: "DENY * if=guest\nDIRECT *", dst: v4, ifIndex: 2, refusal: denied, counted: "denied", rule: "socks.cnf:1"},
		{rules: "DENY * if=guest\nDIRECT *", dst: named, ifIndex: 2, refusal: denied, counted: "denied", rule: "socks.cnf:1"},
		{rules: "DENY * if=guest\nDIRECT *", dst: v4, ifIndex: 9, prepare: func(l *lab) { l.interfaceError = errors.New("it is gone") }, refusal: refused, counted: "upstream"},
		{rules: "DENY * src=10.8.0.0/16\nDIRECT *", dst: v4, ifIndex: 9, prepare: func(l *lab) { l.interfaceError = errors.New("nobody asks") }, rule: "socks.cnf:2"},
		{rules: "DENY * src=10.7.0.0/16\nDIRECT *", dst: v4, refusal: denied, counted: "denied", rule: "socks.cnf:1"},

		{rules: "DENY * uid=4000\nDIRECT *", dst: v4, refusal: denied, counted: "denied", rule: "socks.cnf:1"},
		{rules: "DENY * uid=4000\nDIRECT *", dst: v4, ifIndex: 1, rule: "socks.cnf:2"},
		{rules: "DENY * mark=5\nDIRECT *", dst: named, ifIndex: 1, refusal: denied, counted: "denied", rule: "socks.cnf:1"},
		{rules: "DENY * uid=1\nDIRECT *", dst: v4, prepare: func(l *lab) { l.whoError = errors.New("not noted") }, refusal: refused, counted: "upstream"},
		{rules: "DENY * src=10.8.0.0/16\nDIRECT *", dst: v4, prepare: func(l *lab) { l.whoError = errors.New("nobody asks") }, rule: "socks.cnf:2"},
		{rules: "DENY *\nEXCLUDE-MODULE vpn", dst: v4, prepare: func(l *lab) { l.program = "vpn" }, rule: "socks.cnf:2"},
		{rules: "DENY *\nEXCLUDE-MODULE vpn", dst: named, prepare: func(l *lab) { l.program = "vpn" }, rule: "socks.cnf:2"},
		{rules: "DENY *\nEXCLUDE-MODULE vpn", dst: v4, prepare: func(l *lab) { l.program = "ssh" }, refusal: denied, counted: "denied", rule: "socks.cnf:1"},
		{rules: "DENY *\nEXCLUDE-MODULE vpn", dst: v4, prepare: func(l *lab) { l.programError = errors.New("not allowed") }, refusal: refused, counted: "upstream"},
		{rules: "DENY *\nEXCLUDE-MODULE vpn", dst: v4, ifIndex: 1, prepare: func(l *lab) { l.program = "vpn" }, refusal: denied, counted: "denied", rule: "socks.cnf:1"},
		{rules: servers + "SOCKD5 @=a * timeout=7s", dst: v4, header: v4Header, idle: 7 * time.Second, rule: "socks.cnf:3"},
		{rules: "DENY * reject=drop", dst: v4, refusal: relay.RefuseSilently, counted: "denied", rule: "socks.cnf:1"},
		{rules: "DENY * reject=icmp", dst: v4, refusal: denied, counted: "denied", rule: "socks.cnf:1"},
	} {
		t.Run(strings.ReplaceAll(tt.rules, "\n", "; ")+" "+tt.dst, func(t *testing.T) {
			l := newLab(t, slog.LevelDebug, socksserver.Fault{}, tt.rules)
			l.names.owner[netip.MustParseAddr(wwwAt)] = "www.example.org"
			if tt.prepare != nil {
				tt.prepare(l)
			}
			v := l.DecideUDP(netip.MustParseAddrPort(clientAt), netip.MustParseAddrPort(tt.dst), tt.ifIndex)
			if (v.Way != nil) != (tt.counted == "") || v.Refusal != tt.refusal || string(v.Header) != tt.header || v.Named != tt.named || v.Short != tt.short || v.Idle != tt.idle {
				t.Errorf("%+v", v)
			}
			rule := ""
			if r, ok := v.Why.(interface{ Position() string }); ok {
				rule = r.Position()
			}
			if rule != tt.rule {
				t.Errorf("decided by %q, want %q", rule, tt.rule)
			}
			for reason, n := range l.Stats().Refused {
				if want := reason == tt.counted; n == 1 != want {
					t.Errorf("%d refused as %s", n, reason)
				}
			}
			if left, _ := l.names.balance(); left == 1 != (tt.dst == named && v.Way != nil) || left == 1 != (v.Release != nil) {
				t.Errorf("%d addresses are pinned", left)
			}
			if v.Release != nil {
				v.Release()
			}
			if left, _ := l.names.balance(); left != 0 {
				t.Errorf("%d addresses are still pinned", left)
			}
			hits := uint64(0)
			for _, r := range l.Rules() {
				hits += r.Flows
			}
			if (hits == 1) != (tt.rule != "") {
				t.Errorf("%d hits", hits)
			}
		})
	}
}

// Flows of one session share an outlet if and only if the same servers stand in
// both rules, also after a reload.
func TestUDPKeys(t *testing.T) {
	const rules = `SERVER a 192.0.2.1:1080
SERVER b 192.0.2.2:1080
SOCKD5 @=a 203.0.113.1
SOCKD5 @=a 203.0.113.2
SOCKD5 @=a,b 203.0.113.3
SOCKD5 @=a,b 203.0.113.4 balance=random
DIRECT *`
	l := newLab(t, slog.LevelInfo, socksserver.Fault{}, rules)
	key := func(dst string) string {
		t.Helper()
		v := l.DecideUDP(netip.MustParseAddrPort(clientAt), netip.MustParseAddrPort(dst), 1)
		if v.Way == nil {
			t.Fatalf("%s is refused", dst)
		}
		return v.Way.Key
	}
	var before []string
	dsts := []string{"203.0.113.1:7000", "203.0.113.1:7001", "203.0.113.2:7000", "203.0.113.3:7000", "203.0.113.4:7000", "203.0.113.1:53", "203.0.113.9:7000", "203.0.113.9:7001"}
	for _, dst := range dsts {
		before = append(before, key(dst))
	}
	if before[0] != before[1] || before[0] != before[2] {
		t.Errorf("one server has several keys: %q", before[:3])
	}
	distinct := slices.Clone(before)
	slices.Sort(distinct)
	if len(slices.Compact(distinct)) != 6 {
		t.Errorf("keys %q", before)
	}
	l.Swap(l.plan(socksserver.Fault{}, rules))
	for i, dst := range dsts {
		if got := key(dst); got != before[i] {
			t.Errorf("%s has key %q, had %q before the reload", dst, got, before[i])
		}
	}
	l.Swap(l.plan(socksserver.Fault{}, strings.ReplaceAll(rules, "192.0.2.1", "192.0.2.7")))
	if key(dsts[0]) == before[0] {
		t.Error("another server has the key of the one before")
	}
	// Of a name the plan has a say in which of its addresses it may be.
	l.names.owner[netip.MustParseAddr(wwwAt)] = "www.example.org"
	direct := key(wwwAt + ":7000")
	l.Swap(l.plan(socksserver.Fault{}, rules))
	if key(wwwAt+":7000") == direct {
		t.Error("what a name was dialled at by an earlier plan goes on")
	}
}

// A datagram goes there and back: through a server by address and by name, and
// directly by both.
func TestUDPEndToEnd(t *testing.T) {
	for _, udp := range []socksserver.UDP{{}, {OwnOnly: true}, {Names: true}, {AskedOnly: true}, {Bound: netip.MustParseAddrPort("0.0.0.0:0")}, {BoundName: "relay.example"}} {
		t.Run(fmt.Sprintf("%+v", udp), func(t *testing.T) {
			l := newUDPLab(t, slog.LevelDebug, socksserver.Fault{}, udp,
				"SERVER far $S", "DENY 127.20.0.4", "DIRECT 127.20.0.2", "SOCKD5 @=far *")
			l.names.owner[netip.MustParseAddr(wwwAt)] = "www.example.org"
			for range 3 {
				l.echoes(clientAt, l.to("127.20.0.3"), "by address")
				l.echoes(clientAt, l.to("127.20.0.2"), "directly")
				l.echoes(clientAt, l.to(wwwAt), "by name")
				l.put(clientAt, l.to("127.20.0.4"), "denied")
				l.refuses(l.to("127.20.0.4"), relay.RefuseProhibited)
			}
			if c := l.servers[0].Counts(); c.Total != 1 || c.Up != 6 || c.Down != 6 {
				t.Errorf("the server has %+v", c)
			}
			if r := <-l.requests; r.Network != flow.UDP {
				t.Errorf("the server was asked for %+v", r)
			}
			s := l.packets.Stats()
			if s.Sessions != 1 || s.Flows != 4 || s.Outlets != 2 || s.Refused != 3 || s.Dropped["stranger"] != 0 {
				t.Errorf("%+v", s)
			}
			l.ends()
			line := l.flow()
			for key, want := range map[string]string{
				"msg": "session", "level": "DEBUG", "src": clientAt, "dst": l.to("127.20.0.3"), "upstream": "far",
				"destinations": "4", "rules": "socks.cnf:4 socks.cnf:3 socks.cnf:2", "datagrams_up": "12", "datagrams_down": "9",
			} {
				if got := fmt.Sprint(line[key]); got != want {
					t.Errorf("log: %s is %q, want %q", key, got, want)
				}
			}
		})
	}
}

// A DIRECT name is dialled at the first of its addresses that no earlier rule
// takes, and never at this host itself.
func TestUDPDirectByName(t *testing.T) {
	const rules = "SERVER far 192.0.2.9:1080\nDENY 127.20.0.3\nSOCKD5 @=far 192.0.2.0/24\nDIRECT *"
	for _, c := range []struct {
		addrs   string
		dial    error
		want    string // where it was dialled; empty: nowhere
		refused bool
	}{
		{addrs: "203.0.113.1", want: "203.0.113.1"},
		{addrs: "203.0.113.1 203.0.113.2", want: "203.0.113.1"},
		{addrs: "192.0.2.1 203.0.113.2", want: "203.0.113.2"},
		{addrs: "192.0.2.1", refused: true},
		{addrs: "127.0.0.1 ::1 0.0.0.0 127.198.0.9", refused: true},
		{addrs: "", refused: true},
		{addrs: "error", refused: true},
		{addrs: "203.0.113.1", dial: syscall.ENETUNREACH, want: "203.0.113.1", refused: true},
	} {
		t.Run(c.addrs, func(t *testing.T) {
			l := newUDPLab(t, slog.LevelInfo, socksserver.Fault{}, socksserver.UDP{}, rules)
			l.names.owner[netip.MustParseAddr(wwwAt)] = "www.example.org"
			l.resolve = func(_ context.Context, name string) (list []netip.Addr, err error) {
				if c.addrs == "error" || name != "www.example.org" {
					return nil, fmt.Errorf("no %s", name)
				}
				for _, a := range strings.Fields(c.addrs) {
					list = append(list, netip.MustParseAddr(a))
				}
				return list, nil
			}
			l.dial = func(netip.AddrPort) error { return c.dial }
			l.put(clientAt, l.to(wwwAt), "hello")
			if c.refused {
				l.refuses(l.to(wwwAt), relay.RefusePort)
			} else {
				l.hears(clientAt, l.to(wwwAt), "hello")
			}
			var got string
			for _, a := range l.dials() {
				got += a.String()
			}
			if got != c.want {
				t.Errorf("dialled %q, want %q", got, c.want)
			}
			l.ends()
		})
	}
}
