package routes

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestMistakes: a file of more than 50 kinds of mistakes has them all reported in
// one run, and nothing else.
func TestMistakes(t *testing.T) {
	const path = "testdata/mistakes.cnf"
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	kinds := 0
	for i, line := range strings.Split(string(text), "\n") {
		_, comment, ok := strings.Cut(line, "#!")
		if !ok {
			continue
		}
		kinds++
		words := strings.Fields(comment)
		for j := 0; j+1 < len(words); j += 2 {
			want = append(want, fmt.Sprintf("%d:%s %s", i+1, words[j], words[j+1]))
		}
	}
	table, ds := ParseFile(path, Options{})
	got := short(ds)
	slices.Sort(want)
	slices.Sort(got)
	if diff := cmp.Diff(want, got); diff != "" || table != nil || kinds < 50 {
		t.Errorf("%d kinds: %s\n%s", kinds, diff, ds.Error())
	}
	for _, d := range ds {
		if d.File != path || len(d.Msg) < 10 {
			t.Errorf("no place or no words: %s", d)
		}
	}
}

func TestAllErrorsInOneRunInTheOrderOfTheFiles(t *testing.T) {
	_, ds := parse("DENY *foo\nINCLUDE more.cnf\nDENY * eq\nSERVER a\nSOCKD5 @=b 10.0.0. 80 \\\n  foo=1", map[string]string{
		"more.cnf": "SOCKD6 *\nDENY 1.2.3.4 0.0.0.255",
	})
	var got []string
	for _, d := range ds {
		got = append(got, fmt.Sprintf("%s:%d:%d %s", d.File, d.Line, d.Col, d.Code))
	}
	want := []string{
		"socks.cnf:1:6 E26", "more.cnf:1:1 E01", "more.cnf:2:14 E05", "socks.cnf:3:8 E10", "socks.cnf:4:9 E29",
		"socks.cnf:5:10 E12", "socks.cnf:5:12 E03", "socks.cnf:5:20 W01", "socks.cnf:6:3 E29",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff, ds.Error())
	}
	if s := ds[0].String(); !strings.HasPrefix(s, "socks.cnf:1:6: error E26: ") {
		t.Error(s)
	}
}
