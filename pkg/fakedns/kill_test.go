package fakedns

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
	"github.com/tproxyd/tproxyd/pkg/flow"
)

// checked is a PacketConn that looks into the file before each answer.
type checked struct {
	t    *testing.T
	dir  string
	in   [][]flow.Datagram
	sent int
}

func (c *checked) ReadBatch(ds []flow.Datagram) (int, error) {
	if len(c.in) == 0 {
		return 0, net.ErrClosed
	}
	n := copy(ds, c.in[0])
	c.in = c.in[1:]
	return n, nil
}

func (c *checked) WriteBatch(ds []flow.Datagram) (int, error) {
	on := written(c.t, c.dir)
	for _, d := range ds {
		m := new(dns.Msg)
		if err := m.Unpack(d.Data); err != nil {
			c.t.Error(err)
			continue
		}
		c.sent++
		name := strings.TrimSuffix(m.Question[0].Name, ".")
		if a := m.Answer[0].(*dns.A).A.String(); on[name] == 0 || (prefix{pool4}).addr(on[name]).String() != a {
			c.t.Errorf("%s was answered with %s; the file has index %d", name, a, on[name])
		}
	}
	return len(ds), nil
}

func (c *checked) Close() error { return nil }

func TestStoreBeforeAnswer(t *testing.T) {
	dir := t.TempDir()
	s, err := New(Options{Dir: dir, Pool4: pool4, Decide: func(string, Asker) (Verdict, bool) { return Synthetic, true }})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	c := &checked{t: t, dir: dir}
	for i := range 8 {
		var batch []flow.Datagram
		for j := range 40 {
			m := new(dns.Msg).SetQuestion(fmt.Sprintf("host%d-%d.example.", i, j), dns.TypeA)
			if j == 20 {
				m.SetQuestion(fmt.Sprintf("slow\\ host%d.example.", i), dns.TypeA) // the slow way
			}
			b, err := m.Pack()
			if err != nil {
				t.Fatal(err)
			}
			batch = append(batch, flow.Datagram{Data: b})
		}
		c.in = append(c.in, batch)
	}
	if err := s.ServeUDP(t.Context(), c); err != nil {
		t.Fatal(err)
	}
	if c.sent != 320 {
		t.Errorf("%d answers, want 320", c.sent)
	}
}

const (
	childEnv  = "TPROXYD_TEST_FAKEDNS_CHILD" // a directory to serve from
	killNames = 10_000
)

// TestStoreKill kills a process that has just given many addresses.
func TestStoreKill(t *testing.T) {
	if dir := os.Getenv(childEnv); dir != "" {
		serveChild(t, dir)
		return
	}
	dir := t.TempDir()
	cmd := exec.Command(os.Args[0], "-test.run=^TestStoreKill$")
	cmd.Env = append(os.Environ(), childEnv+"="+dir)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	kill := sync.OnceFunc(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	defer kill()
	var addr string
	if _, err := fmt.Fscanln(out, &addr); err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("udp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(20 * time.Second))

	answers := make(map[string]uint32, killNames)
	in := make([]byte, 512)
	for i := 0; i < killNames; {
		const window = 50 // questions on the way
		for j := range window {
			b, err := new(dns.Msg).SetQuestion("host"+strconv.Itoa(i+j)+".example.", dns.TypeA).Pack()
			if err != nil {
				t.Fatal(err)
			}
			if _, err := conn.Write(b); err != nil {
				t.Fatal(err)
			}
		}
		for range window {
			n, err := conn.Read(in)
			if err != nil {
				t.Fatal(err)
			}
			m := new(dns.Msg)
			if err := m.Unpack(in[:n]); err != nil || len(m.Answer) != 1 {
				t.Fatalf("%v\n%v", err, m)
			}
			a, _ := netip.AddrFromSlice(m.Answer[0].(*dns.A).A)
			answers[strings.TrimSuffix(m.Question[0].Name, ".")] = (prefix{pool4}).index(a)
		}
		i += window
	}
	kill()
	if got := reopen(t, dir); len(got) != killNames || !cmp.Equal(got, answers) {
		t.Errorf("%d names after the kill: %s", len(got), cmp.Diff(got, answers))
	}
}

func serveChild(t *testing.T, dir string) {
	s, err := New(Options{Dir: dir, Pool4: pool4, Decide: func(string, Asker) (Verdict, bool) { return Synthetic, true }})
	if err != nil {
		t.Fatal(err)
	}
	c := listen(t)
	fmt.Println(c.addr())
	s.ServeUDP(context.Background(), c)
}
