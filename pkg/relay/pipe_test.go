package relay

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

type poolState struct{ Made, Lent int }

func (p *pipePool) state() poolState {
	made, lent := p.count()
	return poolState{made, lent}
}

func TestPipePool(t *testing.T) {
	p := &pipePool{max: 4, size: 128 << 10, spare: new(spareFD)}
	defer p.close()
	want := func(what string, w poolState) {
		t.Helper()
		if d := cmp.Diff(w, p.state()); d != "" {
			t.Errorf("%s: %s", what, d)
		}
	}
	s := new(Stream)
	var lent []*pipe
	for range 4 {
		q := p.get(s)
		if q == nil || q.size != 128<<10 || q.slots != 32 || q.holder.Load() != s {
			t.Fatalf("%+v", q)
		}
		lent = append(lent, q)
	}
	if q := p.get(s); q != nil {
		t.Errorf("a fifth: %+v", q)
	}
	if n := len(p.holders()); n != 4 {
		t.Errorf("%d holders in a shortage", n)
	}
	want("all lent", poolState{4, 4})
	p.put(lent[0])
	if h := p.holders(); h != nil {
		t.Errorf("holders without a shortage: %v", h)
	}
	p.drop(lent[1])
	want("one back, one dropped", poolState{3, 2})
	if q := p.get(s); q != lent[0] {
		t.Error("not the one that came back last")
	}
	if q := p.get(s); q == nil || q == lent[1] {
		t.Error("the dropped one was not replaced")
	} else {
		lent[1] = q
	}
	for _, q := range lent {
		p.put(q)
	}
	want("all back", poolState{4, 0})
	p.trim() // they were in use since the last trim
	want("trimmed once", poolState{4, 0})
	p.trim()
	want("trimmed twice", poolState{3, 0})
	for range 5 {
		p.trim()
	}
	want("trimmed often", poolState{2, 0})

	q := p.get(s)
	p.close()
	want("closed", poolState{1, 1})
	p.put(q)
	want("closed, the last came back", poolState{0, 0})
	if q := p.get(s); q != nil {
		t.Error("a pipe of a closed pool")
	}
}

func TestNewPipe(t *testing.T) {
	for _, tt := range []struct{ ask, want int }{
		{4096, 4096}, {1 << 20, 1 << 20}, {100 << 10, 128 << 10},
	} {
		p := newPipe(tt.ask)
		if p == nil || p.size != tt.want {
			t.Errorf("newPipe(%d): %+v", tt.ask, p)
			continue
		}
		p.close()
	}
	// More than fs.pipe-max-size: the kernel refuses, a smaller one comes.
	p := newPipe(1 << 30)
	if p == nil || p.size < minPipe {
		t.Fatalf("%+v", p)
	}
	p.close()
}
