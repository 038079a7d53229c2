package lint_test

import (
	"go/ast"
	"go/doc"
	"strings"
	"testing"
)

// packages groups the sources that are not tests by folder.
func packages(t *testing.T) map[string][]*source {
	all := map[string][]*source{}
	for _, s := range sources(t) {
		if !s.test() {
			all[s.dir] = append(all[s.dir], s)
		}
	}
	return all
}

// TestPackageComments: each package says what it promises, in one place.
func TestPackageComments(t *testing.T) {
	for dir, files := range packages(t) {
		var said []string
		for _, s := range files {
			if s.file.Doc != nil {
				said = append(said, s.path)
				want := "Package " + s.file.Name.Name + " "
				if s.file.Name.Name == "main" {
					want = "Command "
				}
				if !strings.HasPrefix(s.file.Doc.Text(), want) {
					t.Errorf("%s: the package comment does not begin with %q", s.path, want)
				}
			}
		}
		if len(said) != 1 {
			t.Errorf("%s: package comments in %v, want one", dir, said)
		}
	}
}

// TestDocumented: every exported name, field and method has a comment.
func TestDocumented(t *testing.T) {
	for dir, files := range packages(t) {
		var parsed []*ast.File
		for _, s := range files {
			parsed = append(parsed, s.file)
		}
		d, err := doc.NewFromFiles(files[0].fset, parsed, module+dir)
		if err != nil {
			t.Fatal(err)
		}
		missing := func(kind, name string) { t.Errorf("%s: %s %s has no comment", dir, kind, name) }
		values := func(vs []*doc.Value) {
			for _, v := range vs {
				if v.Doc != "" {
					continue
				}
				for _, spec := range v.Decl.Specs {
					s := spec.(*ast.ValueSpec)
					for _, n := range s.Names {
						if n.IsExported() && s.Doc == nil && s.Comment == nil {
							missing("value", n.Name)
						}
					}
				}
			}
		}
		funcs := func(fs []*doc.Func, on string) {
			for _, f := range fs {
				if f.Doc == "" && ast.IsExported(f.Name) && !wellKnown[f.Name] {
					missing("function", on+f.Name)
				}
			}
		}
		values(d.Consts)
		values(d.Vars)
		funcs(d.Funcs, "")
		for _, typ := range d.Types {
			if !ast.IsExported(typ.Name) {
				continue
			}
			if typ.Doc == "" {
				missing("type", typ.Name)
			}
			values(typ.Consts)
			values(typ.Vars)
			funcs(typ.Funcs, "")
			funcs(typ.Methods, typ.Name+".")
		}
	}
}

// wellKnown are methods whose meaning is that of an interface of the standard
// library.
var wellKnown = map[string]bool{
	"Error": true, "Unwrap": true, "Is": true, "Len": true, "Less": true, "Swap": true,
	"Network": true, "LocalAddr": true, "RemoteAddr": true, "SetDeadline": true, "SetReadDeadline": true, "SetWriteDeadline": true,
	"MarshalText": true, "MarshalJSON": true, "LogValue": true, "GoString": true,
}
