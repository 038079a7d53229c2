package netns_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// TestGoTest: the example of a Go test that is socksified whole, as it stands.
// It passes where its server carries it, and fails where there is none.
func TestGoTest(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	binary := filepath.Join(filepath.Dir(program(t)), "gotest.test")
	out, err := exec.Command("go", "test", "-c", "-tags", "example", "-o", binary, "github.com/tproxyd/tproxyd/examples/gotest").CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	rules, err := os.ReadFile("../../examples/gotest/socks.cnf")
	if err != nil {
		t.Fatal(err)
	}
	w.gateway.file(t, "socks.cnf", string(rules), 0o644) // where it runs
	test := command{
		args: asNobody(t, binary, "-test.v"),
		env:  []string{"PATH=" + filepath.Dir(program(t)) + ":/usr/bin:/bin"},
	}
	w.gateway.run(t, test).exit(t, 1) // no server yet
	startMicrosocks(t, w.socks1, socks1At+":1080")
	w.gateway.run(t, test).ok(t)
	if n := len(w.outsideWeb.from("/")); n != 1 {
		t.Errorf("the page was fetched %d times", n)
	}
}
