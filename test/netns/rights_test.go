package netns_test

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"
)

// Topology: world. Others than root ask the daemon.

// TestControlRights: whoever the socket's group lets in may read; to change
// something it takes root. Nobody else gets so far.
func TestControlRights(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	startMicrosocks(t, w.socks1, socks1At+":1080")
	d := serve(t, w.gateway, settings{routes: "SOCKD5 @=198.51.100.11 *\n"})
	flows := w.startEchoes(t, 1)
	const member, stranger = 65001, 65002
	if err := os.Chown(d.socket(), -1, member); err != nil { // a group like that which the package makes
		t.Fatal(err)
	}
	as := func(user, group int, method, path string) string {
		t.Helper()
		r := w.gateway.run(t, command{args: []string{tool(t, "setpriv"), fmt.Sprint("--reuid=", user), fmt.Sprint("--regid=", group), "--clear-groups",
			tool(t, "curl"), "-sS", "--unix-socket", d.socket(), "-X", method, "-o", "/dev/null", "-w", "%{http_code}", "http://tproxyd" + path}})
		if r.code != 0 {
			return strings.TrimSpace(r.err)
		}
		return r.out
	}
	id := d.flow(t)
	for _, tt := range []struct {
		user, group  int
		method, path string
		want         string
	}{
		{member, member, "GET", "/status", "200"},
		{member, member, "GET", "/flows", "200"},
		{member, member, "GET", "/metrics", "200"},
		{member, member, "POST", "/reload", "403"},
		{member, member, "POST", "/takeover", "403"},
		{member, member, "DELETE", fmt.Sprint("/flows/", id), "403"},
		{member, member, "PUT", "/status", "403"},
		{stranger, stranger, "GET", "/status", "Permission denied"},
		{0, 0, "POST", "/reload", "200"},
	} {
		got := as(tt.user, tt.group, tt.method, tt.path)
		if got != tt.want && !(strings.HasPrefix(got, "curl:") && tt.want == "Permission denied") {
			t.Errorf("user %d: %s %s: %s, want %s", tt.user, tt.method, tt.path, got, tt.want)
		}
	}
	by := func(args ...string) result {
		return w.gateway.run(t, command{args: append([]string{tool(t, "setpriv"), fmt.Sprint("--reuid=", stranger), fmt.Sprint("--regid=", stranger), "--clear-groups", d.bin}, args...)})
	}
	if r := by("status", "--socket", d.socket()).exit(t, 1); !strings.Contains(r.err, "root may ask") || strings.Contains(r.err, "hint") {
		t.Errorf("status of a stranger: %q", r.err)
	}
	if r := by("doctor", "--socket", d.socket()).exit(t, 1); strings.Count(r.out, "why:") != 1 || !strings.Contains(r.out, "run this as root") {
		t.Errorf("doctor of a stranger: %q", r.out)
	}
	if n := d.metric(t, `tproxyd_reloads_total{result="done"}`); n != 1 {
		t.Errorf("%v reloads, want that of root alone", n)
	}
	flows.finish(t)
}

// flow returns the ID of a flow that is being carried.
func (d *daemon) flow(t testing.TB) (id uint64) {
	t.Helper()
	eventually(t, 5*time.Second, "a flow is carried", func() bool {
		var list []struct{ ID uint64 }
		if err := json.Unmarshal([]byte(d.ask(t, "/flows")), &list); err != nil {
			t.Fatal(err)
		}
		for _, f := range list {
			id = f.ID
		}
		return id != 0
	})
	return id
}

// troubled waits until status tells of a trouble.
func (d *daemon) troubled(t testing.TB, what string) {
	t.Helper()
	var told string
	eventually(t, 10*time.Second, "status tells of "+what, func() bool {
		var s struct{ Trouble []string }
		if err := json.Unmarshal([]byte(d.ask(t, "/status")), &s); err != nil {
			t.Fatal(err)
		}
		told = strings.Join(s.Trouble, "\n")
		return strings.Contains(told, what)
	})
	if out := d.cli(t, "status", "-c", d.config).ok(t).out; !strings.Contains(out, "TROUBLE  ") || !strings.Contains(out, what) {
		t.Errorf("status does not tell of %s:\n%s", what, out)
	}
}
