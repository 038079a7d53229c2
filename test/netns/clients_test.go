package netns_test

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Topology: world. Two users and a cgroup of the gateway, and its client:
//
//	uid 1000 ──► socks2 ──► outside        cgroup tproxyd-….slice ── kernel ──► inside
//	others   ──► socks1 ──► outside        client, by its MAC     ── kernel ──► inside

// cgroup makes a cgroup for a test and returns its path below the mount, and its
// directory.
func cgroup(t testing.TB, name string) (path, dir string) {
	t.Helper()
	mount := "/sys/fs/cgroup"
	if _, err := os.Stat(mount + "/cgroup.procs"); err != nil {
		mount = "/sys/fs/cgroup/unified"
	}
	dir = filepath.Join(mount, name)
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.Remove(dir); err != nil {
			t.Error(err)
		}
	})
	return "/" + name, dir
}

// curlAs is curl as a user, or in a cgroup.
func (h *host) curlAs(t testing.TB, prefix []string, url string, args ...string) page {
	t.Helper()
	all := append(append(prefix, tool(t, "curl"), "-sS", "--max-time", "20"), args...)
	return pageOf(h.run(t, command{args: append(all, url)}))
}

func TestClientsOfRules(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.dante(t)
	name := fmt.Sprintf("tproxyd-test-%d.slice", os.Getpid())
	_, dir := cgroup(t, name)
	_, mac, _ := strings.Cut(w.client.run(t, command{args: []string{tool(t, "ip"), "-o", "link", "show", "eth0"}}).ok(t).out, "link/ether ")
	mac, _, _ = strings.Cut(mac, " ")
	d := serve(t, w.gateway, settings{local: true, routes: `SERVER one 198.51.100.11
SERVER two 198.51.100.12
DIRECT 198.51.100.20 cgroup=` + name + `
DIRECT 198.51.100.20 uid=1001
DENY 203.0.113.80 eq 80 uid=1002 reject=icmp
DENY 2001:db8:3::80 eq 80 uid=1002 reject=icmp
DENY *.example.org uid=1002
DENY www.example.net uid=1002 reject=dns-nxdomain
SOCKD5 @=two * uid=1000
DIRECT 198.51.100.20 mac=` + mac + `
SOCKD5 @=one *
`})
	as := func(uid string) []string {
		return []string{tool(t, "setpriv"), "--reuid=" + uid, "--regid=" + uid, "--clear-groups"}
	}
	in := []string{tool(t, "sh"), "-c", "echo $$ >" + dir + "/cgroup.procs; exec \"$@\"", "sh"}
	for _, to := range []string{"http://www.example.org/", "http://" + outsideAt + "/", "http://[" + outsideAt6 + "]/"} {
		w.gateway.curlAs(t, as("1000"), to).fetched(t, socks2Out, socks2Out6)
		w.gateway.curlAs(t, as("1001"), to).fetched(t, socks1Out, socks1Out6)
		w.gateway.curl(t, to).fetched(t, socks1Out, socks1Out6)
		w.client.curl(t, to).fetched(t, socks1Out, socks1Out6)
		w.gateway.curlAs(t, as("1002"), to).refused(t)
	}
	if p := w.gateway.curlAs(t, as("1002"), "http://www.example.net/"); p.code != 6 {
		t.Errorf("a name that one user is told does not exist: %d %s%s", p.code, p.out, p.err)
	}
	w.gateway.curlAs(t, as("1000"), "http://www.example.net/").fetched(t, socks2Out, socks2Out6)

	// UDP, of each user by their own server.
	w.outside.udpServices(t, outsideAt, outsideAt6)
	for uid, from := range map[string][2]string{"1000": {socks2Out, socks2Out6}, "0": {socks1Out, socks1Out6}} {
		for i, to := range []string{outsideAt, outsideAt6} {
			r := w.gateway.run(t, command{args: append(as(uid), tool(t, "bash"), "-c", "exec 3<>/dev/udp/"+to+"/1111; echo x >&3; timeout 5 dd bs=100 count=1 status=none <&3")})
			if got, _, err := net.SplitHostPort(strings.TrimSpace(r.out)); err != nil || got != from[i] {
				t.Errorf("UDP of %s to %s came from %q, want %s (%s)", uid, to, r.out, from[i], r.err)
			}
		}
	}

	// What the kernel decides never comes to the daemon.
	before := d.metric(t, `tproxyd_flows_total{action="proxied"}`) + d.metric(t, `tproxyd_flows_total{action="direct"}`)
	direct := d.metric(t, `tproxyd_kernel_packets_total{verdict="direct"}`)
	w.gateway.curlAs(t, in, "http://"+insideAt+"/").fetched(t, wanAt)
	w.gateway.curlAs(t, as("1001"), "http://"+insideAt+"/").fetched(t, wanAt)
	w.client.curl(t, "http://"+insideAt+"/").fetched(t, clientAt)
	if n := d.metric(t, `tproxyd_flows_total{action="proxied"}`) + d.metric(t, `tproxyd_flows_total{action="direct"}`); n != before {
		t.Errorf("%v flows that the kernel lets pass came to the daemon", n-before)
	}
	if d.metric(t, `tproxyd_kernel_packets_total{verdict="direct"}`) <= direct {
		t.Error("the kernel counted none of them")
	}
	w.gateway.curl(t, "http://"+insideAt+"/").fetched(t, socks1At, socks1Out)
	for line, action := range map[int]string{3: "DIRECT", 4: "DIRECT", 10: "DIRECT", 5: "DENY", 6: "DENY"} {
		metric := fmt.Sprintf("tproxyd_rule_kernel_packets_total{action=%q,rule=\"%s/socks.cnf:%d\"}", action, w.gateway.dir, line)
		if d.metric(t, metric) == 0 {
			t.Errorf("%s is 0", metric)
		}
	}

	// A reload that asks for something new of clients that are there.
	d.routes(t, "SERVER two 198.51.100.12\nDENY * uid=1000 gid=1000\nSOCKD5 @=two * cgroup=/"+name+"\nDENY *\n")
	d.reload(t)
	w.gateway.curlAs(t, in, "http://www.example.org/").fetched(t, socks2Out, socks2Out6)
	w.gateway.curlAs(t, as("1000"), "http://www.example.org/").refused(t)
	w.client.curl(t, "http://"+outsideAt+"/").refused(t)

	// A cgroup that comes later.
	d.routes(t, "SERVER two 198.51.100.12\nDENY 203.0.113.0/24 cgroup=late.service\nSOCKD5 @=two *\n")
	d.reload(t)
	late := filepath.Join(dir, "late.service")
	if err := os.Mkdir(late, 0o755); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(late)
	eventually(t, 10*time.Second, "the rule holds for a cgroup that came later", func() bool {
		return w.gateway.curlAs(t, []string{tool(t, "sh"), "-c", "echo $$ >" + late + "/cgroup.procs; exec \"$@\"", "sh"}, "http://"+outsideAt+"/").code == 7
	})
}

// TestExcludeModule: a unit of the gateway is DIRECT before all rules: by the
// kernel where its flows have addresses, and where they have names too.
func TestExcludeModule(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.dante(t)
	w.insideDNS.add(t, "www.example.org. 60 IN A "+outsideAt, "www.example.org. 60 IN AAAA "+outsideAt6)
	name := fmt.Sprintf("tproxyd-excluded-%d.service", os.Getpid())
	_, dir := cgroup(t, name)
	in := []string{tool(t, "sh"), "-c", "echo $$ >" + dir + "/cgroup.procs; exec \"$@\"", "sh"}
	d := serve(t, w.gateway, settings{local: true, routes: "SERVER one 198.51.100.11\nDENY * eq 8081\nSOCKD5 @=one *\nEXCLUDE-MODULE " + name + "\n"})
	startWeb(t, w.outside, outsideAt+":8081")
	flows := func() float64 {
		return d.metric(t, `tproxyd_flows_total{action="proxied"}`) + d.metric(t, `tproxyd_flows_total{action="direct"}`)
	}
	before := flows()
	for _, to := range []string{"http://" + outsideAt + "/", "http://[" + outsideAt6 + "]/", "http://" + outsideAt + ":8081/", "http://www.example.org/"} {
		w.gateway.curlAs(t, in, to).fetched(t, wanAt, wanAt6)
	}
	if n := flows(); n != before {
		t.Errorf("%v flows of the unit came to the daemon", n-before)
	}
	for _, to := range []string{"http://" + outsideAt + "/", "http://www.example.org/"} {
		w.gateway.curl(t, to).fetched(t, socks1Out, socks1Out6)
		w.client.curl(t, to).fetched(t, socks1Out, socks1Out6)
	}
	w.gateway.curl(t, "http://"+outsideAt+":8081/").refused(t)
}

// TestExcludeProgram: a program of the gateway is DIRECT before all rules, TCP and
// UDP, by address, by name and where others are denied; others are not, nor is what
// is forwarded.
func TestExcludeProgram(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.dante(t)
	w.insideDNS.add(t, "www.example.org. 60 IN A "+outsideAt, "www.example.org. 60 IN AAAA "+outsideAt6)
	programs := map[string]string{}
	for _, name := range []string{"curl", "bash"} {
		b, err := os.ReadFile(tool(t, name))
		w.gateway.must(t, err)
		programs[name] = w.gateway.file(t, fmt.Sprintf("tproxyd-%d-%s", os.Getpid(), name), string(b), 0o755)
	}
	// In the namespace of a command.
	file := w.gateway.file(t, "run.cnf", "SOCKD5 @="+socks1At+" *\nEXCLUDE-MODULE "+filepath.Base(programs["curl"])+"\n", 0o644)
	for curl, want := range map[string]string{programs["curl"]: wanAt, tool(t, "curl"): socks1Out} {
		pageOf(w.gateway.run(t, command{args: asNobody(t, program(t), "run", "--routes", file, "--", curl, "-sS", "--max-time", "20", "http://"+outsideAt+"/")})).fetched(t, want)
	}

	link := filepath.Join(w.gateway.dir, "link")
	w.gateway.must(t, os.Symlink(programs["curl"], link))
	rules := "SERVER one 198.51.100.11\nDENY * eq 8081\nDENY 203.0.113.0/24 eq 1112 proto=udp\nSOCKD5 @=one *\n"
	named := "EXCLUDE-MODULE " + link + "\nEXCLUDE-MODULE " + filepath.Base(programs["bash"]) + "\n"
	d := serve(t, w.gateway, settings{local: true, routes: rules + named})
	startWeb(t, w.outside, outsideAt+":8081")
	w.outside.udpServices(t, outsideAt, outsideAt6)

	fetch := func(url string) page {
		return pageOf(w.gateway.run(t, command{args: []string{programs["curl"], "-sS", "--max-time", "20", url}}))
	}
	for _, to := range []string{"http://" + outsideAt + "/", "http://[" + outsideAt6 + "]/", "http://" + outsideAt + ":8081/", "http://www.example.org/"} {
		fetch(to).fetched(t, wanAt, wanAt6)
	}
	for _, to := range []string{"http://" + outsideAt + "/", "http://[" + outsideAt6 + "]/", "http://www.example.org/"} {
		w.gateway.curl(t, to).fetched(t, socks1Out, socks1Out6)
		w.client.curl(t, to).fetched(t, socks1Out, socks1Out6)
	}
	for _, h := range []*host{w.gateway, w.client} {
		h.curl(t, "http://"+outsideAt+":8081/").refused(t)
	}
	from := func(bash, to string) string {
		r := w.gateway.run(t, command{args: []string{bash, "-c", "exec 3<>/dev/udp/" + to + "/1111; echo x >&3; timeout 5 dd bs=100 count=1 status=none <&3"}})
		host, _, _ := net.SplitHostPort(strings.TrimSpace(r.out))
		return host
	}
	for to, want := range map[string][2]string{outsideAt: {wanAt, socks1Out}, outsideAt6: {wanAt6, socks1Out6}} {
		if direct, proxied := from(programs["bash"], to), from(tool(t, "bash"), to); direct != want[0] || proxied != want[1] {
			t.Errorf("UDP to %s came from %q and %q, want %v", to, direct, proxied, want)
		}
	}
	if strings.Contains(d.output(), "sandbox") {
		t.Errorf("it says\n%s", d.output())
	}
	if n := d.metric(t, fmt.Sprintf(`tproxyd_rule_flows_total{action="DIRECT",rule="%s/socks.cnf:5"}`, w.gateway.dir)); n < 4 {
		t.Errorf("%v flows are counted for the line", n)
	}

	d.routes(t, rules)
	d.reload(t)
	fetch("http://"+outsideAt+"/").fetched(t, socks1Out)
	fetch("http://" + outsideAt + ":8081/").refused(t)
	d.stop(t)

	// The sandbox of a daemon without such a rule may not look at processes.
	d.start(t)
	d.routes(t, rules+named)
	if r := d.cli(t, "reload", "-c", d.config); r.code != 2 || !strings.Contains(r.err, "socks.cnf:5: EXCLUDE-MODULE") || !strings.Contains(r.err, "CAP_SYS_PTRACE") {
		t.Errorf("a reload that would need another sandbox: %d %s", r.code, r.err)
	}
	fetch("http://"+outsideAt+"/").fetched(t, socks1Out)
	d.takeover(t)
	fetch("http://"+outsideAt+"/").fetched(t, wanAt)
}

// TestRunUsers: a rule means the same user in the namespaces of run, where users
// have other numbers.
func TestRunUsers(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.dante(t)
	for uid, want := range map[string]bool{"65534": true, "0": false} {
		rules := w.gateway.file(t, "users.cnf", "SOCKD5 @="+socks1At+" * uid="+uid+"\nDENY *\n", 0o644)
		p := pageOf(w.gateway.run(t, command{args: runLine(t, "--routes", rules, "--", tool(t, "curl"), "-sS", "--max-time", "20", "http://"+outsideAt+"/")}))
		if want {
			p.fetched(t, socks1Out)
		} else {
			p.refused(t)
		}
	}
}
