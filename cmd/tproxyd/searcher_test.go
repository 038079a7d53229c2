package main

import (
	"encoding/gob"
	"io"
	"os/exec"
	"strings"
	"testing"
)

// TestSearcherThatIsGone: who asks is told, and does not wait.
func TestSearcherThatIsGone(t *testing.T) {
	s := &searcher{}
	if _, err := s.ask(nil); err == nil {
		t.Error("one that was not started answers")
	}
	s = &searcher{cmd: &exec.Cmd{}, in: io.NopCloser(nil), to: gob.NewEncoder(io.Discard), from: gob.NewDecoder(strings.NewReader(""))}
	if _, err := s.ask([]string{"ssh"}); err == nil || !strings.Contains(err.Error(), "has ended, and a restart is needed") {
		t.Errorf("one that has ended: %v", err)
	}
	s.stop()
	if _, err := s.ask(nil); err == nil {
		t.Error("one that was stopped answers")
	}
}
