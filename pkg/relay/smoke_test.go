package relay

import (
	"context"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"
)

func TestSmoke(t *testing.T) {
	e, err := New(Options{})
	if err != nil {
		t.Fatal(err)
	}
	echo, _ := net.Listen("tcp", "127.0.0.1:0")
	go func() {
		for {
			c, err := echo.Accept()
			if err != nil {
				return
			}
			go func() { io.Copy(c, c); c.Close() }()
		}
	}()
	ln, _ := net.Listen("tcp", "127.0.0.1:0")
	res := make(chan Result, 10)
	go e.Serve(context.Background(), ln.(*net.TCPListener), func(c *Conn) {
		s, err := e.Dial(context.Background(), DialOptions{}, netip.MustParseAddrPort(echo.Addr().String()))
		if err != nil {
			t.Error(err)
			c.Reset()
			return
		}
		e.Join(c, s, JoinOptions{Done: func(r Result) { res <- r }})
	})
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	c.SetDeadline(time.Now().Add(5 * time.Second))
	c.Write([]byte("hello"))
	b := make([]byte, 5)
	if _, err := io.ReadFull(c, b); err != nil {
		t.Fatal(err)
	}
	c.(*net.TCPConn).CloseWrite()
	rest, err := io.ReadAll(c)
	t.Log(string(b), rest, err)
	t.Log(<-res)
	t.Log(e.Stats())
	e.Close()
	t.Log(e.Stats())
}
