package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/miekg/dns"
	"github.com/spf13/cobra"
	"github.com/tproxyd/tproxyd/internal/daemon"
	"github.com/tproxyd/tproxyd/internal/socksserver"
	"github.com/tproxyd/tproxyd/pkg/flow"
)

const demoDrawing = `
  client 192.0.2.2 ---- 192.0.2.1 gateway 198.51.100.1 ---- 198.51.100.2 SOCKS server
  (not touched)             tproxyd                              203.0.113.80 web server
`

const demoRules = `# what goes where: the first rule that matches decides
SERVER far 198.51.100.2:1080
DENY   *.ads.example.org
SOCKD5 @=far *
`

const demoConfig = `routes = "socks.cnf"
[intercept]
interfaces = ["lan0"]
[state]
directory = "state"
[control]
socket = "control.sock"
`

// demoTimeout bounds the whole demonstration.
const demoTimeout = 50 * time.Second

func demoCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:   "demo",
		Short: "Show the main job without any set-up",
		Long: `Make three network namespaces (a client, this program as a gateway, a SOCKS
server with a web server behind it) and show from the untouched client how a
name is asked, answered, decided, carried or denied. Nothing outside these
namespaces is touched and nothing is left behind. Without root it uses a user
namespace.`,
		Example: "  tproxyd demo",
		Args:    cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			ctx, cancel := context.WithTimeout(c.Context(), demoTimeout)
			defer cancel()
			if os.Geteuid() != 0 {
				return failed(inUserNamespace(ctx, e))
			}
			return failed(demo(ctx, e.stdout))
		},
	}
}

// inUserNamespace runs the demonstration as root of a user namespace of its
// own.
func inUserNamespace(ctx context.Context, e *env) error {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "demo")
	cmd.Stdout, cmd.Stderr = e.stdout, e.stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER,
		UidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}},
		GidMappings: []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}},
		Pdeathsig:   syscall.SIGKILL,
	}
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("demo: in a user namespace: %w; run it as root", err)
	}
	return nil
}

func demo(ctx context.Context, out io.Writer) error {
	say := func(format string, args ...any) { fmt.Fprintf(out, format+"\n", args...) }
	dir, err := os.MkdirTemp("", "tproxyd-demo")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	conf := filepath.Join(dir, "tproxyd.toml")
	if err := errors.Join(
		os.WriteFile(conf, []byte(demoConfig), 0o644),
		os.WriteFile(filepath.Join(dir, "socks.cnf"), []byte(demoRules), 0o644),
	); err != nil {
		return err
	}
	setup, diags := daemon.Load(conf, "")
	if diags.HasErrors() {
		return diags
	}

	lab, err := newDemoLab()
	if err != nil {
		return fmt.Errorf("demo: %w", err)
	}
	defer lab.close()
	say("A client, a gateway, a SOCKS server, each in a network namespace of its own:\n%s", demoDrawing)
	say("socks.cnf on the gateway:\n")
	for i, l := range strings.Split(strings.TrimSpace(demoRules), "\n") {
		say("  %d  %s", i+1, l)
	}

	carried := make(chan socksserver.Request, 8)
	if err := lab.startServers(ctx, carried); err != nil {
		return fmt.Errorf("demo: %w", err)
	}
	stop, err := lab.startGateway(ctx, conf)
	if err != nil {
		return fmt.Errorf("demo: %w", err)
	}
	defer stop()

	for _, name := range []string{"www.example.org", "tracker.ads.example.org"} {
		say("\n--- the client wants http://%s/", name)
		addr, err := lab.ask(ctx, name)
		if err != nil {
			return fmt.Errorf("demo: %w", err)
		}
		say("client asks   A %s of the resolver 203.0.113.53 (which does not exist)", name)
		say("answer        %s, a synthetic address", addr)
		f := flow.Flow{Name: name, Dst: netip.AddrPortFrom(netip.Addr{}, 80), Src: netip.MustParseAddrPort("192.0.2.2:0"), InIf: "lan0"}
		x := setup.Table.Explain(f, surroundings(setup))
		say("rule          %s", strings.TrimPrefix(x.Rule, dir+"/"))
		page, err := lab.fetch(ctx, name, addr)
		switch {
		case x.Verdict == "DENY" && err != nil:
			say("client        %v, at once", rootCause(err))
		case x.Verdict == "DENY" || err != nil:
			return fmt.Errorf("demo: verdict %s, but the page %q came with error %v", x.Verdict, page, err)
		default:
			r := <-carried
			say("SOCKS server  far was asked: CONNECT %s, by name, by %s", r.Target, r.Client.Addr())
			say("page          %s", strings.TrimSpace(page))
		}
		say("verdict       %s", x.Verdict)
	}

	say("\n--- the daemon is killed (SIGKILL); the client tries again")
	stop()
	began := time.Now()
	if page, err := lab.fetch(ctx, "www.example.org", netip.MustParseAddr("203.0.113.80")); err == nil {
		return fmt.Errorf("demo: a leak: the page %q came without the daemon", page)
	} else {
		say("client        %v after %v: nothing leaks, nothing hangs", rootCause(err), time.Since(began).Round(10*time.Microsecond))
	}
	return nil
}

// rootCause is the system's own word in a network error.
func rootCause(err error) error {
	var errno syscall.Errno
	switch {
	case errors.Is(err, syscall.EPIPE), errors.Is(err, io.EOF):
		// A reset is told once: who writes hears EPIPE if who reads was told, and who
		// reads finds the end if who writes was.
		return syscall.ECONNRESET
	case errors.As(err, &errno):
		return errno
	}
	return err
}

// ask sends the client's DNS question and returns the answer's address.
func (l *demoLab) ask(ctx context.Context, name string) (netip.Addr, error) {
	var conn net.Conn
	err := l.client.Do(func() (err error) {
		conn, err = (&net.Dialer{}).DialContext(ctx, "udp", "203.0.113.53:53")
		return err
	})
	if err != nil {
		return netip.Addr{}, err
	}
	defer conn.Close()
	q := new(dns.Msg).SetQuestion(dns.Fqdn(name), dns.TypeA)
	c := dns.Client{Timeout: 5 * time.Second}
	a, _, err := c.ExchangeWithConnContext(ctx, q, &dns.Conn{Conn: conn})
	if err != nil {
		return netip.Addr{}, fmt.Errorf("the DNS question for %s: %w", name, err)
	}
	for _, rr := range a.Answer {
		if a, ok := rr.(*dns.A); ok {
			addr, _ := netip.AddrFromSlice(a.A.To4())
			return addr, nil
		}
	}
	return netip.Addr{}, fmt.Errorf("no address for %s: %s", name, dns.RcodeToString[a.Rcode])
}

// fetch gets the page at addr as the client does.
func (l *demoLab) fetch(ctx context.Context, name string, addr netip.Addr) (string, error) {
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (conn net.Conn, err error) {
		err = l.client.Do(func() error {
			conn, err = (&net.Dialer{Timeout: 10 * time.Second}).DialContext(ctx, "tcp", netip.AddrPortFrom(addr, 80).String())
			return err
		})
		return conn, err
	}}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+name+"/", nil)
	if err != nil {
		return "", err
	}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	return string(b), err
}

// startServers starts the SOCKS server and the web server behind it; both end
// with ctx.
func (l *demoLab) startServers(ctx context.Context, carried chan<- socksserver.Request) error {
	var web, socks net.Listener
	err := l.server.Do(func() (err error) {
		if web, err = net.Listen("tcp", "203.0.113.80:80"); err != nil {
			return err
		}
		socks, err = net.Listen("tcp", "198.51.100.2:1080")
		return err
	})
	if err != nil {
		return err
	}
	page := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "<h1>%s, served to %s</h1>\n", r.Host, r.RemoteAddr)
	})
	webServer := &http.Server{Handler: page}
	go webServer.Serve(web)
	context.AfterFunc(ctx, func() { webServer.Close() })
	s := &socksserver.Server{
		Dial: func(ctx context.Context, network, addr string) (conn net.Conn, err error) {
			err = l.server.Do(func() error {
				conn, err = (&net.Dialer{}).DialContext(ctx, network, addr)
				return err
			})
			return conn, err
		},
		Resolve:   func(string) (netip.Addr, error) { return netip.MustParseAddr("203.0.113.80"), nil },
		OnRequest: func(r socksserver.Request) { carried <- r },
	}
	go s.Serve(ctx, socks)
	return nil
}

// startGateway starts this program as the daemon in the gateway's namespace
// and waits until it is ready. Stop kills it, as a crash would.
func (l *demoLab) startGateway(ctx context.Context, conf string) (stop func(), err error) {
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "serve", "-c", conf, "--log-level", "warn")
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := l.gateway.Do(cmd.Start); err != nil {
		return nil, err
	}
	stop = func() {
		cmd.Process.Kill()
		cmd.Wait()
	}
	if line, err := bufio.NewReader(stdout).ReadString('\n'); err != nil {
		stop()
		return nil, fmt.Errorf("the gateway did not become ready: %q: %w", line, err)
	}
	return stop, nil
}
