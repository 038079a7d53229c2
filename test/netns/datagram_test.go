package netns_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// roomy gives a socket buffers for some of the largest datagrams.
func roomy(c *net.UDPConn) {
	c.SetReadBuffer(4 << 20)
	c.SetWriteBuffer(4 << 20)
}

// answerUDP answers each datagram that comes to an address and port of the
// host with what answer makes of it; nil is no answer.
func (h *host) answerUDP(t testing.TB, at string, answer func(b []byte, from netip.AddrPort) []byte) *net.UDPConn {
	t.Helper()
	c := h.listenPacket(t, "udp", at).(*net.UDPConn)
	roomy(c)
	go func() {
		buf := make([]byte, 1<<16)
		for {
			n, from, err := c.ReadFromUDPAddrPort(buf)
			if errors.Is(err, net.ErrClosed) {
				return
			}
			if err != nil {
				continue // an ICMP error about an earlier answer
			}
			if b := answer(buf[:n], netip.AddrPortFrom(from.Addr().Unmap(), from.Port())); b != nil {
				c.WriteToUDPAddrPort(b, from)
			}
		}
	}()
	return c
}

// echoUDP sends datagrams back as they are.
func echoUDP(b []byte, _ netip.AddrPort) []byte { return b }

// whoUDP answers with the address and port that a datagram came from.
func whoUDP(_ []byte, from netip.AddrPort) []byte { return []byte(from.String()) }

// udpServices is where the far side answers: port 7 with what it was sent, and
// ports 1111 and 2222 with whom they saw.
func (h *host) udpServices(t testing.TB, addrs ...string) {
	t.Helper()
	for _, a := range addrs {
		h.answerUDP(t, net.JoinHostPort(a, "7"), echoUDP)
		h.answerUDP(t, net.JoinHostPort(a, "1111"), whoUDP)
		h.answerUDP(t, net.JoinHostPort(a, "2222"), whoUDP)
	}
}

// socket opens an unconnected UDP socket on the host, of the family of an
// address.
func (h *host) socket(t testing.TB, like string) *net.UDPConn {
	t.Helper()
	network := "udp6"
	if netip.MustParseAddr(like).Is4() {
		network = "udp4"
	}
	c := h.listenPacket(t, network, ":0").(*net.UDPConn)
	roomy(c)
	return c
}

// connected opens a UDP socket on the host that is connected to an address and
// port: it hears nobody else, and learns of ICMP errors.
func (h *host) connected(t testing.TB, to string) *net.UDPConn {
	t.Helper()
	c, err := h.dial("udp", to, time.Second)
	h.must(t, err)
	t.Cleanup(func() { c.Close() })
	roomy(c.(*net.UDPConn))
	return c.(*net.UDPConn)
}

// say sends b from a connected socket and returns what comes back within the
// limit; once, so that a lost datagram is seen.
func say(c *net.UDPConn, b []byte, limit time.Duration) ([]byte, error) {
	c.SetDeadline(time.Now().Add(limit))
	if _, err := c.Write(b); err != nil {
		return nil, err
	}
	return hear(c)
}

// hear returns the next datagram that comes.
func hear(c *net.UDPConn) ([]byte, error) {
	buf := make([]byte, 1<<16)
	n, err := c.Read(buf)
	return buf[:max(n, 0)], err
}

// sayTo is say from an unconnected socket; whoever answers must be to.
func sayTo(c *net.UDPConn, to netip.AddrPort, b []byte, limit time.Duration) ([]byte, error) {
	c.SetDeadline(time.Now().Add(limit))
	if _, err := c.WriteToUDPAddrPort(b, to); err != nil {
		return nil, err
	}
	buf := make([]byte, 1<<16)
	n, from, err := c.ReadFromUDPAddrPort(buf)
	if err == nil && netip.AddrPortFrom(from.Addr().Unmap(), from.Port()) != to {
		return nil, fmt.Errorf("%v answered in the place of %v", from, to)
	}
	return buf[:max(n, 0)], err
}

// echoed fails the test unless a datagram of n random bytes comes back. A path
// that it does not fit, behind a SOCKS header, may say so once, as any path.
func echoed(t testing.TB, c *net.UDPConn, n int) {
	t.Helper()
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rand.Uint32())
	}
	got, err := say(c, b, 5*time.Second)
	for errors.Is(err, syscall.EMSGSIZE) {
		got, err = hear(c)
	}
	if err != nil || !bytes.Equal(got, b) {
		t.Errorf("%v: %d bytes came back as %d: %v", c.RemoteAddr(), n, len(got), err)
	}
}

// refused says whether an error is what an ICMP error makes of a datagram, or
// EPERM, which a socket of the gateway sees already as it writes what the
// kernel denies.
func refused(err error) bool {
	return errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, syscall.EHOSTUNREACH) ||
		errors.Is(err, syscall.EACCES) || errors.Is(err, syscall.EPERM)
}

// forget takes the error that a socket would tell next, and tells that it was
// there: what is refused on its way out of the gateway itself is told twice, by
// EPERM and by the ICMP error.
func forget(t testing.TB, c *net.UDPConn) (told bool) {
	t.Helper()
	raw, err := c.SyscallConn()
	if err == nil {
		err = raw.Control(func(fd uintptr) {
			errno, _ := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
			told = errno != 0
		})
	}
	if err != nil {
		t.Fatal(err)
	}
	return told
}

// refusedAtOnce fails the test unless a datagram is answered with an ICMP error at
// once.
func refusedAtOnce(t testing.TB, what string, c *net.UDPConn) {
	t.Helper()
	began := time.Now()
	_, err := say(c, []byte("let me in"), 5*time.Second)
	took := time.Since(began)
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		t.Errorf("%s: no answer at all", what)
	case !refused(err):
		t.Errorf("%s: %v, want a refusal", what, err)
	case took > atOnceLimit:
		t.Errorf("%s: refused only after %v", what, took)
	case errors.Is(err, syscall.EPERM):
		eventually(t, atOnceLimit, what+": the ICMP error", func() bool { return forget(t, c) })
	}
}
