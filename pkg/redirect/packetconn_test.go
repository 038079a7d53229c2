package redirect

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/tproxyd/tproxyd/pkg/flow"
	"golang.org/x/sys/unix"
)

// TryReadBatch returns at once, and allocates nothing, whether there is
// something or not.
func TestTryReadBatch(t *testing.T) { // alone: allocations are counted
	w := newWorld(t)
	p := worldPlan()
	p.Local = true
	p = w.start(p)
	w.unlisten()
	var err error
	w.gateway.do(func() { w.udp, err = ListenUDP(testMarks, 1) })
	if err != nil {
		t.Fatal(err)
	}
	p.Ports = Ports{UDP: w.udp.Port()}
	w.apply(p)
	ds := make([]flow.Datagram, 8)
	for i := range ds {
		ds[i].Data = make([]byte, 2048)
	}
	text := []byte("one")
	for i, s := range w.udp.Shards()[0] {
		c := w.dialUDP(w.gateway, udpDestinations[i])
		fd := -1
		if err := s.Control(func(n int) error { fd = n; return nil }); err != nil {
			t.Fatal(err)
		}
		if size, err := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_RCVBUF); err != nil || size != 2*receiveBuffer {
			t.Errorf("the receive buffer has %d bytes, %v", size, err)
		}
		raw, err := c.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		var failed error
		raw.Control(func(from uintptr) {
			allocs := testing.AllocsPerRun(50, func() {
				if n, err := s.TryReadBatch(ds); n != 0 || err != nil {
					failed = fmt.Errorf("of nothing: %d, %v", n, err)
				}
				for range 2 {
					if _, err := unix.Write(int(from), text); err != nil {
						failed = err
					}
				}
				for got := 0; got < 2 && failed == nil; {
					n, err := s.TryReadBatch(ds)
					if err != nil {
						failed = err
					}
					got += n
				}
			})
			if allocs != 0 {
				t.Errorf("%v allocations", allocs)
			}
		})
		if failed != nil {
			t.Error(failed)
		}
		if d := ds[0]; string(d.Data) != "one" || d.Dst.String() != udpDestinations[i] {
			t.Errorf("%q came for %s", d.Data, d.Dst)
		}
		s.Close()
		_, err1 := s.TryReadBatch(ds)
		_, err2 := s.ReadBatch(ds)
		_, err3 := s.WriteBatch([]flow.Datagram{{Data: text, Src: netip.MustParseAddrPort(udpDestinations[i]), Dst: c.addr()}})
		err4 := s.Control(func(int) error { return nil })
		for i, err := range []error{err1, err2, err3, err4} {
			if !errors.Is(err, net.ErrClosed) {
				t.Errorf("%d: after Close: %v", i, err)
			}
		}
	}
	w.leaked()
}

// Close ends a wait, and so does a deadline, after which what is there can be read.
func TestCloseEndsRead(t *testing.T) {
	t.Parallel()
	n := newNetns(t)
	var u *UDPListener
	var err error
	n.do(func() { u, err = ListenUDP(testMarks, 1) })
	if err != nil {
		t.Fatal(err)
	}
	s := u.Shards()[0][0].(*packetConn)
	ended := make(chan error)
	go func() {
		_, err := s.ReadBatch([]flow.Datagram{{Data: make([]byte, 1)}})
		ended <- err
	}()
	for { // until it waits
		s.recv.mu.Lock()
		waits := s.recv.poller != nil
		s.recv.mu.Unlock()
		if waits {
			break
		}
		time.Sleep(time.Millisecond)
	}
	if err := s.SetReadDeadline(time.Unix(1, 0)); err != nil {
		t.Error(err)
	}
	if err := <-ended; !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("ReadBatch after its time: %v", err)
	}
	if n, err := s.TryReadBatch([]flow.Datagram{{Data: make([]byte, 1)}}); n != 0 || err != nil {
		t.Errorf("TryReadBatch of nothing: %d, %v", n, err)
	}
	if err := s.SetReadDeadline(time.Time{}); err != nil {
		t.Error(err)
	}
	go func() {
		_, err := s.ReadBatch([]flow.Datagram{{Data: make([]byte, 1)}})
		ended <- err
	}()
	u.Close()
	if err := <-ended; !errors.Is(err, net.ErrClosed) {
		t.Errorf("ReadBatch: %v", err)
	}
	if err := s.SetReadDeadline(time.Time{}); !errors.Is(err, net.ErrClosed) {
		t.Errorf("SetReadDeadline of what is closed: %v", err)
	}
}
