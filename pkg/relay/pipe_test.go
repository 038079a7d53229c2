package relay

import (
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
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

// TestKeptPipes makes pipes that stay, though nobody needs them.
func TestKeptPipes(t *testing.T) {
	p := &pipePool{max: 8, keep: 4, size: 128 << 10, spare: new(spareFD)}
	defer p.close()
	p.fill()
	if d := cmp.Diff(poolState{4, 0}, p.state()); d != "" {
		t.Errorf("filled: %s", d)
	}
	s := new(Stream)
	var lent []*pipe
	for range 7 {
		lent = append(lent, p.get(s))
	}
	for _, q := range lent {
		if _, err := unix.Write(q.w, make([]byte, 5000)); err != nil {
			t.Fatal(err)
		}
		p.drop(q)
	}
	if d := cmp.Diff(poolState{7, 0}, p.state()); d != "" {
		t.Errorf("back with bytes in them: %s", d)
	}
	q := p.get(s)
	if n, err := unix.Read(q.r, make([]byte, 1)); err != unix.EAGAIN {
		t.Errorf("a pipe was lent with %d bytes in it, %v", n, err)
	}
	p.put(q)
	for range 6 {
		p.trim()
	}
	if d := cmp.Diff(poolState{4, 0}, p.state()); d != "" {
		t.Errorf("trimmed often: %s", d)
	}
	p.shed() // a descriptor is worth more
	if d := cmp.Diff(poolState{3, 0}, p.state()); d != "" {
		t.Errorf("one given up: %s", d)
	}

	e, err := New(Options{KeptPipes: 3, MaxPipes: 2, Loops: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	if n := e.Stats().Pipes; n != 2 {
		t.Errorf("%d pipes of 2 at most", n)
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
