package netns_test

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"image/png"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
)

// Topology: world. The daemon is asked by the Clash API, by a program and by a
// browser.

// What opens the address, see settings.clash.
const (
	adminSecret  = "correct horse battery staple"
	readerSecret = "who has this may only look"
)

// clash asks the daemon's Clash API, from the gateway.
func (d *daemon) clash(t testing.TB, secret, method, path, body string) (status int, answer map[string]any) {
	t.Helper()
	args := []string{tool(t, "curl"), "-sS", "-X", method, "-H", "Authorization: Bearer " + secret, "-w", "\n%{http_code}", "http://" + d.set.clash + path}
	if body != "" {
		args = append(args, "-d", body)
	}
	out := d.host.run(t, command{args: args}).ok(t).out
	i := strings.LastIndex(out, "\n")
	fmt.Sscan(out[i:], &status)
	if text := out[:i]; text != "" {
		if err := json.Unmarshal([]byte(text), &answer); err != nil {
			t.Fatalf("%s %s: %v\n%s", method, path, err, text)
		}
	}
	return status, answer
}

// TestClash: what the API tells is what happens, and what is done by it happens.
func TestClash(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.dante(t)
	d := serve(t, w.gateway, settings{clash: "127.0.0.1:9090", routes: `SERVER one 198.51.100.11
SERVER two 198.51.100.12
DENY *.denied.example
DIRECT 198.51.100.0 255.255.255.0
SOCKD5 @=one,two *
`})
	get := func(path string) map[string]any {
		t.Helper()
		status, answer := d.clash(t, readerSecret, "GET", path, "")
		if status != 200 {
			t.Fatalf("%s: %d %v", path, status, answer)
		}
		return answer
	}
	var rules []string
	for _, r := range get("/rules")["rules"].([]any) {
		m := r.(map[string]any)
		rules = append(rules, fmt.Sprintf("%v,%v,%v", m["type"], m["payload"], m["proxy"]))
	}
	if got, want := strings.Join(rules, " "), "DomainSuffix,denied.example,REJECT IPCIDR,198.51.100.0/24,DIRECT Match,,one,two Match,,REJECT"; got != want {
		t.Errorf("rules %s, want %s", got, want)
	}
	flows := w.startEchoes(t, 2)
	eventually(t, 5*time.Second, "both flows are told", func() bool { return len(get("/connections")["connections"].([]any)) == 2 })
	c := get("/connections")["connections"].([]any)[0].(map[string]any)
	meta := c["metadata"].(map[string]any)
	if fmt.Sprint(c["chains"]) != "[one one,two]" || meta["sourceIP"] != clientAt && meta["sourceIP"] != clientAt6 || meta["destinationPort"] != "7" || c["rule"] != "Match" {
		t.Errorf("a flow: %v", c)
	}
	now := func() any { return get("/proxies")["proxies"].(map[string]any)["one,two"].(map[string]any)["now"] }
	if now() != "one" {
		t.Errorf("now %v", now())
	}
	// The other server is pinned: new flows go there, the old ones stay.
	if status, answer := d.clash(t, readerSecret, "PUT", "/proxies/one%2Ctwo", `{"name":"two"}`); status != 403 {
		t.Errorf("the reader pinned a server: %d %v", status, answer)
	}
	if status, answer := d.clash(t, adminSecret, "PUT", "/proxies/one%2Ctwo", `{"name":"two"}`); status != 204 || now() != "two" {
		t.Errorf("pinned: %d %v, now %v", status, answer, now())
	}
	w.client.curl(t, "http://www.example.org/pinned").fetched(t, socks2Out, socks2Out6, socks2At)
	d.reload(t)
	w.client.curl(t, "http://www.example.org/reloaded").fetched(t, socks2Out, socks2Out6, socks2At)
	if status, _ := d.clash(t, adminSecret, "DELETE", "/proxies/one%2Ctwo", ""); status != 204 {
		t.Errorf("unpinned: %d", status)
	}
	w.client.curl(t, "http://www.example.org/unpinned").fetched(t, socks1Out, socks1Out6, socks1At)

	status, answer := d.clash(t, adminSecret, "GET", "/proxies/two/delay?timeout=5000&url=http%3A%2F%2Fwww.example.org%2Fdelay", "")
	if ms, _ := answer["delay"].(float64); status != 200 || ms < 1 || ms > 5000 {
		t.Errorf("delay: %d %v", status, answer)
	}
	if status, answer := d.clash(t, adminSecret, "GET", "/proxies/two/delay?timeout=5000&url=http%3A%2F%2Fwww.example.org:81%2F", ""); status != 503 {
		t.Errorf("the delay of nobody: %d %v", status, answer)
	}
	// A wrong secret is noticed at a reload, and the old one stays in force.
	before := d.metric(t, `tproxyd_reloads_total{result="done"}`)
	w.gateway.file(t, "secrets.toml", "admin = \"short\"\n", 0o600)
	if r := d.cli(t, "reload", "-c", d.config); r.code != 2 || strings.Contains(r.err, "short") && strings.Contains(r.err, "\"short\"") {
		t.Errorf("reload with a short secret: %d %s", r.code, r.err)
	}
	w.gateway.file(t, "secrets.toml", "admin = \"another secret of the admin\"\n", 0o600)
	if status, answer := d.clash(t, adminSecret, "PUT", "/configs?force=true", `{"path":"","payload":""}`); status != 204 {
		t.Errorf("reload: %d %v", status, answer)
	}
	if n := d.metric(t, `tproxyd_reloads_total{result="done"}`); n != before+1 {
		t.Errorf("%v reloads, want %v", n, before+1)
	}
	for secret, want := range map[string]int{adminSecret: 401, readerSecret: 401, "another secret of the admin": 200} {
		if status, _ := d.clash(t, secret, "GET", "/version", ""); status != want {
			t.Errorf("after the secret was changed %q gets %d, want %d", secret, status, want)
		}
	}
	flows.finish(t)
	if text := d.output(); strings.Contains(text, adminSecret) || strings.Contains(text, "another secret") {
		t.Error("the log has a secret")
	}
}

// TestClashTakeover: a new process has the address, and a stream of the old one
// ends, so that who listens to it asks again.
func TestClashTakeover(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	startMicrosocks(t, w.socks1, socks1At+":1080")
	d := serve(t, w.gateway, settings{clash: "127.0.0.1:9090", routes: "SOCKD5 @=198.51.100.11 *\n"})
	flows := w.startEchoes(t, 1)
	stream := w.gateway.start(t, command{args: []string{tool(t, "curl"), "-sSN", "-H", "Authorization: Bearer " + readerSecret, "http://127.0.0.1:9090/traffic"}})
	eventually(t, 10*time.Second, "the stream flows", func() bool { return strings.Contains(stream.output(), "upTotal") })
	old := d.takeover(t)
	if _, ended := stream.wait(10 * time.Second); !ended {
		t.Error("the stream of the old process does not end")
	}
	if status, answer := d.clash(t, readerSecret, "GET", "/version", ""); status != 200 {
		t.Errorf("the new process: %d %v", status, answer)
	}
	if !old.running() {
		t.Error("the old process has ended, and its flow with it")
	}
	flows.finish(t)
}

// browser is a Chromium on a host, by its DevTools protocol.
type browser struct {
	t    testing.TB
	conn *websocket.Conn
	ids  int
}

// startBrowser starts Chromium on a host; nothing but the host's network is there
// for it.
func (h *host) startBrowser(t testing.TB) *browser {
	t.Helper()
	profile := filepath.Join(h.dir, "profile")
	p := h.start(t, command{alone: true, args: []string{tool(t, "chromium"), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
		"--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--user-data-dir=" + profile,
		"--window-size=1280,900", "--remote-debugging-port=9222", "--remote-allow-origins=*", "about:blank"}})
	client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(_ context.Context, network, addr string) (net.Conn, error) {
		return h.dial(network, addr, 5*time.Second)
	}}}
	var tabs []struct{ Type, WebSocketDebuggerURL string }
	eventually(t, 60*time.Second, "the browser answers", func() bool {
		if _, ended := p.wait(0); ended {
			t.Fatalf("the browser has ended:\n%s", p.output())
		}
		r, err := client.Get("http://127.0.0.1:9222/json/list")
		if err != nil {
			return false
		}
		defer r.Body.Close()
		return json.NewDecoder(r.Body).Decode(&tabs) == nil && len(tabs) > 0
	})
	for _, tab := range tabs {
		if tab.Type == "page" {
			conn, _, err := websocket.Dial(t.Context(), tab.WebSocketDebuggerURL, &websocket.DialOptions{HTTPClient: &client})
			if err != nil {
				t.Fatal(err)
			}
			conn.SetReadLimit(64 << 20)
			t.Cleanup(func() { conn.CloseNow() })
			return &browser{t: t, conn: conn}
		}
	}
	t.Fatalf("the browser has no page: %+v", tabs)
	return nil
}

// do sends one command and returns what it results in.
func (b *browser) do(method string, params any) map[string]any {
	b.t.Helper()
	ctx, cancel := context.WithTimeout(b.t.Context(), 30*time.Second)
	defer cancel()
	b.ids++
	text, err := json.Marshal(map[string]any{"id": b.ids, "method": method, "params": params})
	if err == nil {
		err = b.conn.Write(ctx, websocket.MessageText, text)
	}
	if err != nil {
		b.t.Fatal(err)
	}
	for {
		_, text, err := b.conn.Read(ctx)
		if err != nil {
			b.t.Fatalf("%s: %v", method, err)
		}
		var m struct {
			ID     int
			Result map[string]any
			Error  any
		}
		if err := json.Unmarshal(text, &m); err != nil {
			b.t.Fatal(err)
		}
		if m.ID == b.ids {
			if m.Error != nil {
				b.t.Fatalf("%s: %v", method, m.Error)
			}
			return m.Result
		}
	}
}

// eval runs a script in the page and returns its value.
func (b *browser) eval(script string) any {
	b.t.Helper()
	r := b.do("Runtime.evaluate", map[string]any{"expression": script, "returnByValue": true, "awaitPromise": true})
	if x := r["exceptionDetails"]; x != nil {
		b.t.Fatalf("%s: %v", script, x)
	}
	return r["result"].(map[string]any)["value"]
}

// text returns what an element shows.
func (b *browser) text(selector string) string {
	b.t.Helper()
	s, _ := b.eval(fmt.Sprintf("[...document.querySelectorAll(%q)].map((e) => e.innerText).join('\\n')", selector)).(string)
	return s
}

// screenshot returns what the page looks like, and writes it where
// TPROXYD_SCREENSHOTS says.
func (b *browser) screenshot(name string) []byte {
	b.t.Helper()
	image, err := base64.StdEncoding.DecodeString(b.do("Page.captureScreenshot", map[string]any{"format": "png"})["data"].(string))
	if err != nil {
		b.t.Fatal(err)
	}
	if dir := os.Getenv("TPROXYD_SCREENSHOTS"); dir != "" {
		if err := os.WriteFile(filepath.Join(dir, name+".png"), image, 0o644); err != nil {
			b.t.Fatal(err)
		}
	}
	return image
}

// TestPage: the page asks for the secret once, shows a flow while it runs and its
// end, with its rule and its server, and ends one.
func TestPage(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.dante(t)
	d := serve(t, w.gateway, settings{clash: "127.0.0.1:9090", routes: "SERVER one 198.51.100.11\nSERVER two 198.51.100.12\nDENY *.denied.example\nSOCKD5 @=one,two *\n"})
	b := w.gateway.startBrowser(t)
	b.do("Page.navigate", map[string]any{"url": "http://127.0.0.1:9090/"})
	eventually(t, 20*time.Second, "the page asks for the secret", func() bool { return strings.Contains(b.text("#ask[open]"), "Secret") })
	enter := func(secret string) {
		b.eval(fmt.Sprintf("document.querySelector('#secret').value = %q; document.querySelector('#ask-form button').click()", secret))
	}
	enter("not the secret of this")
	eventually(t, 10*time.Second, "a wrong one is noticed", func() bool { return strings.Contains(b.text("#wrong"), "not a secret") })
	enter(adminSecret)
	eventually(t, 10*time.Second, "it is live", func() bool { return b.text("#state") == "live" })
	if shown := b.text("#no-flows"); !strings.Contains(shown, "Nothing is being carried") {
		t.Errorf("without a flow: %s", shown)
	}

	echo := w.outside.listen(t, "tcp", outsideAt+":7")
	go func() {
		for {
			c, err := echo.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); bytes.NewBuffer(make([]byte, 3<<20)).WriteTo(c); c.Read(make([]byte, 1)) }()
		}
	}()
	open := func() net.Conn {
		t.Helper()
		c, err := w.client.dial("tcp", outsideAt+":7", 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		go func() {
			for buf := make([]byte, 64<<10); ; {
				if _, err := c.Read(buf); err != nil {
					return
				}
			}
		}()
		return c
	}
	c := open()
	eventually(t, 10*time.Second, "the flow is shown with its bytes", func() bool {
		row := b.text("#flows tr")
		return strings.Contains(row, outsideAt+":7") && strings.Contains(row, c.LocalAddr().String()) && strings.Contains(row, "socks.cnf:4") && strings.Contains(row, "3.1 MB")
	})
	if rules := b.text("#rules"); !strings.Contains(rules, "SOCKD5 @=one,two *") || !strings.Contains(rules, "DENY *.denied.example") {
		t.Errorf("rules: %s", rules)
	}
	if servers := b.text("#servers"); !strings.Contains(servers, "198.51.100.11:1080") || strings.Count(servers, "up") != 2 {
		t.Errorf("servers: %s", servers)
	}
	look := func(scheme string) {
		t.Helper()
		b.do("Emulation.setEmulatedMedia", map[string]any{"features": []map[string]string{{"name": "prefers-color-scheme", "value": scheme}}})
		if _, err := png.Decode(bytes.NewReader(b.screenshot("page-" + scheme))); err != nil {
			t.Errorf("%s: %v", scheme, err)
		}
	}
	look("light")
	look("dark")
	c.Close()
	eventually(t, 10*time.Second, "its end is shown", func() bool { return strings.Contains(b.text("#flows tr.ended"), "ended") })
	eventually(t, 15*time.Second, "and then it is gone", func() bool { return b.text("#flows") == "" })

	open()
	eventually(t, 10*time.Second, "another flow is shown", func() bool { return strings.Contains(b.text("#flows"), outsideAt+":7") })
	b.eval("document.querySelector('#flows button').click()")
	eventually(t, 10*time.Second, "it is ended by its button", func() bool { return b.text("#flows tr.ended") != "" && d.metric(t, "tproxyd_flows") == 0 })

	// The secret is asked for once.
	b.do("Page.reload", nil)
	eventually(t, 10*time.Second, "it is live again, by itself", func() bool { return b.text("#state") == "live" })
	if said := b.eval("document.querySelector('#said').innerText"); said != "" {
		t.Errorf("the page complains: %v", said)
	}
}
