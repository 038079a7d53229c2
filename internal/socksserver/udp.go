package socksserver

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

// UDP is how a server carries datagrams (RFC 1928 section 7) and how it
// misbehaves at that. With the zero value it carries them, and anybody may
// answer: an association has one outgoing socket for all destinations.
//
// A client's datagrams are those of the address and port that its request
// names. For what it leaves open the control connection's address and the port
// of the first datagram count.
type UDP struct {
	Refuse    byte           // REP for every UDP ASSOCIATE, 7 as a server without UDP; 0: the true one
	HangUp    bool           // close in place of the reply, as ssh -D
	OwnOnly   bool           // REP 2 if the request names another address, and nothing carried if it names no port, as hpsockd
	Bound     netip.AddrPort // BND in the reply: address, port, or both; what is zero is told truly
	BoundName string         // BND.ADDR is this name (ATYP 3); empty: an address
	Names     bool           // replies of those that were asked by name bear the name, as v2ray
	Frag      byte           // FRAG in the header of replies
	AskedOnly bool           // drop replies of those that were not asked, as danted

	// Inside opens the socket that a client sends to, at the address that its
	// control connection came to; Outside the one that destinations see. Nil: a
	// socket of this host.
	Inside  func(at netip.Addr) (PacketConn, error)
	Outside func() (PacketConn, error)

	// OnDatagram learns of each datagram of a client before it is sent on: its
	// address and the target in the header. It is called by many goroutines. Nil:
	// nobody wants to know.
	OnDatagram func(Request)
}

// PacketConn is what a server needs of a UDP socket. *net.UDPConn is one.
type PacketConn interface {
	ReadFromUDPAddrPort(b []byte) (int, netip.AddrPort, error)
	WriteToUDPAddrPort(b []byte, to netip.AddrPort) (int, error)
	Close() error
}

// Counts is what a server has carried in UDP.
type Counts struct {
	Alive, Total      int    // associations
	Up, Down, Dropped uint64 // datagrams: to and from destinations, and those that went no further
}

// Counts returns what s has carried until now.
func (s *Server) Counts() Counts {
	s.mu.Lock()
	defer s.mu.Unlock()
	return Counts{
		Alive: len(s.alive), Total: s.total,
		Up: s.up.Load(), Down: s.down.Load(), Dropped: s.dropped.Load(),
	}
}

// EndAssociations closes the control connections of all associations that are
// alive, as a server does that is restarted.
func (s *Server) EndAssociations() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for a := range s.alive {
		a.control.Close()
	}
}

// associations is the part of a Server that its associations share.
type associations struct {
	mu    sync.Mutex
	alive map[*association]struct{}
	total int

	up, down, dropped atomic.Uint64
}

// association is one of them. Its control connection's goroutine owns it; two
// more read its sockets.
type association struct {
	s               *Server
	control         net.Conn
	inside, outside PacketConn

	mu     sync.Mutex
	client netip.AddrPort            // port 0: not known yet
	asked  map[netip.AddrPort]string // those that were asked, and their names; nil: nobody wants to know
}

const (
	maxHeader   = 4 + 1 + 255 + 2
	maxDatagram = 65535
)

// buffers are shared since most associations wait most of the time.
var buffers = sync.Pool{New: func() any { return new([maxHeader + maxDatagram]byte) }}

// associate serves a request to associate, which names dst, until the control
// connection ends.
func (s *Server) associate(ctx context.Context, c net.Conn, dst flow.Target) {
	a, rep := s.open(c, dst)
	if s.Fault.Reply != 0 {
		rep = s.Fault.Reply
	}
	reply := []byte{5, rep, 0, 1, 0, 0, 0, 0, 0, 0}
	var readers sync.WaitGroup
	defer readers.Wait()
	if a != nil {
		defer a.close()
		if rep == 0 {
			reply = append(reply[:3], a.bound()...)
		}
	}
	if s.UDP.HangUp || s.answer(ctx, c, AtRequest, reply) != nil || rep != 0 {
		return
	}
	readers.Go(func() { a.carryUp(ctx) })
	readers.Go(a.carryDown)
	io.Copy(io.Discard, c)
}

// open opens the sockets of an association and returns REP.
func (s *Server) open(c net.Conn, dst flow.Target) (*association, byte) {
	peer, ok := c.RemoteAddr().(*net.TCPAddr)
	here, ok2 := c.LocalAddr().(*net.TCPAddr)
	switch {
	case s.UDP.Refuse != 0:
		return nil, s.UDP.Refuse
	case !ok || !ok2 || dst.Name != "":
		return nil, 1
	}
	client := netip.AddrPortFrom(dst.Addr.Unmap(), dst.Port)
	from := peer.AddrPort().Addr().Unmap()
	if client.Addr().IsUnspecified() {
		client = netip.AddrPortFrom(from.WithZone(""), client.Port())
	}
	if s.UDP.OwnOnly && client.Addr() != from.WithZone("") {
		return nil, 2
	}
	a := &association{s: s, control: c, client: client}
	if s.UDP.Names || s.UDP.AskedOnly {
		a.asked = make(map[netip.AddrPort]string)
	}
	inside, outside := s.UDP.Inside, s.UDP.Outside
	if inside == nil {
		inside = func(at netip.Addr) (PacketConn, error) { return listenUDP(netip.AddrPortFrom(at, 0)) }
	}
	if outside == nil {
		outside = func() (PacketConn, error) { return listenUDP(netip.AddrPort{}) }
	}
	var err error
	if a.inside, err = inside(here.AddrPort().Addr().Unmap()); err != nil {
		return nil, 1
	}
	if a.outside, err = outside(); err != nil {
		a.inside.Close()
		return nil, 1
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.alive == nil {
		s.alive = make(map[*association]struct{})
	}
	s.alive[a] = struct{}{}
	s.total++
	return a, 0
}

// listenUDP opens a socket of this host; the zero value at is any address of
// both families. Its buffers have room for some of the largest datagrams where
// the kernel lets them.
func listenUDP(at netip.AddrPort) (PacketConn, error) {
	var local *net.UDPAddr
	if at.IsValid() {
		local = net.UDPAddrFromAddrPort(at)
	}
	c, err := net.ListenUDP("udp", local)
	if err != nil {
		return nil, err
	}
	const room = 4 << 20
	c.SetReadBuffer(room)
	c.SetWriteBuffer(room)
	if raw, err := c.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) {
			syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_RCVBUFFORCE, room)
			syscall.SetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_SNDBUFFORCE, room)
		})
	}
	return c, nil
}

// close ends the association.
func (a *association) close() {
	a.s.mu.Lock()
	delete(a.s.alive, a)
	a.s.mu.Unlock()
	a.inside.Close()
	a.outside.Close()
}

// bound returns ATYP, BND.ADDR and BND.PORT of the reply.
func (a *association) bound() []byte {
	udp := &a.s.UDP
	var addr netip.Addr
	var port uint16
	if c, ok := a.inside.(interface{ LocalAddr() net.Addr }); ok {
		if at, ok := c.LocalAddr().(*net.UDPAddr); ok {
			addr, port = at.AddrPort().Addr().Unmap(), at.AddrPort().Port()
		}
	}
	if udp.Bound.Addr().IsValid() {
		addr = udp.Bound.Addr()
	}
	if udp.Bound.Port() != 0 {
		port = udp.Bound.Port()
	}
	var b []byte
	switch {
	case udp.BoundName != "":
		b = append([]byte{3, byte(len(udp.BoundName))}, udp.BoundName...)
	default:
		b = addrBytes(addr)
	}
	return binary.BigEndian.AppendUint16(b, port)
}

// carryUp carries the client's datagrams until a socket or the control
// connection ends.
func (a *association) carryUp(ctx context.Context) {
	defer a.control.Close()
	on := func(b []byte, from netip.AddrPort) bool { return a.toOutside(ctx, b, from) }
	for a.carry(a.inside, on) {
	}
}

// carryDown carries what comes from outside.
func (a *association) carryDown() {
	defer a.control.Close()
	for a.carry(a.outside, a.toClient) {
	}
}

// carry takes a datagram from c and hands it on; b has maxHeader bytes of room
// before it. It reports whether c is still there.
func (a *association) carry(c PacketConn, on func(b []byte, from netip.AddrPort) bool) bool {
	wait(c)
	b := buffers.Get().(*[maxHeader + maxDatagram]byte)
	defer buffers.Put(b)
	n, from, err := c.ReadFromUDPAddrPort(b[maxHeader:])
	if err != nil {
		return false
	}
	if !on(b[:maxHeader+n], netip.AddrPortFrom(from.Addr().Unmap(), from.Port())) {
		a.s.dropped.Add(1)
	}
	return true
}

// wait returns when a socket has something to read, so that a buffer is needed
// only then.
func wait(c PacketConn) {
	socket, ok := c.(syscall.Conn)
	if !ok {
		return
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return
	}
	raw.Read(func(fd uintptr) bool {
		_, _, err := syscall.Recvfrom(int(fd), nil, syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		return err != syscall.EAGAIN
	})
}

// toOutside sends a client's datagram on and reports whether it did.
func (a *association) toOutside(ctx context.Context, b []byte, from netip.AddrPort) bool {
	t, payload, err := parseDatagram(b[maxHeader:])
	if err != nil || !a.isClient(from) {
		return false
	}
	if a.s.UDP.OnDatagram != nil {
		a.s.UDP.OnDatagram(Request{Client: from, Target: t, Network: flow.UDP})
	}
	to := netip.AddrPortFrom(t.Addr, t.Port)
	if t.Name != "" {
		addr, err := a.s.resolve(ctx, t.Name)
		if err != nil {
			return false
		}
		to = netip.AddrPortFrom(addr.Unmap(), t.Port)
	}
	if a.asked != nil {
		a.mu.Lock()
		a.asked[to] = t.Name
		a.mu.Unlock()
	}
	// Counted before, so that whoever has its answer finds it counted.
	a.s.up.Add(1)
	if _, err := a.outside.WriteToUDPAddrPort(payload, to); err != nil {
		a.s.up.Add(^uint64(0))
		return false
	}
	return true
}

// isClient reports whether the client's datagrams come from there, and keeps
// the port that the first of them has.
func (a *association) isClient(from netip.AddrPort) bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	open := a.client.Port() == 0 && !a.s.UDP.OwnOnly
	if from.Addr().WithZone("") != a.client.Addr().WithZone("") || a.client.Port() != from.Port() && !open {
		return false
	}
	a.client = from // with the zone, where it has one
	return true
}

// toClient sends b, which is from outside, with a header to the client and
// reports whether it did.
func (a *association) toClient(b []byte, from netip.AddrPort) bool {
	a.mu.Lock()
	client := a.client
	name, asked := a.asked[from]
	a.mu.Unlock()
	if client.Port() == 0 || a.s.UDP.AskedOnly && !asked {
		return false
	}
	var room [maxHeader]byte
	head := append(room[:0], 0, 0, a.s.UDP.Frag)
	if name != "" && a.s.UDP.Names {
		head = append(append(head, 3, byte(len(name))), name...)
	} else {
		head = append(head, addrBytes(from.Addr())...)
	}
	head = binary.BigEndian.AppendUint16(head, from.Port())
	b = b[maxHeader-len(head):]
	copy(b, head)
	a.s.down.Add(1)
	if _, err := a.inside.WriteToUDPAddrPort(b, client); err != nil {
		a.s.down.Add(^uint64(0))
		return false
	}
	return true
}

// parseDatagram parts a datagram of a client into target and payload.
func parseDatagram(b []byte) (t flow.Target, payload []byte, err error) {
	if len(b) < 5 || b[2] != 0 {
		return t, nil, errDatagram // fragments are not carried, which RFC 1928 allows
	}
	size := 0
	switch b[3] {
	case 1:
		size = 4 + 4 + 2
	case 3:
		size = 4 + 1 + int(b[4]) + 2
	case 4:
		size = 4 + 16 + 2
	}
	if size == 0 || len(b) < size || b[3] == 3 && b[4] == 0 {
		return t, nil, errDatagram
	}
	if addr := b[4 : size-2]; b[3] == 3 {
		t.Name = string(addr[1:])
	} else {
		t.Addr, _ = netip.AddrFromSlice(addr)
		t.Addr = t.Addr.Unmap()
	}
	t.Port = binary.BigEndian.Uint16(b[size-2:])
	return t, b[size:], nil
}

var errDatagram = errors.New("socksserver: no datagram of SOCKS5")

// resolve returns an address of a name.
func (s *Server) resolve(ctx context.Context, name string) (netip.Addr, error) {
	if s.Resolve != nil {
		return s.Resolve(name)
	}
	addrs, err := net.DefaultResolver.LookupNetIP(ctx, "ip", name)
	if err != nil {
		return netip.Addr{}, err
	}
	return addrs[0], nil
}
