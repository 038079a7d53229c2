package netns_test

import (
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// built is the daemon's binary, built once for all tests of the package. The
// directory is removed by TestMain.
var built struct {
	once sync.Once
	dir  string
	err  error
}

// TestMain removes what the tests shared.
func TestMain(m *testing.M) {
	code := m.Run()
	if built.dir != "" {
		os.RemoveAll(built.dir)
	}
	os.Exit(code)
}

// program returns the path of the daemon's binary.
func program(t testing.TB) string {
	t.Helper()
	built.once.Do(func() {
		if built.dir, built.err = os.MkdirTemp("", "tpx"); built.err != nil {
			return
		}
		if built.err = os.Chmod(built.dir, 0o755); built.err != nil {
			return
		}
		out, err := exec.Command("go", "build", "-o", built.dir, "github.com/tproxyd/tproxyd/cmd/tproxyd").CombinedOutput()
		if err != nil {
			built.err = fmt.Errorf("go build: %w\n%s", err, out)
		}
	})
	if built.err != nil {
		t.Fatal(built.err)
	}
	return filepath.Join(built.dir, "tproxyd")
}

// settings is what differs between the gateways of the tests; the zero value
// is a gateway with one LAN, lan0.
type settings struct {
	routes      string   // the text of socks.cnf
	credentials string   // the text of credentials.toml; empty: none
	interfaces  []string // nil: lan0; empty: none
	local       bool
	noDNS       bool     // port 53 is as any other
	fail        string   // empty: not stated
	resolvers   []string // nil: the inside's name server
	state       string   // empty: a directory of the host
	metrics     string   // address; empty: only on the control socket
	clash       string   // address of the Clash API; empty: none
	args        []string // of serve, after the usual ones
	trust       string   // a file of certificates; empty: the system's
	env         []string // of serve and of the commands, added to the environment
}

// daemon is tproxyd on a host, running or not.
type daemon struct {
	*process // the last one started
	host     *host
	config   string // path of tproxyd.toml
	set      settings
	bin      string
}

// newDaemon writes the files of a gateway.
func newDaemon(t testing.TB, h *host, s settings) *daemon {
	t.Helper()
	if s.interfaces == nil {
		s.interfaces = []string{"lan0"}
	}
	if s.resolvers == nil {
		s.resolvers = []string{insideNS}
	}
	if s.state == "" {
		s.state = filepath.Join(h.dir, "state")
		h.must(t, os.MkdirAll(s.state, 0o755))
	}
	d := &daemon{host: h, set: s, bin: program(t)}
	d.routes(t, s.routes)
	d.write(t)
	return d
}

// write writes tproxyd.toml and the credentials from the settings.
func (d *daemon) write(t testing.TB) {
	t.Helper()
	var b strings.Builder
	fmt.Fprintf(&b, "routes = \"socks.cnf\"\n")
	if d.set.credentials != "" {
		d.host.file(t, "credentials.toml", d.set.credentials, 0o600)
		fmt.Fprintf(&b, "credentials = \"credentials.toml\"\n")
	}
	fmt.Fprintf(&b, "\n[intercept]\ninterfaces = [%s]\nlocal = %v\n", quoted(d.set.interfaces), d.set.local)
	if d.set.noDNS {
		fmt.Fprintf(&b, "dns = false\n")
	}
	if d.set.fail != "" {
		fmt.Fprintf(&b, "fail = %q\n", d.set.fail)
	}
	fmt.Fprintf(&b, "\n[dns]\nresolvers = [%s]\n\n[state]\ndirectory = %q\n\n[control]\nsocket = %q\nmetrics = %q\n",
		quoted(d.set.resolvers), d.set.state, d.socket(), d.set.metrics)
	if d.set.clash != "" {
		d.host.file(t, "secrets.toml", fmt.Sprintf("admin = %q\nreader = %q\n", adminSecret, readerSecret), 0o600)
		fmt.Fprintf(&b, "clash = %q\nsecrets = \"secrets.toml\"\n", d.set.clash)
	}
	d.config = d.host.file(t, "tproxyd.toml", b.String(), 0o644)
}

// socket is the path of the control socket.
func (d *daemon) socket() string { return filepath.Join(d.host.dir, "control.sock") }

func quoted(list []string) string {
	var q []string
	for _, s := range list {
		q = append(q, fmt.Sprintf("%q", s))
	}
	return strings.Join(q, ", ")
}

// routes writes socks.cnf, in one go as an editor does.
func (d *daemon) routes(t testing.TB, text string) {
	t.Helper()
	d.host.file(t, "socks.cnf.new", text, 0o644)
	d.host.must(t, os.Rename(filepath.Join(d.host.dir, "socks.cnf.new"), filepath.Join(d.host.dir, "socks.cnf")))
}

// start starts `serve` and waits until it tells systemd that it is ready.
func (d *daemon) start(t testing.TB) {
	t.Helper()
	path := filepath.Join(d.host.dir, "notify")
	os.Remove(path)
	notify, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer notify.Close()
	d.launch(t, "NOTIFY_SOCKET="+path)
	buf := make([]byte, 4096)
	for end := time.Now().Add(15 * time.Second); ; {
		notify.SetReadDeadline(time.Now().Add(50 * time.Millisecond))
		n, err := notify.Read(buf)
		if err == nil && strings.Contains("\n"+string(buf[:n])+"\n", "\nREADY=1\n") {
			return
		}
		if !d.running() || time.Now().After(end) {
			t.Fatalf("serve is not ready\n%s", d.output())
		}
	}
}

// launch starts `serve` and waits for nothing.
func (d *daemon) launch(t testing.TB, env ...string) {
	t.Helper()
	d.process = d.host.start(t, command{args: append([]string{d.bin, "serve", "-c", d.config}, d.set.args...), env: append(env, d.env()...)})
}

// env is what serve and the commands find in their environment.
func (d *daemon) env() []string {
	if d.set.trust == "" {
		return d.set.env
	}
	return append([]string{"SSL_CERT_FILE=" + d.set.trust}, d.set.env...)
}

// stop ends the daemon as systemd does and fails the test unless it exits
// with 0.
func (d *daemon) stop(t testing.TB) {
	t.Helper()
	d.cmd.Process.Signal(syscall.SIGTERM)
	code, ended := d.wait(15 * time.Second)
	if !ended || code != 0 {
		t.Fatalf("SIGTERM: ended %v, exit %d\n%s", ended, code, d.output())
	}
}

// cli runs a command of the binary on the daemon's host.
func (d *daemon) cli(t testing.TB, args ...string) result {
	t.Helper()
	return d.host.run(t, command{args: append([]string{d.bin}, args...), env: d.env()})
}

// reload runs `reload` and fails the test unless it worked.
func (d *daemon) reload(t testing.TB) {
	t.Helper()
	d.cli(t, "reload", "-c", d.config).ok(t)
}

// serve writes the files of a gateway and starts it; what the daemon printed
// is shown if the test fails.
func serve(t testing.TB, h *host, s settings) *daemon {
	t.Helper()
	d := newDaemon(t, h, s)
	d.start(t)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("tproxyd printed:\n%s", d.output())
		}
	})
	return d
}

// kernel is the state of a host's kernel that the daemon may touch, as the
// usual tools print it.
func (h *host) kernel(t testing.TB) string {
	t.Helper()
	var b strings.Builder
	for _, c := range [][]string{
		{"nft", "list", "ruleset"},
		{"ip", "rule"}, {"ip", "-6", "rule"},
		{"ip", "route", "show", "table", "all"}, {"ip", "-6", "route", "show", "table", "all"},
	} {
		fmt.Fprintf(&b, "# %s\n%s", strings.Join(c, " "), h.run(t, command{args: append([]string{tool(t, c[0])}, c[1:]...)}).ok(t).out)
	}
	return b.String()
}
