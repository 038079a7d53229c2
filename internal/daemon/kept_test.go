package daemon

import "testing"

// TestKept: what is let pass by name outlives a restart, and then a reload that
// changes no rule; after one that does nobody knows any longer what it was let
// pass for.
func TestKept(t *testing.T) {
	const direct = "DIRECT direct.example\nDENY *\n"
	first := serve(t, "")
	first.routes(direct)
	if at := ask(t, "direct.example."); at != directAt {
		t.Fatalf("direct.example is at %s", at)
	}
	first.stop()
	r := serveIn(t, first.dir)
	for _, tt := range []struct {
		rules string
		want  int
	}{{direct, 1}, {"# the same\n" + direct, 1}, {direct + "DENY *.example.org\n", 0}} {
		r.routes(tt.rules)
		if in, err := r.inForce(); err != nil || len(in) != tt.want {
			t.Errorf("%q: %v, %v, want %d", tt.rules, in, err, tt.want)
		}
	}
}
