package netns_test

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"
)

// Topology: world. Flows of the client through the gateway and danted, which
// carries half-closes, to a service of the outside whose half of the work is
// known to both sides from the number of the flow:
//
//	client <==up, down==> gateway <====> danted <====> outside:7000

// script is what the two ends of one flow do. Each side sends its bytes, ends
// its direction, and reads the other direction to the end.
type script struct {
	id                   uint64
	up, down             int
	upDelay, downDelay   time.Duration // before the first byte
	upLinger, downLinger time.Duration // between the last byte and the FIN
	upSlow, downSlow     bool          // the reader of the direction dawdles
}

func newScript(id uint64) script {
	r := rand.New(rand.NewPCG(id, 7))
	delay := func() time.Duration { return time.Duration(r.IntN(4)*r.IntN(100)) * time.Millisecond }
	size := func() int { return []int{0, r.IntN(100), r.IntN(64 << 10), r.IntN(2 << 20)}[r.IntN(4)] }
	return script{id, size(), size(), delay(), delay(), delay(), delay(), r.IntN(5) == 0, r.IntN(5) == 0}
}

// data returns the bytes of a direction.
func (s script) data(direction uint64, n int) []byte {
	r := rand.NewChaCha8([32]byte(binary.LittleEndian.AppendUint64(make([]byte, 24), s.id*2+direction)))
	b := make([]byte, n)
	r.Read(b)
	return b
}

// play does one side of the script: send, end, read to the end, compare.
func (s script) play(c *net.TCPConn, send, want []byte, delay, linger time.Duration, slow bool) error {
	c.SetDeadline(time.Now().Add(60 * time.Second))
	sent := make(chan error, 1)
	go func() {
		time.Sleep(delay)
		if _, err := c.Write(send); err != nil {
			sent <- fmt.Errorf("write: %w", err)
			return
		}
		time.Sleep(linger)
		sent <- c.CloseWrite()
	}()
	h := sha256.New()
	buf := make([]byte, 64<<10)
	var n int64
	for {
		if slow {
			time.Sleep(time.Millisecond)
		}
		m, err := c.Read(buf[:map[bool]int{true: 8 << 10, false: len(buf)}[slow]])
		h.Write(buf[:m])
		n += int64(m)
		if err == io.EOF {
			break
		}
		if err != nil {
			return fmt.Errorf("read after %d of %d bytes: %w", n, len(want), err)
		}
	}
	if err := <-sent; err != nil {
		return err
	}
	if [32]byte(h.Sum(nil)) != sha256.Sum256(want) {
		return fmt.Errorf("%d bytes came, not the %d that were sent", n, len(want))
	}
	return nil
}

func TestRelayCorrectness(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.dante(t)
	serve(t, w.gateway, settings{routes: "BALANCE\nSOCKD5 @=198.51.100.11,198.51.100.12 *\n"})
	const flows = 200

	results := make(chan error, 2*flows)
	for _, a := range []string{outsideAt, outsideAt6} {
		l := w.outside.listen(t, "tcp", net.JoinHostPort(a, "7000"))
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				go func() {
					defer c.Close()
					var id [8]byte
					c.SetDeadline(time.Now().Add(60 * time.Second))
					if _, err := io.ReadFull(c, id[:]); err != nil {
						results <- fmt.Errorf("outside: no number: %w", err)
						return
					}
					s := newScript(binary.LittleEndian.Uint64(id[:]))
					err := s.play(c.(*net.TCPConn), s.data(1, s.down), s.data(0, s.up), s.downDelay, s.downLinger, s.upSlow)
					if err != nil {
						err = fmt.Errorf("flow %d at the outside: %w", s.id, err)
					}
					results <- err
				}()
			}
		}()
	}
	var wg sync.WaitGroup
	for id := range uint64(flows) {
		wg.Go(func() {
			s := newScript(id)
			to := net.JoinHostPort([]string{outsideAt, outsideAt6}[id%2], "7000")
			c, err := w.client.dial("tcp", to, 20*time.Second)
			if err == nil {
				defer c.Close()
				var number [8]byte
				binary.LittleEndian.PutUint64(number[:], id)
				c.Write(number[:])
				err = s.play(c.(*net.TCPConn), s.data(0, s.up), s.data(1, s.down), s.upDelay, s.upLinger, s.downSlow)
			}
			if err != nil {
				err = fmt.Errorf("flow %d at the client: %w", id, err)
			}
			results <- err
		})
	}
	wg.Wait()
	for range 2 * flows {
		select {
		case err := <-results:
			if err != nil {
				t.Error(err)
			}
		case <-time.After(30 * time.Second):
			t.Fatal("not every flow has a result at both ends")
		}
	}
}

// TestStalledReader: a reader that stops makes the sender stop, whichever side
// it is, and the memory in between is bounded.
func TestStalledReader(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.dante(t)
	// The kernel's buffers are not what is tested: let them stay small.
	for _, h := range []*host{w.client, w.gateway, w.socks1, w.outside} {
		h.sysctl(t, "net.ipv4.tcp_rmem", "4096 131072 1048576")
		h.sysctl(t, "net.ipv4.tcp_wmem", "4096 131072 1048576")
	}
	d := serve(t, w.gateway, settings{routes: "SOCKD5 @=198.51.100.11 *\n"})
	l := w.outside.listen(t, "tcp", outsideAt+":7000")
	before := d.memory(t)
	for i := range 4 {
		client, err := w.client.dial("tcp", outsideAt+":7000", 10*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		server, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer server.Close()
		what, sender := "client", client
		if i%2 == 1 {
			what, sender = "server", server
		}
		block := make([]byte, 256<<10)
		var total int
		for {
			sender.SetWriteDeadline(time.Now().Add(2 * time.Second))
			n, err := sender.Write(block)
			total += n
			if errors.Is(err, os.ErrDeadlineExceeded) {
				break
			}
			if err != nil {
				t.Fatal(err)
			}
			if total > 16<<20 {
				t.Fatalf("%d MB were accepted for a reader that does not read", total>>20)
			}
		}
		t.Logf("%d KB in flight when the %s was stopped", total>>10, what)
	}
	if after := d.memory(t); after > before+32<<20 {
		t.Errorf("the daemon grew from %d to %d KB", before>>10, after>>10)
	}
}

// memory returns the daemon's resident bytes.
func (d *daemon) memory(t testing.TB) (bytes int) {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", d.pid()))
	if err != nil {
		t.Fatal(err)
	}
	if _, rest, ok := strings.Cut(string(status), "VmRSS:"); ok {
		fmt.Sscan(rest, &bytes)
	}
	return bytes << 10
}
