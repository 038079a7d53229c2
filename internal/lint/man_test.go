package lint_test

import (
	"maps"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// display is an indented block of a man page, and oneLine a single line of it.
var (
	display = regexp.MustCompile(`(?ms)^\.Bd -literal -offset indent\n(.*?)^\.Ed$`)
	oneLine = regexp.MustCompile(`(?m)^\.Dl (.*)$`)
)

// manPages returns the paths of the man pages.
func manPages(t *testing.T) []string {
	t.Helper()
	pages, err := filepath.Glob(filepath.Join(root, "man", "*.[58]"))
	if err != nil || len(pages) == 0 {
		t.Fatalf("no man pages: %v", err)
	}
	return pages
}

// TestManPages: mandoc finds nothing to say, but that a manual of somebody
// else is not installed here.
func TestManPages(t *testing.T) {
	mandoc := tool(t, "mandoc", "mandoc")
	for _, page := range manPages(t) {
		out, _ := exec.Command(mandoc, "-T", "lint", "-W", "style", page).Output()
		for _, line := range strings.Split(strings.TrimSpace(string(out)), "\n") {
			if line != "" && !strings.Contains(line, "referenced manual not found") {
				t.Error(line)
			}
		}
	}
}

// TestManCommands: tproxyd(8) speaks of every command and flag.
func TestManCommands(t *testing.T) {
	page := strings.ReplaceAll(read(t, "man/tproxyd.8"), `\-`, "-")
	help, _ := tproxyd(t, "--help")
	_, list, _ := strings.Cut(help, "Available Commands:\n")
	list, _, _ = strings.Cut(list, "\n\n")
	commands := 0
	for _, line := range strings.Split(list, "\n") {
		name, _, _ := strings.Cut(strings.TrimSpace(line), " ")
		if name == "" || name == "help" || name == "completion" {
			continue
		}
		commands++
		if !regexp.MustCompile(`(?m)^\.It Cm `+name+`\b`).MatchString(page) && !strings.Contains(page, ".It Cm "+name) {
			t.Errorf("man/tproxyd.8 does not speak of %s", name)
		}
		text, _ := tproxyd(t, name, "--help")
		for _, m := range regexp.MustCompile(`--([a-z][a-z-]+)`).FindAllStringSubmatch(text, -1) {
			flag := m[1]
			short := map[string]string{"config": "Fl c", "verbose": "Fl v", "help": ""}
			want, known := short[flag]
			if !known {
				want = "Fl -" + flag
			}
			if !strings.Contains(page, want) {
				t.Errorf("man/tproxyd.8 does not speak of %s --%s", name, flag)
			}
		}
	}
	if commands < 5 {
		t.Errorf("found only %d commands in\n%s", commands, help)
	}
}

// TestManKeys: tproxyd.toml(5) and the example file know the same keys, and
// the daemon knows them too: TestDeployedFiles lets it read every one.
func TestManKeys(t *testing.T) {
	page := read(t, "man/tproxyd.toml.5")
	keys := regexp.MustCompile(`(?m)^#?([a-z0-9]+) *= `).FindAllStringSubmatch(read(t, "deploy/tproxyd.toml"), -1)
	if len(keys) < 10 {
		t.Fatalf("found only %d keys in deploy/tproxyd.toml", len(keys))
	}
	for _, k := range keys {
		if !regexp.MustCompile(`(?m)^\.It Ic .*\b` + k[1] + `\b`).MatchString(page) {
			t.Errorf("man/tproxyd.toml.5 does not speak of %s", k[1])
		}
	}
}

// TestManExamples: the blocks of the man pages parse.
func TestManExamples(t *testing.T) {
	_, examples, _ := strings.Cut(read(t, "man/tproxyd.8"), ".Sh EXAMPLES\n")
	examples, _, _ = strings.Cut(examples, ".Sh ")
	for _, m := range append(oneLine.FindAllStringSubmatch(examples, -1), display.FindAllStringSubmatch(examples, -1)...) {
		for _, line := range strings.Split(strings.TrimSpace(m[1]), "\n") {
			checkCommand(t, "man/tproxyd.8", line)
		}
	}
	_, examples, _ = strings.Cut(read(t, "man/tproxyd.toml.5"), ".Sh EXAMPLES\n")
	for _, m := range display.FindAllStringSubmatch(examples, -1) {
		checkConfig(t, "man/tproxyd.toml.5", m[1])
	}
	for _, m := range display.FindAllStringSubmatch(read(t, "man/tproxyd-socks.cnf.5"), -1) {
		checkRules(t, "man/tproxyd-socks.cnf.5", m[1])
	}
}

// among reports what a manual does not list as an item, and what it lists too
// much. The items are those of a line pattern, between two section titles.
func among(t *testing.T, page, from, to string, item *regexp.Regexp, want map[string]bool) {
	t.Helper()
	_, part, _ := strings.Cut(read(t, page), from)
	part, _, _ = strings.Cut(part, to)
	if len(want) == 0 {
		t.Fatalf("found nothing that %s should list", page)
	}
	listed := map[string]bool{}
	for _, m := range item.FindAllStringSubmatch(part, -1) {
		listed[m[1]] = true
		if !want[m[1]] {
			t.Errorf("%s lists %s, which the program does not have", page, m[1])
		}
	}
	for name := range want {
		if !listed[name] {
			t.Errorf("%s does not list %s", page, name)
		}
	}
}

// found returns the first group of each match in those sources of a folder
// that are not tests.
func found(t *testing.T, dir string, pattern *regexp.Regexp) map[string]bool {
	t.Helper()
	all := map[string]bool{}
	for _, s := range packages(t)[dir] {
		for _, m := range pattern.FindAllSubmatch(s.text, -1) {
			all[string(m[1])] = true
		}
	}
	return all
}

// TestManCodes: the manuals explain every code that a message can have.
func TestManCodes(t *testing.T) {
	code := regexp.MustCompile(`"([EWT][0-9]{2})"`)
	item := regexp.MustCompile(`(?m)^\.It ([EWT][0-9]{2})\b`)
	among(t, "man/tproxyd-socks.cnf.5", ".Sh DIAGNOSTICS", ".Sh SEE ALSO", item, found(t, "pkg/routes", code))
	toml := found(t, "internal/config", code)
	maps.Copy(toml, found(t, "internal/daemon", regexp.MustCompile(`"(W[0-9]{2})"`))) // what both files say together
	among(t, "man/tproxyd.toml.5", ".Sh DIAGNOSTICS", ".Sh SEE ALSO", item, toml)
}

// TestManMetrics: tproxyd(8) names every metric of ours.
func TestManMetrics(t *testing.T) {
	want := map[string]bool{}
	for name := range found(t, "internal/daemon", regexp.MustCompile(`\bgauge\("([a-z_]+)"`)) {
		want["tproxyd_"+name] = true
	}
	for name := range found(t, "internal/daemon", regexp.MustCompile(`\bcounter\("([a-z_]+)"`)) {
		want["tproxyd_"+name+"_total"] = true
	}
	for name := range found(t, "internal/daemon", regexp.MustCompile(`\bhistogram\("([a-z_]+)"`)) {
		want["tproxyd_"+name] = true
	}
	among(t, "man/tproxyd.8", ".Sh METRICS", "\n.Sh ", regexp.MustCompile(`(?m)^\.It Li (tproxyd_[a-z_]+)`), want)
}

// TestManOptions: tproxyd-socks.cnf(5) explains each option of a rule.
func TestManOptions(t *testing.T) {
	_, table, _ := strings.Cut(read(t, "pkg/routes/rule.go"), "var optionWords = ")
	table, _, _ = strings.Cut(table, "\n}\n")
	have := map[string]bool{}
	for _, m := range regexp.MustCompile(`"([a-z]+)"`).FindAllStringSubmatch(table, -1) {
		have[m[1]] = true
	}
	among(t, "man/tproxyd-socks.cnf.5", "\nOptions:\n", ".Ss ", regexp.MustCompile(`(?m)^\.It Ic ([a-z]+)`), have)
}

// TestManCapabilities: tproxyd(8) explains what the unit leaves, and what it offers in
// a comment.
func TestManCapabilities(t *testing.T) {
	lines := regexp.MustCompile(`(?m)^#?CapabilityBoundingSet=(.+)$`).FindAllStringSubmatch(read(t, "deploy/tproxyd.service"), -1)
	if lines == nil {
		t.Fatal("deploy/tproxyd.service has no CapabilityBoundingSet")
	}
	want := map[string]bool{}
	for _, rights := range lines {
		for _, r := range strings.Fields(rights[1]) {
			want[r] = true
		}
	}
	among(t, "man/tproxyd.8", ".Sh CAPABILITIES", "\n.Sh ", regexp.MustCompile(`\b(CAP_[A-Z_]+)\b`), want)
}
