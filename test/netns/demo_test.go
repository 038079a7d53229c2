package netns_test

import (
	"os"
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
	before := h.kernel(t) + links()
	r := h.run(t, command{args: []string{program(t), "demo"}, env: []string{"TMPDIR=" + temp}, limit: time.Minute}).ok(t)
	t.Logf("%v\n%s%s", r.took.Round(time.Millisecond), r.out, r.err)
	text := strings.ToLower(r.out)
	for _, want := range []string{"198.18.", "socks.cnf:", "sockd5", "deny", "http"} {
		if !strings.Contains(text, want) {
			t.Errorf("the demo does not show %q", want)
		}
	}
	if after := h.kernel(t) + links(); after != before {
		t.Errorf("the demo left something in the kernel:\n%s", lineDiff(before, after))
	}
	left, err := os.ReadDir(temp)
	if err != nil || len(left) != 0 {
		t.Errorf("the demo left files: %v %v", left, err)
	}
	// Twice is no harm.
	h.run(t, command{args: []string{program(t), "demo"}, env: []string{"TMPDIR=" + temp}, limit: time.Minute}).ok(t)
}
