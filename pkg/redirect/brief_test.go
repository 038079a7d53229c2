package redirect

import (
	"fmt"
	"net"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/mdlayher/netlink"
	vnetlink "github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// TestBriefly: what ended here, or is a question of DNS, is soon forgotten by the
// kernel, and what is somebody else's is not; and so is nothing on a kernel that
// does not know how.
func TestBriefly(t *testing.T) {
	for _, known := range []bool{true, false} {
		t.Run(fmt.Sprintf("known %v", known), func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			p := worldPlan()
			p.Local = true
			p.Ports = w.listen()
			w.r = w.gateway.open(Options{})
			w.r.can.brief = known
			w.apply(p)
			for _, from := range []*netns{w.client, w.gateway} {
				for _, to := range [][2]string{{"tcp", "203.0.113.5:80"}, {"tcp", "[2001:db8:a::5]:80"}, {"tcp", "203.0.113.5:53"}, {"udp", "203.0.113.5:53"}, {"udp", "[2001:db8:a::5]:53"}} {
					if got := ask(from, to[0], to[1]); !strings.HasPrefix(got, "proxy ") && !strings.HasPrefix(got, "dns ") {
						t.Fatalf("%v: %s", to, got)
					}
				}
			}
			if got := ask(w.client, "tcp", "198.51.100.5:80"); got != "server 198.51.100.5:80" {
				t.Fatal(got)
			}
			w.askServer(t, "192.0.2.2:80")

			const ours = 2*5 + 1
			for range 100 {
				soon, late := w.remembered(t)
				if len(soon) == ours && len(late) == 1 && known || len(soon) == 0 && len(late) == ours+1 && !known {
					return
				}
				time.Sleep(50 * time.Millisecond)
			}
			soon, late := w.remembered(t)
			t.Errorf("forgotten soon: %q\nlate: %q", soon, late)
		})
	}
}

// askServer asks as a socket of ours to a SOCKS server does.
func (w *world) askServer(t *testing.T, addr string) {
	t.Helper()
	d := net.Dialer{Timeout: wait, Control: func(_, _ string, c syscall.RawConn) (err error) {
		c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, int(testMarks.Own()))
		})
		return err
	}}
	w.gateway.do(func() {
		c, err := d.Dial("tcp", addr)
		if err != nil {
			t.Error(err)
			return
		}
		defer c.Close()
		c.Read(make([]byte, 64))
	})
}

// remembered lists what the gateway's kernel remembers of questions of DNS and of
// connections, by whether that will be over in ten seconds. What lasts for days has
// not ended yet.
func (w *world) remembered(t *testing.T) (soon, late []string) {
	t.Helper()
	for _, f := range []vnetlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
		var flows []*vnetlink.ConntrackFlow
		var err error
		w.gateway.do(func() { flows, err = vnetlink.ConntrackTableList(vnetlink.ConntrackTable, f) })
		if err != nil {
			t.Fatal(err)
		}
		for _, x := range flows {
			text := fmt.Sprintf("%d %v:%d %ds", x.Forward.Protocol, x.Forward.DstIP, x.Forward.DstPort, x.TimeOut)
			switch {
			case x.Forward.Protocol != unix.IPPROTO_TCP && (x.Forward.Protocol != unix.IPPROTO_UDP || x.Forward.DstPort != 53):
			case x.TimeOut <= 10:
				soon = append(soon, text)
			default:
				late = append(late, text)
			}
		}
	}
	slices.Sort(soon)
	slices.Sort(late)
	return soon, late
}

// TestAttempt: what is attempted leaves nothing behind, and what cannot be is told
// from it.
func TestAttempt(t *testing.T) {
	t.Parallel()
	n := newNetns(t)
	var c *nfnl
	var err error
	n.do(func() { c, err = dialNfnl() })
	if err != nil {
		t.Fatal(err)
	}
	defer c.close()
	if !c.knowsBrief() {
		t.Error("the kernel of the tests lacks CONFIG_NF_CONNTRACK_TIMEOUT")
	}
	unknown := briefs()[0]
	unknown.proto = 250
	m, err := unknown.message("x")
	if err != nil {
		t.Fatal(err)
	}
	if err := c.attempt([]netlink.Message{newNamed("x", 0), m}); err == nil || err == errAborted {
		t.Errorf("a protocol that is none: %v", err)
	}
	if out := n.run("nft list ruleset"); out != "" {
		t.Errorf("it has left %q", out)
	}
	if err := c.commit([]netlink.Message{newNamed("x", 0)}); err != nil {
		t.Errorf("a transaction after that: %v", err)
	}
}
