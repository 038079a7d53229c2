package daemon

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

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
