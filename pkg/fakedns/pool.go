// Package fakedns answers DNS with synthetic addresses, so that the flows to
// them have names.
//
// It promises that a name keeps its address, over restarts and crashes too:
// what an answer says is on file before the answer leaves; that the table is
// bounded and gives up the names that were used longest ago, never one that a
// flow lives on, and gives their addresses to nobody else for a time; and that
// no question about a proxied name goes out by a way that was not decided.
//
// When the file cannot be written, answers go on, the log and [PoolStats] say
// so, and all is written as soon as it can be.
package fakedns

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"sync"
	"time"
)

// errFull says that there is no address for a new name: all names have live
// flows, or all free addresses are in quarantine.
var errFull = errors.New("fakedns: no synthetic address is free")

// pool is the table behind a lock, with its file and its address ranges.
type pool struct {
	v4, v6     prefix
	quarantine uint32 // seconds
	log        *slog.Logger

	mu      sync.Mutex
	t       *table
	s       *store // nil: the names are in memory only
	pending []byte // records of the batch under way, not in the file yet
	since   []byte // records since renew took its dump; nil: it is not under way
	dirty   bool   // something is in the file that is not on the disk
	lent    bool   // another Server gives the addresses
	stats   PoolStats

	start time.Time     // when the pool was opened
	done  chan struct{} // closed by close
	wg    sync.WaitGroup
}

// PoolStats is what the synthetic addresses are like.
type PoolStats struct {
	Names       int       `json:"names"`        // that have an address
	Max         int       `json:"max"`          // names at most
	Pinned      int       `json:"pinned"`       // names with live flows
	Evicted     uint64    `json:"evicted"`      // names that lost theirs
	Full        uint64    `json:"full"`         // questions without an answer for want of an address
	LastFull    time.Time `json:"-"`            // when Full was counted last
	Unowned     uint64    `json:"unowned"`      // look-ups of addresses that no name has
	StoreErrors uint64    `json:"store_errors"` // writes to the file that failed
	StoreError  string    `json:"store_error,omitempty"`
}

// prefix is a range of addresses to count in; the zero value has none.
type prefix struct{ netip.Prefix }

// maxIndex bounds the table's memory where a pool is larger than that.
const maxIndex = 1 << 21

// size is the first index that is not given: that of the last address.
func (p prefix) size() uint32 {
	host := p.Addr().BitLen() - p.Bits()
	return min(maxIndex, uint32(1)<<min(host, 24)-1)
}

func (p prefix) addr(i uint32) netip.Addr {
	if p.Addr().Is4() {
		b := p.Addr().As4()
		put(b[:], i)
		return netip.AddrFrom4(b)
	}
	b := p.Addr().As16()
	put(b[:], i)
	return netip.AddrFrom16(b)
}

// put adds i to the last four bytes, of which it sets only bits that are 0.
func put(b []byte, i uint32) {
	for k := len(b) - 1; i > 0; k-- {
		b[k] |= byte(i)
		i >>= 8
	}
}

// index is the reverse of addr; 0: not an address of p, or one never given.
func (p prefix) index(a netip.Addr) uint32 {
	if !p.IsValid() || !p.Contains(a) {
		return 0
	}
	b, base := a.As16(), p.Addr().As16()
	var i uint32
	for k := range b {
		i = i<<8 | uint32(b[k]^base[k])
		if k < 12 && i != 0 {
			return 0
		}
	}
	return i
}

func openPool(o *Options) (*pool, error) {
	p := &pool{v4: prefix{o.Pool4.Masked()}, v6: prefix{o.Pool6.Masked()}, log: o.Log, start: time.Now(), done: make(chan struct{})}
	p.quarantine = uint32(o.Quarantine / time.Second)
	limit := uint32(maxIndex)
	for _, r := range []prefix{p.v4, p.v6} {
		if !r.IsValid() {
			continue
		}
		if limit = min(limit, r.size()); limit < 2 {
			return nil, fmt.Errorf("fakedns: pool %v has no address to give", r)
		}
	}
	most := int(limit-1) - max(1, int(limit-1)/8) // the others rest
	if o.Max > 0 {
		most = min(most, o.Max)
	}
	most = max(1, min(most, 1<<20))
	p.t = newTable(limit, most)
	p.stats.Max = most

	var content []byte
	var err error
	switch {
	case o.Dir == "" && o.Taken != nil:
		content = o.Taken.content()
	case o.Dir == "":
	case o.Taken != nil:
		p.s, content, err = takeStore(o.Dir, o.Taken)
	default:
		p.s, content, err = openStore(o.Dir)
	}
	if err != nil {
		return nil, err
	}
	if p.s != nil && p.s.bad != nil {
		p.log.Warn("the file of names was put aside, and names get new addresses", "err", p.s.bad)
	}
	good := p.t.load(content)
	if good < len(content) {
		p.log.Warn("dropped the damaged end of the file of names", "bytes", len(content)-good)
	}
	at := p.now()
	p.t.requeue(at)
	for p.t.size > p.t.max {
		p.t.evict(p.t.oldest, at)
	}
	if p.s == nil {
		return p, nil
	}
	if p.s.file == nil {
		p.renew() // of the content only what was good goes on
	}
	p.wg.Go(p.housekeep)
	return p, nil
}

// now is the time by the clock as it stood at the start, so that a quarantine
// lasts what it should when the clock is set meanwhile (a router without a
// battery begins in 1970).
func (p *pool) now() uint32 {
	return uint32(p.start.Unix() + int64(time.Since(p.start)/time.Second))
}

// index returns the index of a name, a new one if need be. What it records is
// written by flush. The lock is held.
func (p *pool) index(name []byte) (uint32, error) {
	t := p.t
	if i := t.find(name); i != 0 {
		t.touch(i)
		return i, nil
	}
	if len(name) == 0 || len(name) > 255 {
		return 0, fmt.Errorf("fakedns: a name of %d bytes", len(name))
	}
	if p.lent {
		return 0, errLent
	}
	at := p.now()
	full := t.size >= t.max
	var v, i uint32
	if full {
		v = t.victim()
	}
	if v != 0 || !full { // nobody loses an address before there is one to give
		i = t.free(at, p.quarantine)
	}
	if i == 0 {
		p.stats.Full++
		p.stats.LastFull = time.Now()
		return 0, errFull
	}
	if full {
		t.evict(v, at)
		p.pending = appendRecord(p.pending, recordEvicted, v, at, nil)
		p.stats.Evicted++
	}
	t.put(i, name)
	p.pending = appendRecord(p.pending, recordGiven, i, 0, name)
	return i, nil
}

// flush writes what index recorded. The lock is held.
func (p *pool) flush() {
	if len(p.pending) == 0 {
		return
	}
	if p.s == nil {
		p.pending = p.pending[:0]
		return
	}
	if p.since != nil {
		p.since = append(p.since, p.pending...)
	}
	if err := p.s.append(p.pending); err != nil {
		p.failed(err)
	}
	p.dirty = true
	p.pending = p.pending[:0]
}

// failed counts an error of the file. Service goes on; the log says it once.
func (p *pool) failed(err error) {
	p.stats.StoreErrors++
	if p.stats.StoreError == "" {
		p.log.Error("synthetic addresses are not kept on disk", "err", err)
	}
	p.stats.StoreError = err.Error()
}

// assign is index and flush for one name, with the addresses.
func (p *pool) assign(name string) (v4, v6 netip.Addr, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	i, err := p.index([]byte(name))
	p.flush()
	if err != nil {
		return v4, v6, err
	}
	if p.v4.IsValid() {
		v4 = p.v4.addr(i)
	}
	if p.v6.IsValid() {
		v6 = p.v6.addr(i)
	}
	return v4, v6, nil
}

func (p *pool) contains(a netip.Addr) bool {
	return p.v4.IsValid() && p.v4.Contains(a) || p.v6.IsValid() && p.v6.Contains(a)
}

func (p *pool) indexOf(a netip.Addr) uint32 {
	if a.Is4() {
		return p.v4.index(a)
	}
	return p.v6.index(a)
}

func (p *pool) lookup(a netip.Addr) (string, bool) {
	i := p.indexOf(a)
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.t.owner(i) {
		p.stats.Unowned++
		return "", false
	}
	p.t.touch(i)
	return string(p.t.name(i)), true
}

func (p *pool) pin(a netip.Addr, by int) {
	i := p.indexOf(a)
	p.mu.Lock()
	defer p.mu.Unlock()
	if !p.t.owner(i) {
		return
	}
	if n := p.t.pins[i] + by; n > 0 {
		p.t.pins[i] = n
	} else {
		delete(p.t.pins, i)
		p.t.touch(i) // a flow was the last use
	}
}

// housekeep brings what was written to the disk, once a second, and writes the
// file anew when it is bulky or broken.
func (p *pool) housekeep() {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-p.done:
			return
		case <-tick.C:
		}
		p.mu.Lock()
		bulky, dirty, f := p.s.bulky(), p.dirty, p.s.file
		p.dirty = false
		p.mu.Unlock()
		switch {
		case bulky:
			p.renew()
		case dirty && f != nil:
			if err := f.Sync(); err != nil && !errors.Is(err, os.ErrClosed) {
				p.mu.Lock()
				p.failed(err)
				p.mu.Unlock()
			}
		}
	}
}

// renew writes the file anew while answers go on. Only openPool, housekeep and
// close call it, never at the same time.
func (p *pool) renew() {
	p.mu.Lock()
	log := p.t.dump()
	p.since = []byte{}
	p.mu.Unlock()
	f, err := p.s.writeAnew(log)
	p.mu.Lock()
	defer p.mu.Unlock()
	if err == nil {
		err = p.s.adopt(f, len(log), p.since)
	}
	p.since = nil
	if err != nil {
		if p.s.file == nil {
			p.s.err = err
		}
		p.failed(err)
		return
	}
	if p.stats.StoreError != "" {
		p.log.Info("synthetic addresses are kept on disk again")
		p.stats.StoreError = ""
	}
}

func (p *pool) close() error {
	if p.lent {
		p.release()
	}
	if p.s == nil {
		return nil
	}
	close(p.done)
	p.wg.Wait()
	p.renew() // the log knows nothing of the order of last use, this does
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.s.close()
}

func (p *pool) status() PoolStats {
	p.mu.Lock()
	defer p.mu.Unlock()
	s := p.stats
	s.Names, s.Pinned = p.t.size, len(p.t.pins)
	return s
}
