package relay

import "sync/atomic"

const (
	chunkConns  = 1 << 10
	tableChunks = 1 << 11
	maxFD       = chunkConns * tableChunks // descriptors above are refused
)

// connTable finds the Conn of a descriptor without a lock. Chunks are made
// when first used and stay.
//
// A slot is cleared before its descriptor is closed, and set after the
// descriptor was opened, so it never holds a predecessor's Conn; an event that
// was fetched before the change is told by its generation (Conn.gen).
type connTable struct {
	chunks [tableChunks]atomic.Pointer[connChunk]
}

type connChunk [chunkConns]atomic.Pointer[Conn]

func (t *connTable) get(fd int) *Conn {
	if uint(fd) >= maxFD {
		return nil
	}
	c := t.chunks[fd/chunkConns].Load()
	if c == nil {
		return nil
	}
	return c[fd%chunkConns].Load()
}

// set stores c, nil to clear. fd must be below maxFD.
func (t *connTable) set(fd int, c *Conn) {
	p := &t.chunks[fd/chunkConns]
	k := p.Load()
	if k == nil {
		if c == nil {
			return
		}
		p.CompareAndSwap(nil, new(connChunk))
		k = p.Load()
	}
	k[fd%chunkConns].Store(c)
}

// each calls f for every Conn that is in the table throughout the call.
func (t *connTable) each(f func(*Conn)) {
	for i := range t.chunks {
		k := t.chunks[i].Load()
		if k == nil {
			continue
		}
		for j := range k {
			if c := k[j].Load(); c != nil {
				f(c)
			}
		}
	}
}
