package netns_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Topology: the demo makes its own, inside a machine that has nothing:
//
//	machine (lo) [ demo: client -- gateway -- SOCKS server + web ]

func TestDemo(t *testing.T) {
	t.Parallel()
	h := newHost(t, "machine")
	h.settle(t)
	links := func() string {
		return h.run(t, command{args: []string{tool(t, "ip"), "-o", "link"}}).ok(t).out +
			h.run(t, command{args: []string{tool(t, "ip"), "netns", "list"}}).ok(t).out
	}
	temp := h.dir + "/tmp"
	h.must(t, os.Mkdir(temp, 0o777))
	// A path of its own, to know its processes by.
	bin := h.dir + "/tproxyd"
	h.must(t, os.Link(program(t), bin))
	before := h.kernel(t) + links()
	r := h.run(t, command{args: []string{bin, "demo"}, env: []string{"TMPDIR=" + temp}, limit: time.Minute}).ok(t)
	t.Logf("%v\n%s%s", r.took.Round(time.Millisecond), r.out, r.err)
	// The question, the answer, the rule with its line, the server, the page;
	// then DENY; in this order.
	text := r.out
	for _, want := range []string{"A www.example.org", "198.18.0.1", "socks.cnf:4: SOCKD5", "www.example.org:80", "<h1>www.example.org", "verdict       SOCKD5",
		"ads.example.org", "socks.cnf:3: DENY", "reset", "verdict       DENY", "killed", "refused"} {
		_, rest, ok := strings.Cut(text, want)
		if !ok {
			t.Errorf("the demo does not show %q where it should", want)
			continue
		}
		text = rest
	}
	if left := running(t, bin); len(left) != 0 {
		t.Errorf("the demo left processes: %v", left)
	}
	if after := h.kernel(t) + links(); after != before {
		t.Errorf("the demo left something in the kernel:\n%s", lineDiff(before, after))
	}
	left, err := os.ReadDir(temp)
	if err != nil || len(left) != 0 {
		t.Errorf("the demo left files: %v %v", left, err)
	}
	// Twice is no harm.
	h.run(t, command{args: []string{bin, "demo"}, env: []string{"TMPDIR=" + temp}, limit: time.Minute}).ok(t)
}

// running returns the processes that run a program.
func running(t testing.TB, path string) (pids []string) {
	t.Helper()
	all, err := filepath.Glob("/proc/[0-9]*/exe")
	if err != nil {
		t.Fatal(err)
	}
	for _, exe := range all {
		if target, err := os.Readlink(exe); err == nil && target == path {
			pids = append(pids, filepath.Base(filepath.Dir(exe)))
		}
	}
	return pids
}
