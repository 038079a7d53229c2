package lint_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// TestDeployedFiles: the files that make install puts into /etc are right as
// they are, and so are they with every commented default taken in.
func TestDeployedFiles(t *testing.T) {
	conf := read(t, "deploy/tproxyd.toml")
	stated := regexp.MustCompile(`(?m)^#([a-z0-9]+ *= )`).ReplaceAllString(conf, "$1")
	if stated == conf {
		t.Fatal("deploy/tproxyd.toml shows no default as a comment")
	}
	for name, text := range map[string]string{"as it is": conf, "with every key": stated} {
		dir := t.TempDir()
		write(t, filepath.Join(dir, "tproxyd.toml"), text, 0o644)
		write(t, filepath.Join(dir, "socks.cnf"), read(t, "deploy/socks.cnf"), 0o644)
		write(t, filepath.Join(dir, "credentials.toml"), "[office]\nusername = \"u\"\npassword = \"p\"\n", 0o600)
		write(t, filepath.Join(dir, "secrets.toml"), "admin = \"sixteen characters\"\n", 0o600)
		out, status := tproxyd(t, "check", "-c", filepath.Join(dir, "tproxyd.toml"))
		if status != 0 || strings.Contains(out, "warning") {
			t.Errorf("deploy/tproxyd.toml %s: exit %d\n%s", name, status, out)
		}
	}
}

// TestInstall: make install puts everything where the units and manuals expect
// it, keeps an operator's files, and systemd accepts the units as installed.
func TestInstall(t *testing.T) {
	analyze := tool(t, "systemd-analyze", "systemd")
	dest := t.TempDir()
	mine := filepath.Join(dest, "etc/tproxyd/socks.cnf")
	write(t, mine, "DEFAULT DENY\n", 0o644)
	install := exec.Command("make", "-s", "install", "DESTDIR="+dest)
	install.Dir = root
	if out, err := install.CombinedOutput(); err != nil {
		t.Fatalf("make install: %v\n%s", err, out)
	}
	for _, path := range []string{
		"usr/sbin/tproxyd", "lib/systemd/system/tproxyd.service", "lib/systemd/system/tproxyd-closed.service",
		"usr/lib/sysctl.d/90-tproxyd.conf", "usr/share/man/man8/tproxyd.8",
		"usr/share/man/man5/tproxyd.toml.5", "usr/share/man/man5/tproxyd-socks.cnf.5",
		"etc/tproxyd/tproxyd.toml", "etc/tproxyd/tproxyd.toml.example", "etc/tproxyd/socks.cnf.example",
	} {
		if _, err := os.Stat(filepath.Join(dest, path)); err != nil {
			t.Errorf("make install: %v", err)
		}
	}
	if b, _ := os.ReadFile(mine); string(b) != "DEFAULT DENY\n" {
		t.Errorf("make install overwrote socks.cnf with %q", b)
	}

	// The targets that the units name, as any system has them.
	for _, unit := range []string{"basic", "local-fs", "multi-user", "network", "network-pre", "shutdown", "sysinit"} {
		write(t, filepath.Join(dest, "lib/systemd/system", unit+".target"), "[Unit]\nDescription="+unit+"\n", 0o644)
	}
	for _, unit := range []string{"systemd-modules-load", "systemd-sysctl"} {
		write(t, filepath.Join(dest, "lib/systemd/system", unit+".service"), "[Service]\nType=oneshot\nExecStart=/usr/sbin/tproxyd version\n", 0o644)
	}
	write(t, filepath.Join(dest, "bin/sh"), "#!/bin/sh\n", 0o755)
	verify := exec.Command(analyze, "verify", "--root="+dest, "--man=no", "--recursive-errors=yes", "tproxyd.service", "tproxyd-closed.service")
	if out, err := verify.CombinedOutput(); err != nil || len(out) != 0 {
		t.Errorf("systemd-analyze verify: %v\n%s", err, out)
	}
}

// maxExposure is the highest figure of "systemd-analyze security" that a unit
// may have; 0 is none. A gateway's daemon cannot do without networking, netlink
// and CAP_NET_ADMIN, which is most of what remains.
var maxExposure = map[string]float64{"tproxyd.service": 2.0, "tproxyd-closed.service": 2.5}

func TestSandbox(t *testing.T) {
	analyze := tool(t, "systemd-analyze", "systemd")
	level := regexp.MustCompile(`Overall exposure level for \S+ ([0-9.]+)`)
	for unit, most := range maxExposure {
		c := exec.Command(analyze, "security", "--offline=yes", "--no-pager", filepath.Join(root, "deploy", unit))
		c.Env = append(os.Environ(), "LANG=C.UTF-8")
		out, _ := c.CombinedOutput()
		m := level.FindSubmatch(out)
		if m == nil {
			t.Fatalf("systemd-analyze security %s:\n%s", unit, out)
		}
		exposure, err := strconv.ParseFloat(string(m[1]), 64)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: exposure %.1f", unit, exposure)
		if exposure > most {
			t.Errorf("%s: exposure %.1f, more than %.1f\n%s", unit, exposure, most, out)
		}
	}
}

// TestUnits: what the units must say so that nothing leaks and the program can
// do its work.
func TestUnits(t *testing.T) {
	for unit, wants := range map[string][]string{
		"tproxyd.service": {
			"After=network.target tproxyd-closed.service", "Type=notify", "Restart=on-failure", "LimitNOFILE=262144",
			"StateDirectory=tproxyd", "RuntimeDirectory=tproxyd", "NoNewPrivileges=yes", "ProtectSystem=strict",
			"ExecReload=/usr/sbin/tproxyd reload --upgrade -c /etc/tproxyd/tproxyd.toml", "NotifyAccess=main",
			"SystemCallFilter=seccomp landlock_create_ruleset landlock_add_rule landlock_restrict_self",
		},
		"tproxyd-closed.service": {"Before=network-pre.target shutdown.target", "Wants=network-pre.target", "DefaultDependencies=no", "NoNewPrivileges=yes"},
	} {
		text := read(t, "deploy/"+unit)
		for _, line := range append(wants, "SystemCallFilter=@system-service", "SystemCallFilter=bpf") {
			if !strings.Contains(text, "\n"+line+"\n") {
				t.Errorf("deploy/%s does not say %s", unit, line)
			}
		}
	}
}

// TestStopPost runs the ExecStopPost line as systemd does: what a crash leaves
// is closed anew, what a normal stop leaves is not touched.
func TestStopPost(t *testing.T) {
	line := regexp.MustCompile(`(?m)^ExecStopPost=-/bin/sh -c '(.*)'$`).FindStringSubmatch(read(t, "deploy/tproxyd.service"))
	if line == nil {
		t.Fatal("deploy/tproxyd.service has no ExecStopPost that a shell runs")
	}
	const installed = "exec /usr/sbin/tproxyd "
	if !strings.Contains(line[1], installed) {
		t.Fatalf("%q does not run the program", line[1])
	}
	script := strings.Replace(line[1], installed, "echo ", 1)
	for result, want := range map[string]string{
		"success": "", "signal": "close -c /etc/tproxyd/tproxyd.toml\n", "exit-code": "close -c /etc/tproxyd/tproxyd.toml\n", "watchdog": "close -c /etc/tproxyd/tproxyd.toml\n",
	} {
		c := exec.Command("/bin/sh", "-c", script)
		c.Env = []string{"SERVICE_RESULT=" + result}
		if out, err := c.CombinedOutput(); err != nil || string(out) != want {
			t.Errorf("after %s it runs %q, want %q (%v)", result, out, want, err)
		}
	}
}

// TestSysctls: what the file sets are keys, each with a reason above it.
func TestSysctls(t *testing.T) {
	setting := regexp.MustCompile(`^-?([a-z0-9_.-]+) = [0-9 ]+$`)
	for i, line := range strings.Split(strings.TrimSpace(read(t, "deploy/90-tproxyd.conf")), "\n") {
		if line == "" || strings.HasPrefix(line, "#") {
			continue
		}
		m := setting.FindStringSubmatch(line)
		if m == nil {
			t.Errorf("deploy/90-tproxyd.conf:%d: %q is not KEY = VALUE", i+1, line)
			continue
		}
		if strings.HasPrefix(line, "-") {
			continue // may be absent, by its own word
		}
		if _, err := os.Stat("/proc/sys/" + strings.ReplaceAll(m[1], ".", "/")); err != nil {
			t.Errorf("deploy/90-tproxyd.conf:%d: %v", i+1, err)
		}
	}
}
