package main

import (
	"io"
	"os"
	"strings"
	"testing"
)

// TestExamples: the help of every command has an example, and each line of them
// is one that the command line takes.
func TestExamples(t *testing.T) {
	e := &env{io.Discard, io.Discard, os.Getenv}
	for _, c := range rootCommand(e).Commands() {
		if c.Hidden || c.Name() == "help" {
			continue
		}
		if c.Example == "" {
			t.Errorf("%s has no example", c.Name())
		}
		for line := range strings.Lines(c.Example) {
			line = strings.TrimSuffix(strings.TrimPrefix(strings.TrimSpace(line), "source <("), ")")
			line, _, _ = strings.Cut(line, " | ")
			line, _, _ = strings.Cut(line, " >")
			line = strings.ReplaceAll(line, "'", "")
			words := strings.Fields(line)
			if len(words) < 2 || words[0] != "tproxyd" || words[1] != c.Name() {
				t.Errorf("%s: %q is no example of it", c.Name(), line)
				continue
			}
			// A fresh command for each line, since flags keep what they were given.
			found, rest, err := rootCommand(e).Find(words[1:])
			if err == nil {
				err = found.ParseFlags(rest)
			}
			if err == nil {
				err = found.ValidateArgs(found.Flags().Args())
			}
			if err != nil {
				t.Errorf("%s: %q: %v", c.Name(), line, err)
			}
		}
	}
}
