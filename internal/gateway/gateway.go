// Package gateway is what becomes of one flow: its name, the decision, the
// upstream connection, the relay. It knows no kernel and no wire format; what
// it needs of both is handed down to it.
//
// It promises that a flow is carried the way that the rules decided or not at
// all, that a client whose flow cannot be carried sees a reset at once, and
// that a new plan changes no proxied flow that runs.
package gateway

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tproxyd/tproxyd/pkg/flow"
	"github.com/tproxyd/tproxyd/pkg/relay"
	"github.com/tproxyd/tproxyd/pkg/routes"
	"github.com/tproxyd/tproxyd/pkg/upstream"
)

// Limits of a flow where no TIMEOUT line states them.
const (
	defaultConnect    = 10 * time.Second
	defaultIdle       = 3 * time.Hour // above the 2 h 4 min that RFC 5382 asks of middle boxes
	defaultHalfClosed = 10 * time.Minute
)

// Names is the part of the synthetic pool that a flow needs.
type Names interface {
	Contains(netip.Addr) bool                 // is the address of the pool?
	Lookup(netip.Addr) (name string, ok bool) // whose is it?
	Pin(netip.Addr)                           // keep it as long as a flow lives
	Unpin(netip.Addr)
}

// Connector carries a target through the first server of a group that can.
type Connector interface {
	Connect(ctx context.Context, g *upstream.Group, r upstream.Request) (*upstream.Carried, error)
	Associate(ctx context.Context, g *upstream.Group, r upstream.Request, first *upstream.Server) (*upstream.Association, error)
}

// Options is what a Gateway is made of. All fields but Admit and Log are needed.
type Options struct {
	Names     Names
	Upstream  Connector // its connections must be the Engine's, or TLS over them
	Engine    *relay.Engine
	Dial      func(ctx context.Context, to netip.AddrPort) (net.Conn, error) // DIRECT, from this host, by the Engine
	DialUDP   func(to netip.AddrPort) (*relay.Packet, error)                 // DIRECT, from this host
	Resolve   func(ctx context.Context, name string) ([]netip.Addr, error)   // for DIRECT by name
	Interface func(c *relay.Conn, wanted bool) (string, error)               // where it entered; empty: this host's own flow, or not wanted
	Entered   func(ifIndex int) (string, error)                              // name of the interface that a datagram came in by; empty: this host's own
	Gone      func(*relay.Conn) bool                                         // has its peer reset it, or was it closed here?
	Index     func(ifindex int) string                                       // name of an interface; empty: this host's own
	Who       func(f *flow.Flow) error                                       // completes Mark, MAC and Owner of a flow that has all else
	Program   func(f *flow.Flow, named []string) error                       // completes Program of a flow of this host that has all else
	Own       func(netip.AddrPort) bool                                      // is it a listener of ours?
	Admit     func([]Admission) error                                        // into the kernel's DIRECT set, before it returns; nil: there is none, and names that are DIRECT have synthetic addresses
	Log       *slog.Logger                                                   // nil: silent
}

// Gateway carries flows by the plan of the moment. Make it with New.
type Gateway struct {
	o        Options
	plan     atomic.Pointer[Plan]
	noDirect atomic.Bool // see CutDirect
	count    counters

	ids  atomic.Uint64 // given to flows
	gone tally         // of rules that are not in force any longer

	mu       sync.Mutex
	live     map[*live]struct{}
	admitted memory // of what the kernel lets pass by name, for the next reload
}

// live is a flow that is being carried.
type live struct {
	flow   flow.Flow
	plan   *Plan // that decided it, until it is joined: it would be as long in memory as the longest flow
	rule   *routes.Rule
	tally  *tally           // the rule's
	asked  routes.Asked     // what was asked of the client
	via    *upstream.Server // nil: DIRECT
	at     netip.AddrPort   // of a name that is DIRECT: where it was dialled
	start  time.Time
	id     uint64
	stream *relay.Stream     // nil while connecting and under TLS, guarded by Gateway.mu
	copied *copied           // under TLS, guarded by Gateway.mu; nil: not
	up     *upstream.Carried // nil: DIRECT
	early  []byte            // what the client has said before there was a server
	g      *Gateway
	pinned bool
}

// New returns a gateway that follows p.
func New(p *Plan, o Options) *Gateway {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	g := &Gateway{o: o, live: map[*live]struct{}{}, admitted: memory{names: map[netip.Addr][]admittedName{}}}
	g.plan.Store(p)
	return g
}

// NextID returns an ID for a flow that no other flow has had.
func (g *Gateway) NextID() uint64 { return g.ids.Add(1) }

// CountFrom has flows have IDs above n, since those up to it are another gateway's.
func (g *Gateway) CountFrom(n uint64) { g.ids.Store(n) }

// Plan returns the plan in force.
func (g *Gateway) Plan() *Plan { return g.plan.Load() }

// Errors that end a flow before a server is asked.
var (
	errLoop    = errors.New("gateway: the flow would lead to this host itself")
	errUnowned = errors.New("gateway: no name owns this synthetic address")
	errDenied  = errors.New("gateway: denied")
	errLeft    = errors.New("gateway: the client left before a server answered")
)

// Handle carries one accepted connection, whose local address is where the
// client wanted to go. It owns c and returns when the flow runs by itself or
// has been refused with a reset.
func (g *Gateway) Handle(c *relay.Conn) {
	l := &live{g: g, plan: g.plan.Load(), start: time.Now()}
	l.flow = flow.Flow{Network: flow.TCP, Src: unmap(c.RemoteAddrPort()), Dst: unmap(c.LocalAddrPort())}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	defer time.AfterFunc(leaveCheck, func() { g.watch(ctx, c, cancel) }).Stop()
	server, err := g.connect(ctx, l, c)
	if err != nil {
		if ctx.Err() != nil {
			err = errLeft
		}
		c.Reset()
		g.refused(l, err)
		return
	}
	cancel() // the relay sees who leaves
	g.join(l, c, server)
}

// leaveCheck is how often a flow that waits for its server looks whether
// there still is a client.
const leaveCheck = time.Second

// watch calls leave when c's client is gone, so that no server is kept busy for
// nobody, nor the end of the daemon. A client that only sent its FIN is there.
func (g *Gateway) watch(ctx context.Context, c *relay.Conn, leave func()) {
	for !g.o.Gone(c) {
		select {
		case <-ctx.Done():
			return
		case <-time.After(leaveCheck):
		}
	}
	leave()
}

// connect decides the flow and returns the connection that serves it.
func (g *Gateway) connect(ctx context.Context, l *live, c *relay.Conn) (conn net.Conn, err error) {
	p := l.plan
	f := &l.flow
	if g.o.Own(f.Dst) {
		return nil, errLoop
	}
	// Without the answer a rule that asks for it would be passed over, and the next
	// one could be DIRECT.
	if f.InIf, err = g.o.Interface(c, p.table.UsesInterfaces()); err != nil {
		return nil, err
	}
	if err := g.client(l); err != nil {
		return nil, err
	}
	if err := g.name(l); err != nil {
		return nil, err
	}
	l.rule = p.table.Match(*f)
	l.tally = p.tallies[l.rule.Index]
	l.tally.flows.Add(1)
	switch l.rule.Action {
	case routes.Deny:
		return nil, errDenied
	case routes.Direct:
		ctx, cancel := context.WithTimeout(ctx, orDefault(p.table.Limits().Connect, defaultConnect))
		defer cancel()
		return g.direct(ctx, l)
	}
	l.up, err = g.o.Upstream.Connect(ctx, p.groups[l.rule.Index], upstream.Request{To: f.Target(), Src: f.Src.Addr(), Early: l.listen(c)})
	if err != nil {
		return nil, err
	}
	l.via = l.up.Server
	return l.up.Conn, nil
}

// client completes a flow, of which InIf is there, by what the rules ask of who it
// is from.
func (g *Gateway) client(l *live) error {
	t := l.plan.table
	if t.UsesWho() {
		if err := g.o.Who(&l.flow); err != nil {
			return err
		}
	}
	if named := t.Programs(); len(named) > 0 && l.flow.InIf == "" {
		return g.o.Program(&l.flow, named)
	}
	return nil
}

// earlySize is how much of what a client says may be sent ahead of the server's
// reply.
const earlySize = 16 << 10

// listen returns what reads the client's first bytes, see upstream.Request.
func (l *live) listen(c *relay.Conn) func(time.Duration) []byte {
	return func(wait time.Duration) []byte {
		if l.early != nil || wait == 0 && c.Quiet() {
			return l.early
		}
		b := make([]byte, earlySize)
		c.SetReadDeadline(time.Now().Add(max(wait, time.Millisecond)))
		n, _ := c.Read(b) // an end or an error comes again when the flow is joined
		c.SetReadDeadline(time.Time{})
		if n > 0 {
			l.early = b[:n]
		}
		return l.early
	}
}

// name gives a flow to a synthetic address its name, which stays the address's
// as long as the flow lives.
func (g *Gateway) name(l *live) error {
	f := &l.flow
	if !g.o.Names.Contains(f.Dst.Addr()) {
		return nil
	}
	name, ok := g.o.Names.Lookup(f.Dst.Addr())
	if !ok {
		return errUnowned
	}
	f.Name = name
	g.o.Names.Pin(f.Dst.Addr())
	l.pinned = true
	return nil
}

// direct connects from this host: to the address, or in turn to those of the
// name's addresses that no earlier rule takes.
func (g *Gateway) direct(ctx context.Context, l *live) (net.Conn, error) {
	f := &l.flow
	if f.Name == "" {
		return g.o.Dial(ctx, f.Dst)
	}
	addrs, err := g.o.Resolve(ctx, f.Name)
	if err != nil {
		return nil, err
	}
	err = fmt.Errorf("gateway: %s has no address", f.Name)
	end, _ := ctx.Deadline()
	for i, a := range addrs {
		if err = g.mayDial(l, a); err != nil {
			continue
		}
		// An equal share of what is left, for an address that is silent.
		share, cancel := context.WithTimeout(ctx, time.Until(end)/time.Duration(len(addrs)-i))
		var conn net.Conn
		conn, err = g.o.Dial(share, l.at)
		cancel()
		if err == nil {
			return conn, nil
		}
	}
	return nil, err
}

// mayDial tells whether this host may dial an address of the flow's name, and
// if so notes it as where the flow goes.
func (g *Gateway) mayDial(l *live, a netip.Addr) error {
	to := netip.AddrPortFrom(a, l.flow.Dst.Port())
	// A name must not open what this host offers to itself alone.
	if g.o.Own(to) || g.o.Names.Contains(a) || a.IsLoopback() || a.IsUnspecified() {
		return errLoop
	}
	l.at = to
	if r := decides(l.plan.table, l); r != l.rule {
		return fmt.Errorf("gateway: %s is at %s, which goes by %s", l.flow.Name, a, r.Position())
	}
	return nil
}

// decides returns the rule for a flow. One that is DIRECT by its name, and is
// dialled by this host, can have an address that an earlier rule does not leave
// to it: the table is asked for both, as before an address is admitted (R1).
func decides(t *routes.Table, l *live) *routes.Rule {
	r := t.Match(l.flow)
	if r.ActionFor(l.flow.Network) != routes.Direct || !l.at.IsValid() {
		return r
	}
	f := l.flow
	f.Name, f.Dst = "", l.at
	if earlier := t.Match(f); earlier.Index < r.Index && earlier.ActionFor(f.Network) != routes.Direct {
		return earlier
	}
	return r
}

// join hands both connections to the relay; what is left of the flow is its
// entry among the live ones.
func (g *Gateway) join(l *live, client *relay.Conn, server net.Conn) {
	limits := l.plan.table.Limits()
	o := relay.JoinOptions{
		Idle:       cmp.Or(l.rule.Idle, limits.Idle, defaultIdle),
		HalfClosed: orDefault(limits.HalfClosed, defaultHalfClosed),
		Done:       l.done,
	}
	sent := 0
	if l.up != nil {
		sent = l.up.Sent
	}
	o.EarlyUp = l.early[sent:]
	p := l.plan
	l.asked = p.table.Asks()
	l.rule, l.plan, l.early = l.rule.Bare(), nil, nil
	g.count.started(l.rule.Action)
	raw, ok := server.(*relay.Conn)
	l.id = g.NextID()
	g.mu.Lock()
	if !ok {
		l.copied = newCopied()
	}
	g.live[l] = struct{}{}
	g.mu.Unlock()
	if !ok {
		// Under TLS the bytes pass through this process. The flow ends with the
		// engine, which closes the client's connection.
		c := l.copied
		l.done(relay.Copy(c.ctx, client, server, relay.CopyOptions{Idle: o.Idle, HalfClosed: o.HalfClosed, EarlyUp: o.EarlyUp, Up: &c.up, Down: &c.down}))
		return
	}
	stream := g.o.Engine.Join(client, raw, o)
	g.mu.Lock()
	l.stream = stream
	g.mu.Unlock()
	if l.via == nil && (g.noDirect.Load() || g.plan.Load() != p && !g.stillDirect(l)) {
		stream.Kill() // a reload came between the decision and the relay
	}
}

// stillDirect tells whether the plan in force makes a flow DIRECT. It does not
// if it asks for what nobody wanted to know of the client when the flow came.
func (g *Gateway) stillDirect(l *live) bool {
	t := g.plan.Load().table
	return l.asked.Has(t.Asks()) && decides(t, l).Action == routes.Direct
}

// done is called once, when both connections of the flow are closed.
func (l *live) done(r relay.Result) {
	g := l.g
	if l.up != nil {
		r.Up += uint64(l.up.Sent)
	}
	g.mu.Lock()
	delete(g.live, l)
	g.count.ended(r.Up, r.Down)
	l.tally.add(r.Up, r.Down)
	g.mu.Unlock()
	if l.copied != nil {
		l.copied.kill()
	}
	if l.pinned {
		g.o.Names.Unpin(l.flow.Dst.Addr())
	}
	if l.up != nil {
		l.up.Done()
	}
	g.report(l, r.Up, r.Down, r.Err)
}

// refused ends a flow that could not be carried.
func (g *Gateway) refused(l *live, err error) {
	if l.pinned {
		g.o.Names.Unpin(l.flow.Dst.Addr())
	}
	g.count.refuse(err)
	g.report(l, 0, 0, err)
}

// report writes the flow's one line, at its end: at debug, or at info where
// the rule says log.
func (g *Gateway) report(l *live, up, down uint64, err error) {
	level := slog.LevelDebug
	if l.rule != nil && l.rule.Log {
		level = slog.LevelInfo
	}
	ctx := context.Background()
	if !g.o.Log.Enabled(ctx, level) {
		return
	}
	attrs := []slog.Attr{slog.Any("src", l.flow.Src), slog.Any("dst", l.flow.Dst)}
	if l.flow.Name != "" {
		attrs = append(attrs, slog.String("host", l.flow.Name))
	}
	if l.rule != nil {
		attrs = append(attrs, slog.String("rule", l.rule.Position()), slog.String("action", l.rule.Action.String()))
		if l.rule.Tag != "" {
			attrs = append(attrs, slog.String("tag", l.rule.Tag))
		}
	}
	if l.via != nil {
		attrs = append(attrs, slog.String("upstream", l.via.Name))
	}
	attrs = append(attrs, slog.Uint64("up", up), slog.Uint64("down", down), slog.Duration("dur", time.Since(l.start).Round(time.Millisecond)))
	if err != nil {
		attrs = append(attrs, slog.String("err", err.Error()))
	}
	g.o.Log.LogAttrs(ctx, level, "flow", attrs...)
}

// Swap puts a new plan in force. Proxied flows keep their server (R11); flows
// that this host dialled itself and that are no longer DIRECT are reset, since
// leak comes before loss. It returns how many were.
func (g *Gateway) Swap(p *Plan) (reset int) {
	old := g.plan.Load()
	p.follow(old, &g.gone)
	p.pinAs(old)
	g.plan.Store(p)
	var cut []*relay.Stream
	g.mu.Lock()
	for l := range g.live {
		if l.via == nil && l.stream != nil && !g.stillDirect(l) {
			cut = append(cut, l.stream)
		}
	}
	g.mu.Unlock()
	for _, s := range cut {
		s.Kill()
	}
	return len(cut)
}

// CutDirect resets the flows that this host dialled itself, from now on those too
// that are being connected, and returns how many those were.
func (g *Gateway) CutDirect() int {
	g.noDirect.Store(true)
	var cut []*relay.Stream
	g.mu.Lock()
	for l := range g.live {
		if l.via == nil && l.stream != nil {
			cut = append(cut, l.stream)
		}
	}
	g.mu.Unlock()
	for _, s := range cut {
		s.Kill()
	}
	return len(cut)
}

func unmap(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }

func orDefault(d, def time.Duration) time.Duration {
	if d == 0 {
		return def
	}
	return d
}
