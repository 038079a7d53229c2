package main

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"github.com/tproxyd/tproxyd/internal/netns"
)

// TestScripts runs testdata/*.txtar, each in a folder and a network namespace
// of its own. Such a file is lines of a script, then files for its folder, each
// behind a line "-- NAME --" and of mode 0600. The lines:
//
//	N> tproxyd ARG…   the command, which must exit with N
//	exec PROGRAM ARG… another one, which must exit with 0
//	stdout RE         what it printed matches RE; ! before it: does not
//	stderr RE         the same
//	cmp stdout FILE   what it printed is the file
//	chmod MODE FILE
//	env NAME=VALUE
//	# a comment
//
// In RE ^ and $ are the ends of a line. A word with blanks stands in '…'.
func TestScripts(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txtar")
	if err != nil || len(files) == 0 {
		t.Fatalf("scripts: %v, %v", files, err)
	}
	for _, path := range files {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Run(strings.TrimSuffix(filepath.Base(path), ".txtar"), func(t *testing.T) {
			t.Chdir(t.TempDir())
			ns, err := netns.New()
			if err != nil {
				t.Fatal(err)
			}
			defer ns.Close()
			if err := ns.Do(func() error { return up("lo") }); err != nil {
				t.Fatal(err)
			}
			s := script{env: map[string]string{}, ns: ns}
			lines := s.unpack(t, string(text))
			for i, line := range lines {
				if err := s.do(line); err != nil {
					t.Errorf("%s:%d: %s: %v\nstdout:\n%s\nstderr:\n%s", path, i+1, line, err, s.stdout.String(), s.stderr.String())
				}
			}
			if s.commands == 0 {
				t.Errorf("%s runs no command", path)
			}
		})
	}
}

// script is one that runs.
type script struct {
	env            map[string]string
	ns             *netns.Namespace
	stdout, stderr bytes.Buffer // of the last command
	commands       int
}

var (
	fileLine = regexp.MustCompile(`(?m)^-- (.+) --\n`)
	word     = regexp.MustCompile(`'([^']*)'|(\S+)`)
)

// unpack writes the files and returns the lines of the script.
func (s *script) unpack(t *testing.T, text string) []string {
	t.Helper()
	marks := fileLine.FindAllStringSubmatchIndex(text, -1)
	end := len(text)
	for i := len(marks) - 1; i >= 0; i-- {
		m := marks[i]
		name := text[m[2]:m[3]]
		if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o700), os.WriteFile(name, []byte(text[m[1]:end]), 0o600)); err != nil {
			t.Fatal(err)
		}
		end = m[0]
	}
	return strings.Split(text[:end], "\n")
}

// do carries out one line.
func (s *script) do(line string) error {
	var words []string
	for _, m := range word.FindAllStringSubmatch(line, -1) {
		words = append(words, cmp.Or(m[1], m[2]))
	}
	if len(words) == 0 || strings.HasPrefix(words[0], "#") {
		return nil
	}
	want := words[0] != "!"
	if !want {
		words = words[1:]
	}
	switch verb, args := words[0], words[1:]; {
	case strings.HasSuffix(verb, ">") && len(args) > 0 && args[0] == "tproxyd":
		return s.run(strings.TrimSuffix(verb, ">"), args[1:])
	case verb == "exec" && len(args) > 0:
		return s.exec(args)
	case (verb == "stdout" || verb == "stderr") && len(args) == 1:
		re, err := regexp.Compile("(?m)" + args[0])
		if err != nil {
			return err
		}
		if re.MatchString(s.output(verb)) != want {
			return fmt.Errorf("a match: %v, want %v", !want, want)
		}
	case verb == "cmp" && len(args) == 2:
		b, err := os.ReadFile(args[1])
		if got := s.output(args[0]); err != nil || got != string(b) {
			return fmt.Errorf("not as in %s, %v", args[1], err)
		}
	case verb == "chmod" && len(args) == 2:
		mode, err := strconv.ParseUint(args[0], 8, 9)
		if err != nil {
			return err
		}
		return os.Chmod(args[1], os.FileMode(mode))
	case verb == "env" && len(args) == 1:
		name, value, _ := strings.Cut(args[0], "=")
		s.env[name] = value
	default:
		return fmt.Errorf("what is %q?", verb)
	}
	return nil
}

func (s *script) output(name string) string {
	if name == "stdout" {
		return s.stdout.String()
	}
	return s.stderr.String()
}

// exec runs another program in the script's namespace.
func (s *script) exec(args []string) error {
	s.stdout.Reset()
	s.stderr.Reset()
	c := exec.Command(args[0], args[1:]...)
	c.Stdout, c.Stderr = &s.stdout, &s.stderr
	return s.ns.Do(c.Run)
}

func (s *script) run(want string, args []string) error {
	s.commands++
	s.stdout.Reset()
	s.stderr.Reset()
	got := 0
	s.ns.Do(func() error {
		got = run(&env{&s.stdout, &s.stderr, func(name string) string { return s.env[name] }}, args)
		return nil
	})
	if strconv.Itoa(got) != want {
		return fmt.Errorf("exit status %d, want %s", got, want)
	}
	return nil
}
