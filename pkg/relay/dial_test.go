package relay

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestDialErrors(t *testing.T) {
	addr, _ := accepted(t)
	to := netip.MustParseAddrPort(addr)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	refused := netip.MustParseAddrPort(ln.Addr().String())
	ln.Close()
	full := fullListener(t)
	past, cancel := context.WithCancel(context.Background())
	cancel()
	no := errors.New("no")
	for _, tt := range []struct {
		name string
		ctx  context.Context
		in   time.Duration // a time limit for ctx
		o    DialOptions
		to   netip.AddrPort
		max  int
		want error
	}{
		{name: "refused", to: refused, want: syscall.ECONNREFUSED},
		{name: "time limit", in: 30 * time.Millisecond, to: full, want: context.DeadlineExceeded},
		{name: "canceled before", ctx: past, to: to, want: context.Canceled},
		{name: "control", o: DialOptions{Control: func(int) error { return no }}, to: to, want: no},
		{name: "not a local address", o: DialOptions{Local: netip.MustParseAddr("192.0.2.1")}, to: to, want: syscall.EADDRNOTAVAIL},
		{name: "no route", to: netip.MustParseAddrPort("255.255.255.255:1"), want: syscall.ENETUNREACH},
		{name: "no room", max: 1, to: to, want: syscall.EMFILE},
	} {
		t.Run(tt.name, func(t *testing.T) {
			e := newEngine(t, Options{MaxConns: tt.max})
			if tt.max > 0 {
				dialEngine(t, e, addr)
			}
			ctx := tt.ctx
			if ctx == nil {
				ctx = t.Context()
			}
			if tt.in > 0 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, tt.in)
				defer cancel()
			}
			before := e.Stats().Conns
			c, err := e.Dial(ctx, tt.o, tt.to)
			var op *net.OpError
			if c != nil || !errors.Is(err, tt.want) || !errors.As(err, &op) || op.Op != "dial" {
				t.Errorf("%v, %v; want %v", c, err, tt.want)
			}
			if n := e.Stats().Conns; n != before {
				t.Errorf("%d sockets left", n-before)
			}
			if n := e.Stats().Refused; (n == 1) != (tt.want == syscall.EMFILE) {
				t.Errorf("%d counted as refused", n)
			}
		})
	}
}

// fullListener is an address that does not answer a SYN: the queue of its
// listener is full.
func fullListener(t *testing.T) netip.AddrPort {
	t.Helper()
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Listen(fd, 0); err != nil {
		t.Fatal(err)
	}
	to := rawName(unix.SYS_GETSOCKNAME, fd)
	for range 4 {
		c, err := net.DialTimeout("tcp", to.String(), 50*time.Millisecond)
		if err != nil {
			return to
		}
		t.Cleanup(func() { c.Close() })
	}
	t.Fatal("the listener's queue does not fill")
	return to
}

func TestDialLocal(t *testing.T) {
	addr, servers := accepted(t)
	e := newEngine(t, Options{})
	called := false
	c, err := e.Dial(t.Context(), DialOptions{
		Local:   netip.MustParseAddr("127.0.0.77"),
		Control: func(fd int) error { called = fd >= 0; return nil },
	}, netip.MustParseAddrPort(addr))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if got := (<-servers).RemoteAddr().(*net.TCPAddr).IP.String(); got != "127.0.0.77" || !called {
		t.Errorf("came from %s; Control called: %v", got, called)
	}
}

// Who speaks at once does not tell the other end first that it may.
func TestDialSpeaksFirst(t *testing.T) {
	addr, servers := accepted(t)
	e := newEngine(t, Options{})
	segments := func(first bool) uint32 {
		c, err := e.Dial(t.Context(), DialOptions{SpeaksFirst: first}, netip.MustParseAddrPort(addr))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		mustWrite(t, c, "hello")
		s := <-servers
		mustRead(t, s, "hello")
		mustWrite(t, s, "good day")
		mustRead(t, c, "good day")
		mustWrite(t, c, "!")
		mustRead(t, s, "!")
		rc, err := s.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		var info *unix.TCPInfo
		if e := rc.Control(func(fd uintptr) { info, err = unix.GetsockoptTCPInfo(int(fd), unix.SOL_TCP, unix.TCP_INFO) }); e != nil || err != nil {
			t.Fatal(e, err)
		}
		return info.Segs_in
	}
	if with, without := segments(true), segments(false); with >= without {
		t.Errorf("the other end got %d segments, and %d of one that need not speak", with, without)
	}
}

func TestDialAfterClose(t *testing.T) {
	addr, _ := accepted(t)
	e := newEngine(t, Options{})
	e.Close()
	if _, err := e.Dial(t.Context(), DialOptions{}, netip.MustParseAddrPort(addr)); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
}

// Close interrupts a Dial that waits.
func TestCloseInterruptsDial(t *testing.T) {
	e := newEngine(t, Options{})
	full := fullListener(t)
	time.AfterFunc(20*time.Millisecond, func() { e.Close() })
	if _, err := e.Dial(t.Context(), DialOptions{}, full); !errors.Is(err, net.ErrClosed) {
		t.Error(err)
	}
}
