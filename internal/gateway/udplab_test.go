package gateway_test

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/tproxyd/tproxyd/internal/socksserver"
	"github.com/tproxyd/tproxyd/pkg/flow"
	"github.com/tproxyd/tproxyd/pkg/relay"
	"github.com/tproxyd/tproxyd/pkg/socks"
	"golang.org/x/sys/unix"
)

// udpLab is a lab whose clients send datagrams. At every address of 127.20.0.0/16
// and on one port there is an echo of them.
//
//	inlet -> relay.UDP -> gateway: decided -+-> DialUDP -----> echo
//	                                        +-> SOCKS server -> echo
type udpLab struct {
	*lab
	*inlet
	packets *relay.UDP
	port    uint16 // of the echo
	refused chan string
}

// newUDPLab starts a gateway for rules, as newLab does; udp is how the SOCKS
// servers carry datagrams.
func newUDPLab(t testing.TB, level slog.Level, fault socksserver.Fault, udp socksserver.UDP, rules ...string) *udpLab {
	t.Helper()
	l := &udpLab{lab: newLab(t, level, fault, "DENY *"), inlet: newInlet(t), refused: make(chan string, 100)}
	l.lab.udp = udp
	l.Swap(l.plan(fault, rules...))
	l.port = startUDPEcho(t)
	l.echoUDP = netip.AddrPortFrom(netip.MustParseAddr(realAt), l.port)
	var err error
	l.packets, err = relay.NewUDP(relay.UDPOptions{
		Sources:    [][]flow.PacketSource{{l.inlet}},
		Decide:     l.DecideUDP,
		Header:     socks.ParseUDPHeader,
		FlowSocket: func(_, _ netip.AddrPort) (int, error) { return -1, errors.New("the raw sender does") },
		Refuse:     func(d flow.Datagram, r relay.Refusal) { l.refused <- fmt.Sprintf("%s: %d", d.Dst, r) },
		Done:       l.SessionDone,
		MaxSockets: 1000,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.packets.Close() })
	return l
}

// to is an address on the echo's port.
func (l *udpLab) to(addr string) string { return net.JoinHostPort(addr, fmt.Sprint(l.port)) }

// echoes has a client send to dst and wants it back from there.
func (l *udpLab) echoes(client, dst, text string) {
	l.t.Helper()
	l.put(client, dst, text)
	l.hears(client, dst, text)
}

// hears wants a datagram for a client.
func (l *udpLab) hears(client, from, text string) {
	l.t.Helper()
	l.wants(l.replies, fmt.Sprintf("%s > %s: %s", from, client, text))
}

// refuses wants a datagram to be refused.
func (l *udpLab) refuses(dst string, why relay.Refusal) {
	l.t.Helper()
	l.wants(l.refused, fmt.Sprintf("%s: %d", dst, why))
}

func (l *udpLab) wants(c <-chan string, want string) {
	l.t.Helper()
	select {
	case got := <-c:
		if got != want {
			l.t.Fatalf("got %.100q, want %.100q", got, want)
		}
	case <-time.After(patience):
		l.t.Fatalf("%.100q has not come", want)
	}
}

// ends closes the loops and wants no address to be pinned after that, nor an
// association at a server.
func (l *udpLab) ends() {
	l.t.Helper()
	l.packets.Close()
	if left, _ := l.names.balance(); left != 0 {
		l.t.Errorf("%d addresses are still pinned", left)
	}
	for _, s := range l.servers {
		eventually(l.t, "no association is left", func() bool { return s.Counts().Alive == 0 })
	}
}

func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not in %v: %s", patience, what)
		}
	}
}

// inlet is a source of datagrams that the test puts in.
type inlet struct {
	fd      int // eventfd: something is in
	replies chan string
	mu      sync.Mutex
	in      []flow.Datagram
}

func newInlet(t testing.TB) *inlet {
	t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return &inlet{fd: fd, replies: make(chan string, 1000)}
}

// put has a client, behind lan0, send datagrams to dst.
func (s *inlet) put(client, dst string, texts ...string) {
	s.mu.Lock()
	for _, text := range texts {
		s.in = append(s.in, flow.Datagram{Data: []byte(text), Src: netip.MustParseAddrPort(client), Dst: netip.MustParseAddrPort(dst), IfIndex: 1})
	}
	unix.Write(s.fd, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	s.mu.Unlock()
}

func (s *inlet) TryReadBatch(ds []flow.Datagram) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := min(len(ds), len(s.in))
	for i, d := range s.in[:n] {
		d.Data = append(ds[i].Data[:0], d.Data...)
		ds[i] = d
	}
	if s.in = s.in[n:]; len(s.in) == 0 {
		unix.Read(s.fd, make([]byte, 8))
	}
	return n, nil
}

func (s *inlet) WriteBatch(ds []flow.Datagram) (int, error) {
	for _, d := range ds {
		s.replies <- fmt.Sprintf("%s > %s: %s", d.Src, d.Dst, d.Data)
	}
	return len(ds), nil
}

func (s *inlet) Control(f func(fd int) error) error { return f(s.fd) }

func (s *inlet) ReadBatch([]flow.Datagram) (int, error) { return 0, errors.New("not for a loop") }

func (s *inlet) Close() error { return nil }

// startUDPEcho answers datagrams from the address that they came to, at some of
// 127.20.0.0/16, and returns the port.
func startUDPEcho(t testing.TB) (port uint16) {
	t.Helper()
	for i := range 4 {
		c, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 20, 0, byte(1+i)), Port: int(port)})
		if err != nil {
			t.Fatal(err)
		}
		port = c.LocalAddr().(*net.UDPAddr).AddrPort().Port()
		done := make(chan struct{})
		go func() {
			defer close(done)
			b := make([]byte, 1<<16)
			for {
				n, from, err := c.ReadFromUDPAddrPort(b)
				if err != nil {
					return
				}
				c.WriteToUDPAddrPort(b[:n], from)
			}
		}()
		t.Cleanup(func() { c.Close(); <-done })
	}
	return port
}
