package netns_test

import (
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
)

// Topology: world, and containers that have nothing but lo. The gateway is the
// machine that the containers are on.

// container is a machine with nothing but lo, and a process on it.
func container(t testing.TB, name string) (*host, *process) {
	t.Helper()
	h := newHost(t, name)
	h.resolver(t, insideNS)
	return h, h.start(t, command{args: []string{"sleep", "600"}})
}

// attach starts tproxyd attach on the gateway, with args, and waits until n
// namespaces are served.
func (w *world) attach(t testing.TB, n int, args ...string) *process {
	t.Helper()
	p := w.gateway.start(t, command{args: append([]string{program(t), "attach"}, args...)})
	eventually(t, 10*time.Second, "attached: "+p.output(), func() bool { return strings.Count(p.out.String(), "ready") == n || !p.running() })
	if !p.running() {
		t.Fatalf("attach %v: %s", args, p.output())
	}
	return p
}

// TestAttach: two containers with rules of their own by one process; what is
// served, what is closed when the process is not there, and how it ends.
func TestAttach(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.dante(t)
	w.observe(t)
	for _, at := range []string{outsideAt, "[" + outsideAt6 + "]"} {
		w.outside.answerUDP(t, at+":7", echoUDP)
	}
	one, oneProcess := container(t, "one")
	two, twoProcess := container(t, "two")
	before := one.kernel(t)
	rules := w.gateway.file(t, "two.cnf", "SOCKD5 @="+socks2At+" *\n", 0o644)
	args := []string{"--socks", socks1At, "--pid", fmt.Sprint(oneProcess.pid()), "--pid", fmt.Sprint(twoProcess.pid()), "--routes", rules}

	p := w.attach(t, 2, args...)
	work := func(h *host, from ...string) {
		t.Helper()
		h.curl(t, "http://www.example.org/").fetched(t, from...)
		h.curl(t, "http://"+outsideAt+"/").fetched(t, from...)
		h.curl(t, "http://["+outsideAt6+"]/").fetched(t, from...)
		for _, to := range []string{outsideAt + ":7", "[" + outsideAt6 + "]:7"} {
			echoed(t, h.connected(t, to), 100)
		}
	}
	work(one, socks1Out, socks1Out6)
	work(two, socks2Out, socks2Out6)

	// Other rules for one of them, by SIGHUP.
	replaceFile(t, rules, "DENY * eq 81\nSOCKD5 @="+socks1At+" *\n")
	p.cmd.Process.Signal(syscall.SIGHUP)
	eventually(t, 5*time.Second, "the new rules", func() bool { return two.curl(t, "http://"+outsideAt+"/").from.String() == socks1Out })

	closed := func(what string, h *host) {
		t.Helper()
		h.curl(t, "http://"+outsideAt+"/").refused(t)
		h.curl(t, "http://["+outsideAt6+"]/").refused(t)
		for _, to := range []string{outsideAt + ":7", "[" + outsideAt6 + "]:7", insideNS + ":53"} {
			c := h.connected(t, to)
			c.SetDeadline(time.Now().Add(3 * time.Second))
			_, err := c.Write([]byte("x"))
			if err == nil {
				_, err = c.Read(make([]byte, 9))
			}
			if ne, ok := err.(net.Error); err == nil || ok && ne.Timeout() {
				t.Errorf("%s: UDP to %s: %v", what, to, err)
			}
		}
	}
	p.kill()
	closed("killed", one)
	closed("killed", two)
	p = w.attach(t, 2, args...)
	work(one, socks1Out, socks1Out6)

	// A container that stops ends its part alone, and the last one the process.
	twoProcess.kill()
	time.Sleep(100 * time.Millisecond)
	work(one, socks1Out, socks1Out6)
	p.cmd.Process.Signal(syscall.SIGTERM)
	if code, ended := p.wait(5 * time.Second); !ended || code != 0 {
		t.Errorf("SIGTERM: exit %d, %v\n%s", code, ended, p.output())
	}
	closed("stopped", one)
	p = w.attach(t, 1, "--cleanup-on-exit", "--socks", socks1At, "--netns", fmt.Sprintf("/proc/%d/ns/net", oneProcess.pid()))
	work(one, socks1Out, socks1Out6)
	p.cmd.Process.Signal(syscall.SIGINT)
	if code, ended := p.wait(5 * time.Second); !ended || code != 0 {
		t.Errorf("SIGINT: exit %d, %v\n%s", code, ended, p.output())
	}
	if diff := cmp.Diff(strings.Split(before, "\n"), strings.Split(one.kernel(t), "\n")); diff != "" {
		t.Errorf("before (-) and after --cleanup-on-exit (+):\n%s", diff)
	}
	p = w.attach(t, 1, "--socks", socks1At, "--pid", fmt.Sprint(oneProcess.pid()))
	oneProcess.kill()
	if code, ended := p.wait(5 * time.Second); !ended || code != 0 {
		t.Errorf("the last container ended: exit %d, %v\n%s", code, ended, p.output())
	}
	if n, who := w.leaked(t); n != 0 {
		t.Errorf("%d packets leaked:\n%s", n, who)
	}
}

// TestAttachKeep: a container on a bridge. Its network stays as it is with
// --keep, and is closed without.
func TestAttachKeep(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	startMicrosocks(t, w.socks1, socks1At+":1080")
	box, process := container(t, "box")
	connect(t, box, "eth0", w.gateway, "br0")
	box.ip(t, "addr add 10.88.0.2/16 dev eth0", "route add default via 10.88.0.1")
	w.gateway.ip(t, "addr add 10.88.0.1/16 dev br0")
	w.gateway.answerTCP(t, "10.88.0.1:7000", func(c *net.TCPConn) { fmt.Fprintln(c, "neighbour") })
	box.answerTCP(t, "0.0.0.0:8000", func(c *net.TCPConn) { fmt.Fprintln(c, "published") })
	reach := func(h *host, addr string) string {
		t.Helper()
		c, err := h.dial("tcp", addr, 2*time.Second)
		if err != nil {
			return "no"
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(2 * time.Second))
		b := make([]byte, 32)
		n, _ := c.Read(b)
		return strings.TrimSpace(string(b[:n]))
	}
	for _, tt := range []struct {
		args               []string
		neighbour, service string
	}{
		{nil, "", "no"}, // the neighbour is asked by the server, which cannot reach it
		{[]string{"--keep", "eth0"}, "neighbour", "published"},
	} {
		p := w.attach(t, 1, append([]string{"--cleanup-on-exit", "--socks", socks1At, "--pid", fmt.Sprint(process.pid())}, tt.args...)...)
		if got := reach(box, "10.88.0.1:7000"); got != tt.neighbour && (got != "no" || tt.neighbour != "") {
			t.Errorf("%v: the neighbour: %q", tt.args, got)
		}
		if got := reach(w.gateway, "10.88.0.2:8000"); got != tt.service {
			t.Errorf("%v: the published port: %q", tt.args, got)
		}
		box.curl(t, "http://www.example.org/").fetched(t, socks1Out, socks1Out6)
		p.cmd.Process.Signal(syscall.SIGTERM)
		p.wait(5 * time.Second)
	}
}

// TestAttachErrors: what is wrong on the command line is said before anything
// is touched.
func TestAttachErrors(t *testing.T) {
	t.Parallel()
	h, process := container(t, "box")
	pid := fmt.Sprint(process.pid())
	for _, tt := range []struct {
		args []string
		code int
		want string
	}{
		{nil, 2, "nothing to attach to"},
		{[]string{"--pid", pid}, 2, "no way out is named"},
		{[]string{"--pid", pid, "--socks", "10.0.3.1", "--routes", "x"}, 2, "exclude one another"},
		{[]string{"--keep", "eth0", "--pid", pid}, 2, "there is none"},
		{[]string{"--pid", "0", "--socks", "10.0.3.1"}, 1, "not the number of a process"},
		{[]string{"--netns", "/run/netns/none", "--socks", "10.0.3.1"}, 1, "no such file"},
		{[]string{"--pid", pid, "--socks", "10.0.3.1", "--keep", "eth9"}, 1, "there is no interface eth9"},
		{[]string{"--container", "none", "--socks", "10.0.3.1"}, 1, "--container:"},
		{[]string{"--pid", pid, "--routes", "/none.cnf"}, 2, "/none.cnf"},
	} {
		r := h.run(t, command{args: append([]string{program(t), "attach"}, tt.args...)})
		if r.code != tt.code || !strings.Contains(r.err, tt.want) {
			t.Errorf("%v: exit %d, want %d\n%s%s", tt.args, r.code, tt.code, r.out, r.err)
		}
	}
}

func replaceFile(t testing.TB, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
}
