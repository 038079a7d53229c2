package gateway_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/tproxyd/tproxyd/internal/gateway"
	"github.com/tproxyd/tproxyd/internal/socksserver"
	"github.com/tproxyd/tproxyd/pkg/fakedns"
	"github.com/tproxyd/tproxyd/pkg/flow"
	"github.com/tproxyd/tproxyd/pkg/relay"
	"github.com/tproxyd/tproxyd/pkg/routes"
	"github.com/tproxyd/tproxyd/pkg/socks"
	"github.com/tproxyd/tproxyd/pkg/upstream"
)

var (
	_ gateway.Names     = (*fakedns.Server)(nil)
	_ gateway.Connector = (*upstream.Pool)(nil)
)

// patience is how long a test waits for what must come.
const patience = 10 * time.Second

// The pool of the tests is part of the loopback network, so that a client can
// connect to a synthetic address without any rule in the kernel.
var pool = netip.MustParsePrefix("127.198.0.0/16")

const (
	realAt   = "127.20.0.1" // has no name
	secret   = "tr0ub4dor&3"
	username = "operator"
)

// lab is a gateway whose client side, resolver and DIRECT destinations are the
// test's; the engine, the SOCKS servers and the pool of servers are real.
//
//	client -> listener at dst -> engine -> gateway -+-> Dial (of the lab) -> echo
//	                                                +-> SOCKS server -----> echo
type lab struct {
	*gateway.Gateway
	t      testing.TB
	engine *relay.Engine
	echo   netip.AddrPort

	echoUDP netip.AddrPort
	names   *names
	opts    gateway.Options

	requests chan socksserver.Request
	log      *records

	interfaceError error       // in place of an interface
	program        string      // of this host's own flows
	programError   error       // in its place
	whoError       error       // in place of what is known of a client
	left           atomic.Bool // the clients are gone

	udp     socksserver.UDP // of servers that are started from now on
	servers []*socksserver.Server

	mu       sync.Mutex
	at       string                                              // where a server finds whatever it is asked for by TCP
	own      netip.Addr                                          // a listener of ours, whichever port
	resolve  func(context.Context, string) ([]netip.Addr, error) // nil: nothing is found
	dial     func(to netip.AddrPort) error                       // nil: every address answers
	dialled  []netip.Addr                                        // by the gateway itself
	admitted []gateway.Admission                                 // to the kernel
	handled  chan struct{}                                       // one for each Handle that came back
}

// newLab starts a gateway for rules in which S is the address of a SOCKS
// server with fault, and CLOSED one where nobody listens.
func newLab(t testing.TB, level slog.Level, fault socksserver.Fault, rules ...string) *lab {
	t.Helper()
	l := &lab{
		t:        t,
		names:    &names{owner: map[netip.Addr]string{}, pins: map[netip.Addr]int{}},
		requests: make(chan socksserver.Request, 16),
		log:      &records{flows: make(chan map[string]any, 16)},
		handled:  make(chan struct{}, 16),
	}
	var err error
	if l.engine, err = relay.New(relay.Options{Loops: 1}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.engine.Close() })
	l.echo = startEcho(t)
	l.at = l.echo.String()
	pool := upstream.New(upstream.Options{
		Dial: func(ctx context.Context, _ upstream.Local, to netip.AddrPort) (net.Conn, error) {
			return l.dialEngine(ctx, to)
		},
		Packet: func(from upstream.Local) (upstream.PacketSocket, error) { return relay.NewPacket(from.Addr, nil) },
	}, nil)
	t.Cleanup(pool.Close)
	l.opts = gateway.Options{
		Names:    l.names,
		Upstream: pool,
		Engine:   l.engine,
		Dial:     l.dialDirect,
		DialUDP:  l.dialUDP,
		Resolve:  l.resolveName,
		Interface: func(_ *relay.Conn, wanted bool) (string, error) {
			if !wanted {
				return "", nil
			}
			return "lan0", l.interfaceError
		},
		Entered: func(i int) (string, error) {
			return map[int]string{1: "lan0", 2: "guest"}[i], l.interfaceError
		},
		Gone:  func(*relay.Conn) bool { return l.left.Load() },
		Index: func(i int) string { return map[int]string{1: "lan0", 2: "guest"}[i] },
		Who: func(f *flow.Flow) error {
			if f.Mark = 5; f.InIf == "" {
				f.Owner = flow.Owner{Known: true, UID: uint32(f.Src.Port())}
			}
			return l.whoError
		},
		Program: func(f *flow.Flow, named []string) error {
			if slices.Contains(named, l.program) {
				f.Program = l.program
			}
			return l.programError
		},
		Own:   func(to netip.AddrPort) bool { return to.Addr() == l.own },
		Admit: l.admit,
		Log:   slog.New(slog.NewJSONHandler(l.log, &slog.HandlerOptions{Level: level})),
	}
	l.Gateway = gateway.New(l.plan(fault, rules...), l.opts)
	return l
}

// plan makes a plan of rules; each one gets its own SOCKS server.
func (l *lab) plan(fault socksserver.Fault, rules ...string) *gateway.Plan {
	l.t.Helper()
	text := strings.Join(rules, "\n")
	for word, at := range map[string]func() string{
		"$S": func() string { return l.startSocks(fault) }, "$CLOSED": func() string { return closedPort(l.t) },
	} {
		if strings.Contains(text, word) {
			text = strings.ReplaceAll(text, word, at())
		}
	}
	table, diags := routes.Parse("socks.cnf", strings.NewReader(text), routes.Options{})
	if diags.HasErrors() {
		l.t.Fatal(diags)
	}
	p, err := gateway.NewPlan(table, routes.LocalNames{}, func(name string) *socks.Auth {
		return map[string]*socks.Auth{"office": {Username: username, Password: secret}}[name]
	})
	if err != nil {
		l.t.Fatal(err)
	}
	return p
}

func (l *lab) startSocks(fault socksserver.Fault) string {
	ln := listen(l.t, "127.0.0.1:0")
	ctx, cancel := context.WithCancel(context.Background())
	s := &socksserver.Server{
		Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
			l.mu.Lock()
			at := l.at
			l.mu.Unlock()
			return (&net.Dialer{}).DialContext(ctx, network, at)
		},
		Resolve: func(string) (netip.Addr, error) { return netip.MustParseAddr(realAt), nil },
		OnRequest: func(r socksserver.Request) {
			select {
			case l.requests <- r:
			default: // nobody looks
			}
		},
		Fault: fault,
		UDP:   l.udp,
	}
	l.servers = append(l.servers, s)
	if fault.Close == socksserver.AtAuth {
		s.Auth = func(string, string) bool { return false }
	}
	done := make(chan struct{})
	go func() { defer close(done); s.Serve(ctx, ln) }()
	l.t.Cleanup(func() { cancel(); <-done })
	return ln.Addr().String()
}

func (l *lab) dialEngine(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	c, err := l.engine.Dial(ctx, relay.DialOptions{}, to)
	if err != nil {
		return nil, err
	}
	return c, nil
}

// dialDirect stands for the network: whatever answers is the echo.
func (l *lab) dialDirect(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	l.mu.Lock()
	l.dialled = append(l.dialled, to.Addr())
	dial := l.dial
	l.mu.Unlock()
	if dial != nil {
		if err := dial(to); err != nil {
			return nil, err
		}
	}
	return l.dialEngine(ctx, l.echo)
}

// dialUDP goes where it is told on this host, else to the echo.
func (l *lab) dialUDP(to netip.AddrPort) (*relay.Packet, error) {
	l.mu.Lock()
	l.dialled = append(l.dialled, to.Addr())
	dial := l.dial
	l.mu.Unlock()
	if dial != nil {
		if err := dial(to); err != nil {
			return nil, err
		}
	}
	if !to.Addr().IsLoopback() {
		to = l.echoUDP
	}
	p, err := relay.NewPacket(netip.IPv4Unspecified(), nil)
	if err != nil {
		return nil, err
	}
	return p, p.Connect(to)
}

func (l *lab) resolveName(ctx context.Context, name string) ([]netip.Addr, error) {
	if l.resolve == nil {
		return nil, errors.New("no such name")
	}
	return l.resolve(ctx, name)
}

func (l *lab) admit(list []gateway.Admission) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.admitted = append(l.admitted, list...)
	return nil
}

func (l *lab) dials() []netip.Addr {
	l.mu.Lock()
	defer l.mu.Unlock()
	return slices.Clone(l.dialled)
}

// connect is a client that connects to dst; the port is any.
func (l *lab) connect(dst string) *net.TCPConn {
	l.t.Helper()
	ln := listen(l.t, net.JoinHostPort(dst, "0")).(*net.TCPListener)
	ctx, cancel := context.WithCancel(context.Background())
	served, connected := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(served)
		l.engine.Serve(ctx, ln, func(c *relay.Conn) {
			<-connected // net.Dial is not to see the reset, Read is
			l.Handle(c)
			l.handled <- struct{}{}
		})
	}()
	c, err := net.Dial("tcp", ln.Addr().String())
	close(connected)
	l.t.Cleanup(func() { cancel(); <-served; ln.Close() })
	if err != nil {
		l.t.Fatal(err)
	}
	l.t.Cleanup(func() { c.Close() })
	c.SetDeadline(time.Now().Add(patience))
	return c.(*net.TCPConn)
}

// flow returns what the log said of the next flow that ended.
func (l *lab) flow() map[string]any {
	l.t.Helper()
	select {
	case r := <-l.log.flows:
		return r
	case <-time.After(patience):
		l.t.Fatal("no line about the flow in the log")
		return nil
	}
}

// request returns what a SOCKS server was asked for.
func (l *lab) request() flow.Target {
	l.t.Helper()
	select {
	case r := <-l.requests:
		return r.Target
	case <-time.After(patience):
		l.t.Fatal("the SOCKS server was not asked")
		return flow.Target{}
	}
}

// echoes fails the test unless what c sends comes back.
func echoes(t testing.TB, c net.Conn, text string) {
	t.Helper()
	got := make([]byte, len(text))
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(c, got); err != nil || string(got) != text {
		t.Fatalf("sent %q, got %q, %v", text, got, err)
	}
}

// wantReset fails the test unless the client's connection ends with a reset.
func wantReset(t testing.TB, c net.Conn) {
	t.Helper()
	if n, err := c.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Fatalf("the client read %d bytes and %v, want a reset", n, err)
	}
}

// finish ends a flow as a client does that has what it wanted.
func finish(t testing.TB, c *net.TCPConn) {
	t.Helper()
	c.CloseWrite()
	if b, err := io.ReadAll(c); err != nil || len(b) > 0 {
		t.Fatalf("after the end: %q, %v", b, err)
	}
	c.Close()
}

// names is a pool of synthetic addresses that counts the pins.
type names struct {
	owner map[netip.Addr]string
	mu    sync.Mutex
	pins  map[netip.Addr]int
	most  int
}

func (n *names) Contains(a netip.Addr) bool { return pool.Contains(a) }

func (n *names) Lookup(a netip.Addr) (string, bool) {
	name, ok := n.owner[a]
	return name, ok
}

func (n *names) Pin(a netip.Addr)   { n.pin(a, 1) }
func (n *names) Unpin(a netip.Addr) { n.pin(a, -1) }

func (n *names) pin(a netip.Addr, by int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.pins[a] += by
	n.most = max(n.most, n.pins[a])
	if n.pins[a] == 0 {
		delete(n.pins, a)
	}
}

// balance returns the pins that are left and how many there were at once.
func (n *names) balance() (left, most int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.pins), n.most
}

// records is what the log was told, line by line.
type records struct {
	flows chan map[string]any
	mu    sync.Mutex
	text  strings.Builder
}

func (r *records) Write(b []byte) (int, error) {
	r.mu.Lock()
	r.text.Write(b)
	r.mu.Unlock()
	line := map[string]any{}
	if err := json.Unmarshal(b, &line); err != nil {
		return 0, fmt.Errorf("%q: %w", b, err)
	}
	r.flows <- line
	return len(b), nil
}

func (r *records) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.text.String()
}

func listen(t testing.TB, at string) net.Listener {
	t.Helper()
	ln, err := net.Listen("tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	return ln
}

// closedPort returns an address where nobody listens.
func closedPort(t testing.TB) string {
	ln := listen(t, "127.0.0.1:0")
	defer ln.Close()
	return ln.Addr().String()
}

// startEcho starts a server that sends everything back.
func startEcho(t testing.TB) netip.AddrPort {
	ln := listen(t, "127.0.0.1:0")
	var open sync.WaitGroup
	open.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			open.Go(func() {
				defer c.Close()
				c.SetDeadline(time.Now().Add(2 * patience))
				io.Copy(c, c)
			})
		}
	})
	t.Cleanup(func() { ln.Close(); open.Wait() })
	return netip.MustParseAddrPort(ln.Addr().String())
}
