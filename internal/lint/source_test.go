package lint_test

import (
	"bytes"
	"go/ast"
	"go/format"
	"go/token"
	"strings"
	"testing"
)

// call is a call of a function of another package, as "os.Exit", or of a
// method of something with a name, as "t.Skip".
type call struct {
	name string
	pos  token.Pos
}

func calls(f *ast.File) []call {
	var all []call
	ast.Inspect(f, func(n ast.Node) bool {
		c, ok := n.(*ast.CallExpr)
		if !ok {
			return true
		}
		if sel, ok := c.Fun.(*ast.SelectorExpr); ok {
			if x, ok := sel.X.(*ast.Ident); ok {
				all = append(all, call{x.Name + "." + sel.Sel.Name, c.Pos()})
			}
		}
		return true
	})
	return all
}

func TestFormatted(t *testing.T) {
	for _, s := range sources(t) {
		want, err := format.Source(s.text)
		if err != nil {
			t.Errorf("%s: %v", s.path, err)
		} else if !bytes.Equal(want, s.text) {
			t.Errorf("%s: gofmt would change it", s.path)
		}
	}
}

// TestNothingSkipped: where a privilege or a program is missing a test fails.
func TestNothingSkipped(t *testing.T) {
	for _, s := range sources(t) {
		if !s.test() {
			continue
		}
		for _, c := range calls(s.file) {
			_, method, _ := strings.Cut(c.name, ".")
			switch method {
			case "Skip", "Skipf", "SkipNow":
				t.Errorf("%s: %s: a test fails where something is missing, it does not skip", s.at(c.pos), c.name)
			}
		}
		if strings.HasPrefix(s.path, "examples/") {
			continue // run by a test of test/netns, in a place that is made for it
		}
		if tags := buildTags(s.file); tags != "" {
			t.Errorf("%s: %s hides a test", s.path, tags)
		}
	}
}

// buildTags returns a file's build constraint other than for the race
// detector and the system.
func buildTags(f *ast.File) string {
	for _, g := range f.Comments {
		for _, c := range g.List {
			if rest, ok := strings.CutPrefix(c.Text, "//go:build "); ok && strings.Trim(rest, "! ") != "race" && rest != "linux" {
				return c.Text
			}
		}
	}
	return ""
}

// maxLines is where a file gets hard to hold in mind.
const maxLines = 500

func TestSource(t *testing.T) {
	for _, s := range sources(t) {
		if n := bytes.Count(s.text, []byte("\n")); n > maxLines {
			t.Errorf("%s: %d lines, more than %d: it holds more than one noun", s.path, n, maxLines)
		}
		for _, d := range s.file.Decls {
			if f, ok := d.(*ast.FuncDecl); ok && f.Recv == nil && f.Name.Name == "init" {
				t.Errorf("%s: init()", s.at(f.Pos()))
			}
		}
		for _, g := range s.file.Comments {
			for _, word := range []string{"TODO", "FIXME", "XXX"} {
				if strings.Contains(g.Text(), word) {
					t.Errorf("%s: %s", s.at(g.Pos()), word)
				}
			}
		}
	}
}
