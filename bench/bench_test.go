package main

import (
	"bytes"
	"context"
	"fmt"
	"math"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TestMain plays a role where the lab of a test runs this binary again.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		if play, ok := roles()[os.Args[1]]; ok {
			if err := play(os.Args[2:], os.Stdout); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
			os.Exit(0)
		}
	}
	os.Exit(m.Run())
}

func TestParseStat(t *testing.T) {
	for _, test := range []struct {
		line string
		want time.Duration
		bad  bool
	}{
		{line: "42 (tproxyd) S 1 2 3 4 5 6 7 8 9 10 150 50 0 0 20 0", want: 2 * time.Second},
		{line: "42 (a) b) (c) S 1 2 3 4 5 6 7 8 9 10 1 0 0 0", want: 10 * time.Millisecond},
		{line: "42 (a) S 1 2", bad: true},
		{line: "", bad: true},
		{line: "42 (a) S 1 2 3 4 5 6 7 8 9 10 x 0 0", bad: true},
	} {
		got, err := parseStat(test.line)
		if got != test.want || (err != nil) != test.bad {
			t.Errorf("parseStat(%q) = %v, %v", test.line, got, err)
		}
	}
}

func TestParseRSS(t *testing.T) {
	got, err := parseRSS("Name:\tx\nVmRSS:\t    1234 kB\nThreads: 1\n")
	if err != nil || got != 1234<<10 {
		t.Errorf("%d, %v", got, err)
	}
	if _, err := parseRSS("Name: x\n"); err == nil {
		t.Error("no error without VmRSS")
	}
}

func TestQuantile(t *testing.T) {
	var r result
	all := make([]time.Duration, 101)
	for i := range all {
		all[len(all)-1-i] = time.Duration(i)
	}
	r.timesFrom(all)
	if r.P50 != 50 || r.P99 != 99 {
		t.Errorf("p50 %d, p99 %d of 0..100", r.P50, r.P99)
	}
	r.timesFrom(nil)
	if r.P50 != 0 {
		t.Errorf("p50 of nothing is %v", r.P50)
	}
}

func TestTable(t *testing.T) {
	var out bytes.Buffer
	tab := newReport(&out).table("Title", "", "a", "long column")
	tab.row("x", spread{2, 1, 3}, 0.12345)
	tab.row("row", spread{5, 5, 5})
	tab.row("none", over(nil, nil), math.Inf(1))
	tab.end()
	want := `## Title

|      | a                | long column |
|------|------------------|-------------|
| x    | 2.00 (1.00-3.00) | 0.123       |
| row  | 5.00             |             |
| none | -                | -           |

`
	if d := cmp.Diff(want, out.String()); d != "" {
		t.Error(d)
	}
}

func TestSpread(t *testing.T) {
	runs := []sample{{cpu: 3}, {cpu: 1}, {cpu: 2}, {cpu: 10}}
	got := over(runs, func(s sample) float64 { return float64(s.cpu) })
	if got != (spread{2.5, 1, 10}) {
		t.Errorf("%+v", got)
	}
}

// TestQuestions: what the load generator asks and what the yardstick answers
// is DNS for somebody else's eyes, too.
func TestQuestions(t *testing.T) {
	q := appendQuestion(nil, 7, 42)
	var m dns.Msg
	if err := m.Unpack(q); err != nil || m.Question[0].Name != "host42.bench.example." || m.Question[0].Qtype != dns.TypeA {
		t.Fatalf("%v: %v", err, m)
	}
	a := appendAnswer(q)
	if err := m.Unpack(a); err != nil || len(m.Answer) != 1 || m.Answer[0].(*dns.A).A.String() != "192.0.2.1" || m.Id != 7 || !m.Response {
		t.Fatalf("%v: %v", err, m)
	}
	if id, ok := answered(a); id != 7 || !ok {
		t.Errorf("answered: %d %t", id, ok)
	}
	for _, bad := range [][]byte{nil, q[:11], appendQuestion(nil, 1, 1)} {
		if _, ok := answered(bad); ok {
			t.Errorf("%x counts as an answer", bad)
		}
	}
}

func TestDirectRules(t *testing.T) {
	const n = 1000
	rules := strings.Split(strings.TrimSpace(directRules(n)), "\n")
	if len(rules) != n+1 || rules[n-1] != "DIRECT 203.0.113.13/32" || !strings.HasPrefix(rules[n], "SOCKD5 ") {
		t.Errorf("%d lines, the last ones %q", len(rules), rules[len(rules)-2:])
	}
}

// TestLab measures plain forwarding and the bare relay in a small way: what
// the report compares with must itself be right.
//
//	client --+-- plain ---+-- server
//	         '-- splice --'
func TestLab(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	l, err := newLab()
	if err != nil {
		t.Fatalf("run it as root: %v", err)
	}
	defer l.close()
	targets, err := startRole(ctx, l.server, "targets")
	if err != nil {
		t.Fatal(err)
	}
	defer targets.stop()
	if err := l.gateways[splice].Do(divert); err != nil {
		t.Fatal(err)
	}
	b := &bench{size: short(), lab: l, report: newReport(t.Output())}
	if b.gateway[splice], err = startRole(ctx, l.gateways[splice], "splice"); err != nil {
		t.Fatal(err)
	}
	defer b.gateway[splice].stop()
	through := func(w way, port uint16, args ...string) sample {
		t.Helper()
		s, err := b.through(ctx, w, append(args, "-to", w.target(port).String())...)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%v %v: %+v", w, args, s)
		return s
	}
	for _, w := range []way{plain, splice} {
		for kind, port := range map[string]uint16{"up": sinkPort, "down": sourcePort} {
			if s := through(w, port, "load", "-kind", kind, "-n", "4", "-time", "200ms"); s.Bytes < 1<<20 {
				t.Errorf("%v %s: %d bytes", w, kind, s.Bytes)
			}
		}
		if s := through(w, echoPort, "load", "-kind", "connect", "-n", "300", "-parallel", "16"); s.Count != 300 || s.Failed != 0 {
			t.Errorf("%v connect: %+v", w, s)
		}
		if s := through(w, echoPort, "load", "-kind", "ping", "-n", "200"); s.Count != 200 || s.P50 <= 0 {
			t.Errorf("%v ping: %+v", w, s)
		}
	}
	if s := through(plain, dnsPort, "dns", "-n", "500"); s.Count != 500 || s.Failed != 0 {
		t.Errorf("dns: %+v", s)
	}

	// A flood is sent whole, and its flow is tracked where that is meant.
	if err := l.gateways[tracked].Do(track); err != nil {
		t.Fatal(err)
	}
	for w, want := range map[way]int{plain: 0, tracked: 1} {
		if s := through(w, discardPort, "load", "-kind", "flood", "-n", "1000"); s.Sent < 1000 || s.Spent <= 0 || s.Spent > s.Elapsed+time.Second {
			t.Errorf("flood by way of %v: %+v", w, s)
		}
		if err := l.gateways[w].Do(func() error {
			flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, netlink.InetFamily(unix.AF_INET))
			if len(flows) != want {
				t.Errorf("%d connections are tracked by way of %v, want %d", len(flows), w, want)
			}
			return err
		}); err != nil {
			t.Fatal(err)
		}
	}

	// The relay is really in the path: each idle flow is descriptors of its.
	before, err := b.gateway[splice].descriptors()
	if err != nil {
		t.Fatal(err)
	}
	idle, err := startRole(ctx, l.client, "idle", splice.target(idleEchoPort).String())
	if err != nil {
		t.Fatal(err)
	}
	defer idle.stop()
	var r result
	if err := idle.ask("40", &r); err != nil || r.Count != 40 {
		t.Fatalf("idle: %+v, %v", r, err)
	}
	after, err := b.gateway[splice].descriptors()
	if err != nil || after-before < 80 {
		t.Errorf("40 flows are %d descriptors: %v", after-before, err)
	}
}
