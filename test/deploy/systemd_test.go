package deploy

import (
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// boot is the init of a Debian below $0: systemd, which finds no units but those of
// /run/units, so that it changes nothing of this host.
const boot = `set -e
mount --bind "$0" "$0"
cd "$0"
mount -t proc proc proc
mount --bind -o ro proc/sys proc/sys
mount -t sysfs -o ro sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
for d in run tmp dev; do mount -t tmpfs tmpfs $d; done
for n in null zero full random urandom tty; do touch dev/$n; mount --bind /dev/$n dev/$n; done
mkdir dev/pts dev/shm run/units
mount -t devpts devpts dev/pts
ln -s pts/ptmx dev/ptmx
ln -s /proc/self/fd dev/fd
touch dev/console
for t in default sysinit basic shutdown network network-pre multi-user; do
	printf '[Unit]\nDefaultDependencies=no\n' >run/units/$t.target
done
for u in tproxyd tproxyd-closed; do ln -s /usr/lib/systemd/system/$u.service run/units/; done
mkdir run/units/tproxyd.service.d
printf '[Service]\nStandardOutput=append:/run/tproxyd.log\nStandardError=append:/run/tproxyd.log\n' >run/units/tproxyd.service.d/log.conf
mkdir run/old
pivot_root . run/old
umount -l /run/old
mount --make-rshared /
exec env -i container=test SYSTEMD_UNIT_PATH=/run/units PATH=/usr/sbin:/usr/bin:/sbin:/bin /lib/systemd/systemd --system --show-status=0 </dev/null
`

// boot starts its systemd, in namespaces and a cgroup of its own. From then on do
// works beside that.
func (d *debian) boot() {
	d.t.Helper()
	group := d.cgroup()
	c := exec.Command("nsenter", "--net=/proc/"+strconv.Itoa(d.ns.Process.Pid)+"/ns/net",
		"unshare", "--fork", "--kill-child", "--pid", "--mount", "--uts", "--ipc", "--cgroup", "sh", "-c", boot, d.dir)
	var out strings.Builder
	c.Stdout, c.Stderr = &out, &out
	c.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(group.Fd()), Pdeathsig: syscall.SIGKILL}
	c.WaitDelay = time.Second
	if err := c.Start(); err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() {
		c.Process.Kill()
		c.Wait()
		if d.t.Failed() {
			d.t.Logf("systemd printed:\n%s", out.String())
		}
	})
	d.eventually("systemd runs", func() bool {
		d.init = strings.TrimSpace(read(filepath.Join("/proc", strconv.Itoa(c.Process.Pid), "task", strconv.Itoa(c.Process.Pid), "children")))
		return d.init != "" && exec.Command("nsenter", d.inside("systemctl", "show-environment")...).Run() == nil
	})
}

// cgroup makes a cgroup, which is removed when nobody is in it any more.
func (d *debian) cgroup() *os.File {
	d.t.Helper()
	at := ""
	for line := range strings.Lines(read("/proc/self/mountinfo")) {
		if f := strings.Fields(line); slices.Contains(f, "cgroup2") {
			at = f[4]
		}
	}
	path := filepath.Join(at, fmt.Sprintf("tproxyd-test-%d", os.Getpid()))
	if err := os.Mkdir(path, 0o755); at == "" || err != nil {
		d.t.Fatalf("a cgroup (version 2) is needed: %v", err)
	}
	d.t.Cleanup(func() {
		d.eventually("the cgroup is empty", func() bool {
			var all []string
			filepath.WalkDir(path, func(p string, e fs.DirEntry, err error) error {
				if err == nil && e.IsDir() {
					all = append(all, p)
				}
				return nil
			})
			for _, p := range slices.Backward(all) {
				os.Remove(p)
			}
			return read(filepath.Join(path, "cgroup.procs")) == "" && len(all) <= 1
		})
	})
	f, err := os.Open(path)
	if err != nil {
		d.t.Fatal(err)
	}
	d.t.Cleanup(func() { f.Close() })
	return f
}

// inside is what nsenter is told for a command beside the booted systemd. Where the
// tests run in a chroot, the mount namespace alone would lead out of that.
func (d *debian) inside(args ...string) []string {
	return append([]string{"--target=" + d.init, "--mount", "--root", "--wd", "--pid", "--uts", "--ipc", "--net", "--cgroup"}, args...)
}

func (d *debian) eventually(what string, ok func() bool) {
	d.t.Helper()
	for end := time.Now().Add(30 * time.Second); !ok(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			d.t.Errorf("it is not so: %s", what)
			return
		}
	}
}

func read(path string) string {
	b, _ := os.ReadFile(path)
	return string(b)
}

// unit returns properties of the service, one a line.
func (d *debian) unit() (pid, state string) {
	d.t.Helper()
	out := strings.Fields(d.do("systemctl", "show", "--property=MainPID,ActiveState,NRestarts", "tproxyd.service"))
	slices.Sort(out)
	return out[1], out[0] + " " + out[2]
}

// upgraded, with the first package installed, is the unit's story under a real systemd: an upgrade of the package has
// the new program take over inside the unit; what cannot take over leaves the old
// one serving; and systemd minds the new process as it did the old one.
func (d *debian) upgraded(first, second string) {
	t := d.t
	d.boot()
	log := func() string { return d.do("cat", "/run/tproxyd.log") }
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("the unit printed:\n%s", log())
		}
	})
	version := func(want string) {
		t.Helper()
		d.eventually("version "+want+" serves", func() bool { return strings.Contains(d.do("tproxyd", "status"), "version "+want+",") })
	}
	const running = "ActiveState=active NRestarts=0"
	d.do("systemctl", "start", "tproxyd.service")
	old, state := d.unit()
	if state != running {
		t.Fatalf("started: %s", state)
	}
	version("v1.0.0")
	if strings.Contains(log(), "sandbox is weaker") {
		t.Error("the unit does not let the daemon limit itself")
	}

	d.do("systemctl", "reload", "tproxyd.service")
	if now, state := d.unit(); now != old || state != running {
		t.Errorf("reloaded with the same program: %s, then %s, %s", old, now, state)
	}

	d.do("dpkg", "-i", d.bring(second))
	version("v1.1.0-2-gabc")
	next, state := d.unit()
	if next == old || state != running {
		t.Errorf("upgraded: %s, then %s, %s", old, next, state)
	}
	if group := d.do("cat", "/proc/"+strings.TrimPrefix(next, "MainPID=")+"/cgroup"); !strings.Contains(group, "/tproxyd.service\n") {
		t.Errorf("the new process is in the cgroup %s", group)
	}
	if out, err := exec.Command("nsenter", d.inside("tproxyd", "reload", "--upgrade", "-c", "/etc/tproxyd/tproxyd.toml")...).CombinedOutput(); err != nil {
		t.Errorf("by hand, with the same program: %v\n%s", err, out)
	}

	// What cannot take over.
	conf := d.do("cat", "/etc/tproxyd/tproxyd.toml")
	d.write("/etc/tproxyd/tproxyd.toml", strings.Replace(conf, "[intercept]\n", "[intercept]\ntable = 99\n", 1), 0o644)
	if out := d.do("dpkg", "-i", d.bring(first)); !strings.Contains(out, "is the one from before the upgrade, and goes on") {
		t.Errorf("an upgrade to what cannot take over says\n%s", out)
	}
	if !strings.Contains(log(), "changed: [intercept] table") {
		t.Error("the log does not say why")
	}
	if out, err := exec.Command("nsenter", d.inside("tproxyd", "reload", "--upgrade", "--socket", "/run/tproxyd/control.sock")...).CombinedOutput(); err == nil || !strings.Contains(string(out), "systemctl reload tproxyd.service") {
		t.Errorf("by hand, outside of the unit: %v\n%s", err, out)
	}
	version("v1.1.0-2-gabc")
	if now, state := d.unit(); now != next || state != running {
		t.Errorf("not upgraded: %s, then %s, %s", next, now, state)
	}
	d.write("/etc/tproxyd/tproxyd.toml", conf, 0o644)
	d.do("systemctl", "reload", "tproxyd.service")
	version("v1.0.0")

	now, _ := d.unit()
	d.do("kill", "-9", strings.TrimPrefix(now, "MainPID="))
	d.eventually("systemd starts it again after its death", func() bool {
		again, state := d.unit()
		return again != now && state == "ActiveState=active NRestarts=1"
	})
	d.do("systemctl", "stop", "tproxyd.service")
	if _, state := d.unit(); state != "ActiveState=inactive NRestarts=1" && state != "ActiveState=inactive NRestarts=0" {
		t.Errorf("stopped: %s", state)
	}
	if out, err := exec.Command("nsenter", d.inside("pgrep", "-x", "tproxyd")...).Output(); err == nil {
		t.Errorf("when the unit is stopped there still are %s", out)
	}
}
