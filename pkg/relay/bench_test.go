package relay

import (
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
)

// relays are what each benchmark compares, in one run: no relay at all, the
// plain Go relay, and the engine. The relay is a process of its own, so that
// its processor time (cpu-us/op, cpu-s/GB) is told from that of the load.
var relays = []string{"direct", "iocopy", "engine"}

func benchRelays(b *testing.B, server func(net.Conn), run func(b *testing.B, addr string, c *child)) {
	for _, kind := range relays {
		b.Run(kind, func(b *testing.B) {
			addr := serve(b, server)
			var c *child
			if kind != "direct" {
				c = startChild(b, kind, addr)
				addr = c.addr
			}
			run(b, addr, c)
		})
	}
}

// BenchmarkConnections is connect, one byte there and back, close; 64 at once.
func BenchmarkConnections(b *testing.B) {
	benchRelays(b, echo, func(b *testing.B, addr string, c *child) {
		one := func() {
			k, err := net.Dial("tcp", addr)
			if err != nil {
				b.Error(err)
				return
			}
			defer k.Close()
			buf := []byte{1}
			if _, err := k.Write(buf); err != nil {
				b.Error(err)
				return
			}
			if _, err := io.ReadFull(k, buf); err != nil {
				b.Error(err)
			}
		}
		one()
		measure(b, c, "cpu-us/op", 1e-3/float64(b.N), func() {
			var left atomic.Int64
			left.Store(int64(b.N))
			var wg sync.WaitGroup
			for range 64 {
				wg.Go(func() {
					for left.Add(-1) >= 0 {
						one()
					}
				})
			}
			wg.Wait()
		})
	})
}

// BenchmarkPingPong is 64 bytes there and back on 64 connections.
func BenchmarkPingPong(b *testing.B) {
	benchRelays(b, echo, func(b *testing.B, addr string, c *child) {
		var conns []net.Conn
		for range 64 {
			k, err := net.Dial("tcp", addr)
			if err != nil {
				b.Fatal(err)
			}
			defer k.Close()
			conns = append(conns, k)
		}
		measure(b, c, "cpu-us/op", 1e-3/float64(b.N), func() {
			var left atomic.Int64
			left.Store(int64(b.N))
			var wg sync.WaitGroup
			for _, k := range conns {
				wg.Go(func() {
					buf := make([]byte, 64)
					for left.Add(-1) >= 0 {
						if _, err := k.Write(buf); err != nil {
							b.Error(err)
							return
						}
						if _, err := io.ReadFull(k, buf); err != nil {
							b.Error(err)
							return
						}
					}
				})
			}
			wg.Wait()
		})
	})
}

// BenchmarkStream is one op for each MiB sent through 8 connections.
func BenchmarkStream(b *testing.B) {
	const streams, mib = 8, 1 << 20
	benchRelays(b, discard, func(b *testing.B, addr string, c *child) {
		b.SetBytes(mib)
		measure(b, c, "cpu-s/GB", 1e-9/(float64(b.N)*mib/1e9), func() {
			var left atomic.Int64
			left.Store(int64(b.N))
			var wg sync.WaitGroup
			for range streams {
				wg.Go(func() {
					k, err := net.Dial("tcp", addr)
					if err != nil {
						b.Error(err)
						return
					}
					defer k.Close()
					buf := make([]byte, 256<<10)
					for left.Add(-1) >= 0 {
						for range mib / len(buf) {
							if _, err := k.Write(buf); err != nil {
								b.Error(err)
								return
							}
						}
					}
					k.(*net.TCPConn).CloseWrite()
					io.Copy(io.Discard, k)
				})
			}
			wg.Wait()
		})
	})
}

// measure times run, and reports the child's processor time in the given
// unit, which is scale times its nanoseconds.
func measure(b *testing.B, c *child, unit string, scale float64, run func()) {
	b.Helper()
	if c == nil {
		b.ResetTimer()
		run()
		return
	}
	before := c.cpu()
	b.ResetTimer()
	run()
	b.StopTimer()
	b.ReportMetric(float64(c.cpu()-before)*scale, unit)
}

func echo(c net.Conn) {
	io.Copy(c, c)
}

// discard reads to the end into the same memory, as a receiver does.
func discard(c net.Conn) {
	buf := make([]byte, 256<<10)
	for {
		if _, err := c.Read(buf); err != nil {
			return
		}
	}
}

// serve runs a server on loopback for the test; handle's connection is closed
// when it returns.
func serve(t testing.TB, handle func(net.Conn)) (addr string) {
	t.Helper()
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				handle(c)
			}()
		}
	}()
	return ln.Addr().String()
}
