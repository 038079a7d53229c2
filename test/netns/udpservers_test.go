package netns_test

import (
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/tproxyd/tproxyd/internal/socksserver"
)

// Topology: world, with a list of two servers. What cannot be had of one is had
// of the other, and a socket of the client has one of them at a time:
//
//	client ---> gateway --+--> socks1 --> outside
//	                      '--> socks2 --> outside

// seenAt asks port 1111 of the outside whom it sees of the socket, until it is
// answered.
func seenAt(t *testing.T, c *net.UDPConn, limit time.Duration) netip.AddrPort {
	t.Helper()
	var b []byte
	eventually(t, limit, c.RemoteAddr().String()+" answers", func() (ok bool) {
		var err error
		b, err = say(c, []byte("who"), time.Second)
		return err == nil
	})
	return netip.MustParseAddrPort(string(b))
}

func TestUDPFailover(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one, _ := w.dante(t)
	w.outside.udpServices(t, outsideAt, outsideAt6)
	serve(t, w.gateway, settings{routes: "SERVER one 198.51.100.11\nSERVER two 198.51.100.12\nSOCKD5 @=one,two *\n"})
	w.observe(t)
	var sockets []*net.UDPConn
	for i := range 8 {
		c := w.client.connected(t, net.JoinHostPort([]string{outsideAt, outsideAt6}[i%2], "1111"))
		sockets = append(sockets, c)
		if a := seenAt(t, c, 5*time.Second).Addr().String(); a != socks1Out && a != socks1Out6 {
			t.Errorf("the outside saw %s, want the first server", a)
		}
	}
	one.kill()
	for _, c := range sockets {
		if a := seenAt(t, c, 3*time.Second).Addr().String(); a != socks2Out && a != socks2Out6 {
			t.Errorf("without the first server the outside saw %s", a)
		}
	}
	if n, who := w.leaked(t); n != 0 {
		t.Errorf("%d packets leaked:\n%s", n, who)
	}
}

// TestUDPSecondServer: the first server has no UDP, which costs it nothing but
// UDP.
func TestUDPSecondServer(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	startMicrosocks(t, w.socks1, socks1At+":1080")
	startDanted(t, w.socks2, socks2At+":1080", openDante([]string{socks2At}, []string{socks2Out, socks2Out6}))
	w.outside.udpServices(t, outsideAt, outsideAt6)
	serve(t, w.gateway, settings{routes: "SERVER one 198.51.100.11\nSERVER two 198.51.100.12\nSOCKD5 @=one,two *\n"})
	w.observe(t)
	for range 3 {
		for _, to := range []string{outsideAt, outsideAt6} {
			c := w.client.connected(t, net.JoinHostPort(to, "1111"))
			if a := seenAt(t, c, 2*time.Second).Addr().String(); a != socks2Out && a != socks2Out6 {
				t.Errorf("UDP to %s came from %s, want from the second server", to, a)
			}
		}
		w.client.curl(t, "http://"+outsideAt+"/first").fetched(t, socks1Out, socks1At)
	}
	if n, who := w.leaked(t); n != 0 {
		t.Errorf("%d packets leaked:\n%s", n, who)
	}
}

// TestUDPBalance: BALANCE draws once for a socket, whatever it sends to (R13).
func TestUDPBalance(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.dante(t)
	w.outside.udpServices(t, outsideAt)
	serve(t, w.gateway, settings{routes: "SERVER one 198.51.100.11\nSERVER two 198.51.100.12\nBALANCE\nSOCKD5 @=one,two *\n"})
	servers := map[netip.Addr]int{}
	for range 24 {
		c := w.client.socket(t, outsideAt)
		saw := map[string]bool{}
		for range 2 {
			for _, port := range []uint16{1111, 2222} {
				b, err := sayTo(c, netip.AddrPortFrom(netip.MustParseAddr(outsideAt), port), []byte("who"), 5*time.Second)
				if err != nil {
					t.Fatal(err)
				}
				saw[string(b)] = true
				servers[netip.MustParseAddrPort(string(b)).Addr()]++
			}
		}
		if len(saw) != 1 {
			t.Errorf("one socket was seen as %v", saw)
		}
	}
	if len(servers) != 2 {
		t.Errorf("24 sockets, and all by one server: %v", servers)
	}
}

// TestUDPGarbage: what comes to the socket of an association from elsewhere is
// not heard, and what comes from the server without sense goes nowhere.
func TestUDPGarbage(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.outside.udpServices(t, outsideAt, outsideAt6)
	var mu sync.Mutex
	relays := []socksserver.PacketConn{}
	associations := map[netip.AddrPort]bool{} // the gateway's sockets
	s := &socksserver.Server{}
	s.UDP.OnDatagram = func(r socksserver.Request) {
		mu.Lock()
		defer mu.Unlock()
		associations[r.Client] = true
	}
	w.socks1.startSocks(t, s, socks1At+":1080")
	inside := s.UDP.Inside
	s.UDP.Inside = func(at netip.Addr) (socksserver.PacketConn, error) {
		c, err := inside(at)
		mu.Lock()
		defer mu.Unlock()
		relays = append(relays, c)
		return c, err
	}
	d := serve(t, w.gateway, settings{routes: "SERVER one 198.51.100.11\nSOCKD5 @=one *\n"})
	ts := w.startTalks(t, w.client, 8)
	ts.heard(t, 5*time.Second, "are served")
	mu.Lock()
	to, from := maps.Clone(associations), slices.Clone(relays)
	mu.Unlock()
	if len(to) != 8 || len(from) != 8 {
		t.Fatalf("%d associations of 8", len(to))
	}
	strangers := []*net.UDPConn{w.outside.socket(t, outsideAt), w.socks2.socket(t, outsideAt), w.socks1.socket(t, outsideAt)}
	// From a stranger what would have sense, too.
	forged := append([]byte{0, 0, 0, 1, 203, 0, 113, 80, 0, 7}, "forged"...)
	for i := range 2000 {
		b := make([]byte, rand.IntN(64))
		for j := range b {
			b[j] = byte(rand.Uint32())
		}
		if i%4 == 0 {
			b = forged
		}
		for at := range to {
			strangers[i%len(strangers)].WriteToUDPAddrPort(b, at)
		}
		if i%4 != 0 {
			if len(b) > 2 {
				b[2] |= 1 // a fragment, so that it has no sense by chance
			}
			for at := range to {
				for _, c := range from { // each is connected to one of them only
					c.WriteToUDPAddrPort(b, at)
				}
			}
		}
		if i%20 == 0 {
			time.Sleep(time.Millisecond)
		}
	}
	ts.heard(t, 5*time.Second, "are served through the flood")
	ts.finish()
	if n := d.metric(t, `tproxyd_udp_dropped_total{reason="malformed"}`); n == 0 {
		t.Error("nothing of the server's garbage was dropped as such")
	}
	if c := s.Counts(); c.Total != 8 {
		t.Errorf("%d associations, want the 8 of the beginning", c.Total)
	}
}
