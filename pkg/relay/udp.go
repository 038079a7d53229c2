package relay

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tproxyd/tproxyd/pkg/flow"
	"golang.org/x/sys/unix"
)

// What a UDP holds at most, unless its options say less.
const (
	// UDPMaxSessions is the number of client sockets that are served at once.
	UDPMaxSessions = 16384
	// UDPMaxFlows is the number of destinations of all of them.
	UDPMaxFlows = 65536
	// UDPMaxQueued is the number of bytes of datagrams that wait for their
	// outlet to be opened.
	UDPMaxQueued = 32 << 20

	// UDPMaxMemory is what all of that takes at most, in bytes; not the buffers of
	// the kernel's sockets, which net.ipv4.udp_mem bounds.
	UDPMaxMemory = UDPMaxSessions*sessionMemory + UDPMaxFlows*flowMemory + UDPMaxQueued

	sessionMemory = 4 << 10 // of a session with its outlet, as the garbage collector lets it grow
	flowMemory    = 2 << 10 // of a flow, likewise

	maxSessionFlows = 8192 // destinations of one client socket
	maxOutletQueue  = 64   // datagrams that wait for one outlet
)

// Limits of inactivity where SetLimits was not called.
const (
	defaultUDPIdle   = 5 * time.Minute // RFC 4787, REQ-5
	defaultShortIdle = 17 * time.Second
)

// Refusal is how a datagram that is not carried is answered.
type Refusal uint8

// The refusals: three kinds of ICMP error, and none.
const (
	RefusePort       Refusal = iota // port unreachable: a connected socket sees ECONNREFUSED
	RefuseHost                      // host unreachable
	RefuseNet                       // network unreachable
	RefuseProhibited                // prohibited by administration
	RefuseSilently
)

// Verdict is what becomes of the datagrams of a flow.
type Verdict struct {
	Way     *Way    // nil: they are refused
	Refusal Refusal // how, if so
	// Header goes before each datagram on its way out. What comes back has one
	// that UDPOptions.Header reads; if Header is nil nothing goes before, and the
	// Way must lead to this destination alone.
	Header []byte
	// Named says that replies cannot be told from those of another named
	// destination on the same port: the two never share an outlet.
	Named bool
	// Short says that the flow is over with its answer, as a DNS question is,
	// and goes by the shorter limit.
	Short bool
	// Idle is the limit of inactivity of a flow that is not Short; 0: that of
	// SetLimits.
	Idle time.Duration
	// Why is of no meaning here; for SessionResult.
	Why any
	// Up and Down are added to as bytes of the flow move; nil: they are not.
	Up, Down *atomic.Uint64
	// Release is called once, when the flow ends or is decided anew. It must not
	// block; nil: nothing is called.
	Release func()
}

// Way is how an outlet is opened.
type Way struct {
	// Key says which ways are the same: flows of one session with equal keys
	// share an outlet.
	Key string
	// Open makes the outlet; it may block until ctx ends. First is the Via of
	// the last outlet that this session had by this Key, nil if it had none.
	Open func(ctx context.Context, first any) (Outlet, error)
	// Refusal says what the client is told of an error of Open.
	Refusal func(error) Refusal
}

// Outlet is a socket that datagrams of one session leave by, and their answers
// come back. The UDP owns the socket and the connections.
type Outlet struct {
	Socket  *Packet
	Control []*Conn // if one of them ends, or says anything, the outlet has ended
	Via     any     // of no meaning here; for Way.Open and SessionResult

	// Outer goes before the header of each datagram on its way out. Inner returns
	// the length of what stands there in what comes back, false if that is not
	// from where it should be. Both or neither.
	Outer []byte
	Inner func(b []byte) (n int, ok bool)
}

// UDPOptions says what a [UDP] is made of. Sources, Decide, Header, FlowSocket
// and Refuse are needed.
type UDPOptions struct {
	// Sources are the sockets that clients' datagrams come from, one list for
	// each loop; what one client socket sends must come to one loop. The UDP
	// reads them until Close, and leaves closing them to the caller.
	Sources [][]flow.PacketSource
	// Decide says what becomes of a flow. It is called by the loops, so it must
	// not block, with the interface that the client's datagram came in by.
	Decide func(client, dst netip.AddrPort, ifIndex int) Verdict
	// Header reads the header of a datagram that came back: who sent it, by
	// address or by name, and its length.
	Header func(b []byte) (from netip.AddrPort, name []byte, n int, err error)
	// FlowSocket makes a non-blocking UDP socket that has the flow's destination
	// as its own address and is connected to the client. The UDP owns it.
	FlowSocket func(client, dst netip.AddrPort) (fd int, err error)
	// Refuse answers a datagram with an ICMP error, TooBig with that which says
	// that its path has the given MTU. Neither may block or keep d. TooBig may
	// be nil.
	Refuse func(d flow.Datagram, r Refusal)
	TooBig func(d flow.Datagram, mtu int)
	Done   func(SessionResult) // called by the loop when a session has ended; nil: not wanted
	ID     func() uint64       // gives out the IDs of flows, by any loop; nil: they are counted

	Paused bool // the sources are not read before the first Attach

	MaxSessions int          // 0: UDPMaxSessions
	MaxFlows    int          // 0: UDPMaxFlows
	MaxQueued   int          // bytes; 0: UDPMaxQueued
	MaxSockets  int          // of outlets and flows; 0: a quarter of RLIMIT_NOFILE
	Beside      *Engine      // with which it shares the descriptors of the process; nil: none
	Log         *slog.Logger // nil: silent

	tick time.Duration // of the clock for limits; 0: 1 s
}

// SessionResult is what became of a session.
type SessionResult struct {
	Client   netip.AddrPort
	IfIndex  int
	Dst      netip.AddrPort // the first of its destinations
	Flows    int            // destinations in all
	Via      []any          // of the outlets that it had, each once, 16 at most
	Why      []any          // of its verdicts, likewise
	Duration time.Duration
	UDPTraffic
}

// UDPTraffic counts datagrams and their bytes, headers not included.
type UDPTraffic struct {
	UpDatagrams   uint64 `json:"datagrams_up"`   // from clients
	DownDatagrams uint64 `json:"datagrams_down"` // to clients
	Up            uint64 `json:"up"`             // bytes
	Down          uint64 `json:"down"`           // bytes
}

// Drop is why a datagram was dropped.
type Drop uint8

// The reasons.
const (
	DropQueue     Drop = iota // its outlet was still being opened and its queue was full
	DropLimit                 // no session, flow or socket more was to be had
	DropTooLong               // it does not fit behind its header
	DropFull                  // the kernel had no room for it
	DropMalformed             // what came back has no header that makes sense
	DropStranger              // it came back from an address that nobody asked, and the rules do not let it in
	DropOutlet                // its outlet broke
	drops
)

// String returns the reason as metrics spell it.
func (d Drop) String() string {
	return [...]string{"queue", "limit", "toolong", "full", "malformed", "stranger", "outlet"}[d]
}

// UDPStats is a snapshot of what a [UDP] holds and has done.
type UDPStats struct {
	Sessions     int    `json:"sessions"`     // now
	Flows        int    `json:"flows"`        // now: destinations of all sessions
	Outlets      int    `json:"outlets"`      // now
	Sockets      int    `json:"sockets"`      // now: of outlets and flows
	MaxSessions  int    `json:"max_sessions"` // that there may be
	MaxFlows     int    `json:"max_flows"`    // likewise
	MaxSockets   int    `json:"max_sockets"`  // likewise
	Opened       uint64 `json:"opened"`       // sessions since the start
	Associations uint64 `json:"associations"` // outlets opened since the start
	Evicted      uint64 `json:"evicted"`      // flows ended early, to make room
	Refused      uint64 `json:"refused"`      // datagrams answered with an ICMP error
	UDPTraffic
	Dropped map[string]uint64 `json:"dropped"` // datagrams, by Drop
}

// UDP carries datagrams between client sockets and outlets. Make it with
// [NewUDP].
type UDP struct {
	o      UDPOptions
	log    *slog.Logger
	shards []*shard

	epoch     atomic.Uint32 // of the decisions; see Invalidate
	now       atomic.Uint32 // ticks
	idle      atomic.Uint32 // ticks
	short     atomic.Uint32 // ticks
	ids       atomic.Uint64
	sockets   atomic.Int64
	queued    atomic.Int64 // bytes
	sessions  atomic.Int64
	flows     atomic.Int64
	outlets   atomic.Int64
	opened    atomic.Uint64
	associate atomic.Uint64
	evicted   atomic.Uint64
	refused   atomic.Uint64
	up, upN   atomic.Uint64
	down      atomic.Uint64
	downN     atomic.Uint64
	dropped   [drops]atomic.Uint64

	ctx      context.Context
	cancel   context.CancelFunc
	closing  sync.Once
	losses   chan error     // see Watch
	routines sync.WaitGroup // loops and the clock
	opening  sync.WaitGroup // calls of Way.Open
}

// NewUDP starts the loops. [UDP.Close] ends them.
func NewUDP(o UDPOptions) (*UDP, error) {
	if len(o.Sources) == 0 || o.Decide == nil || o.Header == nil || o.FlowSocket == nil || o.Refuse == nil {
		return nil, errors.New("relay: UDPOptions lacks a field that is needed")
	}
	for _, d := range []struct {
		field *int
		def   int
	}{{&o.MaxSessions, UDPMaxSessions}, {&o.MaxFlows, UDPMaxFlows}, {&o.MaxQueued, UDPMaxQueued}} {
		if *d.field <= 0 {
			*d.field = d.def
		}
	}
	if o.MaxSockets <= 0 {
		n, err := udpSockets()
		if err != nil {
			return nil, err
		}
		o.MaxSockets = n
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.tick <= 0 {
		o.tick = time.Second
	}
	u := &UDP{o: o, log: o.Log, losses: make(chan error, 1)}
	if u.o.ID == nil {
		u.o.ID = func() uint64 { return u.ids.Add(1) }
	}
	u.SetLimits(0, 0)
	u.ctx, u.cancel = context.WithCancel(context.Background())
	for _, sources := range o.Sources {
		sh, err := newShard(u, sources)
		if err != nil {
			for _, sh := range u.shards {
				sh.release()
			}
			u.cancel()
			return nil, fmt.Errorf("relay: loop of datagrams: %w", err)
		}
		u.shards = append(u.shards, sh)
	}
	for _, sh := range u.shards {
		u.routines.Go(sh.run)
	}
	u.routines.Go(u.runClock)
	return u, nil
}

// udpSockets is the part of the descriptors that UDP may use.
func udpSockets() (int, error) {
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err != nil {
		return 0, os.NewSyscallError("getrlimit", err)
	}
	return int(min(r.Cur, maxFD) / udpShare), nil
}

// Parts of RLIMIT_NOFILE, as one over it: what UDP may have, and what of it TCP
// leaves to it in any case.
const (
	udpShare = 4
	udpKept  = 16
)

// SetLimits sets the time that a flow may be without a datagram in either
// direction, and that of flows which are over with their answer; 0: 5 minutes
// and 17 seconds.
func (u *UDP) SetLimits(idle, short time.Duration) {
	if idle <= 0 {
		idle = defaultUDPIdle
	}
	if short <= 0 {
		short = defaultShortIdle
	}
	u.idle.Store(u.ticks(idle))
	u.short.Store(u.ticks(min(short, idle)))
}

// ticks turns a limit into ticks, rounded up.
func (u *UDP) ticks(d time.Duration) uint32 {
	return uint32(min((d+u.o.tick-1)/u.o.tick, 1<<30))
}

// Invalidate has every flow decided anew before another datagram of it moves.
// A flow that goes on as it did keeps its outlet; any other ends, and begins
// anew with the client's next datagram.
func (u *UDP) Invalidate() {
	u.epoch.Add(1)
	for _, sh := range u.shards {
		sh.wake()
	}
}

// Close ends all sessions and waits until everything has ended. It must not be
// called by a function that was handed in.
func (u *UDP) Close() error {
	u.closing.Do(func() {
		u.cancel()
		for _, sh := range u.shards {
			sh.stop()
		}
		u.routines.Wait()
		u.opening.Wait()
	})
	return nil
}

func (u *UDP) runClock() {
	t := time.NewTicker(u.o.tick)
	defer t.Stop()
	for {
		select {
		case <-u.ctx.Done():
			return
		case <-t.C:
		}
		u.now.Add(1)
		for _, sh := range u.shards {
			sh.wake()
		}
	}
}

func (u *UDP) drop(why Drop, n int) { u.dropped[why].Add(uint64(n)) }

// Stats returns the figures of now.
func (u *UDP) Stats() UDPStats {
	s := UDPStats{
		Sessions: int(u.sessions.Load()), Flows: int(u.flows.Load()),
		Outlets: int(u.outlets.Load()), Sockets: int(u.sockets.Load()),
		MaxSessions: u.o.MaxSessions, MaxFlows: u.o.MaxFlows, MaxSockets: u.o.MaxSockets,
		Opened: u.opened.Load(), Associations: u.associate.Load(),
		Evicted: u.evicted.Load(), Refused: u.refused.Load(),
		UDPTraffic: UDPTraffic{UpDatagrams: u.upN.Load(), DownDatagrams: u.downN.Load(), Up: u.up.Load(), Down: u.down.Load()},
		Dropped:    map[string]uint64{},
	}
	for why := range drops {
		s.Dropped[why.String()] = u.dropped[why].Load()
	}
	return s
}
