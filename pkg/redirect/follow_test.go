package redirect

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/tproxyd/tproxyd/pkg/flow"
	"golang.org/x/sys/unix"
)

// A cgroup comes, ends and comes back with another number, and another beside it:
// rules and notes follow, and only the first of a level needs a new table.
func TestCgroupsFollowed(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	parent := testCgroup(t, "", "follow")
	late := fmt.Sprintf("late-%d.service", os.Getpid())
	mount, err := cgroupMount()
	if err != nil {
		t.Fatal(err)
	}
	p := worldPlan()
	p.Local = true
	p.Blocks = []Block{
		{Client: Client{Cgroups: []string{late}}, Networks: TCP, Ports: []PortRange{{80, 80}}, Deny: ranges("0.0.0.0/0")},
		{Proxy: ranges("0.0.0.0/0", "::/0")},
	}
	p.Who = &Who{Cgroups: []string{late}}
	w.start(p)
	changed := w.heal()
	denied := func(what string, cgroups ...string) {
		t.Helper()
		for _, c := range cgroups {
			if got := w.gateway.inCgroup(c, "203.0.113.6", "80"); got != "ECONNREFUSED" {
				t.Errorf("%s: from %s: %s", what, c, got)
			}
			got := w.gateway.run("sh -c 'echo $$ >" + mount + c + "/cgroup.procs; exec bash -c \"exec 3<>/dev/tcp/203.0.113.6/81; ss -Htn state established dst 203.0.113.6:81\"'")
			words := strings.Fields(got)
			f := flow.Flow{Src: netip.MustParseAddrPort(words[2]), Dst: netip.MustParseAddrPort(words[3])}
			if err := w.r.Who(&f); err != nil || f.Owner.Cgroup != c {
				t.Errorf("%s: a flow from %s is noted as from %q, %v", what, c, f.Owner.Cgroup, err)
			}
		}
	}
	tables := func() string { return w.gateway.run("nft list table inet tproxyd | grep 'set '") }
	one, two := parent+"/"+late, parent+"/two/"+late
	do := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		changed("cgroup")
	}
	end := func(path string) (err error) {
		for range 100 { // who was in it may not be gone quite
			if err = os.Remove(mount + path); !errors.Is(err, unix.EBUSY) {
				break
			}
			time.Sleep(20 * time.Millisecond)
		}
		return err
	}
	t.Cleanup(func() { end(one) })
	before := tables()
	do(os.Mkdir(mount+one, 0o755))
	denied("at first", one)
	made := tables()
	if made == before {
		t.Error("the table is as it was")
	}
	do(end(one))
	do(os.Mkdir(mount+one, 0o755))
	denied("again", one)
	if now := tables(); now != made {
		t.Errorf("a cgroup that came back needed other sets:\n%s\nbefore:\n%s", now, made)
	}
	t.Cleanup(func() { end(two); end(parent + "/two") })
	if err := os.Mkdir(mount+parent+"/two", 0o755); err != nil {
		t.Fatal(err)
	}
	do(os.Mkdir(mount+two, 0o755)) // on another level
	denied("both", one, two)
	do(end(one))
	denied("one is left", two)
}
