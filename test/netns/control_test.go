package netns_test

import (
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
	serving "github.com/tproxyd/tproxyd/internal/daemon"
)

// Topology: world. The daemon is asked over its control socket and, for
// metrics, from the LAN.

// ask asks the running daemon over its control socket.
func (d *daemon) ask(t testing.TB, path string) string {
	t.Helper()
	var dialer net.Dialer
	c := http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", d.socket())
		},
	}}
	r, err := c.Get("http://tproxyd" + path)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	b, err := io.ReadAll(r.Body)
	if err != nil || r.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s %v\n%s", path, r.Status, err, b)
	}
	return string(b)
}

// metric reads one metric, spelled with its labels, from the control socket.
func (d *daemon) metric(t testing.TB, name string) float64 {
	t.Helper()
	text := d.ask(t, "/metrics")
	for line := range strings.Lines(text) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), name+" "); ok {
			f, err := strconv.ParseFloat(value, 64)
			if err != nil {
				t.Fatal(err)
			}
			return f
		}
	}
	t.Fatalf("no metric %s in\n%s", name, text)
	return 0
}

func TestMetrics(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	startMicrosocks(t, w.socks1, socks1At+":1080")
	d := serve(t, w.gateway, settings{metrics: lanAt + ":9470", routes: "SERVER one 198.51.100.11\nDENY *.denied.example\nSOCKD5 @=one *\n"})
	for range 3 { // one family, since curl may try both at once
		w.client.curl(t, "http://www.example.org/metrics", "-4").fetched(t, socks1Out, socks1Out6, socks1At)
	}
	w.client.curl(t, "http://www.denied.example/", "-4").refused(t)
	eventually(t, 5*time.Second, "no flow is left", func() bool { return d.metric(t, "tproxyd_flows") == 0 })
	for name, want := range map[string]float64{
		`tproxyd_flows_total{action="proxied"}`:               3,
		`tproxyd_flows_total{action="direct"}`:                0,
		`tproxyd_flows_refused_total{reason="denied"}`:        1,
		`tproxyd_flows_refused_total{reason="unowned"}`:       0,
		`tproxyd_upstream_up{server="one"}`:                   1,
		`tproxyd_upstream_flows_total{server="one"}`:          3,
		`tproxyd_upstream_faults_total{server="one"}`:         0,
		`tproxyd_upstream_answer_seconds_count{server="one"}`: 3,
		`tproxyd_trouble`:                      0,
		`tproxyd_dns_names`:                    2,
		`tproxyd_reloads_total{result="done"}`: 0,
		`tproxyd_state_errors_total`:           0,
	} {
		if got := d.metric(t, name); got != want {
			t.Errorf("%s %v, want %v", name, got, want)
		}
	}
	for _, name := range []string{`tproxyd_flow_bytes_total{direction="up"}`, `tproxyd_flow_bytes_total{direction="down"}`,
		`tproxyd_kernel_packets_total{verdict="diverted"}`, `tproxyd_dns_questions_total{answer="synthetic"}`,
		`tproxyd_start_time_seconds`, `process_open_fds`} {
		if got := d.metric(t, name); got <= 0 {
			t.Errorf("%s %v, want more", name, got)
		}
	}

	text := d.ask(t, "/metrics")
	if r := w.gateway.run(t, command{args: []string{tool(t, "promtool"), "check", "metrics"}, stdin: text}); r.code != 0 || r.out+r.err != "" {
		t.Errorf("promtool: exit %d\n%s%s", r.code, r.out, r.err)
	}
	for _, address := range []string{clientAt, lanAt, "www.example.org", "www.denied.example"} { // they are without number
		if strings.Contains(text, address) {
			t.Errorf("a metric tells of %s", address)
		}
	}

	inDashboard(t, text)

	// Status says the same, by rule with its position.
	var status struct {
		Rules []struct {
			Position, Text string
			Flows          int
		}
		Flows struct{ Live, Proxied int }
	}
	if err := json.Unmarshal([]byte(d.cli(t, "status", "--json", "-c", d.config).ok(t).out), &status); err != nil {
		t.Fatal(err)
	}
	if status.Flows.Live != 0 || status.Flows.Proxied != 3 || len(status.Rules) < 2 ||
		!strings.HasSuffix(status.Rules[0].Position, "socks.cnf:2") || status.Rules[0].Flows != 1 || status.Rules[1].Flows != 3 {
		t.Errorf("status: %+v", status)
	}

	// The listener for the network has metrics and nothing else.
	at := "http://" + lanAt + ":9470"
	if p := w.client.curl(t, at+"/metrics"); !strings.Contains(p.body, "\ntproxyd_flows_total{action=\"proxied\"} 3\n") {
		t.Errorf("/metrics on [control] metrics:\n%s", p.body)
	}
	for _, args := range [][]string{{at + "/status"}, {at + "/"}, {at + "/reload", "-X", "POST"}} {
		if p := w.client.curl(t, args[0], append(args[1:], "-o", "/dev/null", "-w", "%{http_code}")...); p.body != "404" {
			t.Errorf("%v: %s, want 404", args, p.body)
		}
	}
	if n := d.metric(t, `tproxyd_reloads_total{result="done"}`); n != 0 {
		t.Errorf("the network could reload: %v", n)
	}
}

// inDashboard: deploy/grafana.json asks for metrics that there are, with labels that
// they have, in PromQL.
func inDashboard(t *testing.T, metrics string) {
	t.Helper()
	b, err := os.ReadFile("../../deploy/grafana.json")
	if err != nil {
		t.Fatal(err)
	}
	var board struct {
		Panels []struct {
			ID      int
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(b, &board); err != nil {
		t.Fatal(err)
	}
	name, by := regexp.MustCompile(`tproxyd_[a-z_]+`), regexp.MustCompile(`by \(([a-z, ]+)\)`)
	asked, ids := 0, map[int]bool{}
	rules := "groups:\n- name: board\n  rules:\n"
	for _, p := range board.Panels {
		if ids[p.ID] {
			t.Errorf("two panels have the number %d", p.ID)
		}
		ids[p.ID] = true
		for _, q := range p.Targets {
			asked++
			for _, m := range name.FindAllString(q.Expr, -1) {
				if !strings.Contains(metrics, "\n"+m+"{") && !strings.Contains(metrics, "\n"+m+" ") {
					t.Errorf("%s: there is no metric %s", p.Title, m)
				}
			}
			for _, m := range by.FindAllStringSubmatch(q.Expr, -1) {
				for _, label := range strings.Split(m[1], ", ") {
					if !strings.Contains(metrics, label+"=\"") {
						t.Errorf("%s: no metric has a label %s", p.Title, label)
					}
				}
			}
			expr := strings.NewReplacer("$__rate_interval", "5m", "$instance", ".*").Replace(q.Expr)
			rules += fmt.Sprintf("  - record: panel:%d:%d\n    expr: %q\n", p.ID, asked, expr)
		}
	}
	if asked < 20 {
		t.Errorf("the dashboard asks only %d questions", asked)
	}
	path := filepath.Join(t.TempDir(), "rules.yaml")
	if err := os.WriteFile(path, []byte(rules), 0o644); err != nil {
		t.Fatal(err)
	}
	if out, err := exec.Command(tool(t, "promtool"), "check", "rules", path).CombinedOutput(); err != nil {
		t.Errorf("promtool does not understand the dashboard: %v\n%s", err, out)
	}
}

// TestNoSecrets: a password is in no output, nor where other users of the host can
// read, whether it is from the file or from systemd and the server took it or not.
func TestNoSecrets(t *testing.T) {
	t.Parallel()
	const wrong, systemd = "sword & fish", "from systemd"
	w := newWorld(t)
	for h, p := range map[*host]string{w.socks1: password, w.socks2: systemd} {
		p := h.start(t, command{args: []string{tool(t, "microsocks"), "-i", "::", "-p", "1080", "-u", "int", "-P", p}})
		waitPort(t, h, "127.0.0.1:1080", p.output)
	}
	dir := w.gateway.dir + "/systemd" // as LoadCredential= makes it
	w.gateway.must(t, os.Mkdir(dir, 0o700))
	w.gateway.must(t, os.WriteFile(dir+"/service", fmt.Appendf(nil, "username = \"int\"\npassword = %q\n", systemd), 0o400))
	d := serve(t, w.gateway, settings{args: []string{"--log-level", "debug"}, env: []string{"CREDENTIALS_DIRECTORY=" + dir},
		credentials: fmt.Sprintf("[right]\nusername = \"int\"\npassword = %q\n[wrong]\nusername = \"int\"\npassword = %q\n", password, wrong),
		routes: `SERVER one 198.51.100.11 auth=userpass credential=right
SERVER two 198.51.100.12 auth=userpass credential=wrong
SERVER three 198.51.100.12 credential=service
SOCKD5 @=two * 81
SOCKD5 @=three * 82
SOCKD5 @=two,one *
`})
	w.client.curl(t, "http://www.example.org/secret").fetched(t, socks1Out, socks1Out6, socks1At)
	w.client.curl(t, "http://www.example.org:81/secret").refused(t)
	w.outside.answerTCP(t, outsideAt+":82", whoTCP)
	for range 2 {
		if from, c, err := w.carrier(outsideAt + ":82"); err != nil || from != socks2Out {
			t.Errorf("by the credential of systemd: %q %v", from, err)
		} else {
			defer c.Close() // which flows shows
		}
		d.reload(t)
	}
	outputs := map[string]string{"log": d.output(), "/status": d.ask(t, "/status"), "/metrics": d.ask(t, "/metrics")}
	for _, file := range []string{"cmdline", "environ"} {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", d.pid(), file))
		w.gateway.must(t, err)
		outputs[file] = string(b)
	}
	files, err := os.ReadDir(d.set.state)
	w.gateway.must(t, err)
	for _, f := range files {
		b, err := os.ReadFile(d.set.state + "/" + f.Name())
		w.gateway.must(t, err)
		outputs[f.Name()] = string(b)
	}
	for _, args := range [][]string{
		{"status", "--all", "-c", d.config}, {"status", "--json", "-c", d.config}, {"check", "-v", "-c", d.config},
		{"explain", "-c", d.config, "www.example.org:80"}, {"explain", "-c", d.config, "--json", "www.example.org:80"},
		{"flows", "-c", d.config}, {"flows", "-c", d.config, "--json"}, {"check", "--probe", "-c", d.config},
	} {
		r := d.cli(t, args...)
		if args[1] != "--probe" { // of a server that does not let us in
			r.ok(t)
		}
		outputs[strings.Join(args, " ")] = r.out + r.err
	}
	if !strings.Contains(outputs["log"], "upstream") || !strings.Contains(outputs["/status"], "198.51.100.12") {
		t.Errorf("the outputs are not about these servers:\n%v", outputs)
	}
	for what, text := range outputs {
		for _, secret := range []string{password, wrong, systemd} {
			for _, spelling := range []string{secret, url.QueryEscape(secret), url.PathEscape(secret), base64.StdEncoding.EncodeToString([]byte(secret)),
				fmt.Sprintf("%x", secret), fmt.Sprint([]byte(secret))} {
				if strings.Contains(text, spelling) {
					t.Errorf("%s has a password:\n%s", what, text)
				}
			}
		}
	}
}

// TestReloadWithErrors: the old rules stay, flows go on, and the message says
// what is wrong with each line.
func TestReloadWithErrors(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	startMicrosocks(t, w.socks1, socks1At+":1080")
	d := serve(t, w.gateway, settings{routes: "DENY * 81\nSOCKD5 @=198.51.100.11 *\n"})
	flows := w.startEchoes(t, 4)
	kernel := uncounted(w.gateway.kernel(t))
	refused := d.metric(t, `tproxyd_reloads_total{result="refused"}`)

	d.routes(t, fiftyMistakes())
	d.cli(t, "reload", "-c", d.config).allFifty(t)
	var told struct {
		Result string
		Errors []string
	}
	r := d.cli(t, "reload", "--json", "-c", d.config).exit(t, 2)
	if err := json.Unmarshal([]byte(r.out), &told); err != nil || told.Result != "refused" || len(told.Errors) < 50 || r.err != "" {
		t.Errorf("reload --json: %v, %q, %d errors, standard error %q", err, told.Result, len(told.Errors), r.err)
	}
	d.cmd.Process.Signal(syscall.SIGHUP)
	eventually(t, 5*time.Second, "the signal is followed", func() bool {
		return d.metric(t, `tproxyd_reloads_total{result="refused"}`) == refused+3
	})
	if now := uncounted(w.gateway.kernel(t)); now != kernel {
		t.Errorf("a reload that was refused changed the kernel's state:\n%s", lineDiff(kernel, now))
	}
	w.client.curl(t, "http://www.example.org/old").fetched(t, socks1Out, socks1Out6, socks1At)
	w.client.curl(t, "http://"+outsideAt+":81/old").refused(t)

	d.routes(t, "DENY * 80\nSOCKD5 @=198.51.100.11 *\n")
	if r := d.cli(t, "reload", "--json", "-c", d.config).ok(t); r.out != "{\"result\":\"reloaded\",\"errors\":[]}\n" {
		t.Errorf("reload --json: %q", r.out)
	}
	w.client.curl(t, "http://www.example.org/new").refused(t)
	flows.finish(t)
	if d.metric(t, `tproxyd_reloads_total{result="done"}`) != 1 {
		t.Error("the reload was not counted")
	}
}

var counted = regexp.MustCompile(`packets \d+ bytes \d+`)

// uncounted is a kernel's state without what its counters have counted.
func uncounted(kernel string) string { return counted.ReplaceAllString(kernel, "packets N bytes N") }

// TestUnowned: a flow to a synthetic address that no name has is refused at
// once, asked of no server, and counted.
func TestUnowned(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	startMicrosocks(t, w.socks1, socks1At+":1080")
	d := serve(t, w.gateway, settings{routes: "DIRECT 198.51.100.0/24\nSOCKD5 @=198.51.100.11 *\n"})
	w.client.mustLookup(t, insideNS, "www.example.org", dns.TypeA)
	w.observe(t)
	const looks, flows = `tproxyd_dns_unowned_total`, `tproxyd_flows_refused_total{reason="unowned"}`
	if d.metric(t, looks) != 0 || d.metric(t, flows) != 0 {
		t.Fatal("counted before anything happened")
	}
	nobodys := []string{"198.19.255.1", "198.18.0.0", "fd74:7072:6f78::fff1"}
	for _, a := range nobodys {
		began := time.Now()
		atOnce(t, a, began, w.get(netip.MustParseAddr(a)))
	}
	if d.metric(t, looks) < 3 || d.metric(t, flows) != 3 {
		t.Errorf("counted %v look-ups and %v flows, want 3", d.metric(t, looks), d.metric(t, flows))
	}
	var status struct {
		Flows struct{ Refused map[string]int }
		DNS   struct{ Pool struct{ Unowned int } }
	}
	if err := json.Unmarshal([]byte(d.cli(t, "status", "--json", "--socket", d.socket()).ok(t).out), &status); err != nil {
		t.Fatal(err)
	}
	if status.Flows.Refused["unowned"] != 3 || status.DNS.Pool.Unowned < 3 {
		t.Errorf("status: %+v", status)
	}
	if n, who := w.leaked(t); n != 0 || w.carried(t) != 0 {
		t.Errorf("%d packets leaked, %d went to a server %s", n, w.carried(t), who)
	}
}

// TestDumpState: SIGUSR1 has the running daemon, in its sandbox, write one line with
// all that status tells, and go on.
func TestDumpState(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	startMicrosocks(t, w.socks1, socks1At+":1080")
	d := serve(t, w.gateway, settings{routes: "SERVER one 198.51.100.11\nSOCKD5 @=one *\n", args: []string{"--log-format", "json"}})
	flows := w.startEchoes(t, 2)
	eventually(t, 5*time.Second, "both flows are carried", func() bool { return d.metric(t, "tproxyd_flows") == 2 })
	type state struct {
		Msg, Level string
		Status     serving.Status
	}
	dumps := func() (list []state) {
		for line := range strings.Lines(d.output()) {
			var s state
			if json.Unmarshal([]byte(line), &s) == nil && s.Msg == "state" {
				list = append(list, s)
			}
		}
		return list
	}
	for n := 1; n <= 2; n++ {
		w.gateway.must(t, d.cmd.Process.Signal(syscall.SIGUSR1))
		eventually(t, 5*time.Second, "the state is in the log", func() bool { return len(dumps()) == n })
		s := dumps()[n-1]
		if s.Level != "INFO" || s.Status.Pid != d.pid() || s.Status.Config != d.config || s.Status.Flows.Live != 2 || len(s.Status.Servers) != 1 || s.Status.Servers[0].Flows != 2 || s.Status.Rules[0].Flows != 2 {
			t.Errorf("the state is %+v", s)
		}
	}
	flows.finish(t)
	w.client.curl(t, "http://www.example.org/after", "-4").ok(t)
}
