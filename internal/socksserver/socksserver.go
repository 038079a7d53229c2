// Package socksserver is a small SOCKS5 server (RFC 1928: CONNECT and UDP
// ASSOCIATE; RFC 1929) for the demonstration and for tests, which can script
// its faults. It is not meant to serve anybody else.
package socksserver

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"syscall"
	"time"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

// Request is what a client asked for.
type Request struct {
	Client  netip.AddrPort
	User    string       // empty: no authentication
	Network flow.Network // flow.UDP: UDP ASSOCIATE
	Target  flow.Target
}

// Stage is a point of the conversation.
type Stage uint8

// The stages, in their order.
const (
	Never      Stage = iota
	AtGreeting       // when the greeting has come
	AtAuth           // when user name and password have come
	AtRequest        // when the request has come
)

// Fault is how a server misbehaves. The zero value behaves.
type Fault struct {
	Close   Stage         // close there
	Silent  Stage         // say nothing more from there on, until the client leaves
	Garbage Stage         // answer there with bytes that are no SOCKS
	Delay   time.Duration // before each answer
	Reply   byte          // REP for every request; 0: the true one
	Bytes   bool          // send answers a byte at a time
}

// Server is one SOCKS5 server. Its fields are set before Serve. It is not to be
// copied after that.
type Server struct {
	Dial      func(ctx context.Context, network, addr string) (net.Conn, error) // nil: from this host
	Resolve   func(name string) (netip.Addr, error)                             // nil: Dial resolves, and this host for datagrams
	Auth      func(user, password string) bool                                  // nil: no authentication
	OnRequest func(Request)                                                     // nil: nobody wants to know
	Fault     Fault
	UDP       UDP

	associations
}

// Serve serves ln until ctx ends, and returns when every connection of it has
// ended. It closes ln.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	stop := context.AfterFunc(ctx, func() { ln.Close() })
	defer stop()
	for {
		c, err := ln.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		wg.Go(func() { s.serve(ctx, c) })
	}
}

var errScripted = errors.New("socksserver: scripted fault")

func (s *Server) serve(ctx context.Context, c net.Conn) {
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	defer c.Close()
	r, err := s.handshake(ctx, c)
	if err != nil {
		return
	}
	if r.Network == flow.UDP {
		s.associate(ctx, c, r.Target)
		return
	}
	server, rep := s.connect(ctx, r.Target)
	if s.Fault.Reply != 0 {
		rep = s.Fault.Reply
	}
	reply := []byte{5, rep, 0, 1, 0, 0, 0, 0, 0, 0}
	if server != nil {
		defer server.Close()
		stop := context.AfterFunc(ctx, func() { server.Close() })
		defer stop()
		if a, ok := server.LocalAddr().(*net.TCPAddr); ok {
			ap := a.AddrPort()
			reply = append(reply[:3], addrBytes(ap.Addr().Unmap())...)
			reply = binary.BigEndian.AppendUint16(reply, ap.Port())
		}
	}
	if s.answer(ctx, c, AtRequest, reply) != nil || rep != 0 {
		return
	}
	relay(c, server)
}

func addrBytes(a netip.Addr) []byte {
	if a.Is4() {
		return append([]byte{1}, a.AsSlice()...)
	}
	return append([]byte{4}, a.AsSlice()...)
}

// handshake reads greeting, authentication and request.
func (s *Server) handshake(ctx context.Context, c net.Conn) (r Request, err error) {
	b := make([]byte, 513)
	read := func(n int) []byte {
		if err == nil {
			_, err = io.ReadFull(c, b[:n])
		}
		return b[:n]
	}
	if n := read(2); err == nil && n[0] != 5 {
		return r, errors.New("socksserver: not SOCKS5")
	}
	offered := read(int(b[1]))
	if err != nil {
		return r, err
	}
	method := byte(0)
	if s.Auth != nil {
		method = 2
	}
	if !bytes.Contains(offered, []byte{method}) {
		method = 0xff
	}
	if err := s.answer(ctx, c, AtGreeting, []byte{5, method}); err != nil {
		return r, err
	}
	if method == 0xff {
		return r, errors.New("socksserver: the client does not offer the method")
	}
	if a, ok := c.RemoteAddr().(*net.TCPAddr); ok {
		r.Client = a.AddrPort()
	}
	if s.Auth != nil {
		read(2)
		r.User = string(read(int(b[1])))
		read(1)
		password := string(read(int(b[0])))
		if err != nil {
			return r, err
		}
		status := byte(1)
		if s.Auth(r.User, password) {
			status = 0
		}
		if err := s.answer(ctx, c, AtAuth, []byte{1, status}); err != nil || status != 0 {
			return r, errors.Join(err, errScripted)
		}
	}
	head := read(4)
	if err != nil {
		return r, err
	}
	command := head[1]
	var t flow.Target
	switch head[3] {
	case 1:
		t.Addr = netip.AddrFrom4([4]byte(read(4)))
	case 3:
		read(1)
		t.Name = string(read(int(b[0])))
	case 4:
		t.Addr = netip.AddrFrom16([16]byte(read(16)))
	default:
		c.Write([]byte{5, 8, 0, 1, 0, 0, 0, 0, 0, 0})
		return r, errors.New("socksserver: unknown address type")
	}
	t.Port = binary.BigEndian.Uint16(read(2))
	r.Target = t
	switch command {
	case 1:
	case 3:
		r.Network = flow.UDP
	default:
		c.Write([]byte{5, 7, 0, 1, 0, 0, 0, 0, 0, 0})
		return r, errors.New("socksserver: only CONNECT and UDP ASSOCIATE")
	}
	if err == nil && s.OnRequest != nil {
		s.OnRequest(r)
	}
	return r, err
}

// answer sends b, or does what the script says of this stage.
func (s *Server) answer(ctx context.Context, c net.Conn, at Stage, b []byte) error {
	if s.Fault.Delay > 0 {
		select {
		case <-time.After(s.Fault.Delay):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	switch at {
	case s.Fault.Close:
		return errScripted
	case s.Fault.Silent:
		io.Copy(io.Discard, c)
		return errScripted
	case s.Fault.Garbage:
		c.Write([]byte("HTTP/1.0 400 this is no SOCKS\r\n\r\n"))
		return errScripted
	}
	if !s.Fault.Bytes {
		_, err := c.Write(b)
		return err
	}
	for i := range b {
		if _, err := c.Write(b[i : i+1]); err != nil {
			return err
		}
		time.Sleep(time.Millisecond)
	}
	return nil
}

// connect dials the target and returns REP.
func (s *Server) connect(ctx context.Context, t flow.Target) (net.Conn, byte) {
	if t.Name != "" && s.Resolve != nil {
		a, err := s.Resolve(t.Name)
		if err != nil {
			return nil, 4
		}
		t = flow.Target{Addr: a, Port: t.Port}
	}
	dial := s.Dial
	if dial == nil {
		dial = (&net.Dialer{}).DialContext
	}
	c, err := dial(ctx, "tcp", t.String())
	switch {
	case err == nil:
		return c, 0
	case errors.Is(err, syscall.ECONNREFUSED):
		return nil, 5
	case errors.Is(err, syscall.ENETUNREACH):
		return nil, 3
	case errors.Is(err, syscall.EHOSTUNREACH):
		return nil, 4
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, syscall.ETIMEDOUT):
		return nil, 6
	}
	return nil, 1
}

// relay carries both directions, each to its own end.
func relay(client, server net.Conn) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		copyHalf(server, client)
	}()
	copyHalf(client, server)
	<-done
}

func copyHalf(dst, src net.Conn) {
	if _, err := io.Copy(dst, src); err != nil {
		dst.Close()
		src.Close()
		return
	}
	if c, ok := dst.(interface{ CloseWrite() error }); ok {
		c.CloseWrite()
	}
}
