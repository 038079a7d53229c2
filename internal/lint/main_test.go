package lint_test

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// program is the binary of the checkout, built once for the tests that run it.
var program string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	dir, err := os.MkdirTemp("", "tproxyd-lint")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	program = filepath.Join(dir, "tproxyd")
	build := exec.Command("go", "build", "-buildvcs=false", "-o", program, "./cmd/tproxyd")
	build.Dir = root
	if out, err := build.CombinedOutput(); err != nil {
		fmt.Fprintf(os.Stderr, "go build ./cmd/tproxyd: %v\n%s", err, out)
		program = "" // the tests that need it fail; the others speak
	}
	return m.Run()
}

// tproxyd runs the built binary and returns what it said and how it exited.
func tproxyd(t *testing.T, args ...string) (output string, status int) {
	t.Helper()
	if program == "" {
		t.Fatal("cmd/tproxyd does not build")
	}
	out, err := exec.Command(program, args...).CombinedOutput()
	var exit *exec.ExitError
	switch {
	case err == nil:
		return string(out), 0
	case errors.As(err, &exit):
		return string(out), exit.ExitCode()
	}
	t.Fatal(err)
	return "", -1
}

// write puts text into a file of a folder of the test's own.
func write(t *testing.T, path, text string, mode os.FileMode) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), mode); err != nil {
		t.Fatal(err)
	}
}
