package netns_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// podman is an engine with storage of its own on a machine, of root or of a
// user. Its containers have an image of busybox and nothing else.
type podman struct {
	host *host
	user []string // a command line in front of each of its commands
	path string   // where its podman is, for PATH
	env  []string
}

// podmanUser is whose rootless containers are.
const podmanUser = 65001

// newPodman makes an engine on the machine. Containers and what podman leaves
// running end with the test.
func newPodman(t testing.TB, h *host, root bool) *podman {
	t.Helper()
	dir, err := os.MkdirTemp("", "tpx")
	if err != nil {
		t.Fatal(err)
	}
	p := &podman{host: h, path: filepath.Join(dir, "bin")}
	p.env = []string{"PATH=" + p.path + ":/usr/sbin:/usr/bin:/sbin:/bin", "HOME=" + dir, "XDG_RUNTIME_DIR=" + dir + "/xdg"}
	img := filepath.Join(dir, "img")
	policy := filepath.Join(dir, ".config/containers/policy.json")
	options := strings.Join([]string{"--root", dir + "/root", "--runroot", dir + "/run", "--tmpdir", dir + "/tmp", "--storage-driver", "vfs",
		"--cgroup-manager", "cgroupfs", "--events-backend", "file", "--runtime", "runc"}, " ")
	script := "set -e\nmkdir -p " + img + "/bin " + p.path + " " + dir + "/xdg " + filepath.Dir(policy) + "\n" +
		"cp " + tool(t, "busybox") + " " + probePath(t) + " " + img + "/bin/\nln -s busybox " + img + "/bin/sh\ntar -C " + img + " -cf " + dir + "/img.tar .\n" +
		"echo '{\"default\":[{\"type\":\"insecureAcceptAnything\"}]}' >" + policy + "\n" +
		"printf '#!/bin/sh\\nexec " + tool(t, "podman") + " " + options + " \"$@\"\\n' >" + p.path + "/podman\nchmod 755 " + p.path + "/podman\n"
	if !root {
		script += fmt.Sprintf("chown -R %d %s\nchmod 700 %s/xdg\n", podmanUser, dir, dir)
		p.user = []string{tool(t, "setpriv"), fmt.Sprintf("--reuid=%d", podmanUser), "--regid=65534", "--clear-groups", "--"}
		h.user(t, "ann", passwordHash)
		h.replace(t, "/etc/subuid", "ann:200000:65536\n", 0o644)
		h.replace(t, "/etc/subgid", "ann:200000:65536\n", 0o644)
	}
	h.run(t, command{args: []string{"sh", "-c", script}}).ok(t)
	t.Cleanup(func() {
		defer os.RemoveAll(dir)
		for range 3 { // one whose network another has goes only after that
			if p.podman(t, "rm", "-f", "-t", "0", "-a").code == 0 {
				break
			}
		}
		if b, err := os.ReadFile(dir + "/tmp/pause.pid"); err == nil {
			if pid, err := strconv.Atoi(strings.TrimSpace(string(b))); err == nil && pid > 1 {
				syscall.Kill(pid, syscall.SIGKILL)
			}
		}
	})
	p.podman(t, "import", "-q", dir+"/img.tar", "box").ok(t)
	return p
}

func (p *podman) podman(t testing.TB, args ...string) result {
	t.Helper()
	line := append(append([]string{}, p.user...), p.path+"/podman")
	return p.host.run(t, command{args: append(line, args...), env: p.env, limit: 90 * time.Second})
}

// start starts a container without a network.
func (p *podman) start(t testing.TB, name string) {
	t.Helper()
	p.podman(t, "run", "-d", "--name", name, "--network", "none", "--ulimit", "nofile=20000:20000", "--ulimit", "nproc=5000:5000",
		"box", "/bin/busybox", "sleep", "600").ok(t)
}

// in runs an applet of busybox in a container.
func (p *podman) in(t testing.TB, name string, args ...string) result {
	t.Helper()
	return p.podman(t, append([]string{"exec", name, "/bin/busybox"}, args...)...)
}

// TestAttachPodman: containers of podman without a network have one by the
// rules, of root and of a user alike: HTTP, DNS, UDP. Without the daemon they
// have none, and with it again.
func TestAttachPodman(t *testing.T) {
	t.Parallel()
	for _, root := range []bool{true, false} {
		t.Run(fmt.Sprintf("root %v", root), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			w.dante(t)
			w.outside.answerUDP(t, outsideAt+":7", echoUDP)
			p := newPodman(t, w.gateway, root)
			p.start(t, "web")
			p.start(t, "db")
			line := append(append([]string{}, p.user...), program(t), "attach", "--container", "web", "--socks", socks1At, "--container", "db", "--socks", socks2At)
			attach := func() *process {
				t.Helper()
				a := w.gateway.start(t, command{args: line, env: p.env})
				eventually(t, 20*time.Second, "attached", func() bool { return strings.Count(a.out.String(), "ready") == 2 || !a.running() })
				if !a.running() {
					t.Fatalf("attach: %s", a.output())
				}
				return a
			}
			fetch := func(name string) string {
				r := p.podman(t, "exec", name, "/bin/probe", "http", "http://www.example.org/")
				return r.out + r.err
			}
			a := attach()
			if got := fetch("web"); !fromSocks1.MatchString(got) {
				t.Errorf("web: %q", got)
			}
			if got := fetch("db"); !strings.Contains(got, "from="+socks2Out) && !strings.Contains(got, "from="+socks2Out6) {
				t.Errorf("db: %q", got)
			}
			if r := p.in(t, "web", "nslookup", "www.example.org", insideNS); !strings.Contains(r.out, "198.1") {
				t.Errorf("DNS: %s%s", r.out, r.err)
			}
			udp := p.podman(t, "exec", "web", "/bin/probe", "udp", outsideAt+":7")
			if !strings.Contains(udp.out, "hello") {
				t.Errorf("UDP: %s%s", udp.out, udp.err)
			}
			a.kill()
			if r := p.in(t, "web", "wget", "-q", "-T", "10", "-O-", "http://"+outsideAt+"/"); r.code == 0 || r.took > 8*time.Second {
				t.Errorf("without the daemon: exit %d after %v\n%s%s", r.code, r.took, r.out, r.err)
			}
			a = attach()
			if got := fetch("web"); !fromSocks1.MatchString(got) {
				t.Errorf("web, again: %q", got)
			}
			p.podman(t, "rm", "-f", "-t", "0", "-a").ok(t)
			if code, ended := a.wait(10 * time.Second); !ended || code != 0 {
				t.Errorf("when the containers ended: exit %d, %v\n%s", code, ended, a.output())
			}
		})
	}
}

// TestDeployedContainers: the files of deploy/container as they stand. A container
// with tproxyd has the network; another one shares it, has no right over it, and
// goes where the rules say. The unit for a container without a network names a
// command line that serves it.
func TestDeployedContainers(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	startMicrosocks(t, w.socks1, socks1At+":1080")
	p := newPodman(t, w.gateway, true)
	dir := filepath.Dir(p.path)
	build := exec.Command("go", "build", "-o", dir+"/context/bin/tproxyd", "github.com/tproxyd/tproxyd/cmd/tproxyd")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	p.podman(t, "build", "-q", "-t", "tproxyd", "-f", abs(t, "../../deploy/container/Containerfile"), dir+"/context").ok(t)
	limits := []string{"--ulimit", "nofile=20000:20000", "--ulimit", "nproc=5000:5000"}
	files := abs(t, "../../deploy/container")
	p.podman(t, append(append([]string{"run", "-d", "--name", "tproxyd"}, limits...), // as compose.yaml has it
		"--network", "ns:"+w.client.ns.Path(), "--cap-drop", "all", "--cap-add", "NET_ADMIN,NET_RAW", "--read-only",
		"-v", files+"/tproxyd.toml:/etc/tproxyd/tproxyd.toml:ro", "-v", files+"/socks.cnf:/etc/tproxyd/socks.cnf:ro",
		"-v", "state:/var/lib/tproxyd", "--tmpfs", "/run", "tproxyd")...).ok(t)
	eventually(t, 20*time.Second, "it is ready", func() bool { return strings.Contains(p.podman(t, "logs", "tproxyd").out, "ready") })
	p.podman(t, append(append([]string{"run", "-d", "--name", "application", "--network", "container:tproxyd", "--cap-drop", "NET_RAW"}, limits...),
		"box", "/bin/busybox", "sleep", "600")...).ok(t)
	app := func(args ...string) result {
		t.Helper()
		return p.podman(t, append([]string{"exec", "application"}, args...)...)
	}
	if r := app("/bin/probe", "http", "http://www.example.org/").ok(t); !fromSocks1.MatchString(r.out) {
		t.Errorf("the application: %s%s", r.out, r.err)
	}
	if r := app("/bin/busybox", "ip", "link", "set", "lo", "down"); r.code == 0 {
		t.Error("the application may change the network")
	}
	p.podman(t, "kill", "tproxyd").ok(t)
	p.podman(t, "wait", "tproxyd").ok(t)
	if r := app("/bin/probe", "tcp", outsideAt+":80"); r.code != int(syscall.ECONNREFUSED) {
		t.Errorf("without tproxyd: exit %d\n%s%s", r.code, r.out, r.err)
	}
	w.client.run(t, command{args: []string{program(t), "cleanup"}}).ok(t)

	unit, err := os.ReadFile("../../deploy/tproxyd-attach@.service")
	if err != nil {
		t.Fatal(err)
	}
	_, line, _ := strings.Cut(string(unit), "ExecStart=/usr/sbin/tproxyd ")
	line, _, _ = strings.Cut(line, "\n")
	line = strings.NewReplacer("/etc/tproxyd/containers/%i.cnf", files+"/socks.cnf", "%i", "web").Replace(line)
	p.start(t, "web")
	a := w.gateway.start(t, command{args: append([]string{program(t)}, strings.Fields(line)...), env: p.env})
	eventually(t, 20*time.Second, "attached: "+a.output(), func() bool { return strings.Contains(a.out.String(), "ready") })
	if r := p.podman(t, "exec", "web", "/bin/probe", "http", "http://www.example.org/").ok(t); !fromSocks1.MatchString(r.out) {
		t.Errorf("the unit's: %s%s", r.out, r.err)
	}
}
