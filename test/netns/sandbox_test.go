package netns_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// Topology: world.

// TestSandboxed: a serving daemon is in the sandbox with each of its threads, and
// reload, lists, state and a successor go on; with sandbox = false it is not.
func TestSandboxed(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	startMicrosocks(t, w.socks1, socks1At+":1080")
	d := serve(t, w.gateway, settings{routes: "SOCKD5 @=" + socks1At + " *\n"})
	if strings.Contains(d.output(), "sandbox is weaker") {
		t.Errorf("it says\n%s", d.output())
	}
	d.threads(t, "Seccomp:\t2")
	d.threads(t, "NoNewPrivs:\t1")
	w.client.curl(t, "http://www.example.org/").fetched(t, socks1Out, socks1Out6, socks1At)

	d.host.file(t, "list", "www.example.org\n", 0o644)
	d.routes(t, "LIST l file=list\nDENY $l\nSOCKD5 @="+socks1At+" *\n")
	d.reload(t)
	w.client.curl(t, "http://www.example.org/").refused(t)
	if got, err := os.ReadFile(filepath.Join(d.set.state, "decided-by")); err != nil || len(got) == 0 {
		t.Errorf("the state directory: %q %v", got, err)
	}
	d.stop(t)

	b, err := os.ReadFile(d.config)
	w.gateway.must(t, err)
	d.host.file(t, "tproxyd.toml", "sandbox = false\n"+string(b), 0o644)
	d.start(t)
	d.threads(t, "Seccomp:\t0")
}

// threads wants a line in the status of every thread of the daemon.
func (d *daemon) threads(t *testing.T, line string) {
	t.Helper()
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", d.pid()))
	if err != nil || len(tasks) < 2 {
		t.Fatalf("threads: %v %v", tasks, err)
	}
	for _, task := range tasks {
		if b, err := os.ReadFile(task); err == nil && !strings.Contains(string(b), line+"\n") {
			t.Errorf("%s has no %q:\n%s", task, line, b)
		}
	}
}
