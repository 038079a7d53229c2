package daemon

import (
	"bufio"
	"fmt"
	"maps"
	"net/netip"
	"os"
	"slices"
	"strings"

	"github.com/tproxyd/tproxyd/internal/config"
	"github.com/tproxyd/tproxyd/internal/gateway"
	"github.com/tproxyd/tproxyd/internal/watch"
	"github.com/tproxyd/tproxyd/pkg/redirect"
	"github.com/tproxyd/tproxyd/pkg/routes"
	"github.com/tproxyd/tproxyd/pkg/socks"
)

// resolvConf is where the host's own resolvers and search list stand.
const resolvConf = "/etc/resolv.conf"

// Setup is what the files of one moment say. Config is nil where only rules
// were read.
type Setup struct {
	Config      *config.Config
	Table       *routes.Table // nil only from LoadClosed
	credentials config.Credentials
	secrets     config.Secrets // of the Clash API
	host        hostDNS
	lists       map[string]watch.State // the files of LISTs, as they were read
	gone        map[string]struct{}    // those of which a copy was read
	included    []string               // what INCLUDE and LIST name

	credentialDir string     // where Load was told to look for credentials
	enclosure     *Enclosure // nil: flows of this host and of its interfaces

	search func(named []string) (map[uint64]string, error) // see SearchBy; nil: this process does
}

// Load reads tproxyd.toml at path and the files that it names. CredentialDir
// is systemd's credential directory; empty: none. The diagnostics are those of
// all files; the Setup is nil if there is an error among them.
//
// The file of a LIST that is gone is no error if it was there when the rules were in
// force last: what it held then counts, with a warning.
func Load(path, credentialDir string) (*Setup, routes.Diagnostics) {
	return loadAgain(path, credentialDir, nil)
}

// loadAgain is Load where that is so only of some files; nil: of all.
func loadAgain(path, credentialDir string, gone map[string]struct{}) (*Setup, routes.Diagnostics) {
	defer frugal()()
	c, diags := config.LoadPartial(path)
	if c == nil || slices.ContainsFunc(diags, func(d routes.Diagnostic) bool { return d.Code == "T01" }) {
		return nil, diags // it does not tell where the other files are
	}
	o := newOpened(c.State.Directory, gone)
	t, more := routes.ParseFile(c.Routes, routes.Options{Open: o.open})
	diags = append(append(diags, more...), o.warnings()...)
	creds, more := config.LoadCredentials(c.Credentials, credentialDir)
	diags = append(diags, more...)
	if t != nil && creds != nil {
		diags = append(diags, missingCredentials(t, creds)...)
	}
	var secrets config.Secrets
	if c.Control.Clash != "" {
		secrets, more = config.LoadSecrets(c.Control.Secrets, credentialDir)
		diags = append(diags, more...)
	}
	if diags.HasErrors() {
		return nil, diags
	}
	if len(c.Intercept.Interfaces) == 0 && !c.Intercept.Local {
		diags = append(diags, routes.Diagnostic{
			File: path, Line: 1, Col: 1, Severity: routes.Warning, Code: "W03",
			Msg: "nothing is intercepted: [intercept] has neither interfaces nor local = true",
		})
	}
	if c.Intercept.DNS {
		diags = append(diags, rulesOfPort53(t)...)
	}
	diags = append(diags, rulesOfOtherInterfaces(t, c)...)
	diags = append(diags, rulesOfNobody(t, c)...)
	diags = append(diags, syntheticResolvers(t, c)...)
	diags = append(diags, localLoops(t, c)...)
	if diags.HasErrors() {
		return nil, diags
	}
	return &Setup{Config: c, Table: t, credentials: creds, secrets: secrets, host: readHostDNS(resolvConf), credentialDir: credentialDir, lists: o.lists(t), gone: o.gone, included: slices.Collect(maps.Keys(o.states))}, diags
}

// missingCredentials reports the servers whose credentials nobody knows.
func missingCredentials(t *routes.Table, creds config.Credentials) (diags routes.Diagnostics) {
	for _, s := range t.Servers() {
		if _, ok := creds[s.Credential]; s.Credential != "" && !ok {
			diags = append(diags, routes.Diagnostic{
				File: s.File, Line: s.Line, Col: 1, Severity: routes.Error, Code: "E20",
				Msg: fmt.Sprintf("server %s: no credential %q in the credentials file or among systemd's credentials", s.Name, s.Credential),
			})
		}
	}
	return diags
}

// LoadClosed reads what CloseTable needs: no credentials, and rules only if no
// file has an error. Without rules everything that enters is refused. The Setup
// is nil if tproxyd.toml has an error and does not tell what to take.
func LoadClosed(path string) (*Setup, routes.Diagnostics) {
	defer frugal()()
	c, diags := config.LoadPartial(path)
	switch {
	case !diags.HasErrors():
	case c != nil && (len(c.Intercept.Interfaces) > 0 || c.Intercept.Local):
		return &Setup{Config: c}, diags
	default:
		return nil, diags
	}
	o := newOpened(c.State.Directory, nil)
	t, more := routes.ParseFile(c.Routes, routes.Options{Open: o.open})
	return &Setup{Config: c, Table: t, host: readHostDNS(resolvConf)}, append(append(diags, more...), o.warnings()...)
}

// syntheticResolvers reports resolvers of via= that no question can come to: their
// addresses stand for names.
func syntheticResolvers(t *routes.Table, c *config.Config) (diags routes.Diagnostics) {
	t.AllResolvers(func(a netip.AddrPort, file string, line int) {
		if c.DNS.Pool4.Contains(a.Addr()) || c.DNS.Pool6.Contains(a.Addr()) {
			diags = append(diags, routes.Diagnostic{
				File: file, Line: line, Col: 1, Severity: routes.Error, Code: "E14",
				Msg: fmt.Sprintf("resolver %s is in the pool of synthetic addresses, whose questions come here: a loop; see [dns] in %s", a, c.Path),
			})
		}
	})
	return diags
}

// rulesOfOtherInterfaces warns of rules for interfaces whose flows are not taken.
func rulesOfOtherInterfaces(t *routes.Table, c *config.Config) (diags routes.Diagnostics) {
	for _, r := range t.Rules() {
		taken := func(name string) bool { return slices.Contains(c.Intercept.Interfaces, name) }
		if len(r.Ifs) > 0 && !slices.ContainsFunc(r.Ifs, taken) {
			diags = append(diags, routes.Diagnostic{
				File: r.File, Line: r.Line, Col: 1, Severity: routes.Warning, Code: "E22",
				Msg: fmt.Sprintf("rule can never match: if=%s, but [intercept] interfaces in %s has it not", strings.Join(r.Ifs, ","), c.Path),
			})
		}
	}
	return diags
}

// localLoops warns of servers that run on this host and are given what they send
// themselves.
func localLoops(t *routes.Table, c *config.Config) (diags routes.Diagnostics) {
	if !c.Intercept.Local {
		return nil
	}
	var own hostAddrs
	for _, l := range t.Loops(own.has) {
		diags = append(diags, routes.Diagnostic{
			File: l.Server.File, Line: l.Server.Line, Col: l.Server.Col, Severity: routes.Warning, Code: "E14",
			Msg: fmt.Sprintf("server %s is a program of this host, whose own flows are intercepted too ([intercept] local = true) and come back to it by %s: proxy loop; "+
				"make it DIRECT before, as by EXCLUDE-MODULE UNIT.service, EXCLUDE-MODULE PROGRAM or DIRECT * uid=USER", l.Server.Name, l.Rule.Position()),
		})
	}
	return diags
}

// rulesOfPort53 warns of rules that no flow can come to (R9): with dns = true
// questions are answered and not carried.
func rulesOfPort53(t *routes.Table) (diags routes.Diagnostics) {
	for _, r := range t.Rules() {
		if len(r.Ports) == 1 && r.Ports[0] == (routes.PortRange{From: 53, To: 53}) {
			diags = append(diags, routes.Diagnostic{
				File: r.File, Line: r.Line, Col: 1, Severity: routes.Warning, Code: "W02",
				Msg: "rule for port 53 alone has no effect: with [intercept] dns = true questions are answered here, whomever they are sent to",
			})
		}
	}
	return diags
}

// rulesOfNobody warns of rules whose clients are not intercepted, or have a mark
// that no packet can.
func rulesOfNobody(t *routes.Table, c *config.Config) (diags routes.Diagnostics) {
	for _, r := range t.Rules() {
		warn := func(msg string) {
			diags = append(diags, routes.Diagnostic{File: r.File, Line: r.Line, Col: 1, Severity: routes.Warning, Code: "W07", Msg: msg})
		}
		if (len(r.UIDs)+len(r.GIDs)+len(r.Cgroups) > 0 || r.Program != "") && !c.Intercept.Local {
			warn("rule for this host's own processes, but their flows are not intercepted: [intercept] local = false")
		}
		for _, m := range r.Marks {
			if m.Value&c.Intercept.Mark.Mask != 0 {
				warn(fmt.Sprintf("mark=%#x/%#x is no packet's: the bits %#x are those of [intercept] mark", m.Value, m.Mask, c.Intercept.Mark.Mask))
			}
		}
	}
	return diags
}

// SearchBy has another process look for the programs that rules name, for one whose
// sandbox does not let it; see redirect.Options. It is called before New.
func (s *Setup) SearchBy(search func(named []string) (map[uint64]string, error)) { s.search = search }

// NamesPrograms tells whether serving takes a look at other processes.
func (s *Setup) NamesPrograms() bool { return s.Config.Intercept.Local && len(s.Table.Programs()) > 0 }

// mayFindPrograms tells what is missing for the programs that rules name, if this
// process has to look for them.
func (s *Setup) mayFindPrograms() error {
	if !s.NamesPrograms() || redirect.MayFindPrograms() {
		return nil
	}
	r := s.Table.Rules()[0] // such rules are the first ones
	return &restartError{fmt.Sprintf("%s: %s: this process may not see what others execute: that takes CAP_SYS_PTRACE (in the unit: CapabilityBoundingSet=), "+
		"and a start with such a rule, since the sandbox of one without gives it up", r.Position(), r.Text)}
}

// auth returns the user name and password of a credential; nil: there is none.
func (s *Setup) auth(name string) *socks.Auth {
	c, ok := s.credentials[name]
	if !ok {
		return nil
	}
	return &socks.Auth{Username: c.Username, Password: c.Password}
}

// plan makes a plan of the rules.
func (s *Setup) plan() (*gateway.Plan, error) {
	return gateway.NewPlan(s.Table, s.LocalNames(), s.auth)
}

// LocalNames returns which names stay local (R15).
func (s *Setup) LocalNames() routes.LocalNames {
	if s.enclosure != nil {
		return routes.LocalNames{None: true}
	}
	if s.Config != nil && s.Config.DNS.Search != nil {
		return routes.LocalNames{Search: s.Config.DNS.Search}
	}
	return routes.LocalNames{Search: s.host.search}
}

// resolvers returns who is asked for names that are resolved here.
func (s *Setup) resolvers() []netip.AddrPort {
	if s.Config.DNS.Resolvers != nil {
		return s.Config.DNS.Resolvers
	}
	return s.host.resolvers
}

// hostDNS is what resolv.conf(5) says.
type hostDNS struct {
	resolvers []netip.AddrPort
	search    []string
}

// readHostDNS reads a resolv.conf; a file that cannot be read says nothing.
func readHostDNS(path string) (h hostDNS) {
	f, err := os.Open(path)
	if err != nil {
		return h
	}
	defer f.Close()
	for sc := bufio.NewScanner(f); sc.Scan(); {
		words := strings.Fields(sc.Text())
		if len(words) < 2 {
			continue
		}
		switch words[0] {
		case "nameserver":
			if r, err := config.ParseResolver(words[1]); err == nil {
				h.resolvers = append(h.resolvers, r)
			}
		case "search", "domain": // the last one counts
			h.search = nil
			for _, d := range words[1:] {
				if d = strings.ToLower(strings.Trim(d, ".")); d != "" {
					h.search = append(h.search, d)
				}
			}
		}
	}
	return h
}
