// Package deploy tests what is delivered: the packages are made, installed in a
// fresh Debian, upgraded, removed and purged. It needs root and the network that
// Debian's packages come from.
package deploy

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// root is the checkout.
const root = "../.."

// native is the architecture of this host, in the words of deploy/package/build.
func native(t *testing.T) string {
	t.Helper()
	switch runtime.GOARCH {
	case "amd64", "arm64":
		return runtime.GOARCH
	case "arm":
		return "armv7"
	}
	t.Fatalf("no package is made for %s", runtime.GOARCH)
	return ""
}

// build makes packages of a version and returns the folder that has them.
func build(t *testing.T, version string, archs ...string) string {
	t.Helper()
	out := t.TempDir()
	c := exec.Command("make", "-s", "packages", "VERSION="+version, "ARCHS="+strings.Join(archs, " "))
	c.Dir = root
	c.Env = append(os.Environ(), "OUT="+out, "SOURCE_DATE_EPOCH=1700000000")
	if text, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", c.Args, err, text)
	}
	return out
}

// one returns the only file that a pattern matches.
func one(t *testing.T, dir, pattern string) string {
	t.Helper()
	found, err := filepath.Glob(filepath.Join(dir, pattern))
	if err != nil || len(found) != 1 {
		t.Fatalf("%s in %s: %v %v", pattern, dir, found, err)
	}
	return found[0]
}

// TestReproducible: two runs make the same files, byte by byte; those for MIPS
// show that it builds where a word has 32 bits and its first byte is the highest.
func TestReproducible(t *testing.T) {
	first, second := build(t, "v1.0.0", native(t), "mips"), build(t, "v1.0.0", native(t), "mips")
	files, err := os.ReadDir(first)
	if err != nil {
		t.Fatal(err)
	}
	ends := map[string]int{}
	for _, f := range files {
		ends[filepath.Ext(f.Name())]++
		a, err := os.ReadFile(filepath.Join(first, f.Name()))
		if err != nil {
			t.Fatal(err)
		}
		b, err := os.ReadFile(filepath.Join(second, f.Name()))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(a, b) {
			t.Errorf("%s differs from one run to the next", f.Name())
		}
	}
	for ext, want := range map[string]int{".deb": 1, ".rpm": 1, ".apk": 1, ".ipk": 2, "": 2} {
		if ends[ext] != want {
			t.Errorf("%d files of kind %q, want %d: %v", ends[ext], ext, want, files)
		}
	}

	wantFiles(t, "rpm", lines(t, "rpm", "-qlp", one(t, first, "*.rpm")),
		"/usr/sbin/tproxyd", "/usr/lib/systemd/system/tproxyd.service", "/usr/lib/sysusers.d/tproxyd.conf", "/usr/share/man/man8/tproxyd.8.gz")
	wantFiles(t, "conffiles of the rpm", lines(t, "rpm", "-qcp", one(t, first, "*.rpm")), "/etc/tproxyd/socks.cnf", "/etc/tproxyd/tproxyd.toml")
	wantFiles(t, "apk", lines(t, "tar", "-tzf", one(t, first, "*.apk")), "usr/sbin/tproxyd", "etc/init.d/tproxyd", ".PKGINFO", ".pre-deinstall")
	for _, arch := range []string{"x86_64", "mips_24kc"} {
		if arch == "x86_64" && native(t) != "amd64" {
			continue
		}
		ipk := one(t, first, "*_"+arch+".ipk")
		wantFiles(t, "ipk", lines(t, "sh", "-c", `tar -xOzf "$1" ./data.tar.gz | tar -tz`, "sh", ipk), "./usr/sbin/tproxyd", "./etc/init.d/tproxyd", "./lib/upgrade/keep.d/tproxyd")
		wantFiles(t, "ipk", lines(t, "sh", "-c", `tar -xOzf "$1" ./control.tar.gz | tar -xOz ./control`, "sh", ipk), "Architecture: "+arch)
	}
	// Static, for its machine, and without a floating point unit.
	elf := strings.Join(lines(t, "readelf", "-hlA", filepath.Join(first, "tproxyd-mips")), "\n")
	for _, want := range []string{"MIPS R3000", "big endian", "Soft float"} {
		if !strings.Contains(elf, want) {
			t.Errorf("tproxyd-mips is not of %q:\n%s", want, elf)
		}
	}
	if strings.Contains(elf, "INTERP") {
		t.Error("tproxyd-mips is not static")
	}
}

// lines runs a command and returns what it prints.
func lines(t *testing.T, name string, args ...string) []string {
	t.Helper()
	c := exec.Command(name, args...)
	out, err := c.Output()
	if err != nil {
		t.Fatalf("%v: %v", c.Args, err)
	}
	return strings.Split(strings.TrimSpace(string(out)), "\n")
}

func wantFiles(t *testing.T, what string, have []string, want ...string) {
	t.Helper()
	for _, w := range want {
		found := false
		for _, h := range have {
			found = found || h == w
		}
		if !found {
			t.Errorf("%s: no %s among\n%s", what, w, strings.Join(have, "\n"))
		}
	}
}
