package relay

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"
)

// The protocol of TestFlows: the client sends a header that says what the
// server is to do, then both send a random stream and its SHA-256, each ending
// with a half-close, in the order that the header says.
type flowPlan struct {
	Seed     uint64
	Up, Down uint32 // bytes of payload
	Order    uint8  // who sends first
	Slow     uint8  // who reads slowly: bit 0 the client, bit 1 the server
}

const (
	both = iota
	clientFirst
	serverFirst
	orders
)

func randomPlan(r *rand.Rand) flowPlan {
	// As many sizes below 1 KiB as above, up to 4 MiB.
	size := func() uint32 { return r.Uint32N(1 << r.IntN(23)) }
	return flowPlan{Seed: r.Uint64(), Up: size(), Down: size(), Order: uint8(r.IntN(orders)), Slow: uint8(r.IntN(8)) & 3}
}

// sendStream writes n random bytes in random portions, their sum, and a FIN.
func sendStream(c *net.TCPConn, seed uint64, n uint32) error {
	src := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16), byte(seed >> 24)})
	sum := sha256.New()
	w := io.MultiWriter(c, sum)
	buf := make([]byte, 64<<10)
	for n > 0 {
		b := buf[:min(n, 1+uint32(src.Uint64()%uint64(len(buf))))]
		src.Read(b)
		if _, err := w.Write(b); err != nil {
			return err
		}
		n -= uint32(len(b))
	}
	if _, err := c.Write(sum.Sum(nil)); err != nil {
		return err
	}
	return c.CloseWrite()
}

// receiveStream reads to the FIN and checks the length and the sum.
func receiveStream(c *net.TCPConn, n uint32, slow bool) error {
	sum := sha256.New()
	left := int64(n)
	buf := make([]byte, 128<<10)
	for left > 0 {
		b := buf[:min(left, int64(len(buf)))]
		if slow {
			time.Sleep(time.Duration(rand.IntN(3)) * time.Millisecond)
			b = b[:min(len(b), 1+rand.IntN(32<<10))]
		}
		k, err := c.Read(b)
		sum.Write(b[:k])
		left -= int64(k)
		if err != nil {
			return fmt.Errorf("%d bytes missing: %w", left, err)
		}
	}
	got := make([]byte, sha256.Size)
	if _, err := io.ReadFull(c, got); err != nil {
		return fmt.Errorf("sum: %w", err)
	}
	if string(got) != string(sum.Sum(nil)) {
		return errors.New("the bytes are not those sent")
	}
	if k, err := c.Read(buf); k != 0 || err != io.EOF {
		return fmt.Errorf("%d bytes, %v where the end should be", k, err)
	}
	return nil
}

// exchange plays one side of a plan.
func (p flowPlan) exchange(c *net.TCPConn, isServer bool) error {
	c.SetDeadline(time.Now().Add(60 * time.Second))
	out, in := p.Up, p.Down
	first := p.Order == clientFirst
	slow := p.Slow&1 != 0
	if isServer {
		out, in = in, out
		first = p.Order == serverFirst
		slow = p.Slow&2 != 0
	}
	send := func() error { return sendStream(c, p.Seed, out) }
	receive := func() error { return receiveStream(c, in, slow) }
	switch {
	case p.Order == both:
		errs := make(chan error, 1)
		go func() { errs <- send() }()
		return errors.Join(receive(), <-errs)
	case first:
		return errors.Join(send(), receive())
	}
	return errors.Join(receive(), send())
}

func planServer(t testing.TB) string {
	return serve(t, func(k net.Conn) {
		c := k.(*net.TCPConn)
		var p flowPlan
		if err := binary.Read(c, binary.BigEndian, &p); err != nil {
			t.Errorf("server: plan: %v", err)
			return
		}
		if err := p.exchange(c, true); err != nil {
			t.Errorf("server: %+v: %v", p, err)
		}
	})
}

// runPlans has n flows at once, and wants each to end well and to count right.
func runPlans(t *testing.T, r *rig, n int) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	var up, down uint64
	var wg sync.WaitGroup
	for range n {
		p := randomPlan(rnd)
		up += uint64(binary.Size(p)) + uint64(p.Up) + sha256.Size
		down += uint64(p.Down) + sha256.Size
		wg.Go(func() {
			k, err := net.Dial("tcp", r.addr)
			if err != nil {
				t.Error(err)
				return
			}
			defer k.Close()
			if err := binary.Write(k, binary.BigEndian, p); err != nil {
				t.Error(err)
				return
			}
			if err := p.exchange(k.(*net.TCPConn), false); err != nil {
				t.Errorf("client: %+v: %v", p, err)
			}
		})
	}
	wg.Wait()
	for range n {
		x := r.result(t)
		if x.Cause != Ended || x.Err != nil {
			t.Errorf("%+v", x)
		}
		up -= x.Up
		down -= x.Down
	}
	if up != 0 || down != 0 {
		t.Errorf("counted %d up and %d down too few", int64(up), int64(down))
	}
}

func TestFlows(t *testing.T) {
	for _, tt := range []struct {
		name string
		o    Options
		with func(*Engine)
	}{
		{name: "default"},
		{name: "one loop", o: Options{Loops: 1}},
		{name: "small pipes", o: Options{PipeSize: 4096}},
		{name: "two pipes", o: Options{MaxPipes: 2}},
		{name: "no pipe", with: noPipes},
		{name: "no pipe, and nothing may be kept", with: func(e *Engine) { noPipes(e); e.spilled.Store(spillMax) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := newRig(t, tt.o, JoinOptions{Idle: time.Minute, HalfClosed: 30 * time.Second}, planServer(t))
			if tt.with != nil {
				tt.with(r.e)
			}
			kept := r.e.spilled.Load()
			runPlans(t, r, 200)
			eventually(t, "nothing is kept after all has ended", func() bool { return r.e.spilled.Load() == kept })
			t.Logf("%+v", r.e.Stats())
		})
	}
}

// noPipes is the worst shortage.
func noPipes(e *Engine) {
	e.pipes.mu.Lock()
	defer e.pipes.mu.Unlock()
	e.pipes.max = 0
}
