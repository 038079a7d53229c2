package routes

import (
	"bytes"
	"cmp"
	"crypto/sha256"
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

// Options say how rules are read. The zero value reads files by their paths.
type Options struct {
	// Open opens the files that INCLUDE and LIST name; nil: os.Open.
	Open func(path string) (io.ReadCloser, error)
	// User and Group return the number of a user or group of this host; nil:
	// those of package os/user.
	User, Group func(name string) (id uint32, ok bool)
}

// ParseFile reads the rules of a file. The Table is nil if there is an error
// among the diagnostics.
func ParseFile(path string, o Options) (*Table, Diagnostics) {
	p := newParser(o)
	p.reader.file(path, func(code, format string, args ...any) {
		p.diags.at(path, token{line: 1, col: 1}, code, format, args...)
	})
	return p.table()
}

// Parse reads rules from r; path stands for it in messages, and the paths of
// INCLUDE and LIST are relative to it.
func Parse(path string, r io.Reader, o Options) (*Table, Diagnostics) {
	p := newParser(o)
	p.reader.read(path, r)
	return p.table()
}

// Reread reads the files of the LISTs again, and nothing else: the Table that it
// returns has the rules of t as they were read, whatever their own files hold by
// now. It is nil if there is an error among the diagnostics.
func (t *Table) Reread(o Options) (*Table, Diagnostics) {
	p := newParser(o)
	p.reader.again = t.sources[1:]
	p.reader.read(t.sources[0].path, bytes.NewReader(t.sources[0].text))
	return p.table()
}

// ListFiles returns the paths of the files that LISTs name, each once, as they
// were opened. The slice must not be changed.
func (t *Table) ListFiles() []string { return t.listFiles }

// collector takes diagnostics in whatever order they are found and returns
// them in the order of the statements that they are about.
type collector struct {
	list    []collected
	current int          // number of the statement that is being looked at
	wrong   map[int]bool // statements with an error, which mean less or more than they say
}

type collected struct {
	Diagnostic
	statement int
}

func (c *collector) begin() { c.current++ }

func (c *collector) add(file string, t token, s Severity, code, format string, args ...any) {
	d := Diagnostic{File: file, Line: t.line, Col: t.col, Severity: s, Code: code, Msg: fmt.Sprintf(format, args...)}
	c.list = append(c.list, collected{d, c.current})
	if s == Error {
		if c.wrong == nil {
			c.wrong = map[int]bool{}
		}
		c.wrong[c.current] = true
	}
}

func (c *collector) at(file string, t token, code, format string, args ...any) {
	c.add(file, t, Error, code, format, args...)
}

func (c *collector) sorted() Diagnostics {
	slices.SortStableFunc(c.list, func(a, b collected) int {
		return cmp.Or(cmp.Compare(a.statement, b.statement), cmp.Compare(a.Line, b.Line), cmp.Compare(a.Col, b.Col))
	})
	var ds Diagnostics
	for _, d := range c.list {
		ds = append(ds, d.Diagnostic)
	}
	return ds
}

// parser makes a Table of statements. SERVER and LIST lines are read before
// all others, so that they can stand anywhere.
type parser struct {
	reader reader
	diags  collector
	open   func(path string) (io.ReadCloser, error)
	user   func(name string) (id uint32, ok bool)
	group  func(name string) (id uint32, ok bool)

	defined map[string]*Server // SERVER lines
	servers []*Server          // these and those that rules spell out
	numbers map[*Server]int    // of the statements of SERVER lines
	inline  map[string]*Server
	lists   map[string]*list
	names   *nameText // of all destinations
	files   []string  // of lists, each once

	programs      []*Rule // of EXCLUDE-MODULE, before all others: programs,
	excluded      []*Rule // then units and cgroups
	rules         []*Rule
	defaultRule   *Rule
	defaultServer []Chain
	proxyName     []Chain
	resolves      []*resolveRule
	limits        Limits
	health        Health
	given         map[string]bool // TIMEOUT and HEALTH keys

	sticky Strategy     // BALANCE ON
	next   *nextBalance // BALANCE; nil: none that waits for its rule

	nameless []nameless // see resolvedHere
}

func newParser(o Options) *parser {
	p := &parser{names: &nameText{}, open: o.Open, user: orUser(o.User), group: orGroup(o.Group), numbers: map[*Server]int{}, defined: map[string]*Server{}, inline: map[string]*Server{}, lists: map[string]*list{}, given: map[string]bool{}}
	if p.open == nil {
		p.open = openFile
	}
	p.reader.open, p.reader.diags, p.reader.sum = p.open, &p.diags, sha256.New()
	return p
}

// line is a statement while it is being parsed.
type line struct {
	*parser
	*statement
	rest []token // not looked at yet
}

func (l *line) errorf(t token, code, format string, args ...any) {
	l.diags.at(l.file, t, code, format, args...)
}

func (l *line) warnf(t token, code, format string, args ...any) {
	l.diags.add(l.file, t, Warning, code, format, args...)
}

// word takes the next token; ok is false if there is none.
func (l *line) word() (t token, ok bool) {
	if len(l.rest) == 0 {
		return l.tokens[len(l.tokens)-1].end(), false
	}
	t, l.rest = l.rest[0], l.rest[1:]
	return t, true
}

// directives are the first words of lines, with what reads the rest. Those
// without a function are read in another way.
func directives() map[string]func(*line, token) {
	d := map[string]func(*line, token){
		"INCLUDE":        nil, // by the reader
		"SERVER":         nil, // before all others
		"LIST":           nil, // before all others
		"DEFAULT-SERVER": nil, // before the rules
		"BALANCE":        (*line).balance,
		"DEFAULT":        (*line).defaultAction,
		"PROXY_NAME":     func(l *line, t token) { l.proxyName = l.onlyServers(t, l.proxyName) },
		"RESOLVE":        (*line).resolve,
		"TIMEOUT":        (*line).timeout,
		"HEALTH":         (*line).healthLine,
		"BIND-MODULE":    (*line).bindModule,
		"EXCLUDE-MODULE": (*line).excludeModule,
		"GSS":            func(l *line, t token) { l.errorf(t, "E28", "GSS: GSSAPI is not built in") },
	}
	for a, w := range actionWords {
		d[w] = func(l *line, t token) { l.rule(t, Action(a)) }
	}
	return d
}

// table reads all statements and returns what they mean.
func (p *parser) table() (*Table, Diagnostics) {
	each := func(f func(l *line, t token, word string)) {
		for i, s := range p.reader.statements {
			p.diags.current = i + 1
			f(&line{parser: p, statement: s, rest: s.tokens[1:]}, s.tokens[0], strings.ToUpper(s.tokens[0].text))
		}
	}
	each(func(l *line, t token, word string) {
		switch word {
		case "SERVER":
			l.server()
		case "LIST":
			l.list(t)
		}
	})
	each(func(l *line, t token, word string) {
		if word == "DEFAULT-SERVER" {
			l.defaultServer = l.onlyServers(t, l.defaultServer)
		}
	})
	known := directives()
	each(func(l *line, t token, word string) {
		read, ok := known[word]
		switch {
		case !ok:
			l.unknown(t, slices.Sorted(maps.Keys(known)))
		case read != nil:
			read(l, t)
		}
	})
	p.resolvedHere()
	p.unused()
	p.diags.current = len(p.reader.statements) + 1
	p.dangling()
	t := p.build()
	ds := p.diags.sorted()
	if ds.HasErrors() {
		return nil, ds
	}
	return t, ds
}

// done reports words after the end of a directive.
func (l *line) done() {
	if t, ok := l.word(); ok {
		l.errorf(t, "E29", "%q is too much here", t.text)
	}
}

func (l *line) balance(token) {
	mode, sticky := Random, false
	if w, ok := l.word(); ok {
		switch strings.ToUpper(w.text) {
		case "ON":
			sticky = true
		case "OFF":
			mode, sticky = First, true
		default:
			if mode, ok = l.strategy(w, w.text); !ok {
				return
			}
		}
		l.done()
	}
	if sticky {
		l.sticky = mode
		return
	}
	l.dangling()
	l.next = &nextBalance{mode: mode, statement: l.statement, number: l.diags.current}
}

// nextBalance is a BALANCE line on its way to the next rule with servers.
type nextBalance struct {
	mode      Strategy
	statement *statement
	number    int
	passed    bool // a rule without servers came in between
}

// balanceWarning reports something about the BALANCE line that is on its way.
func (p *parser) balanceWarning(format string, args ...any) {
	now := p.diags.current
	p.diags.current = p.next.number
	p.diags.add(p.next.statement.file, p.next.statement.tokens[0], Warning, "E15", format, args...)
	p.diags.current = now
}

// dangling reports a BALANCE that no rule took.
func (p *parser) dangling() {
	if p.next != nil {
		p.balanceWarning("BALANCE has no effect: no SOCKD or HTTP rule follows it")
		p.next = nil
	}
}

// takeBalance returns the order for a rule.
func (l *line) takeBalance(r *Rule) Strategy {
	if l.next == nil {
		return l.sticky
	}
	if !r.Action.proxied() {
		if !l.next.passed {
			l.balanceWarning("BALANCE is followed by %s; it applies to the next SOCKD or HTTP rule", r.Action)
			l.next.passed = true
		}
		return First
	}
	if len(r.Servers) == 1 {
		l.balanceWarning("BALANCE with a single server has no effect")
	}
	mode := l.next.mode
	l.next = nil
	return mode
}

func (l *line) strategy(t token, value string) (Strategy, bool) {
	if i := slices.Index(strategyWords[:], strings.ToLower(value)); i >= 0 {
		return Strategy(i), true
	}
	l.errorf(t, "E29", "%q is no order; use one of %s", value, strings.Join(strategyWords[:], ", "))
	return First, false
}

func (l *line) defaultAction(t token) {
	w, ok := l.word()
	r := &Rule{File: l.file, Line: t.line, Text: l.text(), Default: true}
	switch {
	case ok && strings.EqualFold(w.text, "DENY"):
	case ok && strings.EqualFold(w.text, "DIRECT"):
		r.Action = Direct
	default:
		l.errorf(w, "E29", "DEFAULT is DENY or DIRECT; for servers write SOCKD5 @=servers * as the last rule")
		return
	}
	l.options(r)
	if r.conditional() || r.By != ByAny {
		l.errorf(t, "E29", "DEFAULT takes no condition; write a rule with the destination *")
	}
	if l.defaultRule != nil {
		l.errorf(t, "E29", "DEFAULT is given twice; the first is %s", l.defaultRule.Position())
		return
	}
	l.defaultRule = r
}

// pairs reads KEY=VALUE words.
func (l *line) pairs(t token, set func(t token, key, value string)) {
	if len(l.rest) == 0 {
		l.errorf(t.end(), "E29", "%s without KEY=VALUE", strings.ToUpper(t.text))
	}
	for {
		w, ok := l.word()
		if !ok {
			return
		}
		key, value, ok := strings.Cut(w.text, "=")
		if !ok || value == "" {
			l.errorf(w, "E29", "%q is not KEY=VALUE", w.text)
			continue
		}
		key = strings.ToLower(key)
		if what := strings.ToUpper(t.text) + " " + key + "="; l.given[what] {
			l.errorf(w, "E29", "%s is given twice", what)
			continue
		} else {
			l.given[what] = true
		}
		set(w, key, value)
	}
}

func (l *line) timeout(t token) {
	l.pairs(t, func(w token, key, value string) {
		to := map[string]*time.Duration{
			"connect": &l.limits.Connect, "handshake": &l.limits.Handshake, "idle": &l.limits.Idle,
			"halfclosed": &l.limits.HalfClosed, "udp": &l.limits.UDP, "dns": &l.limits.DNS,
		}[key]
		switch {
		case to == nil:
			l.errorf(w, "E29", "no time limit %q; there are connect, handshake, idle, halfclosed, udp, dns", key)
		default:
			l.duration(w, value, to)
		}
	})
}

// duration reads "30s", "5m" or a number of seconds.
func (l *line) duration(t token, value string, to *time.Duration) {
	d, err := time.ParseDuration(value)
	if n, numErr := strconv.ParseUint(value, 10, 31); numErr == nil {
		d, err = time.Duration(n)*time.Second, nil
	}
	if err != nil || d < time.Millisecond || d > 1000*time.Hour {
		l.errorf(t, "E29", "%q is no duration between 1ms and 1000h, as 30s, 5m, 2h or a number of seconds", value)
		return
	}
	*to = d
}

func (l *line) healthLine(t token) {
	l.pairs(t, func(w token, key, value string) {
		switch key {
		case "maxfail":
			n, err := strconv.ParseUint(value, 10, 16)
			if err != nil || n == 0 {
				l.errorf(w, "E29", "maxfail is a number of faults between 1 and 65535")
				return
			}
			l.health.MaxFail = int(n)
		case "badexpire":
			l.duration(w, value, &l.health.BadExpire)
		case "interval":
			l.duration(w, value, &l.health.Interval)
		case "probe":
			l.probe(w, value)
		default:
			l.errorf(w, "E29", "HEALTH has no %q; there are maxfail, badexpire, interval, probe", key)
		}
	})
}

// probe reads HOST:PORT, or off.
func (l *line) probe(t token, value string) {
	if strings.EqualFold(value, "off") {
		return
	}
	host, port, err := net.SplitHostPort(value)
	n, portErr := strconv.ParseUint(port, 10, 16)
	to := flow.Target{Port: uint16(n)}
	if a, err := netip.ParseAddr(host); err == nil {
		to.Addr = a.Unmap()
	} else {
		to.Name = strings.ToLower(strings.TrimSuffix(host, "."))
	}
	if err != nil || portErr != nil || n == 0 || to.Name != "" && checkName(to.Name) != nil || !to.Addr.IsValid() && to.Name == "" {
		l.errorf(t, "E29", "%q: a probe connects to HOST:PORT, or write off", t.text)
		return
	}
	l.health.Probe = to
}
