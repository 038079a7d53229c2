package daemon

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http/httptest"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tproxyd/tproxyd/internal/control"
	"github.com/tproxyd/tproxyd/pkg/redirect"
	"github.com/tproxyd/tproxyd/pkg/routes"
)

// TestRun is a daemon's life: it gets ready, carries and refuses flows, stops
// and leaves the closed table, which the next one takes over.
func TestRun(t *testing.T) {
	before := kernel(t)
	goroutines := runtime.NumGoroutine()
	r := serve(t, "")
	if line := <-r.lines; line != "tproxyd: ready: interfaces [], this host's own flows, 3 rules, 1 servers" {
		t.Errorf("ready: %q", line)
	}
	c := carried(t)
	refused(t, denied)
	if s := r.Status(); s.Flows.Live != 1 || s.Flows.Proxied != 1 || s.Kernel.Error != "" || s.Kernel.Diverted.Packets == 0 || s.Rules[1].Flows != 1 {
		t.Errorf("status: %+v", s)
	}

	r.stop()
	r.hears("STOPPING=1")
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("a proxied flow outlives the daemon")
	}
	refused(t, far)
	refused(t, denied)
	if len(r.lines) != 0 {
		t.Error("Ready was called twice")
	}

	second := serveIn(t, r.dir)
	carried(t).Close()
	second.stop()
	refused(t, far)
	if err := redirect.Remove(); err != nil {
		t.Fatal(err)
	}
	same(t, "the kernel afterwards", before, kernel(t))

	// Three goroutines are the test's, those that serve SOCKS, echo and DNS.
	for end := time.Now().Add(patience); runtime.NumGoroutine() > goroutines+3; runtime.Gosched() {
		if time.Now().After(end) {
			pprof.Lookup("goroutine").WriteTo(os.Stderr, 1)
			t.Fatalf("%d goroutines, there were %d", runtime.NumGoroutine(), goroutines)
		}
	}
}

// TestFailOpen: what is to be open after a normal stop has nothing of ours.
func TestFailOpen(t *testing.T) {
	before := kernel(t)
	r := serve(t, "fail = \"open\"")
	carried(t).Close()
	if during := kernel(t); !strings.Contains(during, "tproxyd") {
		t.Fatalf("no table while it runs:\n%s", during)
	}
	r.stop()
	same(t, "the kernel afterwards", before, kernel(t))
}

// TestReload: a signal puts new rules in force; a file with an error, or a key
// that cannot change, changes nothing; proxied flows go on.
func TestReload(t *testing.T) {
	r := serve(t, "")
	c := carried(t)
	good, err := os.ReadFile(filepath.Join(r.dir, "socks.cnf"))
	if err != nil {
		t.Fatal(err)
	}
	r.routes("DIRCET *\n")
	if s := r.Status(); s.Reloads != (reloadCount{Refused: 1}) {
		t.Errorf("after an error: %+v", s.Reloads)
	}
	carried(t).Close()
	var diags routes.Diagnostics
	if err := r.Reload(); !errors.As(err, &diags) || diags[0].Code != "E01" {
		t.Errorf("Reload: %v", err)
	}
	r.hears("RELOADING=1")
	r.hears("READY=1")

	r.routes("TIMEOUT dns=9s\n" + string(good))
	if s := r.Status(); s.Reloads != (reloadCount{Refused: 3}) || !strings.Contains(r.log.String(), "TIMEOUT dns=; restart") {
		t.Errorf("after a key that cannot change: %+v", s.Reloads)
	}

	if line := r.routes("DENY *\n"); !strings.HasSuffix(line, ", 2 rules, 0 servers") {
		t.Errorf("systemd heard %q", line)
	}
	if s := r.Status(); s.Reloads != (reloadCount{Done: 1, Refused: 3}) || len(s.Rules) != 2 || len(s.Servers) != 0 {
		t.Errorf("after new rules: %+v", s)
	}
	refused(t, far)
	echoes(t, c)

	r.routes(string(good))
	echoes(t, carried(t))
	echoes(t, c)
}

// TestNames: a name gets an address that stands for it, over restarts too, and
// a flow to it goes by that name.
func TestNames(t *testing.T) {
	r := serve(t, "")
	at := ask(t, "www.example.org.")
	if !r.setup.Config.DNS.Pool4.Contains(netip.MustParseAddr(at)) {
		t.Fatalf("%s is not synthetic", at)
	}
	c, err := client(t, at+":80")
	if err != nil {
		t.Fatal(err)
	}
	echoes(t, c)
	c.Close()
	r.stop()
	second := serveIn(t, r.dir)
	if again := ask(t, "www.example.org."); again != at {
		t.Errorf("%s after a restart, %s before", again, at)
	}
	second.stop()
	if want := "host=www.example.org"; !strings.Contains(r.log.String(), want) {
		t.Errorf("no %s in the log", want)
	}
}

// TestAdmitted: the addresses of a DIRECT name are let pass, a reload that
// leaves it DIRECT keeps them, one that does not takes them back (R11).
func TestAdmitted(t *testing.T) {
	const direct = "DIRECT direct.example\n"
	r := serve(t, "")
	r.routes(direct + "DENY *\n")
	admitted := func() (list []string) {
		t.Helper()
		in, err := r.inForce()
		if err != nil {
			t.Fatal(err)
		}
		for _, a := range in {
			list = append(list, a.Addr.String())
		}
		return list
	}
	if at := ask(t, "direct.example."); at != directAt {
		t.Fatalf("direct.example is at %s", at)
	}
	same(t, "admitted", []string{directAt}, admitted())
	r.routes(direct + "DENY *.example.org\nDENY *\n")
	same(t, "still DIRECT", []string{directAt}, admitted())
	r.routes("DIRCET *\n")
	same(t, "after an error", []string{directAt}, admitted())
	r.routes("DENY *\n")
	same(t, "no longer DIRECT", []string(nil), admitted())
}

// TestMetrics: Prometheus accepts them all, and neither they nor the status
// hold a secret.
func TestMetrics(t *testing.T) {
	r := serve(t, "")
	carried(t).Close()
	refused(t, denied)
	answer := httptest.NewRecorder()
	r.metricsHandler().ServeHTTP(answer, httptest.NewRequest("GET", "/metrics", nil))
	text := answer.Body.String()
	if answer.Code != 200 {
		t.Fatalf("%d: %s", answer.Code, text)
	}
	seen := map[string]bool{}
	for _, line := range strings.Split(text, "\n") {
		if i := strings.LastIndexByte(line, ' '); i > 0 && line[0] != '#' {
			if seen[line[:i]] {
				t.Errorf("twice: %s", line)
			}
			seen[line[:i]] = true
		}
	}
	for _, want := range []string{
		`tproxyd_flows_total{action="proxied"} 1`, `tproxyd_flows_total{action="direct"} 0`, `tproxyd_upstream_up{server="s"} 1`,
		`tproxyd_upstream_flows_total{server="s"} 1`, `tproxyd_reloads_total{result="done"} 0`, `tproxyd_flows_refused_total{reason="loop"} 0`,
	} {
		if !strings.Contains("\n"+text, "\n"+want+"\n") {
			t.Errorf("no %s", want)
		}
	}
	status, err := json.Marshal(r.Status())
	if err != nil {
		t.Fatal(err)
	}
	for name, s := range map[string]string{"metrics": text, "status": string(status), "log": r.log.String()} {
		if strings.Contains(s, secret) || strings.Contains(s, "operator") {
			t.Errorf("the %s tell a secret:\n%s", name, s)
		}
	}
}

// TestControl: the socket offers what the daemon does.
func TestControl(t *testing.T) {
	r := serve(t, "")
	c := control.NewClient(filepath.Join(r.dir, "control.sock"))
	b, err := c.Status(t.Context())
	var s Status
	if err = errors.Join(err, json.Unmarshal(b, &s)); err != nil || s.Config != filepath.Join(r.dir, "tproxyd.toml") {
		t.Errorf("status: %v, %s", err, b)
	}
	if err := c.Reload(t.Context()); err != nil {
		t.Errorf("reload: %v", err)
	}
	os.WriteFile(filepath.Join(r.dir, "socks.cnf"), []byte("DIRCET *\n"), 0o600)
	var refused *control.Refused
	if err := c.Reload(t.Context()); !errors.As(err, &refused) || !strings.Contains(refused.Text, "socks.cnf:1:1: error E01") {
		t.Errorf("reload of an error: %v", err)
	}
	if b, err := c.Metrics(t.Context()); err != nil || !bytes.Contains(b, []byte("tproxyd_flows")) {
		t.Errorf("metrics: %v, %s", err, b)
	}
}

// TestSecond: a second daemon fails and does the first one no harm.
func TestSecond(t *testing.T) {
	r := serve(t, "")
	setup, _ := Load(filepath.Join(r.dir, "tproxyd.toml"), "")
	if _, err := New(setup, slog.New(slog.DiscardHandler)); !errors.Is(err, redirect.ErrInUse) {
		t.Errorf("the second: %v, want %v", err, redirect.ErrInUse)
	}
	carried(t)
	if _, err := control.NewClient(filepath.Join(r.dir, "control.sock")).Status(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestNewFails: it leaves the kernel as it was, with or without a table.
func TestNewFails(t *testing.T) {
	taken := listen(t, "127.0.0.1:0")
	defer taken.Close()
	dir := write(t, map[string]string{
		"tproxyd.toml":     fmt.Sprintf(toml, "", "203.0.113.53") + fmt.Sprintf("metrics = %q\n", taken.Addr()),
		"credentials.toml": office, "socks.cnf": fmt.Sprintf(rules, "127.0.0.1:9"), "state/.keep": "",
	})
	setup, diags := Load(filepath.Join(dir, "tproxyd.toml"), "")
	if diags.HasErrors() {
		t.Fatal(diags)
	}
	defer redirect.Remove()
	for _, closed := range []bool{false, true} {
		if closed {
			if err := CloseTable(setup); err != nil {
				t.Fatal(err)
			}
			refused(t, far)
		}
		before := kernel(t)
		if _, err := New(setup, slog.New(slog.DiscardHandler)); !errors.Is(err, syscall.EADDRINUSE) {
			t.Errorf("error %v, want EADDRINUSE", err)
		}
		after := kernel(t)
		same(t, fmt.Sprintf("the kernel, closed before: %v", closed), before, after)
		if _, err := os.Stat(filepath.Join(dir, "control.sock")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the control socket: %v", err)
		}
	}
}
