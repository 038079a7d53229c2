package clash

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coder/websocket"
)

const (
	adminSecret  = "the secret of the admin"
	readerSecret = "the secret of the reader"
)

// world is what the API is served from: a few flows, rules and servers.
type world struct {
	url    string
	logs   *Logs
	up     atomic.Uint64
	killed chan string
	pinned chan string
}

func serve(t *testing.T, ui string) *world {
	t.Helper()
	w := &world{logs: &Logs{}, killed: make(chan string, 8), pinned: make(chan string, 8)}
	w.up.Store(1000)
	client := netip.MustParseAddrPort("192.0.2.10:40000")
	o := Options{
		Secrets: func() Secrets { return Secrets{adminSecret, readerSecret} }, Version: "1.2", UI: ui, Logs: w.logs,
		Flows: func() []Flow {
			return []Flow{
				{ID: "17", Network: "tcp", Client: client, Destination: netip.MustParseAddrPort("198.18.0.7:443"), Name: "www.example.org",
					Interface: "lan0", Start: time.Now(), Up: 1, Down: 2, Kind: "DomainSuffix", Payload: "example.org", Rule: "socks.cnf:3", Server: "one", List: "one,two"},
				{ID: "18", Network: "udp", Client: client, Destination: netip.MustParseAddrPort("[2001:db8::1]:9"), Start: time.Now(), Kind: "Match", Payload: "", Rule: "socks.cnf:4", Server: Direct},
			}
		},
		Kill: func(ids ...string) {
			for _, id := range ids {
				w.killed <- id
			}
		},
		Rules: func() []Rule {
			return []Rule{{Kind: "DomainSuffix", Payload: "example.org", To: "one,two", Text: "SOCKD5 @=one,two *.example.org", Position: "socks.cnf:3", Flows: 9, Kernel: 1},
				{Kind: "IPCIDR", Payload: "192.0.2.0/24", To: Direct, Text: "DIRECT 192.0.2.0/24", Position: "socks.cnf:4", Kernel: 5000}, {Kind: "Match", To: Reject, Kernel: 7}, {Kind: "Match", To: Direct}}
		},
		Servers: func() []Server {
			return []Server{{Name: "one", Type: "Socks5", Address: "198.51.100.11:1080", Up: true, UDP: true, Delay: 40 * time.Millisecond},
				{Name: "two", Type: "Socks5", Up: false}, {Name: "slow", Type: "Http", Up: true}}
		},
		Lists: func() []List {
			return []List{{Name: "one,two", Ordered: true, Servers: []string{"one", "two"}}, {Name: "one,two random", Servers: []string{"one", "two"}}}
		},
		Totals: func() (uint64, uint64) { return w.up.Add(10), 2000 },
		Pin: func(list, server string) error {
			if list != "one,two" || server == "nobody" {
				return errors.New("no such server")
			}
			w.pinned <- server
			return nil
		},
		Delay: func(ctx context.Context, server, _ string) (time.Duration, error) {
			switch server {
			case "one":
				return 12 * time.Millisecond, nil
			case "slow":
				<-ctx.Done()
				return 0, ctx.Err()
			}
			return 0, errors.New("refused")
		},
		Reload: func() error { return nil }, FlushDNS: func() {},
	}
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w.url = "http://" + ln.Addr().String()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- Serve(ctx, ln, o) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-ended:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(5 * time.Second):
			t.Error("it does not end")
		}
	})
	return w
}

func (w *world) ask(t *testing.T, secret, method, path, body string, headers ...string) (status int, h http.Header, answer string) {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, w.url+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	if secret != "" {
		r.Header.Set("Authorization", "Bearer "+secret)
	}
	for i := 0; i < len(headers); i += 2 {
		r.Header.Set(headers[i], headers[i+1])
	}
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, resp.Header, string(b)
}

// shaped tells what a value lacks to have the shape of another; empty: nothing.
func shaped(got, want any, at string) string {
	if reflect.TypeOf(got) != reflect.TypeOf(want) {
		return fmt.Sprintf("%s is %T, want %T", at, got, want)
	}
	switch want := want.(type) {
	case map[string]any:
		for key, v := range want {
			have, ok := got.(map[string]any)[key]
			if !ok {
				return at + "." + key + " is missing"
			}
			if wrong := shaped(have, v, at+"."+key); wrong != "" {
				return wrong
			}
		}
	case []any:
		if len(want) > 0 && len(got.([]any)) == 0 {
			return at + " is empty"
		}
		for i, v := range got.([]any) {
			if len(want) > 0 {
				if wrong := shaped(v, want[0], fmt.Sprintf("%s[%d]", at, i)); wrong != "" {
					return wrong
				}
			}
		}
	}
	return ""
}

// TestDashboard answers what a dashboard asks, in the shapes that it reads.
func TestDashboard(t *testing.T) {
	w := serve(t, "")
	text, err := os.ReadFile("testdata/dashboard.txt")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, block := range strings.Split(string(text), "\n\n")[1:] {
		n++
		line, want, _ := strings.Cut(strings.TrimSpace(block), "\n")
		words := strings.SplitN(line, " ", 3)
		body := strings.Join(words[2:], "")
		status := 200
		if rest, ok := strings.CutPrefix(want, "- "); ok {
			if _, err := fmt.Sscan(rest, &status); err != nil {
				t.Fatalf("%s: %v", line, err)
			}
			_, want, _ = strings.Cut(rest, " ")
		}
		gotStatus, h, answer := w.ask(t, adminSecret, words[0], words[1], body)
		if gotStatus != status {
			t.Errorf("%s: %d, want %d: %s", line, gotStatus, status, answer)
			continue
		}
		if want == "" {
			if answer != "" {
				t.Errorf("%s: %s", line, answer)
			}
			continue
		}
		var have, shape any
		if err := json.Unmarshal([]byte(want), &shape); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		if err := json.Unmarshal([]byte(answer), &have); err != nil || h.Get("Content-Type") != "application/json" {
			t.Errorf("%s: %v, %s: %s", line, err, h.Get("Content-Type"), answer)
			continue
		}
		if wrong := shaped(have, shape, ""); wrong != "" {
			t.Errorf("%s: %s in\n%s", line, wrong, answer)
		}
	}
	if n < 25 {
		t.Errorf("only %d requests are recorded", n)
	}
	close(w.killed)
	var killed []string
	for id := range w.killed {
		killed = append(killed, id)
	}
	if got := strings.Join(killed, " "); got != "17 17 18" {
		t.Errorf("killed %s", got)
	}
	if one, two := <-w.pinned, <-w.pinned; one != "two" || two != "" {
		t.Errorf("pinned %q, then %q", one, two)
	}
}

// TestSecrets: without one nothing is told, with the reader's nothing is changed,
// whatever the method and wherever the secret stands.
func TestSecrets(t *testing.T) {
	w := serve(t, "")
	for pattern := range (&api{}).answers() {
		method, path, _ := strings.Cut(pattern, " ")
		path = strings.NewReplacer("{name}", "one", "{id}", "17").Replace(path)
		for _, wrong := range []string{"", "wrong", adminSecret + "x", "the secret of", " "} {
			if status, _, answer := w.ask(t, wrong, method, path, ""); status != 401 || answer != "{\"message\":\"Unauthorized\"}\n" {
				t.Errorf("%s with %q: %d %s", pattern, wrong, status, answer)
			}
		}
		if status, _, _ := w.ask(t, "", method, path+"?token="+strings.ReplaceAll(adminSecret, " ", "+"), ""); status != 401 {
			t.Errorf("%s with the secret in the address, and no WebSocket: %d", pattern, status)
		}
		if method != "GET" || strings.HasSuffix(path, "/delay") {
			if status, _, answer := w.ask(t, readerSecret, method, path, "{}"); status != 403 {
				t.Errorf("%s with the reader's secret: %d %s", pattern, status, answer)
			}
		}
	}
	if status, _, _ := w.ask(t, readerSecret, "GET", "/rules", ""); status != 200 {
		t.Errorf("the reader sees no rules: %d", status)
	}
	if len(w.killed)+len(w.pinned) != 0 {
		t.Error("something was changed")
	}
	if (&api{o: Options{Secrets: func() Secrets { return Secrets{} }}}).right(&http.Request{Header: http.Header{}}) != nobody {
		t.Error("no secret at all opens it")
	}
}

// TestCORS: a dashboard may come from elsewhere, and from a public page.
func TestCORS(t *testing.T) {
	w := serve(t, "")
	status, h, _ := w.ask(t, "", "OPTIONS", "/proxies/one", "", "Origin", "https://dashboard.example", "Access-Control-Request-Method", "PUT")
	if status != 204 || h.Get("Access-Control-Allow-Origin") != "*" || !strings.Contains(h.Get("Access-Control-Allow-Methods"), "PUT") ||
		!strings.Contains(h.Get("Access-Control-Allow-Headers"), "Authorization") || h.Get("Access-Control-Allow-Private-Network") != "true" {
		t.Errorf("%d %v", status, h)
	}
	if _, h, _ := w.ask(t, "", "GET", "/rules", ""); h.Get("Access-Control-Allow-Origin") != "*" {
		t.Errorf("an error cannot be read from elsewhere: %v", h)
	}
}

// dial opens a stream as a browser does.
func (w *world) dial(t *testing.T, path string) *websocket.Conn {
	t.Helper()
	sep := "?"
	if strings.Contains(path, "?") {
		sep = "&"
	}
	c, _, err := websocket.Dial(t.Context(), w.url+path+sep+"token="+strings.ReplaceAll(readerSecret, " ", "+"),
		&websocket.DialOptions{HTTPHeader: http.Header{"Origin": {"https://dashboard.example"}}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.CloseNow() })
	return c
}

func next(t *testing.T, c *websocket.Conn) (v map[string]any) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	kind, b, err := c.Read(ctx)
	if err != nil || kind != websocket.MessageText {
		t.Fatalf("%v %v", kind, err)
	}
	if err := json.Unmarshal(b, &v); err != nil {
		t.Fatalf("%v: %s", err, b)
	}
	return v
}

func TestStreams(t *testing.T) {
	w := serve(t, "")
	traffic := w.dial(t, "/traffic")
	first, second := next(t, traffic), next(t, traffic)
	if first["up"] == nil || second["up"] != 10.0 || second["down"] != 0.0 || second["upTotal"] != first["upTotal"].(float64)+10 {
		t.Errorf("traffic: %v, then %v", first, second)
	}
	memory := w.dial(t, "/memory")
	if m := next(t, memory); m["inuse"] != 0.0 || m["oslimit"] != 0.0 {
		t.Errorf("memory begins with %v", m)
	}
	if m := next(t, memory); m["inuse"].(float64) < 1<<20 {
		t.Errorf("memory: %v", m)
	}
	conns := w.dial(t, "/connections?interval=200")
	for range 3 {
		if list := next(t, conns)["connections"].([]any); len(list) != 3 || list[0].(map[string]any)["chains"].([]any)[1] != "one,two" {
			t.Errorf("connections: %v", list)
		}
	}
	// What the kernel lets pass alone looks like a connection, which nothing ends.
	kernel := next(t, conns)["connections"].([]any)[2].(map[string]any)
	if kernel["upload"] != 5000.0 || kernel["rulePayload"] != "192.0.2.0/24" || kernel["metadata"].(map[string]any)["host"] != "DIRECT 192.0.2.0/24" || fmt.Sprint(kernel["chains"]) != "[DIRECT]" {
		t.Errorf("the kernel's: %v", kernel)
	}
	if status, _, answer := w.ask(t, adminSecret, "DELETE", "/connections/"+kernel["id"].(string), ""); status != 400 || len(w.killed) != 0 {
		t.Errorf("it is ended: %d %s", status, answer)
	}
	// Without a WebSocket it is lines.
	r, _ := http.NewRequestWithContext(t.Context(), "GET", w.url+"/traffic", nil)
	r.Header.Set("Authorization", "Bearer "+readerSecret)
	resp, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if line, err := bufio.NewReader(resp.Body).ReadString('\n'); err != nil || !strings.HasPrefix(line, `{"up":`) {
		t.Errorf("%q %v", line, err)
	}
	if _, _, err := websocket.Dial(t.Context(), w.url+"/traffic?token=wrong", nil); err == nil {
		t.Error("a stream without the secret")
	}
}

// TestLogs: a watcher gets what it asks for, also below the level of the log, and
// the log what it always got.
func TestLogs(t *testing.T) {
	w := serve(t, "")
	var out bytes.Buffer
	log := slog.New(w.logs.Handler(slog.NewTextHandler(&out, nil))).With("part", "gateway").WithGroup("g")
	if log.Enabled(t.Context(), slog.LevelDebug) {
		t.Error("debug is on without a watcher")
	}
	debug, warning := w.dial(t, "/logs?level=debug"), w.dial(t, "/logs?level=warning&format=structured")
	for w.logs.watching.Load() < 2 {
		time.Sleep(time.Millisecond)
	}
	log.Debug("flow", "dst", "x y")
	log.Warn("server is at fault")
	if l := next(t, debug); l["type"] != "debug" || l["payload"] != `flow part=gateway g.dst="x y"` {
		t.Errorf("%v", l)
	}
	if l := next(t, debug); l["type"] != "warning" {
		t.Errorf("%v", l)
	}
	if l := next(t, warning); l["level"] != "warning" || !strings.Contains(fmt.Sprint(l["message"]), "server is at fault") || l["time"] == "" {
		t.Errorf("%v", l)
	}
	if text := out.String(); strings.Contains(text, "flow") || !strings.Contains(text, "server is at fault") {
		t.Errorf("the log: %s", text)
	}
	if status, _, _ := w.ask(t, adminSecret, "GET", "/logs?level=loud", ""); status != 400 {
		t.Errorf("a level that is none: %d", status)
	}
	debug.CloseNow()
	warning.CloseNow()
	for end := time.Now().Add(5 * time.Second); w.logs.watching.Load() > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("a watcher that left still watches")
		}
	}
}

// TestLimits: who floods the address is turned away, and those who are there are
// answered.
func TestLimits(t *testing.T) {
	w := serve(t, "")
	stream := w.dial(t, "/connections?interval=100")
	at := strings.TrimPrefix(w.url, "http://")
	away := 0
	var flood []net.Conn
	for range maxConns + 20 {
		c, err := net.Dial("tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		flood = append(flood, c)
	}
	for _, c := range flood[maxConns:] {
		c.SetReadDeadline(time.Now().Add(5 * time.Second))
		if _, err := c.Read(make([]byte, 1)); errors.Is(err, io.EOF) {
			away++
		}
	}
	if away != 20 {
		t.Errorf("%d of 20 too many were turned away", away)
	}
	next(t, stream)
	for _, c := range flood {
		c.Close()
	}
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if r, err := http.Get(w.url + "/"); err == nil {
			r.Body.Close()
			break
		} else if time.Now().After(end) {
			t.Fatalf("there is no room again: %v", err)
		}
	}
}

// TestPage: the page is there without a secret, runs its own script alone, and
// asks for nothing from elsewhere.
func TestPage(t *testing.T) {
	w := serve(t, "")
	status, h, page := w.ask(t, "", "GET", "/", "", "Accept", "text/html,*/*")
	policy := h.Get("Content-Security-Policy")
	if status != 200 || !strings.Contains(page, "<title>tproxyd</title>") || !strings.Contains(policy, "script-src 'sha256-") || !strings.Contains(policy, "default-src 'none'") {
		t.Errorf("%d %v", status, h)
	}
	for _, elsewhere := range []string{"http://", "https://", "src=", "@import", "url(", "innerHTML", "onclick=\""} {
		if strings.Contains(strings.ReplaceAll(page, `"https:"`, ""), elsewhere) {
			t.Errorf("the page has %s", elsewhere)
		}
	}
	if status, _, answer := w.ask(t, "", "GET", "/", ""); status != 401 {
		t.Errorf("a probe without a secret: %d %s", status, answer)
	}
}

// TestUI: a dashboard's folder is served, and nothing beside it.
func TestUI(t *testing.T) {
	dir := t.TempDir()
	for path, text := range map[string]string{"ui/index.html": "a dashboard", "ui/assets/app.js": "code", "secret": "outside"} {
		path = filepath.Join(dir, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("../secret", filepath.Join(dir, "ui", "link")); err != nil {
		t.Fatal(err)
	}
	w := serve(t, filepath.Join(dir, "ui"))
	for path, want := range map[string]string{"/ui/": "a dashboard", "/ui": "a dashboard", "/ui/assets/app.js": "code"} {
		if status, _, got := w.ask(t, "", "GET", path, ""); status != 200 || got != want {
			t.Errorf("%s: %d %s", path, status, got)
		}
	}
	for _, path := range []string{"/ui/link", "/ui/../secret", "/ui/%2e%2e/secret", "/ui/none"} {
		if status, _, got := w.ask(t, "", "GET", path, ""); status == 200 || strings.Contains(got, "outside") {
			t.Errorf("%s: %d %s", path, status, got)
		}
	}
}
