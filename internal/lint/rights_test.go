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
		c := withRights(t, "tproxyd-closed.service", conf, "tc filter show dev lan0 ingress", false)
		if out, err := c.CombinedOutput(); err != nil || !strings.Contains(string(out), "bpf") {
			t.Errorf("%v: %v, and the classifier on lan0 is %q", c.Args, err, out)
		}
	})
	// serves runs the unit until it is ready, and returns what it complains of.
	serves := func(t *testing.T, offered bool) (ready bool, complaint string) {
		t.Helper()
		c := withRights(t, "tproxyd.service", conf, "", offered)
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
		ready = strings.Contains(line, "ready")
		c.Process.Signal(syscall.SIGTERM)
		if err := c.Wait(); err != nil && ready {
			t.Errorf("at SIGTERM: %v", err)
		}
		return ready, stderr.String()
	}
	t.Run("serve", func(t *testing.T) {
		if ready, complaint := serves(t, false); !ready || strings.Contains(complaint, "not permitted") {
			t.Errorf("ready: %v\n%s", ready, complaint)
		}
	})
	t.Run("serve, with a program", func(t *testing.T) {
		write(t, filepath.Join(dir, "socks.cnf"), "EXCLUDE-MODULE ssh\nSOCKD5 @=192.0.2.1 *\n", 0o644)
		if ready, complaint := serves(t, false); ready || !strings.Contains(complaint, "takes CAP_SYS_PTRACE") {
			t.Errorf("without the right that it takes, ready: %v\n%s", ready, complaint)
		}
		if ready, complaint := serves(t, true); !ready || strings.Contains(complaint, "not permitted") {
			t.Errorf("with what the unit has in a comment, ready: %v\n%s", ready, complaint)
		}
	})
}

// withRights is the ExecStart of a unit with no more capabilities than it has,
// in a network namespace. Then is a command of the shell to follow it; empty:
// none, and signals reach the program. Offered adds those of its comments.
func withRights(t *testing.T, unit, conf, then string, offered bool) *exec.Cmd {
	t.Helper()
	if program == "" {
		t.Fatal("cmd/tproxyd does not build")
	}
	text := read(t, "deploy/"+unit)
	start := regexp.MustCompile(`(?m)^ExecStart=/usr/sbin/tproxyd (\w+) -c \S+$`).FindStringSubmatch(text)
	line := `(?m)^CapabilityBoundingSet=(.+)$`
	if offered {
		line = `(?m)^#?CapabilityBoundingSet=(.+)$`
	}
	rights := regexp.MustCompile(line).FindAllStringSubmatch(text, -1)
	if start == nil || rights == nil {
		t.Fatalf("deploy/%s: no ExecStart or no CapabilityBoundingSet", unit)
	}
	set := "-all"
	for _, r := range rights {
		for _, r := range strings.Fields(r[1]) {
			set += ",+" + strings.ToLower(strings.TrimPrefix(r, "CAP_"))
		}
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
