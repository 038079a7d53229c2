package lint_test

import (
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// documents are the texts whose examples and links are tried.
var documents = []string{"README.md", "docs/ARCHITECTURE.md", "CHANGELOG.md"}

// fence is a code block of a Markdown file: its language and its text.
var fence = regexp.MustCompile("(?ms)^```([a-z]*)\n(.*?)^```$")

// TestReadme: it stays short, and what it tells to do can be done.
func TestReadme(t *testing.T) {
	text := read(t, "README.md")
	if n := strings.Count(text, "\n"); n >= 150 {
		t.Errorf("README.md has %d lines, not under 150", n)
	}
	for _, want := range []string{"make demo", "make test", "make bench"} {
		if !strings.Contains(text, want) {
			t.Errorf("README.md does not tell %q", want)
		}
	}
}

// TestExamples runs or parses every example of the documents: TOML and rules by
// our own check, make targets by make, commands by --help, a terminal's text by
// the program itself. TestManExamples does so for the man pages.
func TestExamples(t *testing.T) {
	tried := map[string]int{}
	for _, doc := range documents {
		for _, m := range fence.FindAllStringSubmatch(read(t, doc), -1) {
			tried[m[1]]++
			switch m[1] {
			case "toml":
				checkConfig(t, doc, m[2])
			case "conf":
				checkRules(t, doc, m[2])
			case "sh":
				for _, line := range strings.Split(m[2], "\n") {
					checkCommand(t, doc, line)
				}
			case "console":
				checkConsole(t, doc, m[2])
			case "text", "":
			default:
				t.Errorf("%s: a block of %q is tried by nobody", doc, m[1])
			}
		}
	}
	for _, lang := range []string{"toml", "conf", "sh", "console"} {
		if tried[lang] == 0 {
			t.Errorf("no example of %q in %v", lang, documents)
		}
	}
}

// checkConsole runs the command of a terminal's text with the document's own
// files, and wants what the text shows.
func checkConsole(t *testing.T, doc, text string) {
	t.Helper()
	line, want, _ := strings.Cut(text, "\n")
	args, ours := strings.CutPrefix(line, "$ tproxyd ")
	if !ours {
		t.Fatalf("%s: nobody tries %q", doc, line)
	}
	dir := t.TempDir()
	for _, m := range fence.FindAllStringSubmatch(read(t, doc), -1) {
		switch m[1] {
		case "toml":
			write(t, filepath.Join(dir, "tproxyd.toml"), m[2], 0o644)
		case "conf":
			write(t, filepath.Join(dir, "socks.cnf"), m[2], 0o644)
		}
	}
	out, _ := tproxyd(t, append(strings.Fields(args), "-c", filepath.Join(dir, "tproxyd.toml"))...)
	if got := strings.ReplaceAll(out, dir, "/etc/tproxyd"); got != want {
		t.Errorf("%s: %s prints\n%s\nwant\n%s", doc, line, got, want)
	}
}

// checkConfig lets our own check read a tproxyd.toml.
func checkConfig(t *testing.T, where, text string) {
	t.Helper()
	dir := t.TempDir()
	write(t, filepath.Join(dir, "tproxyd.toml"), text, 0o644)
	write(t, filepath.Join(dir, "socks.cnf"), "DEFAULT DENY\n", 0o644)
	write(t, filepath.Join(dir, "credentials.toml"), "[office]\nusername = \"u\"\npassword = \"p\"\n", 0o600)
	write(t, filepath.Join(dir, "secrets.toml"), "admin = \"sixteen characters\"\n", 0o600)
	if out, status := tproxyd(t, "check", "-c", filepath.Join(dir, "tproxyd.toml")); status != 0 {
		t.Errorf("%s: check exits %d for\n%s\n%s", where, status, text, out)
	}
}

// checkRules lets our own check read a file of rules; a warning is no less
// wrong in an example.
func checkRules(t *testing.T, where, text string) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "socks.cnf")
	write(t, path, text, 0o644)
	if out, status := tproxyd(t, "check", "--routes", path); status != 0 || strings.Contains(out, ": warning") {
		t.Errorf("%s: check exits %d for\n%s\n%s", where, status, text, out)
	}
}

// checkCommand looks at one line of a shell: a make target must exist, a
// command of tproxyd must know its flags, and so on.
func checkCommand(t *testing.T, where, line string) {
	t.Helper()
	line, _, _ = strings.Cut(line, " #")
	for _, command := range strings.Split(line, "&&") {
		words := strings.Fields(command)
		if len(words) > 0 && words[0] == "sudo" {
			words = words[1:]
		}
		if len(words) == 0 {
			continue
		}
		switch filepath.Base(words[0]) {
		case "make":
			for _, target := range words[1:] {
				if strings.Contains(target, "=") {
					continue
				}
				c := exec.Command("make", "-n", target)
				c.Dir = root
				if out, err := c.CombinedOutput(); err != nil {
					t.Errorf("%s: make %s: %v\n%s", where, target, err, out)
				}
			}
		case "tproxyd":
			checkFlags(t, where, words[1:])
		case "git", "cd", "apt-get", "systemctl", "nft", "ip", "sysctl", "editor", "cp", "install":
		default:
			t.Errorf("%s: nobody tries the command %q", where, command)
		}
	}
}

// checkFlags asks the command for help and finds each flag in it.
func checkFlags(t *testing.T, where string, args []string) {
	t.Helper()
	if len(args) == 0 {
		return
	}
	help, status := tproxyd(t, args[0], "--help")
	if status != 0 || !strings.Contains(help, "tproxyd "+args[0]) {
		t.Errorf("%s: tproxyd has no command %q", where, args[0])
		return
	}
	for _, a := range args[1:] {
		flag, _, _ := strings.Cut(a, "=")
		if strings.HasPrefix(flag, "-") && !regexp.MustCompile(regexp.QuoteMeta(flag)+`\b`).MatchString(help) {
			t.Errorf("%s: tproxyd %s has no flag %s", where, args[0], flag)
		}
	}
}

// TestLinks: what a document links to in the repository is there.
func TestLinks(t *testing.T) {
	link := regexp.MustCompile(`\]\(([^)#]+)(#[^)]*)?\)`)
	for _, doc := range documents {
		for _, m := range link.FindAllStringSubmatch(read(t, doc), -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			if _, err := os.Stat(filepath.Join(root, filepath.Dir(doc), m[1])); err != nil {
				t.Errorf("%s: the link to %s: %v", doc, m[1], err)
			}
		}
	}
}

// TestArchitecture: it speaks of every package, and of none that is gone.
func TestArchitecture(t *testing.T) {
	text := read(t, "docs/ARCHITECTURE.md")
	for dir := range rooms {
		if !strings.Contains(text, dir) {
			t.Errorf("docs/ARCHITECTURE.md does not speak of %s", dir)
		}
	}
	for _, m := range regexp.MustCompile(`\b(?:pkg|internal|cmd|test)/[a-z]+\b`).FindAllString(text, -1) {
		if _, err := os.Stat(filepath.Join(root, m)); err != nil {
			t.Errorf("docs/ARCHITECTURE.md speaks of %s: %v", m, err)
		}
	}
}

// TestCI: the machine runs what the README tells people to run.
func TestCI(t *testing.T) {
	if ci := read(t, ".ci/run"); !strings.Contains(ci, "exec make test\n") {
		t.Errorf(".ci/run does not call the README's test command:\n%s", ci)
	}
	for _, path := range []string{".ci/run", "test/run", "test/packages"} {
		if st, err := os.Stat(filepath.Join(root, path)); err != nil || st.Mode()&0o111 == 0 {
			t.Errorf("%s cannot be executed: %v", path, err)
		}
		if out, err := exec.Command("bash", "-n", filepath.Join(root, path)).CombinedOutput(); err != nil {
			t.Errorf("%s: %v\n%s", path, err, out)
		}
	}
}

// TestForbiddenWords: no file knows the machine that it was written on, nor
// where packages are fetched from; that is for whoever builds it to say.
func TestForbiddenWords(t *testing.T) {
	words := regexp.MustCompile(`(^|[^\w.$-])/(work|root|home|Users|mnt)/\w` +
		`|\b(proxy\.golang|sum\.golang|goproxy|pypi|registry\.npmjs|crates|deb\.debian|(archive|security)\.ubuntu|ghcr|docker)\.(org|io|com|cn)\b`)
	for _, line := range []string{"see /wo" + "rk/main", "at https://proxy.golang" + ".org/", "FROM ghcr" + ".io/x"} {
		if !words.MatchString(line) {
			t.Errorf("the pattern does not see %q", line)
		}
	}
	read := 0
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case err != nil:
			return err
		case d.IsDir() && (d.Name() == ".git" || d.Name() == "bin"):
			return fs.SkipDir
		case !d.Type().IsRegular() || d.Name() == ".git": // a file in a linked worktree
			return nil
		}
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		read++
		for i, line := range strings.Split(string(b), "\n") {
			if m := words.FindString(line); m != "" {
				t.Errorf("%s:%d: %q", strings.TrimPrefix(path, root+"/"), i+1, m)
			}
		}
		return nil
	})
	if err != nil || read < 50 {
		t.Errorf("read %d files: %v", read, err)
	}
}
