package netns

import (
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
)

func interfaces(t *testing.T, n *Namespace) string {
	t.Helper()
	var names []string
	err := n.Do(func() error {
		links, err := netlink.LinkList()
		for _, l := range links {
			names = append(names, l.Attrs().Name)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(names, " ")
}

func TestNamespace(t *testing.T) {
	before, err := os.Readlink("/proc/self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	n, err := New()
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	if got := interfaces(t, n); got != "lo" {
		t.Errorf("a new namespace has interfaces %q", got)
	}
	inside, err := os.Readlink(n.Path())
	if err != nil || inside == before {
		t.Errorf("namespace %q of the thread is that of the process: %v", inside, err)
	}

	again, err := Open(n.Path())
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if got, _ := os.Readlink(again.Path()); got != inside {
		t.Errorf("opened %s, want %s", got, inside)
	}
	boom := errors.New("boom")
	if err := n.Do(func() error { return boom }); err != boom {
		t.Errorf("Do returned %v", err)
	}
}

// A socket keeps the namespace it was made in, and a process started on the
// thread is born there.
func TestSocketsAndProcesses(t *testing.T) {
	n, err := New()
	if err != nil {
		t.Fatal(err)
	}
	defer n.Close()
	var ln net.Listener
	err = n.Do(func() error {
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(lo); err != nil {
			return err
		}
		ln, err = net.Listen("tcp", "127.0.0.1:0")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	if c, err := net.Dial("tcp", ln.Addr().String()); err == nil {
		c.Close()
		t.Error("the listener is reachable from outside its namespace")
	}
	err = n.Do(func() error {
		c, err := net.Dial("tcp", ln.Addr().String())
		if err == nil {
			c.Close()
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
	var out []byte
	if err := n.Do(func() (err error) { out, err = exec.Command("readlink", "/proc/self/ns/net").Output(); return err }); err != nil {
		t.Fatal(err)
	}
	want, _ := os.Readlink(n.Path())
	if got := strings.TrimSpace(string(out)); got != want {
		t.Errorf("the process is in %s, want %s", got, want)
	}
}

func TestOpenMissing(t *testing.T) {
	if _, err := Open(filepath.Join(t.TempDir(), "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
}
