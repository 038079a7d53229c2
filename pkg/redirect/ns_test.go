package redirect

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"net/netip"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Tests mostly wait for the kernel, so more of them than processors can run.
func TestMain(m *testing.M) {
	flag.Parse()
	flag.Set("test.parallel", "6")
	m.Run()
}

// netns is a network namespace that lives on one thread.
type netns struct {
	t    testing.TB
	work chan func()
	path string
}

// newNetns makes a namespace with lo up. It ends with the test.
func newNetns(t testing.TB) *netns {
	t.Helper()
	n := &netns{t: t, work: make(chan func())}
	ready := make(chan error)
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends here
		err := unix.Unshare(unix.CLONE_NEWNET)
		n.path = "/proc/" + itoa(unix.Getpid()) + "/task/" + itoa(unix.Gettid()) + "/ns/net"
		ready <- err
		if err != nil {
			return
		}
		for f := range n.work {
			f()
		}
	}()
	if err := <-ready; err != nil {
		t.Fatalf("a network namespace: %v (these tests need root)", err)
	}
	t.Cleanup(func() { close(n.work); <-done })
	// Addresses can be used at once, the link-local ones too.
	n.run("sysctl -qw net.ipv6.conf.all.accept_dad=0 net.ipv6.conf.default.accept_dad=0", "ip link set lo up")
	return n
}

func itoa(n int) string {
	var b []byte
	for ; n > 0; n /= 10 {
		b = append([]byte{byte('0' + n%10)}, b...)
	}
	return string(b)
}

// do runs f in the namespace.
func (n *netns) do(f func()) {
	done := make(chan struct{})
	n.work <- func() { defer close(done); f() }
	<-done
}

// try runs a command line in the namespace and returns its output.
func (n *netns) try(line string) (string, error) {
	var out bytes.Buffer
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, "sh", "-c", line)
	cmd.Stdout, cmd.Stderr = &out, &out
	var err error
	n.do(func() { err = cmd.Start() })
	if err == nil {
		err = cmd.Wait()
	}
	return out.String(), err
}

// run is try for what must succeed.
func (n *netns) run(lines ...string) string {
	n.t.Helper()
	var all strings.Builder
	for _, l := range lines {
		out, err := n.try(l)
		if err != nil {
			n.t.Fatalf("%s: %v\n%s", l, err, out)
		}
		all.WriteString(out)
	}
	return all.String()
}

// batch runs ip(8) for many lines at once.
func (n *netns) batch(lines ...string) {
	n.t.Helper()
	n.run("ip -batch - <<'E'\n" + strings.Join(lines, "\n") + "\nE")
}

// open opens a Redirect in the namespace; it is closed with the test.
func (n *netns) open(o Options) *Redirect {
	n.t.Helper()
	var r *Redirect
	var err error
	for range 100 { // see remove
		n.do(func() { r, err = Open(o) })
		if !errors.Is(err, ErrInUse) {
			break
		}
		time.Sleep(5 * time.Millisecond)
	}
	if err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() { r.Close(true) })
	return r
}

func mustAddr(s string) netip.Addr { return netip.MustParseAddr(s) }

// eventually waits for what a closed descriptor sets free: processes that tests
// start have it, too, until they execute something.
func eventually(t testing.TB, what string, f func() error) {
	t.Helper()
	err := f()
	for i := 0; err != nil && i < 500; i++ {
		time.Sleep(10 * time.Millisecond)
		err = f()
	}
	if err != nil {
		t.Fatalf("%s: it is not so: %v", what, err)
	}
}
