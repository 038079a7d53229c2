package netns_test

import (
	"fmt"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
)

// Topology: world. The client asks for names, over UDP and TCP, while and
// after the daemon of the gateway is killed:
//
//	client --10,000 questions--> gateway (names on disk before the answer leaves)

// resolveMany asks for n names from several sockets at once and returns the
// addresses; one name in twenty is asked over TCP, one in ten for IPv6. What
// got no answer is the zero address. It gives up when the channel until is
// closed, if there is one.
func (w *world) resolveMany(n int, limit time.Duration, until <-chan struct{}) []netip.Addr {
	addrs := make([]netip.Addr, n)
	var wg sync.WaitGroup
	const workers = 16
	for worker := range workers {
		wg.Go(func() {
			w.client.in(func() error {
				udp := dns.Client{Net: "udp", Timeout: limit}
				tcp := dns.Client{Net: "tcp", Timeout: limit}
				conn, err := udp.Dial(net.JoinHostPort(insideNS, "53"))
				if err != nil {
					return err
				}
				defer conn.Close()
				for i := worker; i < n; i += workers {
					select {
					case <-until:
						return nil
					default:
					}
					qtype := dns.TypeA
					if i%10 == 9 {
						qtype = dns.TypeAAAA
					}
					q := new(dns.Msg).SetQuestion(fmt.Sprintf("host-%d.example.org.", i), qtype)
					var m *dns.Msg
					if i%20 == 7 {
						m, _, err = tcp.Exchange(q, net.JoinHostPort(insideNS, "53"))
					} else {
						m, _, err = udp.ExchangeWithConn(q, conn)
					}
					if err != nil || len(m.Answer) != 1 {
						continue
					}
					switch rr := m.Answer[0].(type) {
					case *dns.A:
						addrs[i] = netip.MustParseAddr(rr.A.String())
					case *dns.AAAA:
						addrs[i] = netip.MustParseAddr(rr.AAAA.String())
					}
				}
				return nil
			})
		})
	}
	wg.Wait()
	return addrs
}

func TestSyntheticSurvivesKill(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	d := serve(t, w.gateway, settings{routes: "SOCKD5 @=198.51.100.11 *\n"})
	const n = 10000

	// The first half in peace, then killed at once after the last answer.
	began := time.Now()
	before := w.resolveMany(n/2, 2*time.Second, nil)
	t.Logf("%d names in %v", n/2, time.Since(began).Round(time.Millisecond))
	d.process.kill()
	d.start(t)

	// The second half with the daemon killed in the middle of it: whatever
	// was answered counts.
	killed := make(chan struct{})
	go func() {
		defer close(killed)
		time.Sleep(150 * time.Millisecond)
		d.process.kill()
	}()
	all := w.resolveMany(n, 300*time.Millisecond, killed)
	<-killed
	d.start(t)

	answered := 0
	after := w.resolveMany(n, 2*time.Second, nil)
	seen := map[netip.Addr]int{}
	for i, a := range after {
		if !a.IsValid() {
			t.Fatalf("host-%d has no answer after the restart", i)
		}
		if j, twice := seen[a]; twice {
			t.Fatalf("host-%d and host-%d share %v", i, j, a)
		}
		seen[a] = i
		if i < n/2 && before[i] != a {
			t.Fatalf("host-%d was %v and is %v", i, before[i], a)
		}
		if all[i].IsValid() {
			answered++
			if all[i] != a {
				t.Fatalf("host-%d was %v before the second kill and is %v", i, all[i], a)
			}
		}
	}
	t.Logf("%d of %d were answered around the second kill", answered, n)
	d.process.kill()
	d.start(t)
	for i, a := range w.resolveMany(n, 2*time.Second, nil) {
		if a != after[i] {
			t.Fatalf("host-%d was %v and is %v after all 10,000 were answered", i, after[i], a)
		}
	}
}
