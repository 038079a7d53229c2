// Package lint_test holds the source to the rules that the compiler does not
// know: who may import whom, what must be documented, and that what the README,
// the man pages and the deployment files say is true.
//
// It promises to read the sources themselves, each time: a test that asks
// "go list" is answered from the test cache after a violation. It needs mandoc
// and systemd-analyze and fails where they are missing.
package lint_test

import (
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"testing"
)

// root is the folder of the module, seen from this package.
const root = "../.."

// source is one Go file of the module.
type source struct {
	path string // relative to root
	dir  string // its folder, which is its package's path in the module
	text []byte
	file *ast.File
	fset *token.FileSet
}

func (s *source) test() bool { return strings.HasSuffix(s.path, "_test.go") }

// at names a place of the file.
func (s *source) at(p token.Pos) string {
	pos := s.fset.Position(p)
	pos.Filename = s.path
	return pos.String()
}

// sources parses every Go file of the module.
func sources(t *testing.T) []*source {
	t.Helper()
	var all []*source
	fset := token.NewFileSet()
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := d.Name()
		if d.IsDir() {
			if path != root && (strings.HasPrefix(name, ".") || strings.HasPrefix(name, "_") || name == "testdata" || name == "bin") {
				return fs.SkipDir
			}
			return nil
		}
		if !strings.HasSuffix(name, ".go") {
			return nil
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil {
			return err
		}
		s := &source{path: rel, dir: filepath.Dir(rel), text: text, fset: fset}
		if s.file, err = parser.ParseFile(s.fset, path, text, parser.ParseComments); err != nil {
			return err
		}
		all = append(all, s)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	sort.Slice(all, func(i, j int) bool { return all[i].path < all[j].path })
	return all
}

// read returns a file of the repository.
func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, path))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// tool returns the path of a program, or fails with the package that has it.
func tool(t *testing.T, name, pkg string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatalf("%s is missing: apt-get install %s", name, pkg)
	}
	return path
}
