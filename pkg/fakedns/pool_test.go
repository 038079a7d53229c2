package fakedns

import (
	"bytes"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net/netip"
	"os"
	"testing"
	"testing/synctest"
	"time"
)

var (
	discard = slog.New(slog.DiscardHandler)

	pool4 = netip.MustParsePrefix("198.18.0.0/15")
	pool6 = netip.MustParsePrefix("fd74:7072:6f78::/96")
)

// newPool opens a pool that the test closes at its end.
func newPool(t testing.TB, o Options) *pool {
	t.Helper()
	if o.Dir == "" {
		o.Dir = t.TempDir()
	}
	if o.Log == nil {
		o.Log = discard
	}
	p, err := openPool(&o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := p.close(); err != nil {
			t.Errorf("close: %v", err)
		}
	})
	return p
}

// addr4 assigns the IPv4 address of a name; the zero value: it got none.
func addr4(p *pool, name string) netip.Addr {
	a, _, err := p.assign(name)
	if err != nil {
		return netip.Addr{}
	}
	return a
}

// check fails the test if the table contradicts itself.
func check(t testing.TB, tab *table) {
	t.Helper()
	n, names := 0, map[string]bool{}
	older := uint32(0)
	for i := tab.oldest; i != 0; i = tab.entries[i].newer {
		name := string(tab.name(i))
		if n++; n > tab.size {
			t.Fatalf("the chain of last use is longer than %d", tab.size)
		}
		if names[name] || !tab.owner(i) || tab.find([]byte(name)) != i || tab.entries[i].older != older || i >= tab.limit {
			t.Fatalf("name %q of index %d: twice, not found or wrongly linked", name, i)
		}
		names[name] = true
		older = i
	}
	if n != tab.size || tab.newest != older {
		t.Fatalf("%d names in the chain of last use, want %d; the newest is %d, want %d", n, tab.size, tab.newest, older)
	}
	idle, tail := 0, uint32(0)
	for i := tab.head; i != 0; i = tab.entries[i].newer {
		if idle++; idle > len(tab.entries) || tab.owner(i) {
			t.Fatalf("index %d is in quarantine and has a name, or the queue is a ring", i)
		}
		tail = i
	}
	if tab.tail != tail {
		t.Fatalf("tail of the quarantine is %d, want %d", tab.tail, tail)
	}
	if n+idle != int(tab.fresh)-1 {
		t.Fatalf("%d names and %d in quarantine, but %d indexes were given", n, idle, tab.fresh-1)
	}
}

func TestPoolKeepsAddresses(t *testing.T) {
	p := newPool(t, Options{Pool4: pool4, Pool6: pool6})
	given := map[netip.Addr]string{}
	for i := range 3000 { // more than the table begins with
		name := fmt.Sprintf("host%d.example", i)
		v4, v6, err := p.assign(name)
		if err != nil {
			t.Fatal(err)
		}
		if !pool4.Contains(v4) || !pool6.Contains(v6) || given[v4] != "" {
			t.Fatalf("%s: %v %v (before: %q)", name, v4, v6, given[v4])
		}
		given[v4], given[v6] = name, name
	}
	for a, name := range given {
		if got, ok := p.lookup(a); !ok || got != name {
			t.Errorf("lookup(%v) = %q, %v; want %q", a, got, ok, name)
		}
		if v4, v6, err := p.assign(name); err != nil || given[v4] != name || given[v6] != name {
			t.Errorf("assign(%q) again = %v, %v, %v", name, v4, v6, err)
		}
	}
	check(t, p.t)
}

func TestPoolEdges(t *testing.T) {
	tests := []struct {
		v4, v6      string
		give        int // how many names get an address
		first, last string
	}{
		{v4: "192.0.2.0/30", give: 2, first: "192.0.2.1", last: "192.0.2.2"},
		{v4: "192.0.2.0/29", give: 6, first: "192.0.2.1", last: "192.0.2.6"},
		{v4: "192.0.2.5/29", give: 6, first: "192.0.2.1", last: "192.0.2.6"}, // host bits set
		{v6: "2001:db8::/126", give: 2, first: "2001:db8::1", last: "2001:db8::2"},
		{v6: "2001:db8::fff8/125", give: 6, first: "2001:db8::fff9", last: "2001:db8::fffe"},
		{v4: "192.0.2.0/24", v6: "2001:db8::/126", give: 2, first: "192.0.2.1", last: "192.0.2.2"},
		{v4: "192.0.2.0/31"}, {v4: "192.0.2.0/32"}, {v6: "2001:db8::/127"}, {v6: "2001:db8::/128"},
	}
	for _, tt := range tests {
		t.Run(tt.v4+","+tt.v6, func(t *testing.T) {
			o := Options{Dir: t.TempDir(), Log: discard, Quarantine: time.Hour}
			if tt.v4 != "" {
				o.Pool4 = netip.MustParsePrefix(tt.v4)
			}
			if tt.v6 != "" {
				o.Pool6 = netip.MustParsePrefix(tt.v6)
			}
			p, err := openPool(&o)
			if tt.give == 0 {
				if err == nil {
					p.close()
					t.Fatal("opened a pool without an address to give")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			defer p.close()
			var got []netip.Addr
			for i := range 20 {
				v4, v6, err := p.assign(fmt.Sprint("name", i))
				if err != nil {
					continue
				}
				if tt.v4 == "" {
					v4 = v6
				}
				got = append(got, v4)
			}
			if len(got) != tt.give || got[0].String() != tt.first || got[len(got)-1].String() != tt.last {
				t.Errorf("given %v, want %d from %s to %s", got, tt.give, tt.first, tt.last)
			}
			check(t, p.t)
		})
	}
}

// A huge pool must not become a huge table, however long the daemon runs.
func TestPoolBoundsIndexes(t *testing.T) {
	p := newPool(t, Options{Pool6: netip.MustParsePrefix("2001:db8::/32")})
	if p.t.limit > maxIndex || p.t.max > 1<<20 {
		t.Errorf("limit %d, at most %d names", p.t.limit, p.t.max)
	}
	last := p.v6.addr(p.t.limit - 1)
	if i := p.v6.index(last); i != p.t.limit-1 {
		t.Errorf("index(%v) = %d, want %d", last, i, p.t.limit-1)
	}
}

func TestPoolLookupUnowned(t *testing.T) {
	p := newPool(t, Options{Pool4: pool4, Pool6: pool6})
	addr4(p, "one.example")
	for _, a := range []string{"198.18.0.0", "198.18.0.2", "198.19.255.255", "192.0.2.1", "fd74:7072:6f78::", "fd74:7072:6f78::2",
		"fd74:7072:6f78::1:0:1", "2001:db8::1", "::ffff:198.18.0.1"} {
		if name, ok := p.lookup(netip.MustParseAddr(a)); ok {
			t.Errorf("lookup(%s) = %q", a, name)
		}
	}
	if _, ok := p.lookup(netip.Addr{}); ok {
		t.Error("the zero address has a name")
	}
	if s := p.status(); s.Unowned != 10 || s.Names != 1 {
		t.Errorf("%+v, want 10 unowned and 1 name", s)
	}
}

func TestPoolEvicts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPool(t, Options{Pool4: netip.MustParsePrefix("192.0.2.0/28"), Max: 3, Quarantine: time.Hour})
		a, b, c := addr4(p, "a"), addr4(p, "b"), addr4(p, "c")
		p.lookup(a) // a flow; now b is the one used longest ago
		p.pin(b, 1) // but has a flow, so c goes
		addr4(p, "d")
		for addr, want := range map[netip.Addr]string{a: "a", b: "b", c: ""} {
			if got, _ := p.lookup(addr); got != want {
				t.Errorf("%v belongs to %q, want %q", addr, got, want)
			}
		}
		p.pin(b, -1)
		for i := range 20 { // far more than there are addresses
			if got := addr4(p, fmt.Sprint("e", i)); got == c {
				t.Fatal("an address in quarantine was given")
			}
		}
		if s := p.status(); s.Names != 3 || s.Full == 0 || s.Pinned != 0 || s.LastFull.IsZero() {
			t.Errorf("%+v, want 3 names (nobody loses an address that nobody gets), 0 pinned and some refused", s)
		}
		time.Sleep(time.Hour)
		if got := addr4(p, "f"); got != c {
			t.Errorf("after the quarantine f has %v, want the oldest %v", got, c)
		}
		check(t, p.t)
	})
}

func TestPoolAllPinned(t *testing.T) {
	p := newPool(t, Options{Pool4: pool4, Max: 3})
	var addrs []netip.Addr
	for i := range 3 {
		addrs = append(addrs, addr4(p, fmt.Sprint("name", i)))
		p.pin(addrs[i], 2)
		p.pin(addrs[i], -1) // still one
	}
	if a, _, err := p.assign("more"); err == nil {
		t.Errorf("more got %v", a)
	}
	if s := p.status(); s.Full != 1 || s.Pinned != 3 || s.Evicted != 0 {
		t.Errorf("%+v, want 1 refused, 3 pinned, 0 evicted", s)
	}
	p.pin(addrs[1], -1)
	if !addr4(p, "more").IsValid() {
		t.Error("no address after an unpin")
	}
	if _, ok := p.lookup(addrs[1]); ok {
		t.Error("the name without a flow was not the one that went")
	}
	p.pin(netip.MustParseAddr("198.18.9.9"), 1) // of no name
	if s := p.status(); s.Pinned != 2 {
		t.Errorf("%d pinned, want 2", s.Pinned)
	}
}

// A clock that was wrong must not lock addresses up for years, nor free them
// at once.
func TestPoolQuarantineAndClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		s, _, err := openStore(dir)
		if err != nil {
			t.Fatal(err)
		}
		log := appendRecord([]byte(logHeader), recordEvicted, 1, uint32(time.Now().AddDate(20, 0, 0).Unix()), nil)
		f, err := s.writeAnew(log)
		if err != nil {
			t.Fatal(err)
		}
		if err := s.adopt(f, len(log), nil); err != nil {
			t.Fatal(err)
		}
		s.close()
		p := newPool(t, Options{Dir: dir, Pool4: netip.MustParsePrefix("192.0.2.0/30"), Quarantine: time.Hour})
		if a := addr4(p, "a"); a.String() != "192.0.2.2" {
			t.Errorf("a has %v, want the one that is not in quarantine", a)
		}
		time.Sleep(time.Hour - time.Second)
		if a := addr4(p, "b"); a.IsValid() {
			t.Errorf("b has %v before the time", a)
		}
		time.Sleep(time.Second)
		if a := addr4(p, "b"); a.String() != "192.0.2.1" {
			t.Errorf("b has %v", a)
		}
	})
}

// model is what a pool promises, in the simplest words.
type model struct {
	max    int
	names  map[string]netip.Addr
	use    []string // the oldest first
	pins   map[string]int
	banned map[netip.Addr]time.Time // until when
}

func (m *model) touch(name string) {
	for i, n := range m.use {
		if n == name {
			m.use = append(m.use[:i], m.use[i+1:]...)
			break
		}
	}
	m.use = append(m.use, name)
}

// evict returns the name that must go.
func (m *model) evict(at time.Time) (string, bool) {
	for i, n := range m.use {
		if m.pins[n] == 0 {
			m.banned[m.names[n]] = at
			delete(m.names, n)
			m.use = append(m.use[:i:i], m.use[i+1:]...)
			return n, true
		}
	}
	return "", false
}

func TestPoolModel(t *testing.T) {
	for seed := range uint64(6) {
		synctest.Test(t, func(t *testing.T) {
			const quarantine = 100 * time.Second
			r := rand.New(rand.NewPCG(seed, 0))
			prefix := netip.MustParsePrefix("192.0.2.0/27")
			p := newPool(t, Options{Pool4: prefix, Max: 20, Quarantine: quarantine})
			m := &model{max: 20, names: map[string]netip.Addr{}, pins: map[string]int{}, banned: map[netip.Addr]time.Time{}}
			refused := 0
			for step := range 2000 {
				name := fmt.Sprint("name", r.IntN(40))
				switch op := r.IntN(20); {
				case op < 12:
					old, known := m.names[name]
					got := addr4(p, name)
					if !known && got.IsValid() && len(m.names) >= m.max {
						m.evict(time.Now().Add(quarantine))
					}
					switch {
					case known && got != old:
						t.Fatalf("step %d: %s has %v, had %v", step, name, got, old)
					case known:
						m.touch(name)
					case !got.IsValid():
						refused++
						free := 0 // addresses that it could have got
						for i := uint32(1); i < 31; i++ {
							a := p.v4.addr(i)
							owned := false
							for _, b := range m.names {
								owned = owned || a == b
							}
							if until := m.banned[a]; !owned && !time.Now().Before(until) {
								free++
							}
						}
						pinned := 0
						for _, n := range m.pins {
							pinned += min(n, 1)
						}
						if free > 0 && pinned < m.max {
							t.Fatalf("step %d: %s refused, %d addresses are free", step, name, free)
						}
					default:
						if until := m.banned[got]; time.Now().Before(until) || !prefix.Contains(got) {
							t.Fatalf("step %d: %s got %v, banned until %v", step, name, got, until)
						}
						for n, a := range m.names {
							if a == got {
								t.Fatalf("step %d: %s got %v, which is %s's", step, name, got, n)
							}
						}
						m.names[name] = got
						m.touch(name)
					}
				case op < 15:
					if a, ok := m.names[name]; ok {
						p.pin(a, 1)
						m.pins[name]++
					}
				case op < 18:
					if m.pins[name] > 0 {
						p.pin(m.names[name], -1)
						if m.pins[name]--; m.pins[name] == 0 {
							m.touch(name)
						}
					}
				default:
					time.Sleep(time.Duration(r.IntN(40)) * time.Second)
				}
				if p.t.size != len(m.names) {
					t.Fatalf("step %d: %d names, want %d", step, p.t.size, len(m.names))
				}
				for n, a := range m.names {
					if got := p.t.find([]byte(n)); p.v4.addr(got) != a {
						t.Fatalf("step %d: %s has index %d, want that of %v", step, n, got, a)
					}
				}
				check(t, p.t)
			}
			if s := p.status(); s.Evicted == 0 || refused == 0 || int(s.Full) != refused {
				t.Errorf("%+v and %d refused: the test did not try everything", s, refused)
			}
		})
	}
}

// Names come and go for long; the arena and the hash chains must follow.
func TestTableChurn(t *testing.T) {
	tab := newTable(1<<16, 5000)
	for i := range uint32(100_000) {
		if tab.size >= tab.max {
			tab.evict(tab.victim(), i)
		}
		tab.put(tab.free(i, 0), fmt.Appendf(nil, "host%d.some.longer.domain.example", i))
	}
	check(t, tab)
	if len(tab.text) > 1<<20 || len(tab.entries) > 1<<16 {
		t.Errorf("%d bytes of text and %d entries for %d names", len(tab.text), len(tab.entries), tab.size)
	}
	if i := tab.find([]byte("host99999.some.longer.domain.example")); i == 0 || !bytes.Equal(tab.name(i), []byte("host99999.some.longer.domain.example")) {
		t.Errorf("the last name has index %d", i)
	}
}

// Without a directory the names are in memory: they keep their addresses as
// long as the pool is there, and nothing is written.
func TestPoolInMemory(t *testing.T) {
	t.Chdir(t.TempDir())
	p, err := openPool(&Options{Pool4: pool4, Pool6: pool6, Log: discard})
	if err != nil {
		t.Fatal(err)
	}
	a := addr4(p, "www.example.org")
	if b := addr4(p, "other.example.org"); !a.IsValid() || a == b {
		t.Errorf("the names have %v and %v", a, b)
	}
	if again := addr4(p, "www.example.org"); again != a {
		t.Errorf("%v at first, then %v", a, again)
	}
	check(t, p.t)
	if err := p.close(); err != nil {
		t.Error(err)
	}
	if files, err := os.ReadDir("."); err != nil || len(files) > 0 {
		t.Errorf("left behind: %v, %v", files, err)
	}
}
