package gateway

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/tproxyd/tproxyd/pkg/fakedns"
	"github.com/tproxyd/tproxyd/pkg/flow"
	"github.com/tproxyd/tproxyd/pkg/routes"
	"github.com/tproxyd/tproxyd/pkg/upstream"
)

// Admission is an address that a DIRECT name resolved to, with what of it is
// DIRECT.
type Admission struct {
	Addr    netip.Addr
	Scopes  []routes.Scope // empty: every protocol and port
	Timeout time.Duration  // how long the kernel keeps it
}

// An admitted address outlives the answer's TTL by this much: clients keep
// answers longer than they may, and a connection is made a moment later.
const admitGrace = time.Minute

// maxAdmitted bounds what is remembered of admitted addresses for a reload.
// What is forgotten is not admitted again: leak comes before loss.
const maxAdmitted = 1 << 16

// memory is which names an admitted address was admitted for, and for whom.
type memory struct {
	names map[netip.Addr][]admittedName
	count int
}

type admittedName struct {
	name   string
	client flow.Flow
}

func (m *memory) add(addr netip.Addr, name string, client flow.Flow) {
	if slices.ContainsFunc(m.names[addr], func(a admittedName) bool { return a.name == name }) {
		return
	}
	for a, list := range m.names {
		if m.count < maxAdmitted {
			break
		}
		delete(m.names, a)
		m.count -= len(list)
	}
	m.names[addr] = append(m.names[addr], admittedName{name, client})
	m.count++
}

// Decide says what becomes of a name in DNS. Shared tells that the verdict is
// the same for every client.
func (g *Gateway) Decide(name string, a fakedns.Asker) (v fakedns.Verdict, shared bool) {
	p := g.plan.Load()
	shared = !p.table.DependsOnClient()
	client, err := g.asker(p, a)
	if err != nil {
		return fakedns.Refused, false // who asks decides, and nobody knows
	}
	switch p.table.Name(name, client, p.local).Kind {
	case routes.Real:
		v = fakedns.Real
	case routes.RealDirect:
		if g.o.Admit != nil { // else the address would have to be carried without its name
			v = fakedns.RealDirect
		}
	case routes.LocalFirst:
		v = fakedns.LocalFirst
	case routes.Refused:
		v = fakedns.Refused
	case routes.NXDomain:
		v = fakedns.NXDomain
	default:
		v = fakedns.Synthetic
	}
	return v, shared
}

// asker is the client of a DNS question as the rules see it.
func (g *Gateway) asker(p *Plan, a fakedns.Asker) (f flow.Flow, err error) {
	f.Src = netip.AddrPortFrom(a.Addr.Unmap(), 0)
	if p.table.UsesInterfaces() {
		f.InIf = g.o.Index(a.IfIndex)
	}
	if p.table.UsesWho() {
		asked := f
		asked.Network, asked.Src, asked.Dst = a.Network, netip.AddrPortFrom(a.Addr.Unmap(), a.Port), unmap(a.Server)
		err = g.o.Who(&asked)
		f.Mark, f.MAC, f.Owner = asked.Mark, asked.MAC, asked.Owner
	}
	return f, err
}

// Admit lets the addresses of a DIRECT name into the kernel's set, with the
// part of them that the rules, asked with name and address, call DIRECT (R1).
// It returns when they are in.
func (g *Gateway) Admit(name string, a fakedns.Asker, addrs []netip.Addr, ttl time.Duration) error {
	p := g.plan.Load()
	client, err := g.asker(p, a)
	if err != nil {
		return err
	}
	list := make([]Admission, 0, len(addrs))
	for _, addr := range addrs {
		if ad, ok := p.admission(name, client, addr, ttl+admitGrace); ok {
			list = append(list, ad)
		}
	}
	if len(list) == 0 {
		return nil
	}
	g.mu.Lock()
	for _, ad := range list {
		g.admitted.add(ad.Addr, name, client)
	}
	g.mu.Unlock()
	return g.o.Admit(list)
}

// admission is what of an address is DIRECT for a name.
func (p *Plan) admission(name string, client flow.Flow, addr netip.Addr, timeout time.Duration) (Admission, bool) {
	scopes, ok := p.table.DirectScopes(name, client, addr, p.local)
	return Admission{Addr: addr, Scopes: scopes, Timeout: timeout}, ok
}

// Readmit returns what the kernel shall let pass under a new plan: those of the
// addresses in force that are still DIRECT for a name that they were admitted
// for (R11). The result is never nil.
func (g *Gateway) Readmit(p *Plan, inForce []Admission) []Admission {
	left := map[netip.Addr]time.Duration{}
	for _, a := range inForce {
		left[a.Addr] = max(left[a.Addr], a.Timeout)
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	list := []Admission{}
	kept := memory{names: map[netip.Addr][]admittedName{}}
	for addr, timeout := range left {
		for _, n := range g.admitted.names[addr] {
			kept.add(addr, n.name, n.client) // for a later plan that says DIRECT again
			if a, ok := p.admission(n.name, n.client, addr, timeout); ok {
				list = append(list, a)
			}
		}
	}
	g.admitted = kept
	return list
}

// Remembered is an address that was admitted, and for which name and client.
type Remembered struct {
	Addr   netip.Addr
	Name   string
	Client flow.Flow
}

// Remembered returns what Readmit goes by, for the gateway of a process that
// takes the place of this one.
func (g *Gateway) Remembered() []Remembered {
	g.mu.Lock()
	defer g.mu.Unlock()
	list := make([]Remembered, 0, g.admitted.count)
	for addr, names := range g.admitted.names {
		for _, n := range names {
			list = append(list, Remembered{addr, n.name, n.client})
		}
	}
	return list
}

// Remember adds what another gateway has Remembered.
func (g *Gateway) Remember(list []Remembered) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, r := range list {
		g.admitted.add(r.Addr, r.Name, r.Client)
	}
}

// errNoCarrier says that no rule and no PROXY_NAME has a server for a name.
var errNoCarrier = errors.New("gateway: no server for this name")

// DialRemote connects to a resolver through the server list that carries the
// name: that of the first rule that it can match on any port, else
// PROXY_NAME's (R5).
func (g *Gateway) DialRemote(ctx context.Context, name string, a fakedns.Asker, resolver netip.AddrPort) (net.Conn, error) {
	p := g.plan.Load()
	client, err := g.asker(p, a)
	if err != nil {
		return nil, err
	}
	group := p.carrier(name, client)
	if len(group.Servers) == 0 {
		return nil, fmt.Errorf("%w: %s", errNoCarrier, name)
	}
	return g.dialThrough(ctx, group, upstream.Request{To: flow.Target{Addr: resolver.Addr(), Port: resolver.Port()}, Src: a.Addr})
}

func (p *Plan) carrier(name string, client flow.Flow) *upstream.Group {
	switch r, denied := p.table.CarrierRule(name, client); {
	case r != nil:
		return p.groups[r.Index]
	case denied:
		return &upstream.Group{}
	}
	return p.proxy
}

// dialThrough connects through a group for this process itself.
func (g *Gateway) dialThrough(ctx context.Context, group *upstream.Group, r upstream.Request) (net.Conn, error) {
	c, err := g.o.Upstream.Connect(ctx, group, r)
	if err != nil {
		return nil, err
	}
	return &ownConn{Conn: c.Conn, done: sync.OnceFunc(c.Done)}, nil
}

// ownConn tells the pool of its end.
type ownConn struct {
	net.Conn
	done func()
}

// Close closes the connection.
func (c *ownConn) Close() error {
	c.done()
	return c.Conn.Close()
}
