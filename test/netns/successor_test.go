package netns_test

import (
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tproxyd/tproxyd/internal/control"
)

// serving is the process that answers for the daemon.
func (d *daemon) serving(t testing.TB) (p control.Process) {
	t.Helper()
	if err := json.Unmarshal([]byte(d.ask(t, "/process")), &p); err != nil {
		t.Fatal(err)
	}
	return p
}

// TestReloadUpgrade: by reload --upgrade a program file of another version takes the
// daemon's place, and no flow is cut; the same one reads the files, and one that
// cannot leaves the daemon as it was.
func TestReloadUpgrade(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	startMicrosocks(t, w.socks1, socks1At+":1080")
	d := serve(t, w.gateway, settings{routes: "SOCKD5 @=198.51.100.11 *\n"})
	w.outside.answerTCP(t, outsideAt+":7", func(c *net.TCPConn) { io.Copy(c, c) })
	flow, err := w.client.dial("tcp", outsideAt+":7", 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	talk(t, flow)
	next := filepath.Join(w.gateway.dir, "next")
	out, err := exec.Command("go", "build", "-ldflags", "-X main.version=v9", "-o", next, "github.com/tproxyd/tproxyd/cmd/tproxyd").CombinedOutput()
	if err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	// upgrade runs it; what the new process prints goes to a file, as to a journal.
	upgrade := func(program string) (r result, printed string) {
		t.Helper()
		log := filepath.Join(w.gateway.dir, "upgrade.log")
		r = w.gateway.run(t, command{args: []string{"/bin/sh", "-c", `exec "$0" reload --upgrade -c "$1" >"$2" 2>&1`, program, d.config, log}, env: d.env()})
		b, err := os.ReadFile(log)
		w.gateway.must(t, err)
		return r, string(b)
	}
	first := d.serving(t)
	if first.Pid != d.pid() || first.Args[1] != "serve" {
		t.Errorf("%+v answers, not %d", first, d.pid())
	}

	if r, printed := upgrade(d.bin); r.code != 0 || d.serving(t).Pid != first.Pid || !strings.Contains(d.output(), "reloaded") {
		t.Errorf("the same program: exit %d, %s", r.code, printed)
	}

	config, err := os.ReadFile(d.config)
	w.gateway.must(t, err)
	w.gateway.file(t, "tproxyd.toml", strings.Replace(string(config), "local = false", "table = 99", 1), 0o644)
	if r, printed := upgrade(next); r.code != 2 || !strings.Contains(printed, "changed: [intercept] table") || !strings.Contains(printed, "tproxyd: version v9 cannot take over") {
		t.Errorf("what cannot take over: exit %d, %s", r.code, printed)
	}
	w.gateway.file(t, "tproxyd.toml", string(config), 0o644)
	w.gateway.file(t, "socks.cnf", "nonsense\n", 0o644)
	if r, printed := upgrade(next); r.code != 2 || !strings.Contains(printed, "error E01") {
		t.Errorf("with wrong rules: exit %d, %s", r.code, printed)
	}
	d.routes(t, "SOCKD5 @=198.51.100.11 *\n")
	talk(t, flow)
	if now := d.serving(t); now.Pid != first.Pid {
		t.Fatalf("after that %+v serves", now)
	}

	old := d.process
	r, printed := upgrade(next)
	now := d.serving(t)
	t.Cleanup(func() { syscall.Kill(now.Pid, syscall.SIGKILL) })
	if r.code != 0 || now.Pid == first.Pid || now.Version != "v9" || !strings.Contains(printed, "has taken over") {
		t.Fatalf("exit %d, %+v serves, %s", r.code, now, printed)
	}
	talk(t, flow)
	w.client.curl(t, "http://www.example.org/upgraded", "-4").ok(t)
	if out := d.cli(t, "status", "-c", d.config).ok(t).out; !strings.Contains(out, "version v9, process") {
		t.Errorf("status says\n%s", out)
	}
	flow.Close()
	if code, ended := old.wait(20 * time.Second); !ended || code != 0 {
		t.Errorf("the first: ended %v, exit %d", ended, code)
	}
	syscall.Kill(now.Pid, syscall.SIGTERM)
	eventually(t, 15*time.Second, "the new process ends when it is told to", func() bool { return syscall.Kill(now.Pid, 0) == syscall.ESRCH })
}

// TestTakeoverRemembers: a server that is at fault is not asked anew by the process
// that takes over; counters go on where they were, and count what the process before
// still carries, also when that has ended.
func TestTakeoverRemembers(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	startMicrosocks(t, w.socks2, socks2At+":1080") // nobody is at the first
	d := serve(t, w.gateway, settings{resolvers: []string{outsideNS},
		routes: "SERVER one 198.51.100.11\nSERVER two 198.51.100.12\nHEALTH badexpire=10m\nDIRECT " + outsideAt + " eq 80\nSOCKD5 @=one,two *\n"})
	w.outside.answerTCP(t, outsideAt+":7", func(c *net.TCPConn) { io.Copy(c, c) })
	w.client.curl(t, "http://www.example.org/", "-4").ok(t)
	w.client.curl(t, "http://"+outsideAt+"/").fetched(t, clientAt)
	flow, err := w.client.dial("tcp", outsideAt+":7", 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer flow.Close()
	talk(t, flow)
	eventually(t, 5*time.Second, "one flow is left", func() bool { return d.metric(t, "tproxyd_flows") == 1 })
	rule := func(name string, line int, more string) string {
		return fmt.Sprintf(`tproxyd_rule_%s{action="%s",%srule="%s:%d"}`, name, map[int]string{4: "DIRECT", 5: "SOCKD5"}[line], more, filepath.Join(w.gateway.dir, "socks.cnf"), line)
	}
	up := rule("bytes_total", 5, `direction="up",`)
	const direct = `tproxyd_kernel_packets_total{verdict="direct"}` // neighbours look for one another too
	quiet := []string{                                              // while nobody comes
		`tproxyd_flows_total{action="proxied"}`, rule("flows_total", 5, ""), up, rule("kernel_bytes_total", 4, ""), `tproxyd_flow_bytes_total{direction="down"}`,
		`tproxyd_upstream_flows_total{server="two"}`, `tproxyd_upstream_failure_seconds_count{server="one"}`, `tproxyd_upstream_answer_seconds_count{server="two"}`,
		`tproxyd_dns_questions_total{answer="synthetic"}`, `tproxyd_kernel_packets_total{verdict="diverted"}`, direct,
	}
	before := map[string]float64{}
	for _, name := range quiet {
		if before[name] = d.metric(t, name); before[name] == 0 {
			t.Errorf("%s is 0", name)
		}
	}
	old := d.takeover(t)
	same := func(when string) {
		t.Helper()
		for _, name := range quiet {
			if now := d.metric(t, name); now != before[name] && (name != direct || now < before[name]) {
				t.Errorf("%s: %s was %v and is %v", when, name, before[name], now)
			}
		}
	}
	same("taken over")
	if d.metric(t, `tproxyd_upstream_up{server="one"}`) != 0 {
		t.Error("the server that is at fault is not known to be")
	}
	w.client.curl(t, "http://www.example.org/again", "-4").ok(t)
	if now, was := d.metric(t, `tproxyd_upstream_failure_seconds_count{server="one"}`), before[`tproxyd_upstream_failure_seconds_count{server="one"}`]; now != was {
		t.Errorf("the server that is at fault was asked by a flow: %v times, then %v", was, now)
	}
	eventually(t, 5*time.Second, "one flow is left", func() bool { return d.metric(t, "tproxyd_flows") == 0 })

	began := d.metric(t, up)
	const more = 100_000
	flow.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := flow.Write(make([]byte, more)); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(flow, make([]byte, more)); err != nil {
		t.Fatal(err)
	}
	eventually(t, 20*time.Second, "what the process before carries is counted", func() bool { return d.metric(t, up) == began+more })
	talk(t, flow)
	flow.Close()
	if code, ended := old.wait(20 * time.Second); !ended || code != 0 {
		t.Errorf("the process before: ended %v, exit %d", ended, code)
	}
	eventually(t, 20*time.Second, "what it has counted last is counted", func() bool { return d.metric(t, up) == began+more+5 })
	for _, name := range quiet {
		before[name] = d.metric(t, name)
	}
	d.takeover(t)
	same("taken over again")
}
