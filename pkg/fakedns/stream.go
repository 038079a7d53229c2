package fakedns

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"syscall"
	"time"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

// ServeTCP answers DNS over TCP on ln until ctx ends, and on the connections that
// another one has begun with. It closes ln. What is still open is in Left then.
func (s *Server) ServeTCP(ctx context.Context, ln net.Listener, first ...Stream) error {
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer stop()
	var wg sync.WaitGroup
	defer wg.Wait()
	serve := func(st Stream) {
		select {
		case s.streams <- struct{}{}:
		default:
			s.count.dropped.Add(1)
			st.Conn.Close()
			return
		}
		wg.Go(func() {
			defer func() { <-s.streams }()
			if s.serveStream(ctx, &st) {
				s.leaveStream(st)
			} else {
				st.Conn.Close()
			}
		})
	}
	for _, st := range first {
		serve(st)
	}
	door := &door{ln: ln, away: func() { s.count.dropped.Add(1) }}
	door.restore()
	defer door.close()
	for {
		c, err := door.accept()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return nil
			}
			return err
		}
		tcp, ok := c.(*net.TCPConn)
		if !ok {
			c.Close()
			return fmt.Errorf("fakedns: a listener of %T, not of TCP", c)
		}
		serve(Stream{Conn: tcp})
	}
}

// door lets clients in. It keeps a descriptor back, so that when there is no other a
// client is turned away, and does not wait.
type door struct {
	ln    net.Listener
	away  func()   // is called when one was
	spare *os.File // nil: it is in use, or there was none
}

func (d *door) accept() (net.Conn, error) {
	for {
		c, err := d.ln.Accept()
		switch {
		case err == nil && d.restore():
			return c, nil
		case err == nil: // it has the place of the spare one
			if tcp, ok := c.(*net.TCPConn); ok {
				tcp.SetLinger(0)
			}
			c.Close()
			d.away()
			d.restore()
		case !isTemporary(err):
			return nil, err
		case d.spare != nil:
			d.close() // for the next try
		default:
			time.Sleep(10 * time.Millisecond)
			d.restore()
		}
	}
}

// restore tells whether there is a descriptor that is kept back.
func (d *door) restore() bool {
	if d.spare == nil {
		d.spare, _ = os.Open(os.DevNull)
	}
	return d.spare != nil
}

func (d *door) close() {
	d.spare.Close() // of nil too
	d.spare = nil
}

// isTemporary tells errors of accept(2) that pass: no descriptors, no memory, no
// watch of epoll, a client that left.
func isTemporary(err error) bool {
	for _, e := range []syscall.Errno{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.ENOSPC, syscall.ECONNABORTED} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// serveStream answers a client's questions one after the other. True: the client
// is there, and ctx has ended, with what it said since the last answer in st.
func (s *Server) serveStream(ctx context.Context, st *Stream) (open bool) {
	c := st.Conn
	if s.o.Interface != nil && st.IfIndex == 0 {
		var err error
		if st.IfIndex, err = s.o.Interface(c); err != nil {
			s.o.Log.Debug("the interface of a client", "err", err)
			s.count.dropped.Add(1)
			return false
		}
	}
	client := addrPort(c.RemoteAddr())
	a := Asker{Addr: client.Addr(), Port: client.Port(), Network: flow.TCP, Server: addrPort(c.LocalAddr()), IfIndex: st.IfIndex}
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		c.SetReadDeadline(time.Unix(1, 0))
		close(interrupted)
	})
	defer func() {
		if !stop() {
			<-interrupted // it must not end what serves the connection next
		}
	}()
	for {
		c.SetDeadline(time.Now().Add(tcpIdle))
		if ctx.Err() != nil {
			return true // after the deadline was set, since the other one may have been before
		}
		msg, err := st.message()
		if err != nil {
			return ctx.Err() != nil && errors.Is(err, os.ErrDeadlineExceeded)
		}
		c.SetWriteDeadline(time.Now().Add(tcpIdle + s.o.Timeout))
		b := s.answer(ctx, msg, a, false)
		if ctx.Err() != nil {
			return true
		}
		if b == nil {
			return false
		}
		out := binary.BigEndian.AppendUint16(make([]byte, 0, 2+len(b)), uint16(len(b)))
		if _, err := c.Write(append(out, b...)); err != nil {
			return false
		}
		st.Read = st.Read[:0]
	}
}

// message reads on until a message is whole. It stays in st.Read, behind its
// length.
func (st *Stream) message() ([]byte, error) {
	want := 2
	for {
		if have := len(st.Read); have >= 2 {
			want = 2 + int(binary.BigEndian.Uint16(st.Read))
			if have >= want {
				return st.Read[2:want], nil
			}
		}
		st.Read = slices.Grow(st.Read, want-len(st.Read))
		n, err := st.Conn.Read(st.Read[len(st.Read):want])
		st.Read = st.Read[:len(st.Read)+n]
		if err != nil && n == 0 {
			return nil, err
		}
	}
}

func addrPort(a net.Addr) netip.AddrPort {
	if t, ok := a.(*net.TCPAddr); ok {
		ap := t.AddrPort()
		return netip.AddrPortFrom(ap.Addr().Unmap(), ap.Port())
	}
	return netip.AddrPort{}
}
