package lint_test

import (
	"slices"
	"strconv"
	"strings"
	"testing"
)

const module = "github.com/tproxyd/tproxyd/"

// room is what one package of the house may import: packages of the module,
// and libraries outside of it and of the standard library. Both are prefixes
// of whole path elements. Tests may import more, see testRoom.
type room struct{ own, libs []string }

// rooms is the house: cmd -> internal/daemon -> internal/gateway -> pkg.
// A package that is not listed is an error: whoever adds one says what it is.
var rooms = map[string]room{
	"pkg/flow":           {},
	"pkg/routes":         {own: []string{"pkg/flow"}, libs: []string{"github.com/gaissmai/bart"}},
	"pkg/routes/convert": {own: []string{"pkg/routes"}},
	"pkg/redirect":       {own: []string{"pkg/flow"}, libs: []string{"github.com/google/nftables", "github.com/mdlayher/netlink", "github.com/vishvananda/netlink", "github.com/vishvananda/netns", "golang.org/x/sync", "golang.org/x/sys"}},
	"pkg/fakedns":        {own: []string{"pkg/flow"}, libs: []string{"github.com/miekg/dns", "github.com/hashicorp/golang-lru", "golang.org/x/sys"}},
	"pkg/socks":          {own: []string{"pkg/flow"}},
	"pkg/upstream":       {own: []string{"pkg/flow", "pkg/socks"}},
	"pkg/relay":          {own: []string{"pkg/flow"}, libs: []string{"golang.org/x/sys"}},

	"internal/config":      {own: []string{"pkg/routes", "pkg/redirect"}, libs: []string{"github.com/pelletier/go-toml", "github.com/BurntSushi/toml"}},
	"internal/clash":       {libs: []string{"github.com/coder/websocket"}},
	"internal/control":     {},
	"internal/handover":    {libs: []string{"golang.org/x/sys"}},
	"internal/netns":       {libs: []string{"golang.org/x/sys", "github.com/vishvananda"}},
	"internal/sandbox":     {libs: []string{"github.com/landlock-lsm/go-landlock", "github.com/elastic/go-seccomp-bpf", "kernel.org/pub/linux/libs/security/libcap/psx", "golang.org/x/sys"}},
	"internal/watch":       {libs: []string{"golang.org/x/sys"}},
	"internal/socksserver": {own: []string{"pkg/flow", "pkg/socks"}},
	"internal/doctor":      {own: []string{"pkg/redirect", "internal/control"}, libs: []string{"github.com/vishvananda/netlink", "golang.org/x/sys"}},
	"internal/gateway":     {own: []string{"pkg"}},
	"internal/daemon": {
		own:  []string{"pkg", "internal/clash", "internal/config", "internal/control", "internal/gateway", "internal/handover", "internal/watch"},
		libs: []string{"github.com/coreos/go-systemd", "github.com/prometheus/client_golang", "github.com/prometheus/client_model", "golang.org/x/sync", "golang.org/x/sys"},
	},
	"cmd/tproxyd": {
		own:  []string{"pkg/flow", "pkg/routes", "pkg/redirect", "pkg/relay", "internal/config", "internal/control", "internal/daemon", "internal/doctor", "internal/netns", "internal/sandbox", "internal/socksserver"},
		libs: []string{"github.com/spf13/cobra", "github.com/miekg/dns", "github.com/vishvananda/netlink", "golang.org/x/sys"},
	},

	"examples/gotest": {},
	"bench":           {own: []string{"internal/netns"}, libs: []string{"github.com/google/nftables", "github.com/miekg/dns", "github.com/vishvananda/netlink", "golang.org/x/sys"}},
	"internal/lint":   {},
	"test/deploy":     {},
	"test/netns":      {own: []string{"internal", "pkg"}, libs: []string{"github.com/coder/websocket", "github.com/miekg/dns", "github.com/google/go-cmp", "github.com/quic-go/quic-go", "golang.org/x/sys"}},
}

// testRoom is what the tests of every package may import on top.
var testRoom = room{
	own:  []string{"pkg/flow", "internal/netns", "internal/socksserver"},
	libs: []string{"github.com/google/go-cmp", "github.com/rogpeppe/go-internal", "github.com/miekg/dns", "github.com/google/nftables", "github.com/vishvananda/netlink", "golang.org/x/sys"},
}

// covers tells whether path is one of prefixes, or below one.
func covers(prefixes []string, path string) bool {
	return slices.ContainsFunc(prefixes, func(p string) bool {
		return path == p || strings.HasPrefix(path, p+"/")
	})
}

func TestImports(t *testing.T) {
	for _, s := range sources(t) {
		r, known := rooms[s.dir]
		if !known {
			t.Errorf("%s: package %s has no place in the table of rooms", s.path, s.dir)
			continue
		}
		own, libs := append(slices.Clone(r.own), s.dir), slices.Clone(r.libs)
		if s.test() {
			own, libs = append(own, testRoom.own...), append(libs, testRoom.libs...)
		}
		for _, spec := range s.file.Imports {
			path, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				t.Fatal(err)
			}
			switch first, _, _ := strings.Cut(path, "/"); {
			case strings.HasPrefix(path, module):
				if !covers(own, strings.TrimPrefix(path, module)) {
					t.Errorf("%s: %s may not import %s", s.at(spec.Pos()), s.dir, strings.TrimPrefix(path, module))
				}
			case path == "C" || path == "unsafe" && strings.HasPrefix(s.dir, "internal/gateway"):
				t.Errorf("%s: no import of %q here", s.at(spec.Pos()), path)
			case strings.Contains(first, "."):
				if !covers(libs, path) {
					t.Errorf("%s: %s may not import %s", s.at(spec.Pos()), s.dir, path)
				}
			}
			if n := spec.Name; n != nil && len(n.Name) == 1 {
				t.Errorf("%s: an import alias of one letter, or of none: %s", s.at(n.Pos()), n.Name)
			}
		}
	}
}

// TestRoomsExist keeps the table from naming what is gone.
func TestRoomsExist(t *testing.T) {
	have := map[string]bool{}
	for _, s := range sources(t) {
		have[s.dir] = true
	}
	for dir := range rooms {
		if !have[dir] {
			t.Errorf("the table of rooms names %s, which does not exist", dir)
		}
	}
}

// TestLibraries: what pkg may not do, since a stranger shall be able to use it.
func TestLibraries(t *testing.T) {
	banned := map[string]string{
		"log": "hand in a *slog.Logger", "flag": "hand in options", "os/signal": "belongs to cmd", "expvar": "return figures",
		"testing": "belongs to tests",
	}
	for _, s := range sources(t) {
		if s.test() || !strings.HasPrefix(s.dir, "pkg/") {
			continue
		}
		for _, spec := range s.file.Imports {
			path, _ := strconv.Unquote(spec.Path.Value)
			if why, bad := banned[path]; bad {
				t.Errorf("%s: a library does not import %s: %s", s.at(spec.Pos()), path, why)
			}
		}
		for _, call := range calls(s.file) {
			switch call.name {
			case "os.Getenv", "os.LookupEnv", "os.Exit", "slog.Default", "fmt.Print", "fmt.Println", "fmt.Printf":
				t.Errorf("%s: a library does not call %s", s.at(call.pos), call.name)
			}
		}
	}
}
