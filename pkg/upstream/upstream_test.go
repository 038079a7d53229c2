package upstream

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/tproxyd/tproxyd/pkg/socks"
)

// TestConnectFailover has a first server that fails in every way and a second
// one that works.
func TestConnectFailover(t *testing.T) {
	auth := &socks.Auth{Username: "alice", Password: "hunter2"}
	tests := []struct {
		name  string
		a     behaviour
		auth  *socks.Auth
		reply socks.Reply // the flow's end; 0: b carries it
		bad   bool        // a is asked last from now on
		took  time.Duration
	}{
		{name: "refused", a: refuses, bad: true},
		{name: "connect timeout", a: hangs, bad: true, took: 10 * time.Second},
		{name: "silent at the greeting", a: says(), bad: true, took: 10 * time.Second},
		{name: "silent at the request", a: says("\x05\x00"), bad: true, took: 30 * time.Second},
		{name: "EOF at the greeting", a: says("EOF"), bad: true},
		{name: "silent within the greeting", a: says("\x05"), bad: true, took: 10 * time.Second},
		{name: "EOF at the request", a: says("\x05\x00", "EOF")}, // some refuse so
		{name: "garbage", a: says("HTTP/1.0 400\r\n\r\n"), bad: true},
		{name: "garbage for a reply", a: says("\x05\x00", "HTTP/1.0 400\r\n\r\n"), bad: true},
		{name: "no method", a: says("\x05\xff"), bad: true},
		{name: "password", auth: auth, a: says("\x05\x02", "\x01\x01"), bad: true},
		{name: "password too long", auth: &socks.Auth{Username: "a", Password: strings.Repeat("x", 256)}, a: says()},
		{name: "REP 1", a: replies(1)},
		{name: "REP 2", a: replies(2), reply: socks.NotAllowed},
		{name: "REP 3", a: replies(3), reply: socks.NetworkUnreachable},
		{name: "REP 4", a: replies(4), reply: socks.HostUnreachable},
		{name: "REP 5", a: replies(5), reply: socks.ConnectionRefused},
		{name: "REP 6", a: replies(6), reply: socks.TTLExpired},
		{name: "REP 7", a: replies(7)},
		{name: "REP 8", a: replies(8)},
		{name: "REP 99", a: replies(99)},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := &lab{hosts: map[string]behaviour{addrA: tt.a, addrB: replies(0)}}
				p := l.pool(t, Options{})
				a := &Server{Name: "a", Addr: serverA.Addr, Auth: tt.auth}
				start := time.Now()
				conn, s, err := carry(t.Context(), p, a, serverB)
				if took := time.Since(start); took != tt.took {
					t.Errorf("took %v, want %v", took, tt.took)
				}
				var reply socks.Reply
				errors.As(err, &reply)
				if reply != tt.reply {
					t.Errorf("reply %v, want %v", reply, tt.reply)
				}
				if tt.reply != 0 {
					if asked := l.asked(); conn != nil || s != a || asked != addrA {
						t.Errorf("asked %s; %v", asked, err)
					}
				} else {
					if asked := l.asked(); err != nil || s != serverB || asked != addrA+" "+addrB {
						t.Fatalf("asked %s; %v", asked, err)
					}
					conn.Close()
				}
				want := []Status{
					{Name: "a", Address: addrA, Protocol: "socks5", Up: !tt.bad},
					{Name: "b", Address: addrB, Protocol: "socks5", Up: true},
				}
				if tt.bad {
					want[0].Faults = 1
				}
				if tt.reply == 0 {
					want[0].Failed.Count, want[1].Answered.Count, want[1].Carried = 1, 1, 1
				} else {
					want[0].Answered.Count = 1
				}
				if diff := cmp.Diff(want, p.Status([]*Server{a, serverB}), cmpopts.IgnoreFields(Status{}, "Setup"),
					cmpopts.IgnoreFields(Histogram{}, "Sum", "Buckets")); diff != "" {
					t.Errorf("status (-want +got):\n%s", diff)
				}
			})
		})
	}
}

func TestConnectNoServer(t *testing.T) {
	if _, err := New(Options{}, nil).Connect(t.Context(), &Group{}, Request{To: target}); err == nil {
		t.Error("no server, no error")
	}
}

// TestConnectCarries uses a connection for longer than the time limits.
func TestConnectCarries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &lab{hosts: map[string]behaviour{addrA: says("\x05\x00", "\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00220 hello", "bye")}}
		p := l.pool(t, Options{})
		ctx, cancel := context.WithCancel(t.Context())
		conn, _, err := carry(ctx, p, serverA)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		cancel() // it bounds the connecting only
		time.Sleep(time.Hour)
		b := make([]byte, 64)
		if n, err := conn.Read(b); string(b[:n]) != "220 hello" {
			t.Errorf("%q, %v", b[:n], err)
		}
		io.WriteString(conn, "quit")
		if n, err := conn.Read(b); string(b[:n]) != "bye" {
			t.Errorf("%q, %v", b[:n], err)
		}
	})
}

func TestTimeLimits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &lab{hosts: map[string]behaviour{addrA: hangs, addrB: says("\x05\x00")}}
		p := l.pool(t, Options{ConnectTimeout: 2 * time.Second, HandshakeTimeout: 3 * time.Second})
		start := time.Now()
		_, _, err := carry(t.Context(), p, serverA, serverB)
		if took := time.Since(start); took != 5*time.Second {
			t.Errorf("took %v", took)
		}
		want := "upstream: a (10.0.0.1:1): no answer in time: connection\nupstream: b (10.0.0.2:2): no answer in time: request"
		if err == nil || err.Error() != want {
			t.Errorf("%v", err)
		}
		if names := up(p, serverA, serverB); names != "" {
			t.Errorf("up: %s", names)
		}
	})
}

// cancelling cancels when it was read from n times.
type cancelling struct {
	net.Conn
	n      int
	cancel context.CancelFunc
}

func (c *cancelling) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if c.n--; c.n == 0 {
		c.cancel()
	}
	return n, err
}

// TestCancelled ends the context at every point: nobody else is asked, nobody
// is blamed, and nothing is left open.
func TestCancelled(t *testing.T) {
	soon := time.Second
	tests := []struct {
		name  string
		after time.Duration // of the context
		reads int           // cancelled after that many instead
		a     behaviour
	}{
		{name: "from the start", a: hangs},
		{name: "while connecting", after: soon, a: hangs},
		{name: "at the greeting", after: soon, a: says()},
		{name: "at the request", after: soon, a: says("\x05\x00")},
		{name: "with the reply", after: soon, reads: 3, a: replies(0)},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				defer cancel()
				if tt.after == 0 {
					cancel()
				} else {
					time.AfterFunc(tt.after, cancel)
				}
				l := &lab{hosts: map[string]behaviour{addrB: replies(0), addrA: func(ctx context.Context) (net.Conn, error) {
					conn, err := tt.a(ctx)
					if err != nil || tt.reads == 0 {
						return conn, err
					}
					return &cancelling{conn, tt.reads, cancel}, nil
				}}}
				p := l.pool(t, Options{})
				start := time.Now()
				conn, _, err := carry(ctx, p, serverA, serverB)
				if !errors.Is(err, context.Canceled) || conn != nil {
					t.Errorf("%v, %v", conn, err)
				}
				if took := time.Since(start); took > tt.after {
					t.Errorf("took %v", took)
				}
				if asked := l.asked(); asked != addrA {
					t.Errorf("asked %s", asked)
				}
				if names := up(p, serverA, serverB); names != "a b" {
					t.Errorf("up: %s", names)
				}
			})
		})
	}
}

func TestErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &lab{hosts: map[string]behaviour{addrA: refuses, addrB: replies(1), addrC: says("\x05\x02", "\x01\x01")}}
		p := l.pool(t, Options{})
		c := &Server{Name: "c", Addr: serverC.Addr, Auth: &socks.Auth{Username: "alice", Password: "hunter2"}}
		_, _, err := carry(t.Context(), p, serverA, serverB, c, &Server{Name: "d", Host: "proxy.test", Addr: netip.MustParseAddrPort("0.0.0.0:4")})
		want := "upstream: a (10.0.0.1:1): connection refused\n" +
			"upstream: b (10.0.0.2:2): general SOCKS server failure\n" +
			"upstream: c ([2001:db8::3]:3): the server refuses the user name or password\n" +
			"upstream: d (proxy.test:4): no way to resolve its name"
		if err == nil || err.Error() != want {
			t.Fatalf("got\n%v\nwant\n%s", err, want)
		}
		var reply socks.Reply
		if !errors.As(err, &reply) || reply != socks.GeneralFailure {
			t.Errorf("reply %v", reply)
		}
		if !errors.Is(err, syscall.ECONNREFUSED) || !errors.Is(err, socks.ErrAuth) {
			t.Errorf("%v lacks a cause", err)
		}
		var one *ServerError
		if !errors.As(err, &one) || one.Server != serverA {
			t.Errorf("%v", one)
		}
		if shown := fmt.Sprintf("%v %+v %#v %+v", err, err, err, c); strings.Contains(shown, "alice") || strings.Contains(shown, "hunter2") {
			t.Errorf("a secret is shown: %s", shown)
		}
	})
}

// TestResolve reaches a server by its name.
func TestResolve(t *testing.T) {
	addrs := func(list ...string) func(context.Context, string) ([]netip.Addr, error) {
		return func(_ context.Context, host string) (l []netip.Addr, err error) {
			if host != "proxy.test" {
				return nil, fmt.Errorf("asked for %s", host)
			}
			for _, a := range list {
				l = append(l, netip.MustParseAddr(a))
			}
			return l, nil
		}
	}
	tests := []struct {
		name    string
		resolve func(context.Context, string) ([]netip.Addr, error)
		asked   string
		want    string // the server, or its error
		took    time.Duration
	}{
		{"first address", addrs("10.0.0.9", "2001:db8::9"), "10.0.0.9:1080", "s", 0},
		{"first address refuses", addrs("10.0.0.1", "10.0.0.9"), "10.0.0.1:1080 10.0.0.9:1080", "s", 0},
		{"first address is silent", addrs("2001:db8::9", "10.0.0.9"), "[2001:db8::9]:1080 10.0.0.9:1080", "s", 5 * time.Second},
		{
			"all addresses are silent", addrs("2001:db8::9", "2001:db8::9"), "[2001:db8::9]:1080",
			"upstream: s (proxy.test:1080): no answer in time: connection", 10 * time.Second,
		},
		{"no address", addrs(), "", "upstream: s (proxy.test:1080): its name has no address", 0},
		{
			"no such name", func(context.Context, string) ([]netip.Addr, error) { return nil, errors.New("no such host") }, "",
			"upstream: s (proxy.test:1080): look-up of proxy.test: no such host", 0,
		},
		{
			"silent resolver", func(ctx context.Context, _ string) ([]netip.Addr, error) { <-ctx.Done(); return nil, ctx.Err() }, "",
			"upstream: s (proxy.test:1080): no answer in time: connection", 10 * time.Second,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l := &lab{hosts: map[string]behaviour{"10.0.0.9:1080": replies(0), "10.0.0.1:1080": refuses, "[2001:db8::9]:1080": hangs}}
				p := l.pool(t, Options{Resolve: tt.resolve})
				s := &Server{Name: "s", Host: "proxy.test", Addr: netip.AddrPortFrom(netip.Addr{}, 1080)}
				start := time.Now()
				got := connect(t, p, s)
				if asked := l.asked(); got != tt.want || asked != tt.asked {
					t.Errorf("asked %q: %s\nwant  %q: %s", asked, got, tt.asked, tt.want)
				}
				if took := time.Since(start); took != tt.took {
					t.Errorf("took %v, want %v", took, tt.took)
				}
				if isUp := up(p, s) == "s"; isUp != (tt.want == "s") {
					t.Errorf("up: %v", isUp)
				}
			})
		})
	}
}
