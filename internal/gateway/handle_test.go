package gateway_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
	"weak"

	"github.com/google/go-cmp/cmp"
	"github.com/tproxyd/tproxyd/internal/gateway"
	"github.com/tproxyd/tproxyd/internal/socksserver"
	"github.com/tproxyd/tproxyd/pkg/socks"
)

const wwwAt = "127.198.0.7" // the synthetic address of www.example.org

// TestHandle follows one flow of each kind from the client to its end: what
// the client sees, who was asked, what is counted and logged, what stays.
func TestHandle(t *testing.T) {
	addrs := func(list ...string) (out []netip.Addr) {
		for _, a := range list {
			out = append(out, netip.MustParseAddr(a))
		}
		return out
	}
	resolvesTo := func(list ...string) func(*lab) {
		return func(l *lab) {
			l.resolve = func(_ context.Context, name string) ([]netip.Addr, error) {
				if name != "www.example.org" {
					return nil, fmt.Errorf("asked for %q", name)
				}
				return addrs(list...), nil
			}
		}
	}
	const named = "SERVER far $S\n"
	tests := []struct {
		name    string
		rules   string
		fault   socksserver.Fault
		dst     string
		prepare func(*lab)

		refused string            // the reason; empty: the flow is carried
		request string            // what the server is asked for, host alone
		dials   []netip.Addr      // DIRECT, in order
		log     map[string]string // some of the line, as regular expressions
	}{
		{name: "deny", rules: "DENY * tag=no", dst: realAt, refused: "denied",
			log: map[string]string{"rule": "^socks.cnf:1$", "action": "^DENY$", "tag": "^no$", "err": "denied", "src": `^127\.0\.0\.1:\d+$`, "dst": `^127\.20\.0\.1:\d+$`}},
		{name: "default", rules: "DIRECT 10.0.0.0/8", dst: realAt, refused: "denied", log: map[string]string{"rule": "^DEFAULT$"}},
		{name: "deny by name", rules: "DENY *.example.org\nDIRECT *", dst: wwwAt, refused: "denied",
			log: map[string]string{"rule": "^socks.cnf:1$", "host": "^www.example.org$"}},
		{name: "no name owns it", rules: "DIRECT *", dst: "127.198.9.9", refused: "unowned", log: map[string]string{"err": "no name owns"}},
		{name: "loop", rules: "DIRECT *", dst: realAt, refused: "loop",
			prepare: func(l *lab) { l.own = netip.MustParseAddr(realAt) }, log: map[string]string{"err": "this host itself"}},

		{name: "direct", rules: "DIRECT *", dst: realAt, dials: addrs(realAt), log: map[string]string{"action": "^DIRECT$", "rule": "^socks.cnf:1$"}},
		{name: "direct, nobody there", rules: "DIRECT *", dst: realAt, dials: addrs(realAt), refused: "upstream",
			prepare: func(l *lab) { l.dial = func(netip.AddrPort) error { return syscall.EHOSTUNREACH } }, log: map[string]string{"err": "no route to host"}},
		{name: "direct by name", rules: "DIRECT *", dst: wwwAt, prepare: resolvesTo("192.0.2.1", "192.0.2.2"), dials: addrs("192.0.2.1"),
			log: map[string]string{"host": "^www.example.org$", "action": "^DIRECT$"}},
		{name: "direct by name, the second address", rules: "DIRECT *", dst: wwwAt, dials: addrs("192.0.2.1", "2001:db8::2"),
			prepare: func(l *lab) {
				resolvesTo("192.0.2.1", "2001:db8::2", "192.0.2.3")(l)
				l.dial = func(to netip.AddrPort) error {
					if to.Addr().Is4() {
						return syscall.ECONNREFUSED
					}
					return nil
				}
			}},
		{name: "direct by name, none answers", rules: "DIRECT *", dst: wwwAt, dials: addrs("192.0.2.1", "192.0.2.2"), refused: "upstream",
			prepare: func(l *lab) {
				resolvesTo("192.0.2.1", "192.0.2.2")(l)
				l.dial = func(netip.AddrPort) error { return syscall.ECONNREFUSED }
			}, log: map[string]string{"err": "refused"}},
		{name: "direct by name, no address", rules: "DIRECT *", dst: wwwAt, prepare: resolvesTo(), refused: "upstream", log: map[string]string{"err": "www.example.org has no address"}},
		{name: "direct by name, not found", rules: "DIRECT *", dst: wwwAt, refused: "upstream", log: map[string]string{"err": "no such name"}},
		{name: "direct by name, to the pool", rules: "DIRECT *", dst: wwwAt, prepare: resolvesTo("127.198.0.8"), refused: "loop"},
		{name: "direct by name, to ourselves and then elsewhere", rules: "DIRECT *", dst: wwwAt, dials: addrs("192.0.2.1"),
			prepare: func(l *lab) {
				resolvesTo("127.0.0.5", "127.198.0.8", "192.0.2.1")(l)
				l.own = netip.MustParseAddr("127.0.0.5")
			}},
		{name: "direct by name, to what this host offers to itself", rules: "DIRECT *", dst: wwwAt, prepare: resolvesTo("127.0.0.1", "::1", "0.0.0.0", "::"), refused: "loop"},
		{name: "direct by name, where an earlier rule takes the address", rules: named + "DIRECT 192.0.2.2\nSOCKD5 @=far 192.0.2.0/24\nDIRECT *", dst: wwwAt, refused: "upstream",
			prepare: resolvesTo("192.0.2.1"), log: map[string]string{"err": "www.example.org is at 192.0.2.1, which goes by socks.cnf:3$"}},
		{name: "direct by name, the address that is left", rules: named + "DIRECT 192.0.2.2\nSOCKD5 @=far 192.0.2.0/24\nDIRECT *", dst: wwwAt, dials: addrs("192.0.2.2"),
			prepare: resolvesTo("192.0.2.1", "192.0.2.2")},
		{name: "nobody knows the interface that a rule asks for", rules: named + "SOCKD5 @=far * if=guest\nDIRECT *", dst: realAt, refused: "upstream",
			prepare: func(l *lab) { l.interfaceError = errors.New("no such interface") }, log: map[string]string{"err": "no such interface"}},

		{name: "proxied by address", rules: named + "SOCKD5 @=far *", dst: realAt, request: realAt,
			log: map[string]string{"upstream": "^far$", "action": "^SOCKD5$", "rule": "^socks.cnf:2$", "up": "^5$", "down": "^5$"}},
		{name: "proxied by name", rules: named + "SOCKD5 @=far *.example.org", dst: wwwAt, request: "www.example.org", log: map[string]string{"host": "^www.example.org$"}},
		{name: "an address rule does not match a name", rules: named + "DENY 127.198.0.0/16\nSOCKD5 @=far *", dst: wwwAt, request: "www.example.org"},
		{name: "the next server", rules: "SERVER near $CLOSED\n" + named + "SOCKD5 @=near,far *", dst: realAt, request: realAt, log: map[string]string{"upstream": "^far$"}},
		{name: "not allowed", rules: named + "SOCKD5 @=far *", fault: socksserver.Fault{Reply: byte(socks.NotAllowed)}, dst: wwwAt, request: "www.example.org",
			refused: "reply", log: map[string]string{"host": "^www.example.org$", "rule": "^socks.cnf:2$"}},
		{name: "all servers down", rules: "SERVER a $CLOSED\nSERVER b $CLOSED\nSOCKD5 @=a,b *", dst: wwwAt, refused: "upstream",
			log: map[string]string{"err": "a .*refused.* b .*refused"}},
		{name: "no SOCKS at all", rules: named + "SOCKD5 @=far *", fault: socksserver.Fault{Garbage: socksserver.AtGreeting}, dst: wwwAt, refused: "upstream"},
		{name: "wrong password", rules: "SERVER far $S credential=office\nSOCKD5 @=far *", fault: socksserver.Fault{Close: socksserver.AtAuth}, dst: wwwAt, refused: "upstream"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			l := newLab(t, slog.LevelDebug, tt.fault, tt.rules)
			l.names.owner[netip.MustParseAddr(wwwAt)] = "www.example.org"
			if tt.prepare != nil {
				tt.prepare(l)
			}
			c := l.connect(tt.dst)
			if tt.refused == "" {
				echoes(t, c, "hello")
				finish(t, c)
			} else {
				wantReset(t, c)
			}
			line := l.flow()
			for key, want := range tt.log {
				if got := fmt.Sprint(line[key]); !regexp.MustCompile(want).MatchString(strings.ReplaceAll(got, "\n", " ")) {
					t.Errorf("log: %s is %q, want %q", key, got, want)
				}
			}
			if line["msg"] != "flow" || line["level"] != "DEBUG" || (line["err"] != nil) != (tt.refused != "") {
				t.Errorf("log: %v", line)
			}
			if tt.request != "" {
				if got := l.request(); got.Host() != tt.request {
					t.Errorf("the server was asked for %s, want %s", got.Host(), tt.request)
				}
			}
			if got := l.dials(); !slices.Equal(got, tt.dials) {
				t.Errorf("dialled %v, want %v", got, tt.dials)
			}
			isNamed := tt.dst == wwwAt
			if left, most := l.names.balance(); left != 0 || (most == 1) != isNamed {
				t.Errorf("%d addresses are still pinned, there were %d", left, most)
			}
			if s := l.log.String(); strings.Contains(s, secret) || strings.Contains(s, username) {
				t.Errorf("the log tells a secret: %s", s)
			}
			want := gateway.Stats{Refused: map[string]uint64{"denied": 0, "unowned": 0, "loop": 0, "reply": 0, "upstream": 0, "left": 0}}
			switch {
			case tt.refused != "":
				want.Refused[tt.refused] = 1
			case tt.dials != nil:
				want.Direct, want.Up, want.Down = 1, 5, 5
			default:
				want.Proxied, want.Up, want.Down = 1, 5, 5
			}
			if d := cmp.Diff(want, l.Stats()); d != "" {
				t.Error(d)
			}
		})
	}
}

// TestLogLevels: above debug only flows of a rule with log have a line, one
// each, carried or refused.
func TestLogLevels(t *testing.T) {
	l := newLab(t, slog.LevelInfo, socksserver.Fault{}, "SERVER far $S", "DENY 127.20.0.1", "DENY 127.20.0.2 log tag=bad", "SOCKD5 @=far * log")
	for _, dst := range []string{"127.20.0.1", "127.20.0.2"} {
		wantReset(t, l.connect(dst))
		<-l.handled
	}
	c := l.connect("127.20.0.3")
	echoes(t, c, "hello")
	finish(t, c)
	for _, want := range []string{"socks.cnf:3", "socks.cnf:4"} {
		if line := l.flow(); line["rule"] != want || line["level"] != "INFO" {
			t.Errorf("%v, want %s at INFO", line, want)
		}
	}
	if len(l.log.flows) != 0 {
		t.Errorf("more lines: %s", l.log)
	}
}

func TestHits(t *testing.T) {
	l := newLab(t, slog.LevelDebug, socksserver.Fault{}, "DENY 127.20.0.1", "DENY 127.20.0.2", "DIRECT *")
	for range 2 {
		wantReset(t, l.connect("127.20.0.2"))
		l.flow()
	}
	var got []uint64
	for _, r := range l.Rules() {
		got = append(got, r.Flows)
	}
	if want := []uint64{0, 2, 0, 0, 0}; !slices.Equal(got, want) { // the last two: DEFAULT, and what is gone
		t.Errorf("hits %v, want %v", got, want)
	}
}

// TestLiveBytes: the bytes of a flow count while it lives, and once.
func TestLiveBytes(t *testing.T) {
	l := newLab(t, slog.LevelDebug, socksserver.Fault{}, "DIRECT *")
	c := l.connect(realAt)
	echoes(t, c, "hello")
	<-l.handled
	if s := l.Stats(); s.Live != 1 || s.Up != 5 || s.Down != 5 {
		t.Errorf("while it lives: %+v", s)
	}
	finish(t, c)
	l.flow()
	if s := l.Stats(); s.Live != 0 || s.Up != 5 || s.Down != 5 {
		t.Errorf("at its end: %+v", s)
	}
}

// TestSwap: a new plan leaves proxied flows alone, whatever it says of them,
// and resets what this host dialled unless it is still DIRECT.
func TestSwap(t *testing.T) {
	tests := []struct {
		name, after          string
		resetReal, resetName bool
	}{
		{"the same", "SERVER far $S\nSOCKD5 @=far 127.20.0.9\nDIRECT *", false, false},
		{"DIRECT by another rule", "DIRECT 127.20.0.0/16\nDIRECT *.example.org", false, false},
		{"denied", "DENY *", true, true},
		{"proxied", "SERVER other $S\nSOCKD5 @=other *", true, true},
		{"the name alone denied", "DENY www.example.org\nDIRECT *", false, true},
		{"the address alone denied", "DENY 127.20.0.0/16\nDIRECT *", true, false},
		{"the address of the name alone denied", "DENY 192.0.2.0/24\nDIRECT *", false, true},
		{"proxied for a user that was not asked for", "SERVER other $S\nSOCKD5 @=other * uid=0\nDIRECT *", true, true},
		{"proxied by an interface that was not asked for", "SERVER other $S\nSOCKD5 @=other * if=lan0\nDIRECT *", true, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			l := newLab(t, slog.LevelDebug, socksserver.Fault{}, "SERVER far $S\nSOCKD5 @=far 127.20.0.9\nDIRECT *")
			l.names.owner[netip.MustParseAddr(wwwAt)] = "www.example.org"
			l.resolve = func(context.Context, string) ([]netip.Addr, error) {
				return []netip.Addr{netip.MustParseAddr("192.0.2.1")}, nil
			}
			direct, byName, proxied := l.connect(realAt), l.connect(wwwAt), l.connect("127.20.0.9")
			flows := []struct {
				c     net.Conn
				reset bool
			}{{direct, tt.resetReal}, {byName, tt.resetName}, {proxied, false}}
			want := 0
			for _, f := range flows {
				echoes(t, f.c, "hello")
				<-l.handled
				if f.reset {
					want++
				}
			}
			if n := l.Swap(l.plan(socksserver.Fault{}, tt.after)); n != want {
				t.Errorf("%d flows were reset, want %d", n, want)
			}
			for _, f := range flows {
				if f.reset {
					wantReset(t, f.c)
				} else {
					echoes(t, f.c, "again")
				}
			}
		})
	}
}

// TestSwapBetween: a reload comes when a flow is decided and not yet joined.
func TestSwapBetween(t *testing.T) {
	for _, tt := range []struct {
		name, after string
		reset       bool
	}{{"still DIRECT", "DIRECT 127.0.0.0/8", false}, {"denied", "DENY *", true}} {
		t.Run(tt.name, func(t *testing.T) {
			l := newLab(t, slog.LevelDebug, socksserver.Fault{}, "DIRECT *")
			l.dial = func(netip.AddrPort) error {
				if n := l.Swap(l.plan(socksserver.Fault{}, tt.after)); n != 0 {
					return fmt.Errorf("%d flows were reset, and there are none", n)
				}
				return nil
			}
			c := l.connect(realAt)
			if !tt.reset {
				echoes(t, c, "hello")
				return
			}
			wantReset(t, c)
			if line := l.flow(); line["rule"] != "socks.cnf:1" {
				t.Errorf("log: %v", line)
			}
			if s := l.Stats(); s.Live != 0 {
				t.Errorf("%d flows are left", s.Live)
			}
		})
	}
}

// TestLimits: the limits of a TIMEOUT line end a flow, and only those that
// apply.
func TestLimits(t *testing.T) {
	tests := []struct {
		name, timeout string
		half          bool // the client sends its FIN, the server does not
	}{
		{"idle", "TIMEOUT idle=100ms", false},
		{"halfclosed", "TIMEOUT idle=1h halfclosed=100ms", true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			l := newLab(t, slog.LevelDebug, socksserver.Fault{}, tt.timeout, "DIRECT *")
			silent := listen(t, "127.0.0.1:0")
			defer silent.Close()
			l.echo = netip.MustParseAddrPort(silent.Addr().String())
			c := l.connect(realAt)
			server, err := silent.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer server.Close()
			began := time.Now()
			if tt.half {
				c.CloseWrite()
			}
			wantReset(t, c)
			if took := time.Since(began); took < 100*time.Millisecond || took > 5*time.Second {
				t.Errorf("ended after %v", took)
			}
			if line := l.flow(); !strings.Contains(fmt.Sprint(line["err"]), "timeout") {
				t.Errorf("log: %v", line)
			}
		})
	}
}

// TestSilentAddress: an address that says nothing leaves time for the next.
func TestSilentAddress(t *testing.T) {
	l := newLab(t, slog.LevelDebug, socksserver.Fault{}, "TIMEOUT connect=400ms", "DIRECT *")
	l.names.owner[netip.MustParseAddr(wwwAt)] = "www.example.org"
	silent := netip.MustParseAddr("192.0.2.1")
	l.resolve = func(context.Context, string) ([]netip.Addr, error) {
		return []netip.Addr{silent, netip.MustParseAddr("192.0.2.2")}, nil
	}
	l.opts.Dial = func(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
		if to.Addr() == silent {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		return l.dialEngine(ctx, l.echo)
	}
	l.Gateway = gateway.New(l.Plan(), l.opts)
	echoes(t, l.connect(wwwAt), "hello")
}

// TestLeft: who leaves before the server has answered keeps no server.
func TestLeft(t *testing.T) {
	silent := listen(t, "127.0.0.1:0")
	defer silent.Close()
	l := newLab(t, slog.LevelDebug, socksserver.Fault{}, "SOCKD5 @="+silent.Addr().String()+" *")
	c := l.connect(realAt)
	server, err := silent.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	server.SetDeadline(time.Now().Add(patience))
	l.left.Store(true)
	wantReset(t, c)
	if _, err := io.Copy(io.Discard, server); err != nil {
		t.Errorf("the server's side: %v", err)
	}
	if line := l.flow(); !strings.Contains(fmt.Sprint(line["err"]), "the client left") {
		t.Errorf("log: %v", line)
	}
	if n := l.Stats().Refused["left"]; n != 1 {
		t.Errorf("%d flows are counted as left", n)
	}
}

// TestConnectLimit: what does not answer keeps no client.
func TestConnectLimit(t *testing.T) {
	l := newLab(t, slog.LevelDebug, socksserver.Fault{}, "TIMEOUT connect=50ms", "DIRECT *")
	l.names.owner[netip.MustParseAddr(wwwAt)] = "www.example.org"
	l.resolve = func(ctx context.Context, _ string) ([]netip.Addr, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	wantReset(t, l.connect(wwwAt))
	if line := l.flow(); line["err"] != context.DeadlineExceeded.Error() {
		t.Errorf("log: %v", line)
	}
}

// TestSwapLetsGo: a flow that lives on does not keep the rules in memory by
// which it was decided; they can be a hundred megabytes.
func TestSwapLetsGo(t *testing.T) {
	for _, rules := range []string{"LIST l 127.0.0.0/8 www.example.org\nDIRECT $l", "SOCKD5 @=$S *"} {
		l := newLab(t, slog.LevelInfo, socksserver.Fault{}, rules)
		c := l.connect(realAt)
		echoes(t, c, "before")
		<-l.handled
		old := weak.Make(l.Plan().Table())
		l.Swap(l.plan(socksserver.Fault{}, "DIRECT *"))
		echoes(t, c, "after")
		for end := time.Now().Add(patience); old.Value() != nil; time.Sleep(time.Millisecond) {
			runtime.GC()
			if time.Now().After(end) {
				t.Errorf("%s: a flow keeps the rules before", rules)
				break
			}
		}
		finish(t, c)
	}
}

// TestRuleTimeout: a rule's own limit is that of its flows, and of no others.
func TestRuleTimeout(t *testing.T) {
	l := newLab(t, slog.LevelDebug, socksserver.Fault{}, "DIRECT 127.20.0.8 timeout=1s\nDIRECT *")
	short, long := l.connect("127.20.0.8"), l.connect(realAt)
	for _, c := range []net.Conn{short, long} {
		echoes(t, c, "hello")
		<-l.handled
	}
	short.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := short.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a flow with timeout=1s that is idle: %v", err)
	}
	echoes(t, long, "still here")
}
