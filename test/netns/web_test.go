package netns_test

import (
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"sync"
	"testing"
)

// visit is one request that a webServer got.
type visit struct {
	From netip.Addr
	Host string
	Path string
}

// webServer answers every request with a line that says what it saw, and
// remembers it.
type webServer struct {
	mu     sync.Mutex
	visits []visit
}

// startWeb serves HTTP on each address of the host.
func startWeb(t testing.TB, h *host, addrs ...string) *webServer {
	t.Helper()
	w := &webServer{}
	for _, a := range addrs {
		if _, err := netip.ParseAddr(a); err == nil {
			a = net.JoinHostPort(a, "80")
		}
		s := &http.Server{Handler: w}
		go s.Serve(h.listen(t, "tcp", a))
		t.Cleanup(func() { s.Close() })
	}
	return w
}

// ServeHTTP answers one request.
func (w *webServer) ServeHTTP(rw http.ResponseWriter, r *http.Request) {
	v := visit{netip.MustParseAddrPort(r.RemoteAddr).Addr().Unmap(), r.Host, r.URL.Path}
	w.mu.Lock()
	w.visits = append(w.visits, v)
	w.mu.Unlock()
	fmt.Fprintf(rw, "host=%s from=%s\n", v.Host, v.From)
}

// from returns the addresses that asked for path, in order.
func (w *webServer) from(path string) []netip.Addr {
	w.mu.Lock()
	defer w.mu.Unlock()
	var froms []netip.Addr
	for _, v := range w.visits {
		if v.Path == path {
			froms = append(froms, v.From)
		}
	}
	return froms
}

// page is what curl got.
type page struct {
	result
	body string
	from netip.Addr // who the server saw, if it answered
}

// curl fetches a URL on the host with Debian's curl, over a new connection,
// with args before the URL.
func (h *host) curl(t testing.TB, url string, args ...string) page {
	t.Helper()
	all := append([]string{tool(t, "curl"), "-sS", "--max-time", "20"}, args...)
	return pageOf(h.run(t, command{args: append(all, url)}))
}

// pageOf reads what the web server said.
func pageOf(r result) page {
	p := page{result: r, body: r.out}
	if _, from, ok := strings.Cut(strings.TrimSpace(r.out), " from="); ok {
		p.from, _ = netip.ParseAddr(from)
	}
	return p
}

// fetched fails the test unless the page came, and to the server from an
// address of the list.
func (p page) fetched(t testing.TB, from ...string) page {
	t.Helper()
	p.ok(t)
	for _, f := range from {
		if p.from == netip.MustParseAddr(f) {
			return p
		}
	}
	t.Fatalf("%s: got %q, want it to come from %v", strings.Join(p.args, " "), p.body, from)
	return p
}

// refused fails the test unless curl failed at once, by a refusal or a reset.
func (p page) refused(t testing.TB) page {
	t.Helper()
	// 7: cannot connect, 35: TLS connect error, 52: empty reply, 55 and 56:
	// reset while sending and receiving.
	switch p.code {
	case 7, 35, 52, 55, 56:
	default:
		t.Fatalf("%s: exit %d, want a refusal\n%s%s", strings.Join(p.args, " "), p.code, p.out, p.result.err)
	}
	if p.took.Seconds() > 3 {
		t.Fatalf("%s: refused only after %v", strings.Join(p.args, " "), p.took)
	}
	return p
}
