package netns_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"
)

// Topology: world, with a SOCKS server of our own in the place of socks1 that
// fails as it is told to; the gateway's disk and descriptors fail elsewhere:
//
//	client --> gateway --> faulty (socks1) --x

// startFaulty accepts on socks1 and hands each connection to serve.
func (w *world) startFaulty(t testing.TB, serve func(c *net.TCPConn)) {
	t.Helper()
	l := w.socks1.listen(t, "tcp", socks1At+":1080")
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go serve(c.(*net.TCPConn))
		}
	}()
}

// greet does the server's side of SOCKS5 up to the request, without
// authentication, and returns the request's bytes.
func greet(c net.Conn) ([]byte, error) {
	head := make([]byte, 2)
	if _, err := io.ReadFull(c, head); err != nil {
		return nil, err
	}
	if _, err := io.ReadFull(c, make([]byte, head[1])); err != nil {
		return nil, err
	}
	c.Write([]byte{5, 0})
	request := make([]byte, 300)
	n, err := io.ReadAtLeast(c, request, 7)
	if err != nil {
		return nil, err
	}
	size := map[byte]int{1: 10, 3: 7 + int(request[4]), 4: 22}[request[3]]
	if n < size {
		if _, err := io.ReadFull(c, request[n:size]); err != nil {
			return nil, err
		}
	}
	return request[:size], nil
}

// reply answers a request with a code of RFC 1928.
func reply(c net.Conn, code byte) { c.Write([]byte{5, code, 0, 1, 0, 0, 0, 0, 0, 0}) }

// reset closes a connection with RST.
func reset(c *net.TCPConn) {
	c.SetLinger(0)
	c.Close()
}

// firstByte connects to the outside through the gateway and returns what
// reading gives, and after how long.
func (w *world) firstByte(to string) (time.Duration, error) {
	began := time.Now()
	c, err := w.client.dial("tcp", to, 15*time.Second)
	if err != nil {
		return time.Since(began), err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(15 * time.Second))
	_, err = c.Read(make([]byte, 1))
	return time.Since(began), err
}

func TestSilentServers(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.startFaulty(t, func(c *net.TCPConn) { // says nothing, for ever
		io.Copy(io.Discard, c)
		c.Close()
	})
	w.socks2.nft(t, "table inet hole { chain in { type filter hook input priority 0; tcp dport 1080 drop; }; }")
	serve(t, w.gateway, settings{routes: `TIMEOUT connect=1s handshake=1s
SOCKD5 @=198.51.100.11 * 1
SOCKD5 @=198.51.100.12 * 2
SOCKD5 @=198.51.100.13 * 3
SOCKD5 @=198.51.100.11,198.51.100.12 * 4
`})
	for _, test := range []struct {
		port, what string
		limit      time.Duration
	}{
		{"1", "a server that says nothing", 2500 * time.Millisecond},
		{"2", "a server that drops packets", 2500 * time.Millisecond},
		{"3", "a server that does not exist", 5 * time.Second},
		{"4", "both", 5 * time.Second},
		{"5", "no rule", time.Second},
	} {
		for _, to := range []string{outsideAt, outsideAt6} {
			took, err := w.firstByte(net.JoinHostPort(to, test.port))
			if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.ECONNREFUSED) || took > test.limit {
				t.Errorf("%s: %v after %v, want a reset within %v", test.what, err, took.Round(time.Millisecond), test.limit)
			}
		}
	}
}

func TestRefusalsAndResets(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	clientReset := make(chan error, 1)
	w.startFaulty(t, func(c *net.TCPConn) {
		c.SetDeadline(time.Now().Add(20 * time.Second))
		request, err := greet(c)
		if err != nil {
			c.Close()
			return
		}
		port := int(request[len(request)-2])<<8 | int(request[len(request)-1])
		switch {
		case port < 100: // refused with this code, then closed by the client
			reply(c, byte(port))
			io.Copy(io.Discard, c)
		case port == 100: // a reset after some bytes
			reply(c, 0)
			c.Write([]byte("hello"))
			time.Sleep(200 * time.Millisecond)
			reset(c)
			return
		case port == 101: // waits for the client's reset
			reply(c, 0)
			_, err := io.Copy(io.Discard, c)
			clientReset <- err
		case port == 102: // garbage in place of a reply
			c.Write(bytes.Repeat([]byte{0x41}, 64))
			io.Copy(io.Discard, c)
		case port == 103: // closed in place of a reply
		case port == 104: // success, then closed without a byte
			reply(c, 0)
		}
		c.Close()
	})
	serve(t, w.gateway, settings{routes: "TIMEOUT connect=2s handshake=2s\nSOCKD5 @=198.51.100.11 *\n"})
	named := w.client.mustLookup(t, insideNS, "www.example.org", dns.TypeA).String()
	for _, to := range []string{outsideAt, outsideAt6, named} {
		for _, port := range []string{"1", "2", "3", "4", "5", "6", "7", "8", "99", "102", "103"} {
			took, err := w.firstByte(net.JoinHostPort(to, port))
			if !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.ECONNREFUSED) {
				t.Errorf("%s port %s: %v, want a reset", to, port, err)
			}
			if took > time.Second {
				t.Errorf("%s port %s: only after %v", to, port, took)
			}
		}
		if took, err := w.firstByte(net.JoinHostPort(to, "104")); err != io.EOF || took > time.Second {
			t.Errorf("%s: success and a close: %v after %v, want EOF", to, err, took)
		}
		c, err := w.client.dial("tcp", net.JoinHostPort(to, "100"), 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(5 * time.Second))
		hello := make([]byte, 5)
		if _, err := io.ReadFull(c, hello); err != nil || string(hello) != "hello" {
			t.Errorf("%s: before the reset: %q %v", to, hello, err)
		}
		if _, err := c.Read(hello); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%s: the far side's reset came as %v", to, err)
		}
		c.Close()

		c, err = w.client.dial("tcp", net.JoinHostPort(to, "101"), 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		c.Write([]byte("hello"))
		time.Sleep(200 * time.Millisecond)
		reset(c.(*net.TCPConn))
		select {
		case err := <-clientReset:
			if !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("%s: the client's reset came as %v", to, err)
			}
		case <-time.After(5 * time.Second):
			t.Errorf("%s: the client's reset did not come", to)
		}
	}
}

// TestFullDisk: with no room for its state the daemon answers on, and starts.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	startMicrosocks(t, w.socks1, socks1At+":1080")
	state := filepath.Join(w.gateway.dir, "small")
	w.gateway.must(t, os.Mkdir(state, 0o755))
	w.gateway.must(t, w.gateway.ns.Do(func() error { return unix.Mount("small", state, "tmpfs", 0, "size=64k") }))
	d := serve(t, w.gateway, settings{routes: "SOCKD5 @=198.51.100.11 *\n", state: state})
	const n = 6000
	count := func(when string) []netip.Addr {
		t.Helper()
		addrs := w.resolveMany(n, 2*time.Second, nil)
		for i, a := range addrs {
			if !a.IsValid() {
				t.Fatalf("%s: host-%d has no answer", when, i)
			}
		}
		return addrs
	}
	first := count("disk full")
	for i, a := range count("disk full, asked again") {
		if first[i] != a {
			t.Fatalf("host-%d was %v and is %v", i, first[i], a)
		}
	}
	if d.metric(t, "tproxyd_state_errors_total") == 0 {
		t.Error("the disk was not full: the test shows nothing")
	}
	if out := d.output(); !strings.Contains(out, "synthetic addresses are not kept on disk") {
		t.Errorf("the log says nothing of it:\n%s", out)
	}
	d.troubled(t, "not kept on disk")
	w.client.curl(t, "http://host-1.example.org/full").ok(t)
	d.process.kill()
	d.start(t)
	again := count("disk full, restarted")
	d.takeover(t) // what is not on disk goes along
	for i, a := range count("disk full, taken over") {
		if again[i] != a {
			t.Fatalf("host-%d was %v and is %v", i, again[i], a)
		}
	}
	w.gateway.must(t, w.gateway.ns.Do(func() error { return unix.Mount("small", state, "tmpfs", unix.MS_REMOUNT, "size=16m") }))
	eventually(t, 10*time.Second, "with room again it is on disk", func() bool {
		return !strings.Contains(d.cli(t, "status", "-c", d.config).ok(t).out, "not kept on disk")
	})
	w.client.curl(t, "http://host-2.example.org/full").ok(t)
	d.stop(t)
}

// TestPipesUsedUp: others of the daemon's user have all the pipes that it may have,
// and no byte is copied for that. Not parallel: it is everybody's share.
func TestPipesUsedUp(t *testing.T) {
	w := newWorld(t)
	startMicrosocks(t, w.socks1, socks1At+":1080")
	w.outside.answerTCP(t, outsideAt+":9", func(c *net.TCPConn) { io.Copy(io.Discard, c) })
	b, err := os.ReadFile("/proc/sys/fs/pipe-user-pages-soft")
	if err != nil {
		t.Fatal(err)
	}
	pages, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil {
		t.Fatal(err)
	}
	for size := 1 << 20; pages > 0; pages -= size / os.Getpagesize() {
		var fds [2]int
		if err := unix.Pipe2(fds[:], unix.O_CLOEXEC); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { unix.Close(fds[0]); unix.Close(fds[1]) })
		if _, err := unix.FcntlInt(uintptr(fds[0]), unix.F_SETPIPE_SZ, size); err != nil {
			t.Fatal(err)
		}
	}
	d := serve(t, w.gateway, settings{routes: "SOCKD5 @=198.51.100.11 *\n"})
	for range 3 * 32 { // each leaves bytes in a pipe, or may
		c, err := w.client.dial("tcp", outsideAt+":9", 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.CopyN(c, zeros{}, 2<<20); err != nil {
			t.Fatal(err)
		}
		c.(*net.TCPConn).SetLinger(0)
		c.Close()
	}
	eventually(t, 10*time.Second, "no flow is left", func() bool { return d.metric(t, "tproxyd_flows") == 0 })
	if n := d.metric(t, "tproxyd_relay_shortages_total"); n != 0 {
		t.Errorf("%v chunks were copied", n)
	}
	d.stop(t)
}

// TestDescriptors: out of descriptors, new flows are refused at once, those
// that run go on, and all is well when there is room again.
func TestDescriptors(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	startMicrosocks(t, w.socks1, socks1At+":1080")
	d := serve(t, w.gateway, settings{routes: "TIMEOUT connect=2s handshake=2s\nSOCKD5 @=198.51.100.11 *\n"})
	flows := w.startEchoes(t, 8)
	eventually(t, 10*time.Second, "the flows are carried", func() bool { return d.metric(t, "tproxyd_flows") == 8 })
	used, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", d.pid()))
	if err != nil {
		t.Fatal(err)
	}
	firstPipe := 3 // of those that the relay keeps
	for {
		to, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", d.pid(), firstPipe))
		if err != nil {
			t.Fatal(err)
		}
		if strings.HasPrefix(to, "pipe:") {
			break
		}
		firstPipe++
	}
	limit := func(n int) {
		t.Helper()
		var old unix.Rlimit
		if err := unix.Prlimit(d.pid(), unix.RLIMIT_NOFILE, nil, &old); err != nil {
			t.Fatal(err)
		}
		if err := unix.Prlimit(d.pid(), unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: uint64(n), Max: old.Max}, nil); err != nil {
			t.Fatal(err)
		}
	}
	limit(len(used) + 12)
	var open []net.Conn
	refused := 0
	for range 60 {
		began := time.Now()
		c, err := w.client.dial("tcp", outsideAt+":7", 5*time.Second)
		if err == nil {
			c.SetDeadline(time.Now().Add(5 * time.Second))
			if _, err = c.Write([]byte("x")); err == nil { // a reset is told once, to whoever asks first
				_, err = c.Read(make([]byte, 1))
			}
			if err == nil {
				open = append(open, c)
				continue
			}
			c.Close()
		}
		refused++
		if took := time.Since(began); took > 3*time.Second || !errors.Is(err, syscall.ECONNRESET) && !errors.Is(err, syscall.ECONNREFUSED) {
			t.Fatalf("out of descriptors a flow ended after %v with %v, want a reset", took, err)
		}
	}
	t.Logf("%d flows served, %d refused", len(open), refused)
	if refused == 0 {
		t.Error("the limit was not reached: the test shows nothing")
	}
	if out := d.cli(t, "serve", "--takeover", "-c", d.config); out.code != 1 { // there is no room for a second one's descriptors
		t.Errorf("taking over without descriptors: exit %d\n%s", out.code, out.err)
	}
	d.troubled(t, "want of descriptors")
	limit(d.descriptors(t))
	for range 2 { // then not one is left
		if c, err := w.client.dial("tcp", outsideNS+":53", time.Second); err == nil {
			open = append(open, c)
		}
	}
	for range 5 {
		began := time.Now()
		err := w.client.in(func() error {
			c := dns.Client{Net: "tcp", Timeout: 5 * time.Second}
			_, _, err := c.Exchange(new(dns.Msg).SetQuestion("www.example.org.", dns.TypeA), outsideNS+":53")
			return err
		})
		if took := time.Since(began); took > atOnceLimit { // answered, or turned away
			t.Errorf("a question over TCP ended after %v: %v", took, err)
		}
	}
	for _, c := range open {
		c.Close()
	}
	limit(firstPipe) // far fewer than it has, and giving up a pipe makes no room
	for range 5 {
		began := time.Now()
		atOnce(t, "fewer than none", began, w.get(netip.MustParseAddr(outsideAt)))
	}
	limit(10000)
	eventually(t, 5*time.Second, "new flows are served again", func() bool {
		return w.get(netip.MustParseAddr(outsideAt)) == nil
	})
	flows.finish(t)
}
