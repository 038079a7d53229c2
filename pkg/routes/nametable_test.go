package routes

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
)

// What was entered is found, also over the end of a block and of the table, and
// nothing else is.
func TestNameTable(t *testing.T) {
	t.Parallel()
	r := rand.New(rand.NewPCG(1, 2))
	name := func(i int) string { return strings.Repeat("x", r.IntN(240)) + fmt.Sprint(i) }
	text := &nameText{}
	want := map[string]nameRules{}
	refs := map[string]nameRef{}
	for i := range 20_000 {
		n := name(i)
		refs[n] = text.add([]byte(n))
		if text.add([]byte(n)) != refs[n] {
			t.Fatal("a name that was entered last is entered again")
		}
		want[n] = nameRules{exact: uint32(i), below: r.Uint32()}
	}
	if len(text.blocks) < 2 {
		t.Fatal("one block")
	}
	table := newNameTable(text, text.n)
	for range 2 {
		for n, rules := range want {
			table.slot(refs[n]).nameRules = rules
		}
	}
	for n, rules := range want {
		if got := text.at(refs[n]); got != n {
			t.Fatalf("%q is %q", n, got)
		}
		if got := table.get(n); got != rules {
			t.Fatalf("%q: %v, want %v", n, got, rules)
		}
		for _, other := range []string{n + "x", "y" + n, ""} {
			if got := table.get(other); got != (nameRules{}) {
				t.Fatalf("%q is not there: %v", other, got)
			}
		}
	}
}
