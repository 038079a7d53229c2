package fakedns

import (
	"fmt"
	"net"
	"net/netip"
	"runtime"
	"strconv"
	"testing"

	"github.com/miekg/dns"
	"github.com/tproxyd/tproxyd/pkg/flow"
)

// sink is a PacketConn that answers go to and nothing comes from.
type sink struct{ answers int }

func (*sink) ReadBatch([]flow.Datagram) (int, error) { return 0, net.ErrClosed }
func (*sink) Close() error                           { return nil }
func (s *sink) WriteBatch(ds []flow.Datagram) (int, error) {
	s.answers += len(ds)
	return len(ds), nil
}

// hotLoop returns a reader's loop and a batch of questions about known names.
func hotLoop(t testing.TB) (*udpLoop, *sink, []flow.Datagram) {
	s := newServer(t, Options{})
	out := &sink{}
	u := &udpLoop{s: s, pc: out, out: make([]flow.Datagram, 0, batch), bufs: make([][maxHot]byte, batch)}
	ds := make([]flow.Datagram, batch)
	for i := range ds {
		m := new(dns.Msg).SetQuestion(fmt.Sprintf("host%d.example.syn.", i), []uint16{dns.TypeA, dns.TypeAAAA, dns.TypeHTTPS}[i%3])
		b, err := m.SetEdns0(1232, false).Pack()
		if err != nil {
			t.Fatal(err)
		}
		ds[i] = flow.Datagram{Data: b, Src: netip.MustParseAddrPort("203.0.113.7:5353"), Dst: resolver1}
	}
	u.serve(t.Context(), ds) // now the names are known
	if out.answers != batch {
		t.Fatalf("%d answers to %d questions", out.answers, batch)
	}
	return u, out, ds
}

func TestAnswerAllocatesNothing(t *testing.T) {
	u, out, ds := hotLoop(t)
	if n := testing.AllocsPerRun(200, func() { u.serve(t.Context(), ds) }); n != 0 {
		t.Errorf("%v allocations for a batch of %d", n, batch)
	}
	if out.answers < 200*batch {
		t.Errorf("%d answers", out.answers)
	}
}

func BenchmarkAnswer(b *testing.B) {
	u, _, ds := hotLoop(b)
	b.ReportAllocs()
	for n := 0; b.Loop(); n++ {
		u.serve(b.Context(), ds[n%batch:n%batch+1])
	}
}

func BenchmarkAnswerBatch(b *testing.B) {
	u, _, ds := hotLoop(b)
	b.ReportAllocs()
	for b.Loop() {
		u.serve(b.Context(), ds)
	}
	b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N*batch), "ns/answer")
}

// BenchmarkNewName is with the file, each name in a batch of its own.
func BenchmarkNewName(b *testing.B) {
	p := newPool(b, Options{Pool4: pool4, Pool6: pool6, Max: 100_000})
	b.ReportAllocs()
	name := make([]byte, 0, 40)
	for n := 0; b.Loop(); n++ {
		name = strconv.AppendInt(append(name[:0], "host"...), int64(n), 10)
		p.mu.Lock()
		p.index(append(name, ".example.org"...))
		p.flush()
		p.mu.Unlock()
	}
}

// A router may have little memory, and may see many names.
func TestMemoryPerName(t *testing.T) {
	const count, most = 100_000, 200
	p := newPool(t, Options{Pool4: pool4, Pool6: pool6})
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	for i := range count {
		if !addr4(p, fmt.Sprintf("host%06d.some.domain.example", i)).IsValid() {
			t.Fatalf("name %d has no address", i)
		}
	}
	each := float64(heap()-before) / count
	runtime.KeepAlive(p)
	t.Logf("%.0f bytes for each of %d names of 30 bytes", each, count)
	if each > most || each < 30 {
		t.Errorf("%.0f bytes for each name, want at most %d", each, most)
	}
}
