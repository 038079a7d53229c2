package fakedns

import (
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/miekg/dns"
	"github.com/tproxyd/tproxyd/pkg/flow"
)

// Verdict is what becomes of a name.
type Verdict uint8

// The verdicts.
const (
	Synthetic  Verdict = iota // gets a synthetic address; nobody is asked
	Real                      // the resolvers' answer
	RealDirect                // the same, its addresses admitted first
	LocalFirst                // the resolvers' answer if there is one, else synthetic
	Refused                   // REFUSED
	NXDomain                  // NXDOMAIN
)

// Asker is who asks, and whom.
type Asker struct {
	Addr    netip.Addr     // the client
	Port    uint16         // its port
	Network flow.Network   // that the question came by
	Server  netip.AddrPort // the resolver that it asked
	IfIndex int            // interface that the question came in by; 0: unknown
}

// Options is what a Server is made of. Decide and Dial are needed.
type Options struct {
	Pool4, Pool6 netip.Prefix  // synthetic addresses; the zero value: none of this family
	Dir          string        // of the file of names; empty: they end with the Server
	Taken        *Handover     // of the Server whose place this one takes, with the same pools and Dir; nil: there is none
	TTL          time.Duration // of synthetic answers; 0: 1 min
	Max          int           // names at most; 0: 7/8 of the smaller pool, at most 1<<20
	Quarantine   time.Duration // how long nobody gets the address of a name that lost it; 0: 1 h
	Timeout      time.Duration // for a question that others are asked; 0: 5 s

	// Decide says what becomes of a name (lower case, no final dot), and
	// whether the same becomes of it for every client. It must not block and
	// not call the Server.
	Decide func(name string, a Asker) (v Verdict, shared bool)
	// Admit lets addresses of a RealDirect name pass, before the client hears
	// of them. After an error the answer is a synthetic address: whoever takes
	// flows to that can dial the name itself.
	Admit func(name string, a Asker, addrs []netip.Addr, ttl time.Duration) error
	// DialRemote connects to a resolver by the way that the name's flows go,
	// for DNS over TCP. nil: questions that need it get SERVFAIL.
	DialRemote func(ctx context.Context, name string, a Asker, resolver netip.AddrPort) (net.Conn, error)
	// Dial connects to a resolver from this host.
	Dial      func(ctx context.Context, network, addr string) (net.Conn, error)
	Resolvers []netip.AddrPort // at first; see SetResolvers
	// ResolversOf returns those that are asked for a name (lower case, no final
	// dot) in place of the others; nil, also as a result: there are none. A change
	// of what it says needs SetResolvers or Reset.
	ResolversOf func(name string) []netip.AddrPort
	Own         func(netip.Addr) bool // is it an address of this host? nil: none is
	// Interface tells by which interface a client's TCP connection came in, as
	// Asker.IfIndex; a client of which it cannot is not answered. nil: 0.
	Interface func(*net.TCPConn) (int, error)
	Log       *slog.Logger // nil: silent
}

const (
	udpSize    = 1232 // what we offer and take by UDP (DNS flag day 2020)
	batch      = 64
	maxSlow    = 1024 // questions at a time that are not answered on the fast path
	maxStreams = 512  // TCP connections of clients at a time
	tcpIdle    = 10 * time.Second
)

// Server answers the questions of intercepted hosts.
type Server struct {
	o       Options
	ttl     uint32
	pool    *pool
	fwd     *forwarder
	gen     atomic.Uint32 // of the rules, for what entries remember of them; never 0 in its low 16 bits
	slow    chan struct{}
	streams chan struct{}
	count   counters

	leftMu sync.Mutex
	left   left
}

type counters struct {
	synthetic, local, remote, refused, failed, dropped atomic.Uint64
}

// Stats is a reading of a Server's counters, in questions since the start.
type Stats struct {
	Synthetic uint64    `json:"synthetic"` // answered from the pool
	Local     uint64    `json:"local"`     // answered by the resolvers or from what they said
	Remote    uint64    `json:"remote"`    // answered through a SOCKS server
	Refused   uint64    `json:"refused"`   // REFUSED or NXDOMAIN, by rule
	Failed    uint64    `json:"failed"`    // SERVFAIL
	Dropped   uint64    `json:"dropped"`   // no DNS, or too many at a time: those get SERVFAIL
	Pool      PoolStats `json:"pool"`
}

// New opens the file of names in o.Dir and returns a server that serves
// nothing yet. What stands in the file is never a reason to fail.
func New(o Options) (*Server, error) {
	def := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	def(&o.TTL, time.Minute)
	def(&o.Quarantine, time.Hour)
	def(&o.Timeout, 5*time.Second)
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Own == nil {
		o.Own = func(netip.Addr) bool { return false }
	}
	p, err := openPool(&o)
	if err != nil {
		return nil, err
	}
	s := &Server{o: o, ttl: uint32(o.TTL / time.Second), pool: p, slow: make(chan struct{}, maxSlow), streams: make(chan struct{}, maxStreams)}
	s.fwd = newForwarder(&s.o)
	s.gen.Store(1)
	return s, nil
}

// Close brings everything to the disk. ServeUDP and ServeTCP must have ended.
func (s *Server) Close() error {
	_, streams := s.Left()
	for _, st := range streams {
		st.Conn.Close()
	}
	return s.pool.close()
}

// Reset forgets what was remembered of verdicts and answers: the rules have
// changed.
func (s *Server) Reset() {
	if s.gen.Add(1)&0xffff == 0 {
		s.gen.Add(1)
	}
	s.fwd.forget()
}

// SetResolvers changes the resolvers, also while questions are answered. A
// question that is under way ends with the old ones.
func (s *Server) SetResolvers(list []netip.AddrPort) { s.fwd.setResolvers(list) }

// Contains tells whether an address is of the pools.
func (s *Server) Contains(a netip.Addr) bool { return s.pool.contains(a) }

// Lookup returns the name that owns a synthetic address.
func (s *Server) Lookup(a netip.Addr) (name string, ok bool) { return s.pool.lookup(a) }

// Pin keeps the name of an address as long as a flow lives; each Pin needs its
// Unpin.
func (s *Server) Pin(a netip.Addr) { s.pool.pin(a, 1) }

// Unpin ends a Pin.
func (s *Server) Unpin(a netip.Addr) { s.pool.pin(a, -1) }

// Stats reads the counters.
func (s *Server) Stats() Stats {
	c := &s.count
	return Stats{c.synthetic.Load(), c.local.Load(), c.remote.Load(), c.refused.Load(), c.failed.Load(), c.dropped.Load(), s.pool.status()}
}

// interruptible is a PacketConn whose reader can be woken, and read what is there.
type interruptible interface {
	flow.PacketSource
	SetReadDeadline(time.Time) error
}

// maxRest is how many batches are still read at the end.
const maxRest = 64

// ServeUDP answers questions on pc until ctx ends, those first that were read
// before. What has come until then is answered too, if pc can be read without
// waiting. It closes pc. What it has not answered is in Left then.
func (s *Server) ServeUDP(ctx context.Context, pc flow.PacketConn, first ...flow.Datagram) error {
	queue, _ := pc.(interruptible)
	stop := context.AfterFunc(ctx, func() {
		if queue == nil || queue.SetReadDeadline(time.Unix(1, 0)) != nil {
			pc.Close()
		}
	})
	defer stop()
	var slow sync.WaitGroup
	defer slow.Wait()
	defer pc.Close()
	u := &udpLoop{s: s, pc: pc, slow: &slow, in: make([]flow.Datagram, batch), out: make([]flow.Datagram, 0, batch), bufs: make([][maxHot]byte, batch)}
	for i := range u.in {
		u.in[i].Data = make([]byte, 0, 4096)
	}
	for ds := range slices.Chunk(first, batch) {
		u.serve(ctx, ds)
	}
	for {
		n, err := pc.ReadBatch(u.room())
		switch {
		case err == nil:
			u.serve(ctx, u.in[:n])
		case errors.Is(err, os.ErrDeadlineExceeded) && queue != nil:
			for range maxRest {
				n, err := queue.TryReadBatch(u.room())
				if n == 0 || err != nil {
					break
				}
				u.serve(ctx, u.in[:n])
				if n < batch { // that was all: who is answered asks anew
					break
				}
			}
			return nil
		case ctx.Err() != nil || errors.Is(err, net.ErrClosed):
			return nil
		default:
			return err
		}
	}
}

// udpLoop is one reader with its buffers.
type udpLoop struct {
	s    *Server
	pc   flow.PacketConn
	mu   sync.Mutex // one writer at a time
	slow *sync.WaitGroup
	in   []flow.Datagram
	out  []flow.Datagram
	bufs [][maxHot]byte
	hot  [batch]bool // was answered on the fast path
	name [256]byte
}

// room is where the next batch goes.
func (u *udpLoop) room() []flow.Datagram {
	for i := range u.in {
		u.in[i].Data = u.in[i].Data[:cap(u.in[i].Data)]
	}
	return u.in
}

// serve answers a batch: what can be answered from the table with one write to
// the file and one to the network, the rest by and by.
func (u *udpLoop) serve(ctx context.Context, ds []flow.Datagram) {
	u.out = u.out[:0]
	busy := 0
	p := u.s.pool
	p.mu.Lock()
	for i := range ds {
		d := &ds[i]
		u.hot[i] = false
		if b := u.s.hot(d, &u.name, u.bufs[i][:0]); b != nil {
			u.hot[i] = true
			u.out = append(u.out, flow.Datagram{Data: b, Src: d.Dst, Dst: d.Src})
			continue
		}
		if u.later(ctx, d) {
			continue
		}
		u.s.count.dropped.Add(1)
		if b := serverFailure(d.Data, &u.name, u.bufs[i][:0]); b != nil {
			u.out = append(u.out, flow.Datagram{Data: b, Src: d.Dst, Dst: d.Src})
			busy++
		}
	}
	p.flush()
	p.mu.Unlock()
	if len(u.out) == 0 {
		return
	}
	if !u.write(u.out) {
		for i := range ds {
			if u.hot[i] {
				u.s.leave(&ds[i])
			}
		}
		return
	}
	u.s.count.synthetic.Add(uint64(len(u.out) - busy))
}

// write sends answers; false if there is nothing any longer to send them by.
// What cannot be sent otherwise is lost, as UDP may be.
func (u *udpLoop) write(ds []flow.Datagram) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	_, err := u.pc.WriteBatch(ds)
	return !errors.Is(err, net.ErrClosed)
}

// hot answers a question of the fast path into b; nil: it is none. The pool's
// lock is held.
func (s *Server) hot(d *flow.Datagram, scratch *[256]byte, b []byte) []byte {
	var q question
	if !q.parse(d.Data, scratch) {
		return nil
	}
	switch q.qtype {
	case dns.TypeA, dns.TypeAAAA, dns.TypeHTTPS, dns.TypeSVCB:
	default:
		return nil
	}
	p, gen := s.pool, uint16(s.gen.Load())
	i := p.t.find(q.name)
	if i == 0 || p.t.entries[i].gen != gen {
		v, shared := s.o.Decide(string(q.name), Asker{Addr: d.Src.Addr(), Port: d.Src.Port(), Network: flow.UDP, Server: d.Dst, IfIndex: d.IfIndex})
		if v != Synthetic {
			return nil
		}
		var err error
		if i, err = p.index(q.name); err != nil {
			return nil // the slow way says so
		}
		if shared {
			p.t.entries[i].gen = gen
		}
	} else {
		p.t.touch(i)
	}
	switch {
	case q.qtype == dns.TypeA && p.v4.IsValid():
		a := p.v4.addr(i).As4()
		return q.address(b, a[:], s.ttl)
	case q.qtype == dns.TypeAAAA && p.v6.IsValid():
		a := p.v6.addr(i).As16()
		return q.address(b, a[:], s.ttl)
	}
	return q.nodata(b, s.ttl)
}

// later answers a question on a goroutine of its own. False: there are too
// many already.
func (u *udpLoop) later(ctx context.Context, d *flow.Datagram) bool {
	s := u.s
	select {
	case s.slow <- struct{}{}:
	default:
		return false
	}
	msg := append([]byte(nil), d.Data...)
	src, dst, ifindex := d.Src, d.Dst, d.IfIndex
	u.slow.Go(func() {
		defer func() { <-s.slow }()
		b := s.answer(ctx, msg, Asker{Addr: src.Addr(), Port: src.Port(), Network: flow.UDP, Server: dst, IfIndex: ifindex}, true)
		if ctx.Err() != nil || b != nil && !u.write([]flow.Datagram{{Data: b, Src: dst, Dst: src}}) {
			s.leave(&flow.Datagram{Data: msg, Src: src, Dst: dst, IfIndex: ifindex})
		}
	})
	return true
}

// answer returns the answer to a message, nil if it deserves none.
func (s *Server) answer(ctx context.Context, msg []byte, a Asker, udp bool) []byte {
	req := new(dns.Msg)
	if err := req.Unpack(msg); err != nil {
		if len(msg) < headerLen || msg[2]&0x80 != 0 {
			s.count.dropped.Add(1)
			return nil
		}
		req = &dns.Msg{MsgHdr: dns.MsgHdr{Id: binary.BigEndian.Uint16(msg)}}
		b, _ := new(dns.Msg).SetRcodeFormatError(req).Pack()
		return b
	}
	if req.Response {
		s.count.dropped.Add(1)
		return nil
	}
	resp := s.handle(ctx, req, a)
	finish(req, resp, udp)
	b, err := resp.Pack()
	if err != nil {
		resp = new(dns.Msg).SetRcode(req, dns.RcodeServerFailure)
		b, _ = resp.Pack()
	}
	return b
}

// finish makes an answer fit its question: id, the question's own spelling,
// EDNS if the client speaks it, and no more than it can take.
func finish(req, resp *dns.Msg, udp bool) {
	resp.Id, resp.Response, resp.Opcode = req.Id, true, req.Opcode
	resp.RecursionDesired, resp.RecursionAvailable = req.RecursionDesired, true
	resp.Question = req.Question
	extra := resp.Extra[:0:0]
	for _, rr := range resp.Extra {
		if rr.Header().Rrtype != dns.TypeOPT {
			extra = append(extra, rr)
		}
	}
	resp.Extra = extra
	size := dns.MinMsgSize
	if opt := req.IsEdns0(); opt != nil {
		size = max(size, min(int(opt.UDPSize()), udpSize))
		resp.SetEdns0(udpSize, opt.Do())
	}
	resp.Compress = true
	if udp {
		resp.Truncate(size)
	}
}

// Fit returns an answer that came by TCP as it may go by UDP: with TC and
// without what is too long, if it does not fit into what the question says the
// client takes (RFC 6891; 512 bytes if it says nothing). What is no DNS is
// returned as it is.
func Fit(question, answer []byte) []byte {
	if len(answer) <= dns.MinMsgSize {
		return answer
	}
	var q, a dns.Msg
	if q.Unpack(question) != nil || a.Unpack(answer) != nil {
		return answer
	}
	size := dns.MinMsgSize
	if opt := q.IsEdns0(); opt != nil {
		size = max(size, int(opt.UDPSize()))
	}
	if len(answer) <= size {
		return answer
	}
	a.Compress = true
	a.Truncate(size)
	if b, err := a.Pack(); err == nil {
		return b
	}
	return answer
}

// Failed returns SERVFAIL for a question, so that who asked need not wait for a
// time-out; nil: it is no question.
func Failed(question []byte) []byte {
	q := new(dns.Msg)
	if q.Unpack(question) != nil || q.Response {
		return nil
	}
	a := new(dns.Msg).SetRcode(q, dns.RcodeServerFailure)
	finish(q, a, true)
	b, err := a.Pack()
	if err != nil {
		return nil
	}
	return b
}
