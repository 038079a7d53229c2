package relay

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// halfConn is one end of two net.Pipes: a connection in memory that can be
// half-closed.
type halfConn struct {
	net.Conn          // for reading, deadlines and the rest
	out      net.Conn // for writing
}

func (h halfConn) Write(b []byte) (int, error) { return h.out.Write(b) }
func (h halfConn) CloseWrite() error           { return h.out.Close() }
func (h halfConn) Close() error                { return errors.Join(h.Conn.Close(), h.out.Close()) }

func halfPipe() (a, b halfConn) {
	r1, w1 := net.Pipe()
	r2, w2 := net.Pipe()
	return halfConn{r1, w2}, halfConn{r2, w1}
}

func TestCopy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		clientEnd, c := halfPipe()
		serverEnd, s := halfPipe()
		res := make(chan Result, 1)
		go func() {
			res <- Copy(t.Context(), c, s, CopyOptions{Early: []byte("early down"), EarlyUp: []byte("early up")})
		}()
		mustRead(t, clientEnd, "early down")
		mustRead(t, serverEnd, "early up")
		mustWrite(t, clientEnd, "question")
		mustRead(t, serverEnd, "question")
		clientEnd.CloseWrite()
		mustEOF(t, serverEnd)
		mustWrite(t, serverEnd, "answer")
		mustRead(t, clientEnd, "answer")
		serverEnd.CloseWrite()
		mustEOF(t, clientEnd)
		if x := <-res; x != (Result{Up: 16, Down: 16}) {
			t.Errorf("%+v", x)
		}
	})
}

// A connection that cannot be half-closed ends with its first direction.
func TestCopyWithoutHalfClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		clientEnd, c := net.Pipe()
		serverEnd, s := net.Pipe()
		res := make(chan Result, 1)
		go func() { res <- Copy(t.Context(), c, s, CopyOptions{}) }()
		mustWrite(t, clientEnd, "x")
		mustRead(t, serverEnd, "x")
		clientEnd.Close()
		mustEOF(t, serverEnd)
		if x := <-res; x != (Result{Up: 1}) {
			t.Errorf("%+v", x)
		}
	})
}

func TestCopyLimits(t *testing.T) {
	for _, tt := range []struct {
		name  string
		o     CopyOptions
		half  bool
		cause Cause
		after time.Duration
	}{
		{"idle", CopyOptions{Idle: time.Minute}, false, IdleTimeout, 50*time.Second + time.Minute},
		{"half-closed", CopyOptions{Idle: time.Hour, HalfClosed: time.Minute}, true, HalfClosedTimeout, 50*time.Second + time.Minute},
		{"half-closed, idle shorter", CopyOptions{Idle: time.Minute, HalfClosed: time.Hour}, true, IdleTimeout, 50*time.Second + time.Minute},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				clientEnd, c := halfPipe()
				serverEnd, s := halfPipe()
				start := time.Now()
				if tt.half {
					clientEnd.CloseWrite()
				}
				go func() {
					time.Sleep(50 * time.Second)
					serverEnd.Write([]byte("x"))
				}()
				go io.Copy(io.Discard, clientEnd)
				x := Copy(t.Context(), c, s, tt.o)
				if x.Cause != tt.cause || !errors.Is(x.Err, os.ErrDeadlineExceeded) || x.Down != 1 {
					t.Errorf("%+v", x)
				}
				if d := time.Since(start); d != tt.after {
					t.Errorf("after %v, want %v", d, tt.after)
				}
			})
		})
	}
}

func TestCopyCanceled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		_, c := halfPipe()
		_, s := halfPipe()
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if x := Copy(ctx, c, s, CopyOptions{}); x.Cause != Killed || !errors.Is(x.Err, net.ErrClosed) {
			t.Errorf("%+v", x)
		}
	})
}

// Over real sockets a RST is passed on, whatever wraps them.
func TestCopyPassesReset(t *testing.T) {
	for _, side := range []int{client, server} {
		addr, conns := accepted(t)
		dial := func() (*net.TCPConn, *net.TCPConn) {
			c, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
			return c.(*net.TCPConn), <-conns
		}
		clientEnd, c := dial()
		serverEnd, s := dial()
		res := make(chan Result, 1)
		go func() { res <- Copy(t.Context(), wrapped{c}, s, CopyOptions{}) }()
		mustWrite(t, clientEnd, "x")
		mustRead(t, serverEnd, "x")
		a, b, want := clientEnd, serverEnd, ClientReset
		if side == server {
			a, b, want = b, a, ServerReset
		}
		reset(t, a)
		mustReset(t, b)
		if x := <-res; x.Cause != want || !errors.Is(x.Err, syscall.ECONNRESET) {
			t.Errorf("%+v", x)
		}
	}
}

// wrapped hides a socket as crypto/tls does.
type wrapped struct{ net.Conn }

func (w wrapped) NetConn() net.Conn { return w.Conn }

func TestCopyOverConn(t *testing.T) {
	addr, servers := accepted(t)
	e := newEngine(t, Options{})
	a, b := dialEngine(t, e, addr), dialEngine(t, e, addr)
	pa, pb := <-servers, <-servers
	if pa.RemoteAddr().String() != a.LocalAddr().String() {
		pa, pb = pb, pa
	}
	res := make(chan Result, 1)
	go func() { res <- Copy(t.Context(), a, b, CopyOptions{}) }()
	payload := bytes.Repeat([]byte("x"), 8<<20)
	go func() { pa.Write(payload); pa.CloseWrite() }()
	if n, err := io.Copy(io.Discard, pb); int(n) != len(payload) || err != nil {
		t.Errorf("%d bytes, %v", n, err)
	}
	mustWrite(t, pb, "y")
	mustRead(t, pa, "y")
	reset(t, pb)
	mustReset(t, pa)
	if x := <-res; x.Cause != ServerReset || x.Up != uint64(len(payload)) || x.Down != 1 {
		t.Errorf("%+v", x)
	}
}
