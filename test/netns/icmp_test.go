package netns_test

import (
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"strings"
	"testing"
	"time"
)

// ping sends one echo request from the host and waits for the reply or an
// error that the kernel was told by ICMP.
func (h *host) ping(a netip.Addr) error {
	network, request, reply := "ip4:icmp", byte(8), byte(0)
	if a.Is6() {
		network, request, reply = "ip6:ipv6-icmp", 128, 129
	}
	return h.in(func() error {
		c, err := net.Dial(network, a.String())
		if err != nil {
			return err
		}
		defer c.Close()
		msg := []byte{request, 0, 0, 0, 0x74, 0x70, 0, 1, 'p', 'i', 'n', 'g'}
		if a.Is4() { // IPv6's checksum is the kernel's business
			binary.BigEndian.PutUint16(msg[2:], checksum(msg))
		}
		c.SetDeadline(time.Now().Add(3 * time.Second))
		if _, err := c.Write(msg); err != nil {
			return err
		}
		buf := make([]byte, 1500)
		for {
			n, err := c.Read(buf)
			if err != nil {
				return err
			}
			got := buf[:n]
			if a.Is4() && n >= 20 { // a raw IPv4 socket gives the IP header, too
				got = got[min(n, int(got[0]&15)*4):]
			}
			if len(got) > 0 && got[0] == reply {
				return nil
			}
		}
	})
}

// TestManyRefusals: with the sysctls that are installed, as many datagrams as a
// host has are refused at once. By itself the kernel tells it of one a second.
func TestManyRefusals(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.gateway.sysctl(t, "net.ipv4.icmp_ratelimit", "1000")
	w.gateway.sysctl(t, "net.ipv6.icmp.ratelimit", "1000")
	b, err := os.ReadFile("../../deploy/90-tproxyd.conf")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if key, value, ok := strings.Cut(strings.TrimSpace(line), " = "); ok && strings.Contains(key, "icmp") {
			w.gateway.sysctl(t, key, value)
		}
	}
	d := newDaemon(t, w.gateway, settings{routes: "SOCKD5 @=198.51.100.11 *\n"})
	d.cli(t, "close", "-c", d.config).ok(t)
	for _, to := range []string{insideNS + ":53", "[" + outsideAt6 + "]:443"} {
		for range 100 {
			err := w.client.in(func() error {
				c, err := net.Dial("udp", to)
				if err != nil {
					return err
				}
				defer c.Close()
				c.SetDeadline(time.Now().Add(3 * time.Second))
				c.Write([]byte("question"))
				_, err = c.Read(make([]byte, 100))
				return err
			})
			if err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
				t.Fatalf("%s: %v, want a refusal", to, err)
			}
		}
	}
}

// checksum is the Internet's, RFC 1071.
func checksum(b []byte) uint16 {
	var sum uint32
	for i := 0; i+1 < len(b); i += 2 {
		sum += uint32(binary.BigEndian.Uint16(b[i:]))
	}
	for sum>>16 != 0 {
		sum = sum>>16 + sum&0xffff
	}
	return ^uint16(sum)
}

// atOnceLimit is what "at once" takes at most, on a busy machine too: longer than the
// second until an IPv6 socket that tries twice hears of a prohibition, and less than
// the three seconds until one that hears nothing tries for the third time.
const atOnceLimit = 2500 * time.Millisecond

// atOnce fails the test unless err is a refusal that came at once.
func atOnce(t testing.TB, what string, began time.Time, err error) {
	t.Helper()
	took := time.Since(began)
	switch {
	case err == nil:
		t.Errorf("%s: got through", what)
	case errors.Is(err, os.ErrDeadlineExceeded):
		t.Errorf("%s: no answer at all", what)
	case took > atOnceLimit:
		t.Errorf("%s: refused only after %v: %v", what, took, err)
	}
}
