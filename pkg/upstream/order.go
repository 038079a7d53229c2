package upstream

import (
	"cmp"
	"encoding/binary"
	"hash/fnv"
	"slices"
	"sync/atomic"
)

// Order is how the servers of a group take turns.
type Order uint8

// The orders. Whichever it is, the rest of the list is the failover.
const (
	AsWritten  Order = iota
	Random           // shuffled for each flow: Hummingbird's BALANCE
	RoundRobin       // each flow begins with the server after that of the flow before
	Hash             // the same client and destination begin with the same server, as long as it is well; rendezvous hashing, so that a lost server moves only its own
	LeastLoad        // by the flows that they carry now
)

// Group is the servers of a rule. It may not be copied after its first use.
type Group struct {
	Servers []*Server
	Order   Order

	turn   atomic.Uint64
	pinned atomic.Pointer[Server]
}

// Pin has a server of the group asked before all others, whatever the order,
// as long as it is good; nil: none is.
func (g *Group) Pin(s *Server) { g.pinned.Store(s) }

// Pinned returns the server that is asked before all others; nil: none is.
func (g *Group) Pinned() *Server { return g.pinned.Load() }

// order appends the servers of g to l as they are to be asked for r: preferred
// first, if it is one of them.
func (p *Pool) order(l []*Server, g *Group, r Request, preferred *Server) []*Server {
	l = append(l, g.Servers...)
	if len(l) < 2 {
		return l
	}
	switch g.Order {
	case Random:
		p.shuffle(l)
	case RoundRobin:
		n := int((g.turn.Add(1) - 1) % uint64(len(l)))
		l = append(l[:0], g.Servers[n:]...)
		l = append(l, g.Servers[:n]...)
	case Hash:
		slices.SortFunc(l, func(a, b *Server) int { return cmp.Compare(weight(b, r), weight(a, r)) })
	case LeastLoad:
		p.shuffle(l) // of equals not always the same
		load := make(map[*Server]int64, len(l))
		for _, s := range l {
			load[s] = p.of(s).flows.Load()
		}
		slices.SortStableFunc(l, func(a, b *Server) int { return cmp.Compare(load[a], load[b]) })
	}
	if i := slices.Index(l, preferred); i > 0 {
		copy(l[1:i+1], l[:i])
		l[0] = preferred
	}
	return l
}

func (p *Pool) shuffle(l []*Server) {
	random := p.options.Load().Rand
	for i := len(l) - 1; i > 0; i-- {
		j := random(i + 1)
		l[i], l[j] = l[j], l[i]
	}
}

// weight is how much a server is drawn to a client and a destination. It does
// not change with a restart.
func weight(s *Server, r Request) uint64 {
	h := fnv.New64a()
	h.Write([]byte(s.Name))
	h.Write([]byte{0})
	src := r.Src.As16()
	h.Write(src[:])
	h.Write([]byte(r.To.Host()))
	var port [2]byte
	binary.BigEndian.PutUint16(port[:], r.To.Port)
	h.Write(port[:])
	// FNV alone leaves names that differ in one letter close to one another.
	x := h.Sum64()
	x ^= x >> 32
	x *= 0xd6e8feb86659fd93
	x ^= x >> 32
	x *= 0xd6e8feb86659fd93
	return x ^ x>>32
}
