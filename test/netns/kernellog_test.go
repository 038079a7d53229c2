package netns_test

import (
	"fmt"
	"regexp"
	"strings"
	"testing"
	"time"
)

// Topology: world.

// TestKernelLog: of a rule that says log each flow that the kernel decides has one
// line, let pass or refused, forwarded or the gateway's own, by address and by name;
// of others there is none, and no flow comes to the daemon for it.
func TestKernelLog(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.insideDNS.add(t, "www.example.net. 60 IN A "+outsideAt)
	d := serve(t, w.gateway, settings{local: true, routes: "DENY * eq 8081 log tag=mail\nDENY * eq 8082\nDENY 203.0.113.0/24 eq 9 proto=udp reject=drop log\n" +
		"DIRECT " + insideAt + " log\nDIRECT " + insideAt6 + "\nDIRECT *.example.net log\n"})
	var want []string
	line := func(proto, src, dst string, line int, rest string) {
		want = append(want, fmt.Sprintf(`part=gateway proto=%s src=%s dst=%s rule=%s/socks\.cnf:%d %s by=kernel`,
			proto, regexp.QuoteMeta(src)+`(:\d+)?`, dst, regexp.QuoteMeta(w.gateway.dir), line, rest))
	}
	w.client.curl(t, "http://"+insideAt+"/").fetched(t, clientAt)
	line("tcp", clientAt, insideAt+":80", 4, "action=DIRECT")
	w.gateway.curl(t, "http://"+insideAt+"/").fetched(t, wanAt)
	line("tcp", wanAt, insideAt+":80", 4, "action=DIRECT")
	w.client.curl(t, "http://["+insideAt6+"]/").fetched(t, clientAt6)
	w.client.curl(t, "http://"+outsideAt+":8081/").refused(t)
	line("tcp", clientAt, outsideAt+":8081", 1, "action=DENY tag=mail")
	w.client.curl(t, "http://["+outsideAt6+"]:8081/").refused(t)
	want = append(want, `src="?\[`+clientAt6+`\]:\d+"? dst="?\[`+outsideAt6+`\]:8081"? rule=\S+:1 action=DENY tag=mail by=kernel`)
	w.gateway.curl(t, "http://"+outsideAt+":8081/").refused(t)
	line("tcp", wanAt, outsideAt+":8081", 1, "action=DENY tag=mail")
	w.client.curl(t, "http://"+outsideAt+":8082/").refused(t)
	w.client.curl(t, "http://www.example.net/").fetched(t, clientAt)
	line("tcp", clientAt, outsideAt+":80 host=www.example.net", 6, "action=DIRECT")
	w.client.run(t, command{args: []string{tool(t, "bash"), "-c", "exec 3<>/dev/udp/" + outsideAt + "/9; for i in 1 2 3; do echo x >&3; done"}}).ok(t)
	line("udp", clientAt, outsideAt+":9", 3, "action=DENY")
	w.client.run(t, command{args: []string{tool(t, "ping"), "-c1", insideAt}}).ok(t)
	line("icmp", clientAt, insideAt, 4, "action=DIRECT")

	for _, l := range want {
		re := regexp.MustCompile(`(?m)level=INFO msg=flow .*` + l + `$`)
		eventually(t, 20*time.Second, l, func() bool { return re.MatchString(d.output()) })
	}
	if n := strings.Count(d.output(), "by=kernel"); n != len(want) {
		t.Errorf("%d lines, want %d:\n%s", n, len(want), d.output())
	}
	if n := d.metric(t, `tproxyd_flows_total{action="direct"}`); n != 0 {
		t.Errorf("%v flows came to the daemon", n)
	}

	// The successor listens, too.
	d.takeover(t)
	w.client.curl(t, "http://"+insideAt+"/").fetched(t, clientAt)
	eventually(t, 20*time.Second, "a line of the successor", func() bool { return strings.Contains(d.output(), "by=kernel") })
}
