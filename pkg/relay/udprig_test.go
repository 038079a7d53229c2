package relay

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

// udpRig is a UDP between an injector and a relayServer.
//
//	injector -> loop -> outlet (127.0.0.1) -> server
//	         <-      <-                    <-
type udpRig struct {
	*UDP
	t      testing.TB
	src    *injector
	server *relayServer

	refused chan string // "client > dst: text, kind"
	tooBig  chan string // "client > dst: length, mtu"
	ended   chan SessionResult
	opens   chan any // first, for each call of Way.Open
	endings atomic.Int64

	mu       sync.Mutex
	names    map[netip.Addr]string // of addresses that have one
	verdict  func(v *Verdict, client, dst netip.AddrPort)
	open     func(ctx context.Context, o *Outlet) error // after the socket was made; nil: nothing
	decided  int
	released int
	fds      int // of the process before
	routines int
	engine   *Engine // of control connections; nil: there are none
}

// newUDPRig starts a UDP whose clock stands still, but for tick. When the test
// ends it must have let go of everything.
func newUDPRig(t testing.TB, o UDPOptions) *udpRig {
	t.Helper()
	r := &udpRig{
		t:       t,
		src:     newInjector(t),
		server:  newRelayServer(t, "127.0.0.1:0"),
		refused: make(chan string, many),
		tooBig:  make(chan string, many),
		ended:   make(chan SessionResult, many),
		opens:   make(chan any, many),
		names:   map[netip.Addr]string{},
		fds:     openFDs(t), routines: runtime.NumGoroutine(),
	}
	if o.Sources == nil {
		o.Sources = [][]flow.PacketSource{{r.src}}
	}
	o.Decide = r.decide
	if o.Header == nil {
		o.Header = parseHeader
	}
	if o.FlowSocket == nil {
		o.FlowSocket = func(_, _ netip.AddrPort) (int, error) { return -1, errors.New("no own socket") }
	}
	o.Refuse = func(d flow.Datagram, why Refusal) {
		offer(r.refused, fmt.Sprintf("%s > %s: %s, %d", d.Src, d.Dst, d.Data, why))
	}
	o.TooBig = func(d flow.Datagram, mtu int) {
		r.tooBig <- fmt.Sprintf("%s > %s: %d, %d", d.Src, d.Dst, len(d.Data), mtu)
	}
	o.Done = func(x SessionResult) {
		r.endings.Add(1)
		offer(r.ended, x)
	}
	if o.tick == 0 {
		o.tick = time.Hour
	}
	var err error
	if r.UDP, err = NewUDP(o); err != nil {
		t.Fatal(err)
	}
	r.SetLimits(1000*o.tick, 1000*o.tick)
	t.Cleanup(r.close)
	return r
}

// close ends the UDP and wants nothing to be left of it.
func (r *udpRig) close() {
	r.t.Helper()
	if r.ctx.Err() != nil {
		return
	}
	r.check()
	if err := r.Close(); err != nil {
		r.t.Error(err)
	}
	if s := r.Stats(); s.Sessions != 0 || s.Flows != 0 || s.Outlets != 0 || s.Sockets != 0 || r.queued.Load() != 0 {
		r.t.Errorf("after Close: %+v, %d bytes in queues", s, r.queued.Load())
	}
	if r.decided != r.released {
		r.t.Errorf("%d verdicts, %d released", r.decided, r.released)
	}
	if r.engine != nil {
		if n := r.engine.Stats().Conns; n != 0 {
			r.t.Errorf("%d control connections are left", n)
		}
		return // the far ends are the test's
	}
	eventually(r.t, "descriptors and goroutines as before", func() bool {
		return openFDs(r.t) <= r.fds && runtime.NumGoroutine() <= r.routines
	})
}

func (r *udpRig) decide(client, dst netip.AddrPort, _ int) Verdict {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.decided++
	v := Verdict{
		Header:  header(dst),
		Way:     &Way{Key: "list", Open: r.openOutlet, Refusal: refusalOfTest},
		Release: func() { r.mu.Lock(); r.released++; r.mu.Unlock() },
	}
	if name := r.names[dst.Addr()]; name != "" {
		v.Header, v.Named = nameHeader(name, dst.Port()), true
	}
	if r.verdict != nil {
		r.verdict(&v, client, dst)
	}
	return v
}

// failure is an error of Way.Open that says how the client is refused.
type failure Refusal

func (f failure) Error() string { return "refused" }

func refusalOfTest(err error) Refusal {
	var f failure
	if errors.As(err, &f) {
		return Refusal(f)
	}
	return RefusePort
}

func (r *udpRig) openOutlet(ctx context.Context, first any) (Outlet, error) {
	r.mu.Lock()
	open := r.open // before the test hears of it, which may change it then
	r.mu.Unlock()
	offer(r.opens, first)
	o, err := outletTo(r.server.addr)
	if err != nil {
		return o, err
	}
	if open != nil {
		if err := open(ctx, &o); err != nil {
			o.Socket.Close()
			return Outlet{}, err
		}
	}
	return o, nil
}

// outletTo makes an outlet that leads there.
func outletTo(to netip.AddrPort) (Outlet, error) {
	local := netip.IPv4Unspecified()
	if to.Addr().Is6() {
		local = netip.IPv6Unspecified()
	}
	p, err := NewPacket(local, nil)
	if err != nil {
		return Outlet{}, err
	}
	if err := p.Connect(to); err != nil {
		p.Close()
		return Outlet{}, err
	}
	return Outlet{Socket: p, Via: "server"}, nil
}

// decides sets what becomes of flows from now on.
func (r *udpRig) decides(f func(v *Verdict, client, dst netip.AddrPort)) {
	r.mu.Lock()
	r.verdict = f
	r.mu.Unlock()
}

// opensBy sets what Way.Open does from now on.
func (r *udpRig) opensBy(f func(ctx context.Context, o *Outlet) error) {
	r.mu.Lock()
	r.open = f
	r.mu.Unlock()
}

func datagram(client, dst, text string) flow.Datagram {
	return flow.Datagram{Data: []byte(text), Src: netip.MustParseAddrPort(client), Dst: netip.MustParseAddrPort(dst), IfIndex: 7}
}

// send has a client send to dst, each text in a datagram of its own.
func (r *udpRig) send(client, dst string, texts ...string) {
	var ds []flow.Datagram
	for _, text := range texts {
		ds = append(ds, datagram(client, dst, text))
	}
	r.src.put(ds...)
}

// carries has a client send to dst and wants it at the server.
func (r *udpRig) carries(client, dst, text string) (outlet netip.AddrPort) {
	r.t.Helper()
	r.send(client, dst, text)
	return r.server.expect(dst, text)
}

// exchange has a client ask dst and be answered, and returns the outlet.
func (r *udpRig) exchange(client, dst string) (outlet netip.AddrPort) {
	r.t.Helper()
	outlet = r.carries(client, dst, "question")
	r.server.answer(outlet, header(netip.MustParseAddrPort(dst)), "answer")
	r.reply("%s > %s: answer", dst, client)
	return outlet
}

// reply wants a reply by the raw sender.
func (r *udpRig) reply(format string, args ...any) {
	r.t.Helper()
	want(r.t, r.src.replies, fmt.Sprintf(format, args...))
}

// refuses wants a refusal.
func (r *udpRig) refuses(format string, args ...any) {
	r.t.Helper()
	want(r.t, r.refused, fmt.Sprintf(format, args...))
}

// want waits for something and wants it to be x.
func want[T comparable](t testing.TB, c <-chan T, x T) {
	t.Helper()
	select {
	case got := <-c:
		if got != x {
			t.Fatalf("got %v, want %v", got, x)
		}
	case <-time.After(10 * time.Second):
		t.Fatalf("%v has not come", x)
	}
}

// none wants nothing to be there.
func none[T any](t testing.TB, c <-chan T) {
	t.Helper()
	select {
	case got := <-c:
		t.Fatalf("%v has come too", got)
	default:
	}
}

// inside runs f on each loop, after what has come until now.
func (r *udpRig) inside(f func(sh *shard)) {
	r.t.Helper()
	for _, sh := range r.shards {
		done := make(chan struct{})
		if !sh.post(func() { f(sh); close(done) }) {
			r.t.Fatal("the loop has ended")
		}
		<-done
	}
}

// settle returns when the loops have served what has come until now.
func (r *udpRig) settle() {
	r.t.Helper()
	for range 3 { // an event, what it posted, the clock and Invalidate
		r.inside(func(*shard) {})
	}
}

// tick has n ticks go by.
func (r *udpRig) tick(n int) {
	r.t.Helper()
	for range n {
		r.now.Add(1)
		r.settle()
	}
}

// check wants what the loops hold to agree with itself and with the counters.
func (r *udpRig) check() {
	r.t.Helper()
	var total tally
	counted, goOn := make(chan tally), make(chan struct{})
	for _, sh := range r.shards {
		sh.post(func() {
			t, err := tallyOf(sh)
			if err != nil {
				r.t.Error(err)
			}
			counted <- t
			<-goOn
		})
	}
	for range r.shards {
		total.add(<-counted)
	}
	if err := total.agrees(r.UDP); err != nil {
		r.t.Error(err)
	}
	close(goOn)
}

// controls gives each outlet a control connection from now on, and returns the
// far ends of them.
func (r *udpRig) controls() <-chan *net.TCPConn {
	r.t.Helper()
	e, err := New(Options{Loops: 1})
	if err != nil {
		r.t.Fatal(err)
	}
	addr, far := accepted(r.t)
	r.engine = e
	r.opensBy(func(ctx context.Context, o *Outlet) error {
		c, err := e.Dial(ctx, DialOptions{}, netip.MustParseAddrPort(addr))
		if err == nil {
			o.Control = append(o.Control, c)
		}
		return err
	})
	r.t.Cleanup(func() { r.close(); e.Close() })
	return far
}

// held returns what has Way.Open wait until the test lets it.
func held(let <-chan error) func(context.Context, *Outlet) error {
	return func(ctx context.Context, _ *Outlet) error {
		select {
		case err := <-let:
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
