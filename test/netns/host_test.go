package netns_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tproxyd/tproxyd/internal/netns"
)

// host is a machine of a test: a network namespace and a mount namespace, both
// without a name, held by one thread. Files that programs look for in /etc are
// replaced for this machine alone.
type host struct {
	name string
	dir  string // of this machine alone, its path short enough for UNIX sockets
	ns   *netns.Namespace
	jobs chan func() // idle workers wait here; see in

	workers sync.WaitGroup
	mu      sync.Mutex
	closed  bool
}

// newHost makes a machine with its loopback up, forwarding off, and an empty
// /run of its own.
func newHost(t testing.TB, name string) *host {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("these tests make namespaces: run them as root")
	}
	dir, err := os.MkdirTemp("", "tpx")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	ns, err := netns.New()
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	h := &host{name: name, dir: dir, ns: ns, jobs: make(chan func())}
	t.Cleanup(h.close)
	h.must(t, ns.Do(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		if err := unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""); err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("private mounts: %w", err)
		}
		if err := leaveChroot(); err != nil {
			return fmt.Errorf("leave the chroot: %w", err)
		}
		if err := unix.Mount("run", "/run", "tmpfs", 0, "mode=755"); err != nil {
			return fmt.Errorf("/run: %w", err)
		}
		return nil
	}))
	// No duplicate address detection: an address is there when it is set.
	h.sysctl(t, "net.ipv6.conf.default.accept_dad", "0")
	h.sysctl(t, "net.ipv6.conf.all.accept_dad", "0")
	h.ip(t, "link set lo up")
	return h
}

// leaveChroot makes the root directory of the calling thread, which is in a mount
// namespace of its own, the root of that namespace too. A process in a chroot
// may not make user namespaces (user_namespaces(7)), which programs of the tests
// do; on a machine whose root is no chroot this changes nothing.
func leaveChroot() error {
	root, err := unix.Open("/", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(root)
	ns, err := unix.Open("/proc/thread-self/ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(ns)
	if err := unix.Setns(ns, unix.CLONE_NEWNS); err != nil { // to the root of the namespace
		return err
	}
	var inside, outside unix.Stat_t
	if err := errors.Join(unix.Fstat(root, &inside), unix.Stat("/", &outside)); err != nil {
		return err
	}
	if inside.Dev == outside.Dev && inside.Ino == outside.Ino {
		return nil
	}
	if err := unix.Mount("", "/", "", unix.MS_PRIVATE|unix.MS_REC, ""); err != nil {
		return err
	}
	if err := unix.Fchdir(root); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil { // the old one on top of the new one
		return err
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return err
	}
	return unix.Chdir("/")
}

// close ends the workers, the thread and with it every process of the machine.
func (h *host) close() {
	h.mu.Lock()
	h.closed = true
	close(h.jobs)
	h.mu.Unlock()
	h.workers.Wait()
	h.ns.Close()
	os.RemoveAll(h.dir)
}

func (h *host) must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatalf("%s: %v", h.name, err)
	}
}

// in runs f on a thread of the machine's network namespace, where f may block.
// Any number may run at once.
func (h *host) in(f func() error) error {
	result := make(chan error, 1)
	job := func() { result <- f() }
	h.mu.Lock()
	if h.closed {
		h.mu.Unlock()
		return errors.New(h.name + " is gone")
	}
	select {
	case h.jobs <- job:
		h.mu.Unlock()
	default:
		h.workers.Add(1)
		h.mu.Unlock()
		w, err := netns.Open(h.ns.Path())
		if err != nil {
			h.workers.Done()
			return err
		}
		go h.work(w, job)
	}
	return <-result
}

// work does one job after another until the machine is closed.
func (h *host) work(w *netns.Namespace, job func()) {
	defer h.workers.Done()
	defer w.Close()
	for ok := true; ok; job, ok = <-h.jobs {
		w.Do(func() error { job(); return nil })
	}
}

// sysctl sets a kernel setting of the machine's network.
func (h *host) sysctl(t testing.TB, key, value string) {
	t.Helper()
	path := "/proc/sys/" + strings.ReplaceAll(key, ".", "/")
	h.must(t, h.ns.Do(func() error { return os.WriteFile(path, []byte(value), 0o644) }))
}

// file writes a file into the machine's own directory and returns its path.
func (h *host) file(t testing.TB, name, text string, mode os.FileMode) string {
	t.Helper()
	path := filepath.Join(h.dir, name)
	h.must(t, os.WriteFile(path, []byte(text), mode))
	h.must(t, os.Chmod(path, mode))
	return path
}

// replace puts a file in the place of another, for this machine alone.
func (h *host) replace(t testing.TB, target, text string, mode os.FileMode) {
	t.Helper()
	path := h.file(t, "etc-"+filepath.Base(target), text, mode)
	h.must(t, h.ns.Do(func() error {
		if err := unix.Mount(path, target, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("%s: %w", target, err)
		}
		return nil
	}))
}

// resolver writes the machine's resolv.conf.
func (h *host) resolver(t testing.TB, addrs ...string) {
	t.Helper()
	text := ""
	for _, a := range addrs {
		text += "nameserver " + a + "\n"
	}
	h.replace(t, "/etc/resolv.conf", text+"options timeout:2 attempts:1\n", 0o644)
}

// user adds a system user with a password hash to the machine, for servers
// that ask the system.
func (h *host) user(t testing.TB, name, hash string) {
	t.Helper()
	for _, f := range []struct {
		path, line string
		mode       os.FileMode
	}{
		{"/etc/passwd", name + ":x:65001:65534::/nonexistent:/usr/sbin/nologin\n", 0o644},
		{"/etc/shadow", name + ":" + hash + ":19000:0:99999:7:::\n", 0o600},
	} {
		old, err := os.ReadFile(f.path)
		h.must(t, err)
		h.replace(t, f.path, string(old)+f.line, f.mode)
	}
}

// ip runs one command of ip(8) for each line.
func (h *host) ip(t testing.TB, lines ...string) {
	t.Helper()
	h.run(t, command{args: []string{tool(t, "ip"), "-batch", "-"}, stdin: strings.Join(lines, "\n")}).ok(t)
}

// nft loads a ruleset.
func (h *host) nft(t testing.TB, ruleset string) {
	t.Helper()
	h.run(t, command{args: []string{tool(t, "nft"), "-f", "-"}, stdin: ruleset}).ok(t)
}

// connect joins two machines with a cable.
func connect(t testing.TB, a *host, ifA string, b *host, ifB string) {
	t.Helper()
	a.ip(t,
		fmt.Sprintf("link add name %s type veth peer name %s netns %s", ifA, ifB, b.ns.Path()),
		"link set "+ifA+" up")
	b.ip(t, "link set "+ifB+" up")
}

// dial connects from the machine. The address is literal.
func (h *host) dial(network, addr string, limit time.Duration) (net.Conn, error) {
	var c net.Conn
	err := h.in(func() (err error) {
		c, err = net.DialTimeout(network, addr, limit)
		return err
	})
	return c, err
}

// listen listens on the machine until the test ends.
func (h *host) listen(t testing.TB, network, addr string) net.Listener {
	t.Helper()
	var l net.Listener
	h.must(t, h.in(func() (err error) {
		l, err = net.Listen(network, addr)
		return err
	}))
	t.Cleanup(func() { l.Close() })
	return l
}

// answerTCP serves each connection to an address and port of the host, and
// closes it.
func (h *host) answerTCP(t testing.TB, at string, serve func(*net.TCPConn)) {
	t.Helper()
	l := h.listen(t, "tcp", at)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				serve(c.(*net.TCPConn))
			}()
		}
	}()
}

// listenPacket opens a UDP socket on the machine until the test ends.
func (h *host) listenPacket(t testing.TB, network, addr string) net.PacketConn {
	t.Helper()
	var c net.PacketConn
	h.must(t, h.in(func() (err error) {
		c, err = net.ListenPacket(network, addr)
		return err
	}))
	t.Cleanup(func() { c.Close() })
	return c
}

// tools are the programs that the tests run, and Debian's packages of them.
var tools = map[string]string{
	"busybox": "busybox-static", "podman": "podman", "chromium": "chromium", "promtool": "prometheus", "curl": "curl", "danted": "dante-server", "dig": "bind9-dnsutils", "hpsockd": "hpsockd", "ip": "iproute2",
	"microsocks": "microsocks", "nft": "nftables", "ping": "iputils-ping", "setpriv": "util-linux",
	"ss-local": "shadowsocks-libev", "ss-server": "shadowsocks-libev", "ssh": "openssh-client",
	"ssh-keygen": "openssh-client", "sshd": "openssh-server", "tinyproxy": "tinyproxy-bin", "unshare": "util-linux",
	"v2ray": "v2ray", "wget": "wget",
}

// tool returns the path of a program, or fails with the package that has it.
func tool(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		path = "/usr/sbin/" + name
		if _, err := os.Stat(path); err != nil {
			t.Fatalf("%s is missing: apt-get install %s", name, tools[name])
		}
	}
	return path
}

// abs returns the absolute path of a file of the package.
func abs(t testing.TB, path string) string {
	t.Helper()
	a, err := filepath.Abs(path)
	if err != nil {
		t.Fatal(err)
	}
	return a
}
