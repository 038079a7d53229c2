package netns_test

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Topology: world. The gateway's rules have a million names and 200,000
// networks, none of which is in the world but those that the test adds.

// bigLists writes the files of two LISTs: a million names in the three forms
// that lists come in, and 200,000 networks.
func (h *host) bigLists(t testing.TB) {
	t.Helper()
	write := func(name string, n int, line func(i int) string) {
		f, err := os.Create(h.dir + "/" + name)
		h.must(t, err)
		w := bufio.NewWriter(f)
		for i := range n {
			w.WriteString(line(i))
		}
		h.must(t, w.Flush())
		h.must(t, f.Close())
	}
	write("plain", 500_000, func(i int) string { return fmt.Sprintf("host%d.zone%d.example\n", i, i%5000) })
	write("hosts", 250_000, func(i int) string { return fmt.Sprintf("0.0.0.0 tracker%d.zone%d.example\n", i, i%5000) })
	write("dnsmasq", 250_000, func(i int) string { return fmt.Sprintf("address=/ads%d.zone%d.example/\n", i, i%5000) })
	write("networks", 200_000, func(i int) string {
		if i%5 == 0 {
			return fmt.Sprintf("fd00:%x:%x00::/40\n", i>>8, i&255)
		}
		return fmt.Sprintf("%d.%d.%d.0/24\n", 11+i>>15, i>>7&255, i<<1&255)
	})
}

const bigRules = `LIST ads file=plain file=hosts file=dnsmasq
LIST near file=networks
DENY   $ads reject=dns-nxdomain
DIRECT $near
`

// TestReloadOfBigLists: a million names and 200,000 networks are loaded in
// bounded memory, and loaded anew under load nothing is lost and nothing leaks.
func TestReloadOfBigLists(t *testing.T) {
	t.Parallel()
	w, d := leakWorld(t)
	w.gateway.bigLists(t)
	d.routes(t, bigRules+leakRoutes)
	began := time.Now()
	d.start(t)
	ready := time.Since(began)
	most := d.status(t, "VmHWM")
	if most > 256<<10 {
		t.Errorf("%d KB of memory to be ready", most)
	}
	for _, name := range []string{"host499999.zone4999.example", "tracker7.zone7.example", "ads7.zone7.example", "x.ads7.zone7.example"} {
		if got := w.answer(t, name); got != "NXDOMAIN" {
			t.Errorf("%s: %s", name, got)
		}
	}
	if got := w.answer(t, "x.host7.zone7.example"); got != "pool" {
		t.Errorf("a name that is in no list: %s", got)
	}
	flows := w.startEchoes(t, 8)
	w.observe(t)
	over := make(chan *outcomes, 1)
	go func() { over <- w.storm(600, 2*time.Millisecond) }()
	w.gateway.file(t, "more", "only.example\n", 0o644)
	d.routes(t, strings.Replace(bigRules, "file=plain", "file=plain file=more", 1)+leakRoutes)
	began = time.Now()
	d.reload(t)
	reloaded := time.Since(began)
	o := <-over
	t.Logf("ready in %v, reloaded in %v, CPU %v, at most %d MB to be ready and %d MB in all; %v",
		ready, reloaded, d.cpu(t), most>>10, d.status(t, "VmHWM")>>10, o)
	if want := o.done * 4 / 6; o.served < want || o.hung > 0 {
		t.Errorf("the reload cost somebody the connection: %v, want at least %d served", o, want)
	}
	for name, want := range map[string]string{"only.example": "NXDOMAIN", "host7.zone7.example": "NXDOMAIN", "x.host7.zone7.example": "pool"} {
		if got := w.answer(t, name); got != want {
			t.Errorf("after the reload %s is %s, want %s", name, got, want)
		}
	}
	if n, who := w.leaked(t); n != 0 {
		t.Errorf("%d packets leaked:\n%s", n, who)
	}
	flows.finish(t)
	if kb := d.status(t, "VmHWM"); kb > 400<<10 { // the rules before and those after, for a moment
		t.Errorf("%d KB of memory at the most, with the reload", kb)
	}
}

// TestListsAreFollowed: a list that is written anew is in force a moment later,
// however it was written; one with a mistake is not, and the log says why. The
// rules around it are those that were read.
func TestListsAreFollowed(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	h := w.gateway
	h.file(t, "list", "first.example\n", 0o644)
	d := serve(t, h, settings{routes: "LIST ads file=list\nDENY $ads reject=dns-nxdomain\nSOCKD5 @=198.51.100.11 *\n"})
	follows := func(what, denied string) {
		t.Helper()
		eventually(t, 10*time.Second, what+": "+denied+" is denied", func() bool { return w.answer(t, denied) == "NXDOMAIN" })
	}
	follows("at the start", "first.example")
	d.routes(t, "DENY * reject=dns-refused\n") // somebody is at it, and has not asked for a reload

	h.file(t, "list", "written.example\n", 0o644)
	follows("written over", "written.example")
	if got := w.answer(t, "first.example"); got != "pool" {
		t.Errorf("a name that is no longer in the list is %s", got)
	}
	h.file(t, "new", "renamed.example\n", 0o644)
	h.must(t, os.Rename(h.dir+"/new", h.dir+"/list"))
	follows("renamed over", "renamed.example")

	f, err := os.Create(h.dir + "/list")
	h.must(t, err)
	_, err = f.WriteString("slow.example\n")
	h.must(t, err)
	time.Sleep(time.Second)
	if got := w.answer(t, "renamed.example"); got != "NXDOMAIN" {
		t.Errorf("half of a list is in force: %s", got)
	}
	_, err = f.WriteString("end.example\n")
	h.must(t, err)
	h.must(t, f.Close())
	follows("written slowly", "end.example")

	done := d.metric(t, `tproxyd_reloads_total{result="done"}`)
	h.file(t, "list", "good.example\nbad..example\nx y*\n", 0o644)
	eventually(t, 10*time.Second, "the log says what is wrong", func() bool {
		return strings.Contains(d.output(), "list:2:1: error E26") && strings.Contains(d.output(), "list:3:3: error E26")
	})
	h.must(t, os.Remove(h.dir+"/list"))
	eventually(t, 10*time.Second, "the log says that it is gone", func() bool { return strings.Contains(d.output(), "list: no such file") })
	if got := w.answer(t, "end.example"); got != "NXDOMAIN" {
		t.Errorf("the list before is not in force any longer: %s", got)
	}
	if n := d.metric(t, `tproxyd_reloads_total{result="done"}`) - done; n != 0 {
		t.Errorf("%v reloads by a list with mistakes", n)
	}
	if n := d.metric(t, `tproxyd_reloads_total{result="refused"}`); n != 2 {
		t.Errorf("%v refusals, want 2", n)
	}
	h.file(t, "list", "again.example\n", 0o644)
	follows("put right", "again.example")

	// A reload reads all files.
	d.reload(t)
	if got := w.answer(t, "other.example"); got != "REFUSED" {
		t.Errorf("after a reload: %s", got)
	}
}

// status returns a figure of /proc/PID/status, in KB.
func (d *daemon) status(t testing.TB, key string) (n int) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", d.pid()))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if value, ok := strings.CutPrefix(line, key+":"); ok {
			fmt.Sscan(value, &n)
			return n
		}
	}
	t.Fatalf("no %s in\n%s", key, b)
	return 0
}

// TestListIsGone: a gateway whose list was lost starts by what that held, says so in
// its log and status, and follows the list once there is one again.
func TestListIsGone(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	h := w.gateway
	h.file(t, "list", "denied.example\n", 0o644)
	rules := "LIST ads file=list\nDENY $ads reject=dns-nxdomain\nSOCKD5 @=198.51.100.11 *\n"
	d := serve(t, h, settings{routes: rules})
	eventually(t, 20*time.Second, "a copy of the list", func() bool {
		files, _ := filepath.Glob(filepath.Join(d.set.state, "list-*"))
		return len(files) == 1 && !strings.HasSuffix(files[0], ".new")
	})
	h.must(t, os.Remove(h.dir+"/list"))
	d.stop(t)
	d.start(t)
	if got := w.answer(t, "denied.example"); got != "NXDOMAIN" {
		t.Errorf("without the file: %s", got)
	}
	if !strings.Contains(d.output(), "list:1:1: warning W09: the file is gone") {
		t.Errorf("the log:\n%s", d.output())
	}
	status := func() string { return d.cli(t, "status", "-c", d.config).ok(t).out }
	if !strings.Contains(status(), "list: the file is gone") {
		t.Errorf("the status:\n%s", status())
	}
	d.reload(t)
	d.routes(t, rules+"LIST other file=missing\nDENY $other\n")
	if r := d.cli(t, "reload", "-c", d.config); r.code != 2 || !strings.Contains(r.err, "missing") || strings.Contains(r.err, "list:1:1: error") {
		t.Errorf("a reload with another file that is missing: %d %s", r.code, r.err)
	}
	h.file(t, "list", "again.example\n", 0o644)
	eventually(t, 20*time.Second, "the list that is back", func() bool { return w.answer(t, "again.example") == "NXDOMAIN" })
	if strings.Contains(status(), "gone;") || strings.Contains(status(), "the file is gone") {
		t.Errorf("the status:\n%s", status())
	}
}
