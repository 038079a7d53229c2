package lint_test

import (
	"bufio"
	"bytes"
	"fmt"
	"os/exec"
	"os/user"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestRights: the capabilities that the units leave are enough. Each program
// runs as its unit runs it, in a network namespace of its own.
//
//	namespace: lo; lan0, a cable to nowhere; rp_filter on, as systemd has it
func TestRights(t *testing.T) {
	dir := t.TempDir()
	conf := filepath.Join(dir, "tproxyd.toml")
	write(t, conf, "routes = \"socks.cnf\"\n[intercept]\ninterfaces = [\"lan0\"]\nlocal = true\n"+
		"[dns]\nresolvers = [\"192.0.2.53\"]\n[state]\ndirectory = \"state\"\n[control]\nsocket = \"control.sock\"\n", 0o644)
	write(t, filepath.Join(dir, "socks.cnf"), "DIRECT 10.0.0.0/8\nSOCKD5 @=192.0.2.1 *\n", 0o644)

	t.Run("close", func(t *testing.T) {
		// Close has no log: that its classifier was refused shows only where it
		// is missing.
		c := withRights(t, "tproxyd-closed.service", conf, "tc filter show dev lan0 ingress")
		if out, err := c.CombinedOutput(); err != nil || !strings.Contains(string(out), "bpf") {
			t.Errorf("%v: %v, and the classifier on lan0 is %q", c.Args, err, out)
		}
	})
	t.Run("serve", func(t *testing.T) {
		c := withRights(t, "tproxyd.service", conf, "")
		var stderr bytes.Buffer
		c.Stderr = &stderr
		stdout, err := c.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		timer := time.AfterFunc(20*time.Second, func() { c.Process.Kill() })
		defer timer.Stop()
		line, _ := bufio.NewReader(stdout).ReadString('\n')
		if !strings.Contains(line, "ready") {
			t.Errorf("%v did not become ready: %q", c.Args, line)
		}
		c.Process.Signal(syscall.SIGTERM)
		if err := c.Wait(); err != nil {
			t.Errorf("at SIGTERM: %v", err)
		}
		if strings.Contains(stderr.String(), "not permitted") {
			t.Errorf("it complains:\n%s", stderr.String())
		}
	})
}

// withRights is the ExecStart of a unit with no more capabilities than it has,
// in a network namespace. Then is a command of the shell to follow it; empty:
// none, and signals reach the program.
func withRights(t *testing.T, unit, conf, then string) *exec.Cmd {
	t.Helper()
	if program == "" {
		t.Fatal("cmd/tproxyd does not build")
	}
	text := read(t, "deploy/"+unit)
	start := regexp.MustCompile(`(?m)^ExecStart=/usr/sbin/tproxyd (\w+) -c \S+$`).FindStringSubmatch(text)
	rights := regexp.MustCompile(`(?m)^CapabilityBoundingSet=(.+)$`).FindStringSubmatch(text)
	if start == nil || rights == nil {
		t.Fatalf("deploy/%s: no ExecStart or no CapabilityBoundingSet", unit)
	}
	set := "-all"
	for _, r := range strings.Fields(rights[1]) {
		set += ",+" + strings.ToLower(strings.TrimPrefix(r, "CAP_"))
	}
	group := ""
	if m := regexp.MustCompile(`(?m)^Group=(.+)$`).FindStringSubmatch(text); m != nil {
		if _, err := user.LookupGroup(m[1]); err == nil { // else the control socket is nobody's in particular
			group = "--regid " + m[1] + " --clear-groups"
		}
	}
	script := fmt.Sprintf(`%s %s --bounding-set %s --no-new-privs -- "$@"`, tool(t, "setpriv", "util-linux"), group, lacking(t, set))
	if then == "" {
		script = "exec " + script
	} else {
		script += " && " + then
	}
	script = tool(t, "ip", "iproute2") + " link set lo up && ip link add lan0 type veth peer name peer0 && " +
		"echo 2 >/proc/sys/net/ipv4/conf/all/rp_filter && " + script
	c := exec.Command("/bin/sh", "-c", script, "sh", program, start[1], "-c", conf)
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	return c
}

// lacking takes out of a set of setpriv(1) what this process does not have
// itself, and so cannot give: CAP_SYS_RESOURCE in many containers. With less
// the test only proves more.
func lacking(t *testing.T, set string) string {
	t.Helper()
	dump, err := exec.Command(tool(t, "setpriv", "util-linux"), "--dump").Output()
	if err != nil {
		t.Fatal(err)
	}
	_, have, _ := strings.Cut(string(dump), "Capability bounding set: ")
	have, _, _ = strings.Cut(have, "\n")
	var can []string
	for _, r := range strings.Split(set, ",") {
		if r == "-all" || strings.Contains(","+have+",", ","+strings.TrimPrefix(r, "+")+",") {
			can = append(can, r)
		}
	}
	return strings.Join(can, ",")
}
