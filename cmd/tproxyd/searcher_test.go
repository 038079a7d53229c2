package main

import (
	"encoding/gob"
	"errors"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"
)

// answering is a searcher of a process that answers nothing.
func answering(t *testing.T, args ...string) (s *searcher, end *os.File) {
	t.Helper()
	cmd := exec.Command(args[0], args[1:]...)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	out, end, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { end.Close() })
	return &searcher{cmd: cmd, in: io.NopCloser(nil), out: out, to: gob.NewEncoder(io.Discard), from: gob.NewDecoder(out)}, end
}

// TestSearcherThatIsGone: who asks is told, and does not wait.
func TestSearcherThatIsGone(t *testing.T) {
	t.Parallel()
	s := &searcher{}
	if _, err := s.ask(nil); err == nil {
		t.Error("one that was not started answers")
	}
	s, end := answering(t, "true")
	end.Close()
	if _, err := s.ask([]string{"ssh"}); err == nil || !strings.Contains(err.Error(), "has ended, and a restart is needed") {
		t.Errorf("one that has ended: %v", err)
	}
	s.stop()
	if _, err := s.ask(nil); err == nil {
		t.Error("one that was stopped answers")
	}
}

// TestSearcherThatIsSilent: it is waited for as long as a search may take, and ended.
func TestSearcherThatIsSilent(t *testing.T) {
	t.Parallel()
	s, _ := answering(t, "sleep", "600")
	if _, err := s.ask([]string{"ssh"}); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("one that is silent: %v", err)
	}
	s.stop()
}
