package daemon

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tproxyd/tproxyd/pkg/routes"
	"golang.org/x/sys/unix"
)

// TestListOfNoFile: what is no file is an error at once, also a FIFO that nobody
// writes to.
func TestListOfNoFile(t *testing.T) {
	dir := write(t, map[string]string{"tproxyd.toml": "[intercept]\nlocal = true\n", "socks.cnf": "LIST l file=fifo\nDENY $l"})
	if err := unix.Mkfifo(filepath.Join(dir, "fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	done := make(chan string)
	go func() {
		_, diags := Load(filepath.Join(dir, "tproxyd.toml"), "")
		done <- diags.Error()
	}()
	select {
	case text := <-done:
		if !strings.Contains(text, "fifo: not a regular file") {
			t.Error(text)
		}
	case <-time.After(10 * time.Second):
		t.Error("it waits for somebody who writes")
	}
}

// TestListThatIsGone: a start goes by what the file of a LIST held when it was in
// force last; a reload does not, nor a start with a file that was never there.
func TestListThatIsGone(t *testing.T) {
	dir := write(t, map[string]string{"tproxyd.toml": "[intercept]\nlocal = true\n[state]\ndirectory = \"state\"\n", "socks.cnf": "LIST l file=ads\nDENY $l", "ads": "a.example\n"})
	state := filepath.Join(dir, "state")
	if err := os.Mkdir(state, 0o700); err != nil {
		t.Fatal(err)
	}
	conf, ads := filepath.Join(dir, "tproxyd.toml"), filepath.Join(dir, "ads")
	b, err := os.ReadFile(conf)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(conf, []byte(strings.Replace(string(b), `"state"`, `"`+state+`"`, 1)), 0o644); err != nil {
		t.Fatal(err)
	}
	good, diags := Load(conf, "")
	if diags.HasErrors() {
		t.Fatal(diags)
	}
	if err := os.WriteFile(ads, []byte("half"), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := good.keepLists(); err != nil {
		t.Error(err)
	}
	if files, _ := os.ReadDir(state); len(files) != 0 {
		t.Errorf("a file was copied that is not what was read: %v", files)
	}
	if err := os.WriteFile(ads, []byte("b.example\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if good, diags = Load(conf, ""); diags.HasErrors() {
		t.Fatal(diags)
	}
	if err := good.keepLists(); err != nil {
		t.Error(err)
	}
	if err := os.Remove(ads); err != nil {
		t.Fatal(err)
	}
	again, diags := Load(conf, "")
	if diags.HasErrors() || len(diags) != 1 || diags[0].File != ads || diags[0].Code != "W09" || !strings.Contains(diags[0].Msg, "is in force, as of 20") {
		t.Fatal(diags)
	}
	if again.Table.Sum() != good.Table.Sum() || len(again.goneLists()) != 1 {
		t.Errorf("it means something else, %v", again.goneLists())
	}
	if closed, diags := LoadClosed(conf); diags.HasErrors() || closed.Table == nil {
		t.Error(diags)
	}
	if _, diags := good.again(); !diags.HasErrors() || !strings.Contains(diags.Error(), "E24") {
		t.Errorf("a reload: %v", diags)
	}
	for what, f := range map[string]func() (*Setup, routes.Diagnostics){"a reload": again.again, "a list that changes": again.relisted} {
		if next, diags := f(); diags.HasErrors() || len(next.gone) != 1 {
			t.Errorf("%s of one that began without the file: %v", what, diags)
		}
	}
	if err := again.keepLists(); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "socks.cnf"), []byte("LIST l file=other\nDENY $l"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, diags := Load(conf, ""); !diags.HasErrors() {
		t.Error("a file that was never there")
	}
	if err := os.WriteFile(filepath.Join(dir, "other"), []byte("c.example"), 0o644); err != nil {
		t.Fatal(err)
	}
	other, diags := Load(conf, "")
	if diags.HasErrors() {
		t.Fatal(diags)
	}
	if err := other.keepLists(); err != nil {
		t.Error(err)
	}
	files, err := os.ReadDir(state)
	if err != nil || len(files) != 1 || filepath.Join(state, files[0].Name()) != copyOf(state, filepath.Join(dir, "other")) {
		t.Errorf("%v %v", files, err)
	}
}
