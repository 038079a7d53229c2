package netns_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tproxyd/tproxyd/internal/gateway"
)

// TestFlows: what is carried is listed as long as it lives, with its bytes, and can
// be reset; filters show what they say.
func TestFlows(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.dante(t)
	d := serve(t, w.gateway, settings{routes: "SERVER one 198.51.100.11\nSERVER two 198.51.100.12\nSOCKD5 @=two * eq 8\nSOCKD5 @=one *\n"})
	for _, at := range []string{outsideAt + ":7", outsideAt + ":8", "[" + outsideAt6 + "]:7"} {
		echo := w.outside.listen(t, "tcp", at)
		go func() {
			for {
				c, err := echo.Accept()
				if err != nil {
					return
				}
				go func() { defer c.Close(); io.Copy(c, c) }()
			}
		}()
	}
	list := func(args ...string) (flows []gateway.FlowStatus) {
		t.Helper()
		out := d.cli(t, append([]string{"flows", "--json", "-c", d.config}, args...)...).ok(t).out
		if err := json.Unmarshal([]byte(out), &flows); err != nil {
			t.Fatalf("%v:\n%s", err, out)
		}
		return flows
	}
	if l := list(); len(l) != 0 {
		t.Errorf("before anybody came: %+v", l)
	}
	synthetic := w.client.dig(t, insideNS, "www.example.org")[0]
	open := func(to string) net.Conn {
		t.Helper()
		c, err := w.client.dial("tcp", to, 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		c.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := io.WriteString(c, "hello"); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, make([]byte, 5)); err != nil {
			t.Fatal(err)
		}
		return c
	}
	named, plain := open(synthetic+":7"), open(outsideAt+":8")
	var all []gateway.FlowStatus
	eventually(t, 2*time.Second, "both have their bytes", func() bool {
		all = list()
		return len(all) == 2 && all[0].Down == 5 && all[1].Down == 5
	})
	for i, want := range []gateway.FlowStatus{
		{Name: "www.example.org", Server: "one"}, {Server: "two"},
	} {
		f := all[i]
		c := []net.Conn{named, plain}[i]
		if f.Name != want.Name || f.Server != want.Server || f.Up != 5 || f.Action != "SOCKD5" || f.Client.String() != c.LocalAddr().String() ||
			f.Destination.String() != c.RemoteAddr().String() || !strings.HasSuffix(f.Rule, fmt.Sprint("socks.cnf:", 4-i)) || f.Age <= 0 {
			t.Errorf("flow %d is %+v", i, f)
		}
	}
	ids := func(l []gateway.FlowStatus) (ids []uint64) {
		for _, f := range l {
			ids = append(ids, f.ID)
		}
		return ids
	}
	for args, want := range map[string][]uint64{
		"--server=two": {all[1].ID}, "--to=example.org": {all[0].ID}, "--to=:8": {all[1].ID}, "--client=192.0.2.0/24": ids(all),
		"--client=" + clientAt: ids(all), "--client=198.51.100.1": nil,
	} {
		if got := ids(list(args)); !slices.Equal(got, want) {
			t.Errorf("%s: %v, want %v", args, got, want)
		}
	}
	table := d.cli(t, "flows", "-c", d.config).ok(t).out
	if !strings.HasPrefix(table, "ID ") || !strings.Contains(table, "www.example.org:7") || strings.Count(table, "\n") != 3 {
		t.Errorf("table:\n%s", table)
	}
	d.cli(t, "flows", "-c", d.config, "--client", "nobody").exit(t, 2)

	d.cli(t, "flows", "-c", d.config, "--kill", fmt.Sprint(all[0].ID)).ok(t)
	if _, err := named.Read(make([]byte, 1)); err == nil || !strings.Contains(err.Error(), "reset") {
		t.Errorf("killed: %v", err)
	}
	d.cli(t, "flows", "-c", d.config, "--kill", fmt.Sprint(all[0].ID)).exit(t, 1)
	if l := list(); len(l) != 1 || l[0].ID != all[1].ID {
		t.Errorf("after one was killed: %+v", l)
	}
	if _, err := io.WriteString(plain, "x"); err != nil {
		t.Error(err)
	}
	plain.Close()
	eventually(t, 2*time.Second, "no TCP flow is listed", func() bool { return len(list("--proto", "tcp")) == 0 })

	// A socket of UDP, by its destination.
	for _, at := range []string{outsideAt + ":9", "[" + outsideAt6 + "]:9"} { // the server chooses the family
		w.outside.answerUDP(t, at, echoUDP)
	}
	u, err := w.client.dial("udp", synthetic+":9", time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	exchange := func() {
		t.Helper()
		u.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err := io.WriteString(u, "datagram"); err != nil {
			t.Fatal(err)
		}
		if _, err := u.Read(make([]byte, 100)); err != nil {
			t.Fatal(err)
		}
	}
	exchange()
	sessions := list("--proto", "udp")
	if len(sessions) != 1 {
		t.Fatalf("sessions of UDP: %+v", sessions)
	}
	f := sessions[0]
	if f.Name != "www.example.org" || f.Server != "one" || f.Up != 8 || f.Down != 8 || f.Client.String() != u.LocalAddr().String() || !strings.HasSuffix(f.Rule, "socks.cnf:4") {
		t.Errorf("a session of UDP: %+v", f)
	}
	if l := list("--rule", "socks.cnf:4"); len(l) != 1 {
		t.Errorf("by its rule: %+v", l)
	}
	if l := list("--rule", "socks.cnf:3"); len(l) != 0 {
		t.Errorf("by another rule: %+v", l)
	}
	d.cli(t, "flows", "-c", d.config, "--kill", fmt.Sprint(f.ID)).ok(t)
	if l := list(); len(l) != 0 {
		t.Errorf("a session that was killed: %+v", l)
	}
	exchange()

	// Where there is no terminal the watch is one table after the other.
	watch := w.gateway.start(t, command{args: []string{d.bin, "flows", "--watch", "-c", d.config}})
	eventually(t, 10*time.Second, "two tables", func() bool { return strings.Count(watch.output(), "\nID ") == 1 })
	if out := watch.output(); strings.Contains(out, "\x1b") || !strings.Contains(out, "UP/S") || strings.Count(out, "www.example.org:9") < 2 {
		t.Errorf("the watch shows\n%s", out)
	}
	d.cli(t, "flows", "-c", d.config, "--kill", fmt.Sprint(list()[0].ID)).ok(t)
	eventually(t, 2*time.Second, "no flow is listed", func() bool { return len(list()) == 0 })
}

// TestFlowsOfBefore: what two processes still carry, one taken over after the other,
// is listed beside the daemon's own flows, and can be reset.
func TestFlowsOfBefore(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	startMicrosocks(t, w.socks1, socks1At+":1080")
	d := serve(t, w.gateway, settings{routes: "SERVER one 198.51.100.11\nSOCKD5 @=one *\n"})
	w.outside.answerTCP(t, outsideAt+":7", func(c *net.TCPConn) { io.Copy(c, c) })
	list := func() (flows []gateway.FlowStatus) {
		t.Helper()
		out := d.cli(t, "flows", "--json", "--client", clientAt, "-c", d.config).ok(t).out
		if err := json.Unmarshal([]byte(out), &flows); err != nil {
			t.Fatalf("%v:\n%s", err, out)
		}
		return flows
	}
	var clients []net.Conn
	var carriers []int // who carries each; the last one serves
	for i := range 3 {
		if i > 0 {
			carriers = append(carriers, d.takeover(t).pid())
		}
		c, err := w.client.dial("tcp", outsideAt+":7", 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		talk(t, c)
		clients = append(clients, c)
	}
	carriers = append(carriers, 0)
	flows := list()
	if len(flows) != 3 {
		t.Fatalf("listed are %+v", flows)
	}
	for i, f := range flows {
		if f.Process != carriers[i] || f.Client.String() != clients[i].LocalAddr().String() || f.Server != "one" || f.Up != 5 || f.Down != 5 {
			t.Errorf("flow %d, of process %d: %+v", i, carriers[i], f)
		}
	}
	if r := d.cli(t, "flows", "-c", d.config, "--kill", fmt.Sprint(flows[2].ID+1)).exit(t, 1); !strings.Contains(r.err, "there is no flow") {
		t.Errorf("one that there is not: %s", r.err)
	}
	for i, c := range clients {
		for _, living := range clients[i:] {
			talk(t, living)
		}
		d.cli(t, "flows", "-c", d.config, "--kill", fmt.Sprint(flows[i].ID)).ok(t)
		c.SetDeadline(time.Now().Add(5 * time.Second))
		if _, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("flow %d was reset, and its client sees %v", i, err)
		}
	}
	eventually(t, 5*time.Second, "no flow is listed", func() bool { return len(list()) == 0 })
}
