package relay

import (
	"context"
	"net"
	"sync"
	"testing"
	"time"
)

// TestCloseBesideServe: an engine may be closed at any moment of a Serve, also
// while clients are accepted and before it has begun.
func TestCloseBesideServe(t *testing.T) {
	for i := range 50 {
		e, err := New(Options{})
		if err != nil {
			t.Fatal(err)
		}
		ln, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			t.Fatal(err)
		}
		var wg sync.WaitGroup
		served := make(chan error, 1)
		wg.Go(func() { served <- e.Serve(context.Background(), ln, func(c *Conn) { c.Reset() }) })
		for range 4 {
			wg.Go(func() {
				for range 5 {
					if c, err := net.DialTimeout("tcp", ln.Addr().String(), time.Second); err == nil {
						c.Close()
					}
				}
			})
		}
		time.Sleep(time.Duration(i) * 20 * time.Microsecond)
		e.Close()
		if err := <-served; err != net.ErrClosed {
			t.Fatal(err)
		}
		ln.Close()
		wg.Wait()
	}
}
