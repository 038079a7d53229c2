package daemon

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/pprof"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/tproxyd/tproxyd/internal/socksserver"
	"github.com/tproxyd/tproxyd/pkg/redirect"
)

const (
	patience = 10 * time.Second  // how long a test waits for what must come
	far      = "203.0.113.80:80" // proxied; nobody is there but behind the SOCKS server
	directAt = "203.0.113.90"    // where direct.example is
	denied   = "203.0.113.81:80" // denied by rule
	rules    = "SERVER s %s credential=office\nDENY 203.0.113.81\nSOCKD5 @=s *\n"
	toml     = "credentials = \"credentials.toml\"\n[intercept]\nlocal = true\n%s\n[dns]\nresolvers = [%q]\n[state]\ndirectory = \"state\"\n[control]\nsocket = \"control.sock\"\n"
	office   = "[office]\nusername = \"operator\"\npassword = \"" + secret + "\"\n"
)

// running is a daemon that serves this namespace, in this process.
type running struct {
	*Daemon
	t      testing.TB
	dir    string
	log    *buffer
	hup    chan os.Signal
	cancel context.CancelFunc
	ended  chan error // of Run
	lines  chan string
	told   *net.UnixConn // what systemd hears
}

// serve starts a SOCKS server and a daemon that uses it; more is part of
// [intercept].
func serve(t testing.TB, more string) *running {
	t.Helper()
	dir := write(t, map[string]string{
		"tproxyd.toml": fmt.Sprintf(toml, more, startResolver(t)), "credentials.toml": office, "socks.cnf": fmt.Sprintf(rules, startSocks(t)), "state/.keep": "",
	})
	return serveIn(t, dir)
}

// serveIn starts a daemon with the files of dir.
func serveIn(t testing.TB, dir string) *running {
	t.Helper()
	r := &running{t: t, dir: dir, log: &buffer{}, hup: make(chan os.Signal), ended: make(chan error, 1), lines: make(chan string, 2)}
	path := filepath.Join(t.TempDir(), "notify")
	var err error
	if r.told, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"}); err != nil {
		t.Fatal(err)
	}
	os.Setenv("NOTIFY_SOCKET", path)
	setup, diags := Load(filepath.Join(dir, "tproxyd.toml"), "")
	if diags.HasErrors() {
		t.Fatal(diags)
	}
	if r.Daemon, err = New(setup, slog.New(slog.NewTextHandler(r.log, &slog.HandlerOptions{Level: slog.LevelDebug}))); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	r.cancel = cancel
	go func() {
		r.ended <- r.Run(ctx, Signals{Reload: r.hup, Ready: func(line string) { r.lines <- line }})
	}()
	t.Cleanup(func() {
		r.stop()
		r.told.Close()
		os.Unsetenv("NOTIFY_SOCKET")
		if err := redirect.Remove(); err != nil {
			t.Error(err)
		}
		if strings.Contains(r.log.String(), secret) {
			t.Error("the log tells a secret")
		}
		if t.Failed() {
			t.Logf("log:\n%s", r.log)
		}
	})
	r.hears("READY=1")
	return r
}

// stop ends the daemon; again is once.
func (r *running) stop() {
	r.t.Helper()
	if r.cancel == nil {
		return
	}
	r.cancel()
	r.cancel = nil
	select {
	case err := <-r.ended:
		if err != nil {
			r.t.Errorf("Run: %v", err)
		}
	case <-time.After(patience):
		r.t.Error("Run does not end with its context")
		pprof.Lookup("goroutine").WriteTo(os.Stderr, 1)
	}
}

// hears waits until systemd is told something.
func (r *running) hears(want string) string {
	r.t.Helper()
	r.told.SetReadDeadline(time.Now().Add(patience))
	b := make([]byte, 4096)
	n, err := r.told.Read(b)
	if err != nil || !strings.Contains("\n"+string(b[:n]), "\n"+want) {
		r.t.Fatalf("systemd heard %q, %v, want %q\n%s", b[:n], err, want, r.log)
	}
	return string(b[:n])
}

// routes writes socks.cnf anew and sends the signal for it; it returns when
// the daemon tells systemd that it is done, and what.
func (r *running) routes(text string) string {
	r.t.Helper()
	if err := os.WriteFile(filepath.Join(r.dir, "socks.cnf"), []byte(text), 0o600); err != nil {
		r.t.Fatal(err)
	}
	r.hup <- syscall.SIGHUP
	r.hears("RELOADING=1\nMONOTONIC_USEC=")
	return r.hears("READY=1")
}

// client connects as a program of this host does.
func client(t testing.TB, to string) (net.Conn, error) {
	t.Helper()
	c, err := net.DialTimeout("tcp4", to, patience)
	if err == nil {
		t.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(patience))
	}
	return c, err
}

// carried fails the test unless a flow gets through to the echo.
func carried(t testing.TB) net.Conn {
	t.Helper()
	c, err := client(t, far)
	if err != nil {
		t.Fatal(err)
	}
	echoes(t, c)
	return c
}

func echoes(t testing.TB, c net.Conn) {
	t.Helper()
	b := make([]byte, 5)
	if _, err := io.WriteString(c, "hello"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, b); err != nil || string(b) != "hello" {
		t.Fatalf("%q, %v", b, err)
	}
}

// refused fails the test unless a flow is refused at once.
func refused(t testing.TB, to string) {
	t.Helper()
	began := time.Now()
	c, err := client(t, to)
	if err == nil {
		_, err = c.Read(make([]byte, 1))
	}
	if took := time.Since(began); !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, syscall.ECONNRESET) || took > 2*time.Second {
		t.Errorf("%s: %v after %v, want a refusal at once", to, err, took)
	}
}

// kernel is the state of this namespace that a daemon may change.
func kernel(t testing.TB) string {
	t.Helper()
	var all strings.Builder
	for _, line := range []string{"nft -s list ruleset", "ip rule", "ip -6 rule", "ip route show table all", "ip -6 route show table all"} {
		words := strings.Fields(line)
		out, err := exec.Command(words[0], words[1:]...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s: %v\n%s", line, err, out)
		}
		all.Write(out)
	}
	return all.String()
}

// startSocks starts a SOCKS server for which every place is an echo.
func startSocks(t testing.TB) string {
	t.Helper()
	echo, socks := listen(t, "127.0.0.1:0"), listen(t, "127.0.0.1:0")
	ctx, cancel := context.WithCancel(context.Background())
	s := &socksserver.Server{
		Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, network, echo.Addr().String())
		},
		Auth: func(user, password string) bool { return user == "operator" && password == secret },
	}
	var tasks sync.WaitGroup
	tasks.Go(func() { s.Serve(ctx, socks) })
	tasks.Go(func() {
		for {
			c, err := echo.Accept()
			if err != nil {
				return
			}
			tasks.Go(func() {
				defer c.Close()
				c.SetDeadline(time.Now().Add(2 * patience))
				io.Copy(c, c)
			})
		}
	})
	t.Cleanup(func() { cancel(); echo.Close(); tasks.Wait() })
	return socks.Addr().String()
}

// startResolver starts a resolver that knows direct.example alone.
func startResolver(t testing.TB) string {
	t.Helper()
	pc, err := net.ListenPacket("udp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &dns.Server{PacketConn: pc, Handler: dns.HandlerFunc(func(w dns.ResponseWriter, q *dns.Msg) {
		a := new(dns.Msg).SetReply(q)
		if q.Question[0].Name != "direct.example." {
			a.Rcode = dns.RcodeNameError
		} else if q.Question[0].Qtype == dns.TypeA {
			rr, _ := dns.NewRR("direct.example. 60 IN A " + directAt)
			a.Answer = append(a.Answer, rr)
		}
		w.WriteMsg(a)
	})}
	ended := make(chan struct{})
	go func() { defer close(ended); s.ActivateAndServe() }()
	t.Cleanup(func() { pc.Close(); <-ended })
	return pc.LocalAddr().String()
}

// ask asks a resolver that does not exist for an address of a name.
func ask(t testing.TB, name string) string {
	t.Helper()
	c := dns.Client{Timeout: patience}
	a, _, err := c.Exchange(new(dns.Msg).SetQuestion(name, dns.TypeA), "203.0.113.53:53")
	if err != nil || len(a.Answer) != 1 {
		t.Fatalf("%s: %v, %v", name, a, err)
	}
	return a.Answer[0].(*dns.A).A.String()
}

func listen(t testing.TB, at string) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	return ln
}

// buffer is a log that can be read while it is written.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}
