package netns_test

import (
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// Topology: world. The gateway is somebody's machine here, on which no daemon
// runs: a user without rights runs commands, whose flows go to socks1.

// asNobody is a command line that drops every right.
func asNobody(t testing.TB, args ...string) []string {
	return append([]string{tool(t, "setpriv"), "--reuid=65534", "--regid=65534", "--clear-groups", "--"}, args...)
}

// runLine is a command line of tproxyd run, as nobody.
func runLine(t testing.TB, args ...string) []string {
	return asNobody(t, append([]string{program(t), "run"}, args...)...)
}

// tproxyd runs a command through socks1.
func (w *world) tproxyd(t testing.TB, args ...string) result {
	t.Helper()
	return w.gateway.run(t, command{args: runLine(t, append([]string{"--socks", socks1At, "--resolver", outsideNS, "--"}, args...)...)})
}

// fromSocks1 is what a page says that was fetched through socks1.
var fromSocks1 = regexp.MustCompile(`from=(203\.0\.113\.11|2001:db8:3::11)\b`)

var probe struct {
	once sync.Once
	err  error
}

// probePath is the path of testdata/probe, a static program.
func probePath(t testing.TB) string {
	t.Helper()
	path := filepath.Join(filepath.Dir(program(t)), "probe")
	probe.once.Do(func() {
		c := exec.Command("go", "build", "-o", path, "./testdata/probe")
		c.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := c.CombinedOutput(); err != nil {
			probe.err = fmt.Errorf("go build: %w\n%s", err, out)
		}
	})
	if probe.err != nil {
		t.Fatal(probe.err)
	}
	return path
}

// leftovers are the processes, of whatever namespace, that have this text in
// their command lines. Namespaces and mounts end with the last process in them.
func leftovers(text string) (found []string) {
	files, _ := filepath.Glob("/proc/[0-9]*/cmdline")
	for _, f := range files {
		b, err := os.ReadFile(f)
		if line := strings.ReplaceAll(string(b), "\x00", " "); err == nil && strings.Contains(line, text) {
			found = append(found, f+": "+line)
		}
	}
	return found
}

// TestRun: whatever a command is made of, what it does goes through the server,
// and its end is the end of the run.
func TestRun(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.dante(t)
	w.observe(t)
	w.outside.answerUDP(t, outsideAt+":7", echoUDP)
	w.outside.answerUDP(t, "["+outsideAt6+"]:7", echoUDP)
	for _, at := range []string{outsideAt + ":7", "[" + outsideAt6 + "]:7"} {
		w.outside.answerTCP(t, at, func(c *net.TCPConn) {
			c.Read(make([]byte, 16)) // what is not read would become a reset
			fmt.Fprintln(c, "from="+c.RemoteAddr().(*net.TCPAddr).IP.String())
			c.CloseWrite()
		})
	}
	w.outsideDNS.add(t, "single. 60 IN A "+outsideAt, "single. 60 IN AAAA "+outsideAt6)
	curl := []string{tool(t, "curl"), "-sS", "--max-time", "10"}
	for _, tt := range []struct {
		args []string
		code int
		out  string // a pattern
	}{
		{append(curl, "http://www.example.org/a"), 0, fromSocks1.String()},
		{append(curl, "http://["+outsideAt6+"]/b"), 0, "from=" + socks1Out6},
		{append(curl, "http://single/"), 0, fromSocks1.String()}, // the server's search list, not ours
		{[]string{tool(t, "wget"), "-q", "-O-", "-T10", "http://[" + outsideAt6 + "]/c"}, 0, "from=" + socks1Out6},
		{[]string{probePath(t), "tcp", "www.example.org:7"}, 0, fromSocks1.String()},
		{[]string{probePath(t), "udp", "www.example.org:7"}, 0, "hello"},
		{[]string{probePath(t), "udp", "[" + outsideAt6 + "]:7"}, 0, "hello"},
		{[]string{tool(t, "dig"), "+short", "+tries=1", "www.example.org"}, 0, `^198\.1[89]\.`},
		{[]string{tool(t, "dig"), "+short", "+tries=1", "@192.0.2.77", "www.example.org", "txt"}, 0, "told by the outside"},
		{[]string{"true"}, 0, "^$"},
		{[]string{"sh", "-c", "exit 37"}, 37, "^$"},
		{[]string{"sh", "-c", "kill -TERM $$"}, 128 + 15, "^$"},
		{[]string{"there-is-no-such-command"}, 127, "^$"},
		{[]string{"/etc/passwd"}, 126, "^$"},
		{[]string{"sh", "-c", "id -u; id -g; pwd"}, 0, "^65534\n65534\n" + w.gateway.dir + "\n$"},
		{[]string{"grep", "-E", "Cap(Prm|Eff|Inh|Amb)", "/proc/self/status"}, 0, `^(Cap...:\s0{16}\n){4}$`},
		{[]string{tool(t, "nft"), "list", "ruleset"}, 1, "^$"},
		{[]string{tool(t, "ip"), "link", "set", "lo", "down"}, 2, "^$"},
	} {
		r := w.tproxyd(t, tt.args...)
		if !regexp.MustCompile(tt.out).MatchString(r.out) || r.code != tt.code {
			t.Errorf("%s: exit %d, want %d:\n%s%swant %s", strings.Join(tt.args, " "), r.code, tt.code, r.out, r.err, tt.out)
		}
	}
	if n, who := w.leaked(t); n != 0 {
		t.Errorf("%d packets leaked:\n%s", n, who)
	}
	// What the caller has open is the command's too, from descriptor 3 on.
	three := w.gateway.file(t, "three", "three\n", 0o644)
	open := []string{"sh", "-c", `exec "$@" 3<` + three + ` 4</dev/null`, "sh"}
	open = append(open, runLine(t, "--socks", socks1At, "--", "sh", "-c", "cat <&3; readlink /proc/self/fd/4")...)
	if r, want := w.gateway.run(t, command{args: open}), "three\n/dev/null\n"; r.out != want {
		t.Errorf("with two descriptors of the caller's: %q, want %q\n%s", r.out, want, r.err)
	}
	limits := []string{"sh", "-c", "ulimit -Sn; ulimit -Hn; trap; umask; ls /proc/self/fd; grep -E 'Sig(Blk|Ign|Cgt)|NoNew' /proc/self/status"}
	if in, out := w.tproxyd(t, limits...), w.gateway.run(t, command{args: asNobody(t, limits...)}); in.out != out.out {
		t.Errorf("what is inherited is %q inside, %q outside", in.out, out.out)
	}
}

// TestRunWays: what the command line, a file and the environment can say.
func TestRunWays(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.socks1.user(t, "ann", passwordHash)
	startDanted(t, w.socks1, socks1At+":1080", danteConf([]string{socks1At}, []string{socks1Out}, "username", `
client pass { from: 0/0 to: 0/0 }
socks pass { from: 0/0 to: 0/0 }`))
	startMicrosocks(t, w.socks2, socks2At+":1080")
	rules := w.gateway.file(t, "rules.cnf", "SERVER two "+socks2At+"\nDIRECT *.example\nDENY *.ads.example.org reject=dns-nxdomain\nSOCKD5 @=two *\n", 0o644)
	curl := func(env []string, url string, flags ...string) page {
		t.Helper()
		args := runLine(t, append(flags, "--", tool(t, "curl"), "-sS", "--max-time", "10", url)...)
		p := page{result: w.gateway.run(t, command{args: args, env: env})}
		p.body = p.out
		if _, from, ok := strings.Cut(strings.TrimSpace(p.out), " from="); ok {
			p.from = netip.MustParseAddr(from)
		}
		return p
	}
	curl(nil, "http://www.example.org/", "--routes", rules).fetched(t, socks2Out, socks2Out6)
	curl(nil, "http://direct.example/", "--routes", rules).fetched(t, wanAt, wanAt6)
	curl(nil, "http://x.ads.example.org/", "--routes", rules).exit(t, 6)
	curl([]string{"ALL_PROXY=socks5h://" + socks2At, "http_proxy=http://192.0.2.99:3128"}, "http://www.example.org/").fetched(t, socks2Out, socks2Out6)
	curl([]string{"SOCKS_SERVER=" + socks2At + ":1080"}, "http://www.example.org/").fetched(t, socks2Out, socks2Out6)
	own := w.gateway.file(t, "own.toml", fmt.Sprintf("[mine]\nusername = %q\npassword = %q\n", "ann", password), 0o600)
	if err := os.Chown(own, 65534, -1); err != nil {
		t.Fatal(err)
	}
	curl(nil, "http://www.example.org/", "--socks", socks1At, "--credential", "mine", "--credentials", own).fetched(t, socks1Out)
	curl([]string{"SOCKS_USERNAME=ann", "SOCKS_PASSWORD=" + password}, "http://www.example.org/", "--socks", socks1At).fetched(t, socks1Out)
	curl([]string{"ALL_PROXY=socks5://" + url.UserPassword("ann", password).String() + "@" + socks1At + ":1080"}, "http://www.example.org/").fetched(t, socks1Out)
	curl(nil, "http://www.example.org/", "--socks", socks1At).refused(t)
	if p := curl(nil, "http://www.example.org/"); p.code != 2 || !strings.Contains(p.result.err, "--socks SERVER or --routes FILE") {
		t.Errorf("without a way: exit %d\n%s", p.code, p.result.err)
	}
	if p := curl([]string{"ALL_PROXY=socks5://ann:geheim@[bad"}, "http://www.example.org/"); p.code != 2 || strings.Contains(p.result.err, "geheim") {
		t.Errorf("a bad URL: exit %d\n%s", p.code, p.result.err)
	}
	if p := curl(nil, "http://www.example.org/", "--socks", socks2At, "--credential", "nobody-knows"); p.code != 2 || !strings.Contains(p.result.err, "E20") {
		t.Errorf("an unknown credential: exit %d\n%s", p.code, p.result.err)
	}

	log := filepath.Join(w.gateway.dir, "log")
	if err := os.WriteFile(log, nil, 0o666); err != nil {
		t.Fatal(err)
	}
	os.Chmod(log, 0o666)
	p := curl(nil, "http://www.example.org/", "--socks", socks2At, "-v", "--log", log)
	p.fetched(t, socks2Out, socks2Out6)
	written, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	for what, text := range map[string]string{"-v": p.result.err, "--log": string(written)} {
		if n := strings.Count(text, "host=www.example.org"); n != 1 || !strings.Contains(text, "upstream="+socks2At) {
			t.Errorf("%s has %d lines of the flow:\n%s", what, n, text)
		}
	}
}

// TestRunNoLeak: with no server there is no way out, by any means, and nothing
// hangs.
func TestRunNoLeak(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.observe(t)
	w.gateway.nft(t, `table inet mine {
	counter sent { }
	chain out { type filter hook output priority -300; oifname != "lo" ip daddr != `+socks1At+` icmpv6 type != { nd-neighbor-solicit, nd-neighbor-advert, nd-router-solicit, mld2-listener-report } counter name sent; oifname != "lo" meta nfproto ipv4 ip daddr != `+socks1At+` counter name sent; }
}`)
	var asked atomic.Int32 // systemd-resolved; nscd is asked by setpriv, too
	for _, path := range []string{"/run/nscd/socket", "/run/systemd/resolve/io.systemd.Resolve"} {
		var ln net.Listener
		w.gateway.must(t, w.gateway.ns.Do(func() (err error) { // where its /run is
			if err = os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				return err
			}
			if ln, err = net.Listen("unix", path); err != nil {
				return err
			}
			return os.Chmod(path, 0o777)
		}))
		t.Cleanup(func() { ln.Close() })
		go func() {
			for {
				c, err := ln.Accept()
				if err != nil {
					return
				}
				c.Close()
				if strings.HasPrefix(path, "/run/systemd") {
					asked.Add(1)
				}
			}
		}()
	}
	w.gateway.run(t, command{args: asNobody(t, probePath(t), "unix", "/run/nscd/socket")}).ok(t)
	w.gateway.run(t, command{args: asNobody(t, probePath(t), "unix", "/run/systemd/resolve/io.systemd.Resolve")}).ok(t)
	eventually(t, time.Second, "outside it can be asked", func() bool { return asked.Load() == 1 })
	for _, args := range [][]string{
		{tool(t, "curl"), "-sS", "--max-time", "10", "http://www.example.org/"},
		{tool(t, "curl"), "-sS", "--max-time", "10", "http://[" + outsideAt6 + "]/"},
		{tool(t, "wget"), "-q", "-T10", "-t1", "-O-", "http://" + outsideAt + "/"},
		{probePath(t), "tcp", outsideAt + ":7"},
		{probePath(t), "udp", outsideAt + ":7"},
		{probePath(t), "udp", "[" + outsideAt6 + "]:7"},
		{probePath(t), "icmp", outsideAt},
		{probePath(t), "tcp", "169.254.169.254:80"},
		{probePath(t), "tcp", wanAt + ":22"},
		{probePath(t), "unix", "/run/nscd/socket"},
		{probePath(t), "unix", "/run/systemd/resolve/io.systemd.Resolve"},
		{tool(t, "dig"), "+tries=1", "+time=8", "@" + insideNS, "direct.example", "txt", "+fail"},
		{tool(t, "dig"), "+tries=1", "+time=8", "+tcp", "@" + insideNS6, "direct.example", "mx", "+fail"},
		{tool(t, "ping"), "-c1", "-W8", outsideAt6},
	} {
		r := w.tproxyd(t, args...)
		if r.took > 4*time.Second {
			t.Errorf("%s: only after %v", strings.Join(args, " "), r.took)
		}
		dig := strings.HasSuffix(args[0], "dig")
		if !dig && r.code == 0 || dig && !strings.Contains(r.out, "SERVFAIL") {
			t.Errorf("%s: exit %d\n%s%s", strings.Join(args, " "), r.code, r.out, r.err)
		}
	}
	if n := asked.Load(); n != 1 {
		t.Errorf("systemd-resolved was asked %d times", n-1)
	}
	if n, who := w.leaked(t); n != 0 {
		t.Errorf("%d packets leaked:\n%s", n, who)
	}
	if out := w.gateway.run(t, command{args: []string{tool(t, "nft"), "list", "counter", "inet", "mine", "sent"}}).ok(t).out; !strings.Contains(out, "packets 0 ") {
		t.Errorf("sent by this machine:\n%s", out)
	}
}

// TestRunEnds: nothing of a run outlives it, however it ends.
func TestRunEnds(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	startMicrosocks(t, w.socks1, socks1At+":1080")
	gone := func(what, text string) {
		t.Helper()
		eventually(t, 3*time.Second, what+": all of it is gone", func() bool { return len(leftovers(text)) == 0 })
	}
	// Fifty at once, each leaving a process behind.
	var wg sync.WaitGroup
	for i := range 50 {
		wg.Go(func() {
			r := w.tproxyd(t, "sh", "-c", fmt.Sprintf("sleep 331 & curl -sS --max-time 20 http://www.example.org/; exit %d", i))
			if r.code != i || !fromSocks1.MatchString(r.out) {
				t.Errorf("number %d: exit %d\n%s%s", i, r.code, r.out, r.err)
			}
		})
	}
	wg.Wait()
	gone("fifty", "sleep 331")

	// start runs a shell with children, and returns its processes.
	start := func(n string) (front *process, server, shell int) {
		t.Helper()
		front = w.gateway.start(t, command{args: runLine(t, "--socks", socks1At, "--", "sh", "-c", "setsid sleep "+n+" & trap 'exit 3' TERM; echo ready; while :; do sleep 0.05; done")})
		eventually(t, 5*time.Second, "the command runs", func() bool { return strings.Contains(front.out.String(), "ready") })
		server = childOf(front.pid())
		return front, server, childOf(server)
	}
	front, _, _ := start("332")
	front.cmd.Process.Signal(syscall.SIGTERM)
	if code, ended := front.wait(3 * time.Second); !ended || code != 3 {
		t.Errorf("SIGTERM: exit %d, %v\n%s", code, ended, front.output())
	}
	gone("SIGTERM", "sleep 332")

	front, _, _ = start("333")
	front.kill()
	gone("the front killed", "sleep 333")

	front, server, _ := start("334")
	syscall.Kill(server, syscall.SIGKILL)
	if code, ended := front.wait(3 * time.Second); !ended || code != 125 {
		t.Errorf("the server killed: exit %d, %v\n%s", code, ended, front.output())
	}
	gone("the server killed", "sleep 334")

	front, _, shell := start("335")
	syscall.Kill(shell, syscall.SIGKILL)
	if code, ended := front.wait(3 * time.Second); !ended || code != 128+9 {
		t.Errorf("the command killed: exit %d, %v\n%s", code, ended, front.output())
	}
	gone("the command killed", "sleep 335")
}

// childOf is the first child of a process.
func childOf(pid int) (child int) {
	b, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if fmt.Sscan(string(b), &child); child != 0 {
		return child
	}
	tasks, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, f := range tasks {
		if b, _ := os.ReadFile(f); len(b) > 0 {
			fmt.Sscan(string(b), &child)
		}
	}
	return child
}

// TestRunPublish: a port of the host leads to a server inside.
func TestRunPublish(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	startMicrosocks(t, w.socks1, socks1At+":1080")
	inside := w.gateway.start(t, command{args: runLine(t, "--socks", socks1At, "--publish", "8080:8081", "--publish", wanAt+":8082:8081", "--",
		probePath(t), "serve", "127.0.0.1:8081")})
	eventually(t, 5*time.Second, "it serves", func() bool { return strings.Contains(inside.out.String(), "serving") })
	for h, at := range map[*host]string{w.gateway: "127.0.0.1:8080", w.inside: wanAt + ":8082"} {
		if r := h.run(t, command{args: []string{probePath(t), "tcp", at}}).ok(t); r.out != "hello\n\n" && r.out != "hello\n" {
			t.Errorf("%s: %q", at, r.out)
		}
	}
	if r := w.gateway.run(t, command{args: []string{probePath(t), "tcp", wanAt + ":8080"}}); r.code == 0 {
		t.Error("published on all addresses")
	}
	r := w.gateway.run(t, command{args: runLine(t, "--socks", socks1At, "--publish", "8080:80", "--", "true")})
	if r.code != 125 || !strings.Contains(r.err, "address already in use") {
		t.Errorf("a port that is taken: exit %d\n%s", r.code, r.err)
	}
}

// TestRunRoot: root needs no user namespace, keeps what it can do with files,
// and has no right over the network.
func TestRunRoot(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	startMicrosocks(t, w.socks1, socks1At+":1080")
	w.observe(t)
	run := func(args ...string) result {
		t.Helper()
		return w.gateway.run(t, command{args: append([]string{program(t), "run", "--socks", socks1At, "--"}, args...)})
	}
	own, err := os.Readlink("/proc/self/ns/user")
	if err != nil {
		t.Fatal(err)
	}
	if r := run("readlink", "/proc/self/ns/user").ok(t); strings.TrimSpace(r.out) != own {
		t.Errorf("in user namespace %q", r.out)
	}
	if r := run(tool(t, "curl"), "-sS", "--max-time", "10", "http://www.example.org/").ok(t); !fromSocks1.MatchString(r.out) {
		t.Errorf("%s%s", r.out, r.err)
	}
	run("sh", "-c", "touch f && chown 65534 f && rm f").ok(t)
	run(tool(t, "setpriv"), "--reuid=65534", "--clear-groups", "id").ok(t)
	for _, args := range [][]string{
		{tool(t, "nft"), "flush", "ruleset"},
		{tool(t, "ip"), "link", "set", "lo", "down"},
		{"nsenter", "--net=/proc/1/ns/net", "true"},
		{tool(t, "unshare"), "-m", "true"},
		{probePath(t), "icmp", outsideAt},
	} {
		if r := run(args...); r.code == 0 {
			t.Errorf("%s: allowed", strings.Join(args, " "))
		}
	}
	if n, who := w.leaked(t); n != 0 {
		t.Errorf("%d packets leaked:\n%s", n, who)
	}
}

// TestRunForbidden: where there are no user namespaces the error says which
// knob it is.
func TestRunForbidden(t *testing.T) {
	t.Parallel()
	h := newHost(t, "machine")
	// The limit is that of the user namespace that the process is in.
	line := "echo 0 >/proc/sys/user/max_user_namespaces && exec setpriv --bounding-set=-all -- " + program(t) + " run --socks 10.0.3.1 -- true"
	r := h.run(t, command{args: []string{tool(t, "unshare"), "--user", "--map-root-user", "sh", "-c", line}})
	if r.code != 125 || !strings.Contains(r.err, "sysctl user.max_user_namespaces") {
		t.Errorf("exit %d\n%s%s", r.code, r.out, r.err)
	}
}
