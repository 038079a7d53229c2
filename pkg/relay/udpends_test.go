package relay

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"

	"github.com/tproxyd/tproxyd/pkg/flow"
	"golang.org/x/sys/unix"
)

// injector is a source whose datagrams are the test's: what is put in comes to
// the loop, and what would leave by the raw sender comes out of replies.
type injector struct {
	fd      int // eventfd: something is in
	replies chan string

	mu   sync.Mutex
	in   []flow.Datagram
	fail error  // of the next TryReadBatch
	full bool   // WriteBatch has no room
	next func() // called by the loop before it takes what is in next
}

// many is how much is kept of what nobody looks at.
const many = 1024

func newInjector(t testing.TB) *injector {
	t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return &injector{fd: fd, replies: make(chan string, many)}
}

// put has datagrams come in, in one batch if there are 64 at most.
func (s *injector) put(ds ...flow.Datagram) {
	s.mu.Lock()
	s.in = append(s.in, ds...)
	unix.Write(s.fd, []byte{1, 0, 0, 0, 0, 0, 0, 0})
	s.mu.Unlock()
}

func (s *injector) TryReadBatch(ds []flow.Datagram) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.next != nil {
		s.next()
		s.next = nil
	}
	n := min(len(ds), len(s.in))
	for i, d := range s.in[:n] {
		d.Data = append(ds[i].Data[:0], d.Data...)
		ds[i] = d
	}
	if s.in = s.in[n:]; len(s.in) == 0 {
		var b [8]byte
		unix.Read(s.fd, b[:])
	}
	return n, s.fail
}

// hook has the loop call f when it takes the next datagrams: what f does comes
// to it before them.
func (s *injector) hook(f func()) {
	s.mu.Lock()
	s.next = f
	s.mu.Unlock()
}

func (s *injector) Control(f func(fd int) error) error { return f(s.fd) }

func (s *injector) ReadBatch([]flow.Datagram) (int, error) { return 0, errors.New("not for a loop") }

func (s *injector) Close() error { return nil }

// WriteBatch puts down each reply as "from > to: text".
func (s *injector) WriteBatch(ds []flow.Datagram) (int, error) {
	if s.full {
		return 0, nil
	}
	for _, d := range ds {
		offer(s.replies, fmt.Sprintf("%s > %s: %s", d.Src, d.Dst, d.Data))
	}
	return len(ds), nil
}

// offer sends unless nobody looks, as in a flood.
func offer[T any](c chan<- T, x T) {
	select {
	case c <- x:
	default:
	}
}

// The tests' header is a letter and an address of 16 bytes, or a letter, the
// length of a name and the name; then a port.

func header(to netip.AddrPort) []byte {
	a := to.Addr().As16()
	return binary.BigEndian.AppendUint16(append([]byte{'a'}, a[:]...), to.Port())
}

func nameHeader(name string, port uint16) []byte {
	return binary.BigEndian.AppendUint16(append([]byte{'n', byte(len(name))}, name...), port)
}

var errHeader = errors.New("no header")

func parseHeader(b []byte) (from netip.AddrPort, name []byte, n int, err error) {
	switch {
	case len(b) >= 19 && b[0] == 'a':
		n = 19
		from = netip.AddrPortFrom(netip.AddrFrom16([16]byte(b[1:])).Unmap(), binary.BigEndian.Uint16(b[17:]))
	case len(b) >= 2 && b[0] == 'n' && len(b) >= 4+int(b[1]):
		n = 4 + int(b[1])
		name = b[2 : n-2]
		from = netip.AddrPortFrom(netip.Addr{}, binary.BigEndian.Uint16(b[n-2:]))
	default:
		return from, nil, 0, errHeader
	}
	return from, name, n, nil
}

// relayServer is the far end of outlets.
type relayServer struct {
	*net.UDPConn
	t    testing.TB
	addr netip.AddrPort
}

func newRelayServer(t testing.TB, at string) *relayServer {
	t.Helper()
	c, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(netip.MustParseAddrPort(at)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	c.SetReadBuffer(4 << 20)
	return &relayServer{c, t, c.LocalAddr().(*net.UDPAddr).AddrPort()}
}

// next waits for a datagram: the outlet that it came from, its destination as
// the header says, what is behind.
func (s *relayServer) next() (outlet netip.AddrPort, to, text string) {
	s.t.Helper()
	b := make([]byte, 1<<16)
	s.SetReadDeadline(time.Now().Add(10 * time.Second))
	n, from, err := s.ReadFromUDPAddrPort(b)
	if err != nil {
		s.t.Fatal(err)
	}
	addr, name, k, err := parseHeader(b[:n])
	if err != nil {
		s.t.Fatalf("%q: %v", b[:n], err)
	}
	to = addr.String()
	if name != nil {
		to = fmt.Sprintf("%s:%d", name, addr.Port())
	}
	return from, to, string(b[k:n])
}

// expect waits for a datagram with such a destination and text.
func (s *relayServer) expect(to, text string) (outlet netip.AddrPort) {
	s.t.Helper()
	outlet, gotTo, got := s.next()
	if gotTo != to || got != text {
		s.t.Fatalf("the server got %.60q for %s, want %.60q for %s", got, gotTo, text, to)
	}
	return outlet
}

// answer sends to an outlet what somebody says, behind a header.
func (s *relayServer) answer(outlet netip.AddrPort, head []byte, text string) {
	s.t.Helper()
	if _, err := s.WriteToUDPAddrPort(append(head, text...), outlet); err != nil {
		s.t.Fatal(err)
	}
}
