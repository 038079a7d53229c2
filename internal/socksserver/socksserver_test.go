package socksserver

import (
	"context"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

// pipes is a listener without sockets, for tests with a clock of their own.
type pipes struct {
	conns  chan net.Conn
	closed chan struct{}
	once   sync.Once
}

func newPipes() *pipes {
	return &pipes{conns: make(chan net.Conn), closed: make(chan struct{})}
}

func (p *pipes) Accept() (net.Conn, error) {
	select {
	case c := <-p.conns:
		return c, nil
	case <-p.closed:
		return nil, net.ErrClosed
	}
}

func (p *pipes) Close() error   { p.once.Do(func() { close(p.closed) }); return nil }
func (p *pipes) Addr() net.Addr { return nil }

func (p *pipes) dial() net.Conn {
	client, server := net.Pipe()
	p.conns <- server
	return client
}

const (
	greeting = "\x05\x02\x00\x02"
	auth     = "\x01\x05alice\x07hunter2"
	request  = "\x05\x01\x00\x03\x0bexample.org\x01\xbb"
	success  = "05000001000000000000"
	garbage  = "485454502f312e30203430302074686973206973206e6f20534f434b530d0a0d0a"
)

// talk says the messages one after the other and returns what one Read, up to
// a minute long, brings after each of them.
func talk(c net.Conn, messages ...string) string {
	var heard []string
	b := make([]byte, 64)
	for _, m := range messages {
		c.SetDeadline(time.Now().Add(time.Minute))
		if m != "" { // a pipe waits for a reader of nothing, too
			if _, err := io.WriteString(c, m); err != nil {
				return strings.Join(append(heard, err.Error()), " ")
			}
		}
		n, err := c.Read(b)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			return strings.Join(append(heard, "silence"), " ")
		case err != nil:
			return strings.Join(append(heard, err.Error()), " ")
		}
		heard = append(heard, hex.EncodeToString(b[:n]))
	}
	return strings.Join(heard, " ")
}

func alice(user, password string) bool { return user == "alice" && password == "hunter2" }

// pipe is a destination that takes everything and says nothing.
func pipe(context.Context, string, string) (net.Conn, error) {
	near, far := net.Pipe()
	go func() {
		defer far.Close()
		io.Copy(io.Discard, far)
	}()
	return near, nil
}

func TestFault(t *testing.T) {
	all := []string{greeting, auth, request}
	tests := []struct {
		name     string
		fault    Fault
		messages []string
		want     string
		took     time.Duration
	}{
		{"none", Fault{}, all, "0502 0100 " + success, 0},
		{"close at greeting", Fault{Close: AtGreeting}, all, "EOF", 0},
		{"close at auth", Fault{Close: AtAuth}, all, "0502 EOF", 0},
		{"close at request", Fault{Close: AtRequest}, all, "0502 0100 EOF", 0},
		{"silent at greeting", Fault{Silent: AtGreeting}, all, "silence", time.Minute},
		{"silent at auth", Fault{Silent: AtAuth}, all, "0502 silence", time.Minute},
		{"silent at request", Fault{Silent: AtRequest}, all, "0502 0100 silence", time.Minute},
		{"garbage at greeting", Fault{Garbage: AtGreeting}, []string{greeting, ""}, garbage + " EOF", 0},
		{"garbage at auth", Fault{Garbage: AtAuth}, []string{greeting, auth, ""}, "0502 " + garbage + " EOF", 0},
		{"garbage at request", Fault{Garbage: AtRequest}, []string{greeting, auth, request, ""}, "0502 0100 " + garbage + " EOF", 0},
		{"delay", Fault{Delay: 3 * time.Second}, all, "0502 0100 " + success, 9 * time.Second},
		{"reply", Fault{Reply: 5}, append(all, ""), "0502 0100 05050001000000000000 EOF", 0},
		{"bytes", Fault{Bytes: true}, []string{greeting, "", auth, "", request, "", "", ""}, "05 02 01 00 05 00 00 01", 7 * time.Millisecond},
		{"not offered", Fault{}, []string{"\x05\x01\x00", ""}, "05ff EOF", 0},
		{"wrong password", Fault{}, []string{greeting, "\x01\x05alice\x01x", ""}, "0502 0101 EOF", 0},
		{"BIND", Fault{}, []string{greeting, auth, "\x05\x02\x00\x01\x7f\x00\x00\x01\x00\x50"}, "0502 0100 05070001000000000000", 0},
		{"address type", Fault{}, []string{greeting, auth, "\x05\x01\x00\x02"}, "0502 0100 05080001000000000000", 0},
		{"SOCKS4", Fault{}, []string{"\x04\x01"}, "EOF", 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			// What is left behind by Serve fails the bubble.
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				ln := newPipes()
				s := &Server{Dial: pipe, Auth: alice, Fault: tt.fault}
				done := make(chan error)
				go func() { done <- s.Serve(ctx, ln) }()
				c := ln.dial()
				defer c.Close()
				start := time.Now()
				if got := talk(c, tt.messages...); got != tt.want {
					t.Errorf("heard %s\nwant  %s", got, tt.want)
				}
				if took := time.Since(start); took != tt.took {
					t.Errorf("took %v, want %v", took, tt.took)
				}
				cancel()
				if err := <-done; err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// TestServeEnds ends the context while connections are at every point.
func TestServeEnds(t *testing.T) {
	for name, fault := range map[string]Fault{
		"none": {}, "silent": {Silent: AtGreeting}, "delay": {Delay: time.Hour},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancel(t.Context())
				ln := newPipes()
				s := &Server{Dial: pipe, Fault: fault}
				done := make(chan error)
				go func() { done <- s.Serve(ctx, ln) }()
				var clients []net.Conn
				for _, messages := range [][]string{{}, {greeting}, {greeting, request}} {
					c := ln.dial()
					defer c.Close()
					clients = append(clients, c)
					talk(c, messages...)
				}
				start := time.Now()
				cancel()
				if err := <-done; err != nil {
					t.Error(err)
				}
				for i, c := range clients {
					c.SetDeadline(time.Time{})
					if _, err := c.Read(make([]byte, 1)); err != io.EOF {
						t.Errorf("client %d: %v", i, err)
					}
				}
				if took := time.Since(start); took != 0 {
					t.Errorf("took %v", took)
				}
			})
		})
	}
}

// TestServeFails wants the listener's error, and no connection left.
func TestServeFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ln := newPipes()
		done := make(chan error)
		go func() { done <- (&Server{}).Serve(t.Context(), ln) }()
		c := ln.dial()
		defer c.Close()
		ln.Close()
		if err := <-done; err != net.ErrClosed {
			t.Error(err)
		}
		if _, err := c.Read(make([]byte, 1)); err != io.EOF {
			t.Error(err)
		}
	})
}

// TestCarry goes over real sockets: a name, an answer after the client's end,
// and a destination that refuses.
func TestCarry(t *testing.T) {
	listen := func() net.Listener {
		ln, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { ln.Close() })
		return ln
	}
	echo := listen()
	go func() {
		c, err := echo.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		all, _ := io.ReadAll(c) // until the client's end
		c.Write(all)
	}()
	closed := listen()
	closed.Close()

	var asked []Request
	port := func(ln net.Listener) uint16 { return ln.Addr().(*net.TCPAddr).AddrPort().Port() }
	ctx, cancel := context.WithCancel(t.Context())
	ln := listen()
	s := &Server{
		Auth: alice,
		Resolve: func(name string) (netip.Addr, error) {
			if name == "example.org" {
				return netip.MustParseAddr("127.0.0.1"), nil
			}
			return netip.Addr{}, errors.New("no such name")
		},
		OnRequest: func(r Request) { asked = append(asked, r) },
	}
	done := make(chan error)
	go func() { done <- s.Serve(ctx, ln) }()

	ask := func(name string, port uint16) (net.Conn, string) {
		c, err := net.Dial("tcp", ln.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		r := "\x05\x01\x00\x03" + string([]byte{byte(len(name))}) + name + string([]byte{byte(port >> 8), byte(port)})
		return c, talk(c, greeting, auth, r)
	}
	c, heard := ask("example.org", port(echo))
	if !strings.HasPrefix(heard, "0502 0100 050000017f000001") {
		t.Fatal(heard)
	}
	io.WriteString(c, "hello")
	c.(*net.TCPConn).CloseWrite()
	if b, err := io.ReadAll(c); string(b) != "hello" || err != nil {
		t.Errorf("%q, %v", b, err)
	}
	if _, heard := ask("example.org", port(closed)); heard != "0502 0100 05050001000000000000" {
		t.Errorf("refused: %s", heard)
	}
	if _, heard := ask("nowhere.test", 80); heard != "0502 0100 05040001000000000000" {
		t.Errorf("no such name: %s", heard)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	want := []Request{
		{User: "alice", Target: flow.Target{Name: "example.org", Port: port(echo)}},
		{User: "alice", Target: flow.Target{Name: "example.org", Port: port(closed)}},
		{User: "alice", Target: flow.Target{Name: "nowhere.test", Port: 80}},
	}
	if diff := cmp.Diff(want, asked, cmpopts.IgnoreFields(Request{}, "Client"), cmpopts.EquateComparable(netip.Addr{})); diff != "" {
		t.Errorf("asked for (-want +got):\n%s", diff)
	}
	for _, r := range asked {
		if r.Client.Addr() != netip.MustParseAddr("127.0.0.1") {
			t.Errorf("client %v", r.Client)
		}
	}
}
