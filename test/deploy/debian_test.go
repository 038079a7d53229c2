package deploy

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// debian is a fresh Debian (or Ubuntu, as this host is) below a folder, in a
// network namespace of its own, with its own /proc.
type debian struct {
	t    *testing.T
	dir  string
	ns   *exec.Cmd // sleeps in the namespace, so that it lasts
	init string    // process number of its systemd; empty: it is not booted
}

func newDebian(t *testing.T) *debian {
	t.Helper()
	d := &debian{t: t, dir: filepath.Join(t.TempDir(), "root")}
	suite := lines(t, "sh", "-c", ". /etc/os-release; echo $VERSION_CODENAME")[0]
	c := exec.Command("mmdebstrap", "--quiet", "--variant=essential", "--include=systemd,passwd,procps",
		"--aptopt=Acquire::Languages \"none\"", "--dpkgopt=force-unsafe-io", suite, d.dir)
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", c.Args, err, out)
	}
	d.ns = exec.Command("sleep", "1000")
	d.ns.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if err := d.ns.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		d.ns.Process.Kill()
		d.ns.Wait()
	})
	return d
}

// do runs a command in it, which must succeed, and returns what it printed.
func (d *debian) do(name string, args ...string) string {
	d.t.Helper()
	c := exec.Command("nsenter", d.inside(append([]string{name}, args...)...)...)
	if d.init == "" {
		c = exec.Command("nsenter", append([]string{"--net=/proc/" + strconv.Itoa(d.ns.Process.Pid) + "/ns/net", "unshare", "--mount", "sh", "-c",
			`mount -t proc proc "$0/proc" && exec chroot "$0" "$@"`, d.dir, name}, args...)...)
	}
	c.Dir = "/" // sh says so where its own is not in the chroot
	c.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C.UTF-8", "DEBIAN_FRONTEND=noninteractive"}
	out, err := c.CombinedOutput()
	if err != nil {
		d.t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// bring copies a file of this host into its /tmp and returns the path there.
func (d *debian) bring(path string) string {
	d.t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		d.t.Fatal(err)
	}
	inside := "/var/tmp/" + filepath.Base(path)
	d.write(inside, string(b), 0o644)
	return inside
}

func (d *debian) write(path, text string, mode os.FileMode) {
	d.t.Helper()
	full := filepath.Join(d.dir, path)
	if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
		d.t.Fatal(err)
	}
	if err := os.WriteFile(full, []byte(text), mode); err != nil {
		d.t.Fatal(err)
	}
}

// has tells whether a path exists in it.
func (d *debian) has(path string) bool {
	_, err := os.Lstat(filepath.Join(d.dir, path))
	return err == nil
}

// table tells whether the kernel has a table of ours in the namespace.
func (d *debian) table() bool {
	d.t.Helper()
	out := lines(d.t, "nsenter", "--net=/proc/"+strconv.Itoa(d.ns.Process.Pid)+"/ns/net", "nft", "list", "tables")
	return slices.ContainsFunc(out, func(l string) bool { return strings.Contains(l, "inet tproxyd") })
}

// files lists what is in it, without what dpkg and ldconfig keep for themselves.
func (d *debian) files() []string {
	d.t.Helper()
	return lines(d.t, "find", d.dir, "-xdev", "(", "-path", "*/var/lib/dpkg", "-o", "-path", "*/var/log", "-o", "-path", d.dir+"/run", "-o", "-path", "*/tmp", ")", "-prune", "-o", "-printf", "/%P\n")
}

// TestDebian: the package is installed in a fresh Debian, upgraded, removed and
// purged, without a question; what an operator wrote stays as long as it should,
// and so does the table in the kernel. Then it is booted and upgraded in service.
func TestDebian(t *testing.T) {
	arch := native(t)
	first, second := one(t, build(t, "v1.0.0", arch), "*.deb"), one(t, build(t, "v1.1.0-2-gabc", arch), "*.deb")
	d := newDebian(t)
	before := d.files()
	state := "/var/lib/tproxyd/names.log"

	d.do("dpkg", "-i", d.bring(first))
	if out := d.do("tproxyd", "version"); !strings.HasPrefix(out, "tproxyd v1.0.0\n") {
		t.Errorf("the installed program says %q", out)
	}
	d.do("tproxyd", "check", "-c", "/etc/tproxyd/tproxyd.toml")
	d.do("getent", "group", "tproxyd")
	if out := d.do("systemd-analyze", "verify", "--man=no", "tproxyd.service", "tproxyd-closed.service", "tproxyd-attach@web.service"); out != "" {
		t.Errorf("systemd-analyze verify:\n%s", out)
	}
	d.do("systemd-tmpfiles", "--create", "tproxyd.conf")
	d.do("bash", "-n", "/usr/share/bash-completion/completions/tproxyd")
	d.do("gzip", "-t", "/usr/share/man/man8/tproxyd.8.gz", "/usr/share/man/man5/tproxyd.toml.5.gz", "/usr/share/man/man5/tproxyd-socks.cnf.5.gz")

	// In service: rules of the operator's own, state, and the table.
	const own = "DIRECT 192.0.2.0/24\n"
	d.write("/etc/tproxyd/socks.cnf", own, 0o640)
	d.write("/etc/tproxyd/credentials.toml", "", 0o600)
	d.write(state, "", 0o600)
	d.do("tproxyd", "close", "-c", "/etc/tproxyd/tproxyd.toml")
	if !d.table() {
		t.Fatal("close put no table in place")
	}
	kept := func(when string) {
		t.Helper()
		if b, _ := os.ReadFile(filepath.Join(d.dir, "/etc/tproxyd/socks.cnf")); string(b) != own {
			t.Errorf("%s socks.cnf is %q", when, b)
		}
		if !d.has(state) || !d.has("/etc/tproxyd/credentials.toml") {
			t.Errorf("%s the state or the credentials are gone", when)
		}
	}

	d.do("dpkg", "-i", d.bring(second))
	kept("after the upgrade")
	if !d.table() {
		t.Error("the upgrade opened the host: the table is gone")
	}
	if out := d.do("tproxyd", "version"); !strings.HasPrefix(out, "tproxyd v1.1.0-2-gabc\n") {
		t.Errorf("after the upgrade the program says %q", out)
	}
	d.do("tproxyd", "check", "-c", "/etc/tproxyd/tproxyd.toml")

	d.do("dpkg", "-r", "tproxyd")
	kept("after the removal")
	if d.table() {
		t.Error("after the removal the kernel still has the table")
	}
	if d.has("/usr/sbin/tproxyd") {
		t.Error("after the removal the program is still there")
	}

	d.do("dpkg", "-P", "tproxyd")
	left := d.files()
	left = slices.DeleteFunc(left, func(p string) bool { return slices.Contains(before, p) })
	want := []string{"/etc/tproxyd", "/etc/tproxyd/credentials.toml"}
	left = slices.DeleteFunc(left, func(p string) bool { return strings.HasPrefix(p, "/etc/group") || strings.HasPrefix(p, "/etc/gshadow") })
	slices.Sort(left)
	if !slices.Equal(left, want) {
		t.Errorf("after the purge there are also %v, want %v", left, want)
	}

	d.do("dpkg", "-i", d.bring(first))
	d.upgraded(first, second)
}
