package routes

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// resolveRule is a RESOLVE line.
type resolveRule struct {
	mode   ResolveMode
	file   string
	line   int
	all    bool
	name   string           // exact
	suffix string           // of "*.suffix"
	list   *list            // a LIST with names; nil: it is none
	names  nameTable        // its members
	via    []netip.AddrPort // who is asked; nil: the resolvers of the host
}

func (r *resolveRule) matches(name string) bool {
	switch {
	case r.all:
		return true
	case r.list != nil:
		return r.names.get(name).exact != 0 || r.hasBelow(name)
	case r.suffix != "":
		return below(name, r.suffix)
	}
	return name == r.name
}

// hasBelow tells whether a name is below a pattern of the LIST.
func (r *resolveRule) hasBelow(name string) bool {
	for {
		i := strings.IndexByte(name, '.')
		if i < 0 {
			return false
		}
		if name = name[i+1:]; r.names.get(name).below != 0 {
			return true
		}
	}
}

// covers tells whether r matches every name that later does. What a LIST has is not
// gone through for it.
func (r *resolveRule) covers(later *resolveRule) bool {
	switch {
	case r.all || later.all:
		return r.all
	case later.list != nil:
		return r.list == later.list
	case r.list != nil && later.suffix != "":
		return r.names.get(later.suffix).below != 0 || r.hasBelow(later.suffix)
	case later.suffix != "":
		return r.suffix != "" && (later.suffix == r.suffix || below(later.suffix, r.suffix))
	}
	return r.matches(later.name)
}

func (r *resolveRule) position() string { return r.file + ":" + strconv.Itoa(r.line) }

// asks returns who is asked, and by which line.
func (r *resolveRule) asks() string {
	list := make([]string, len(r.via))
	for i, a := range r.via {
		list[i] = a.String()
	}
	return strings.Join(list, ", ") + " (" + r.position() + ")"
}

// resolves finds the RESOLVE line of a name.
type resolves struct {
	list         []*resolveRule // in order
	place        map[*resolveRule]int
	exact, below map[string]*resolveRule // the first one
	lists        []*resolveRule
	all          *resolveRule
}

func newResolves(list []*resolveRule) *resolves {
	s := &resolves{list: list, place: map[*resolveRule]int{}, exact: map[string]*resolveRule{}, below: map[string]*resolveRule{}}
	for i, r := range list {
		s.place[r] = i
		switch {
		case r.all:
			if s.all == nil {
				s.all = r
			}
		case r.list != nil:
			s.lists = append(s.lists, r)
		case r.suffix != "":
			if s.below[r.suffix] == nil {
				s.below[r.suffix] = r
			}
		case s.exact[r.name] == nil:
			s.exact[r.name] = r
		}
	}
	return s
}

// of returns the first line that matches a name; nil: there is none.
func (s *resolves) of(name string) *resolveRule {
	if len(s.list) == 0 {
		return nil
	}
	first := s.all
	take := func(r *resolveRule) {
		if r != nil && (first == nil || s.place[r] < s.place[first]) {
			first = r
		}
	}
	take(s.exact[name])
	for rest := name; len(s.below) > 0; {
		i := strings.IndexByte(rest, '.')
		if i < 0 {
			break
		}
		rest = rest[i+1:]
		take(s.below[rest])
	}
	for _, r := range s.lists {
		if (first == nil || s.place[r] < s.place[first]) && r.matches(name) {
			return r
		}
	}
	return first
}

// Resolvers returns who is asked for a name where this host asks for it: those of
// via= of the RESOLVE line that matches; nil: those of the host. The name must be
// lower case, without a final dot. The slice must not be changed.
func (t *Table) Resolvers(name string) []netip.AddrPort {
	if r := t.resolves.of(name); r != nil {
		return r.via
	}
	return nil
}

// AllResolvers calls f with each resolver of via=, and with the place of its line.
func (t *Table) AllResolvers(f func(a netip.AddrPort, file string, line int)) {
	for _, r := range t.resolves.list {
		for _, a := range r.via {
			f(a, r.file, r.line)
		}
	}
}

// resolve reads a RESOLVE line.
func (l *line) resolve(t token) {
	r := &resolveRule{file: l.file, line: t.line}
	w, ok := l.word()
	switch strings.ToLower(w.text) {
	case "local":
		r.mode = ResolveLocal
	case "remote":
		r.mode = ResolveRemote
	case "local-then-remote":
		r.mode = ResolveLocalFirst
	default:
		if ok {
			l.errorf(w, "E29", "%q is no way to resolve; use local, remote or local-then-remote", w.text)
		} else {
			l.errorf(w, "E29", "RESOLVE local|remote|local-then-remote PATTERN|$LIST [via=RESOLVER]")
		}
		return
	}
	w, ok = l.word()
	if !ok {
		l.errorf(w, "E02", "missing name or pattern after RESOLVE %s", l.tokens[1].text)
		return
	}
	switch {
	case w.text == "*":
		r.all = true
	case w.text[0] == '$':
		d := l.destination(w)
		if d.list == nil {
			return
		}
		if d.noName() && len(d.prefixes) > 0 {
			l.warnf(w, "E22", "RESOLVE line can never match: LIST %s has no names", w.text[1:])
		}
		r.all, r.list = d.anyName, d.list
		r.names = newNameTable(l.names, len(d.names.refs)+len(d.suffixes.refs))
		for _, n := range d.names.refs {
			r.names.slot(n).exact = 1
		}
		for _, n := range d.suffixes.refs {
			r.names.slot(n).below = 1
		}
	default:
		name, suffix, ok := l.pattern(w, w.text)
		if !ok {
			return
		}
		r.name, r.suffix = name, suffix
	}
	if w, ok := l.word(); ok {
		value, isVia := strings.CutPrefix(w.text, "via=")
		if !isVia {
			l.errorf(w, "E29", "%q is too much here; RESOLVE takes via=RESOLVER and nothing else", w.text)
			return
		}
		if r.via, ok = l.resolvers(w, value); !ok {
			return
		}
	}
	l.done()
	if i := slices.IndexFunc(l.resolves[:min(len(l.resolves), maxCover)], func(e *resolveRule) bool { return e.covers(r) }); i >= 0 {
		l.warnf(l.tokens[0], "E22", "RESOLVE line can never match: covered by %s", l.resolves[i].position())
	}
	l.resolves = append(l.resolves, r)
}

// resolvers reads the list of via=.
func (l *line) resolvers(t token, value string) (list []netip.AddrPort, ok bool) {
	ok = true
	col := t.col + len("via=")
	if value == "" || strings.HasSuffix(value, ",") || len(l.rest) > 0 && strings.HasPrefix(l.rest[0].text, ",") {
		l.errorf(t, "E29", "%q: write via=10.0.0.53 or via=10.0.0.53,[2001:db8::53]:5353, without blanks", t.text)
		l.rest = nil
		return nil, false
	}
	for _, word := range strings.Split(value, ",") {
		at := token{text: word, line: t.line, col: col}
		col += len([]rune(word)) + 1
		a, good := l.resolver(at)
		if good && slices.Contains(list, a) {
			l.errorf(at, "E29", "resolver %s is given twice", a)
			good = false
		}
		ok = ok && good
		list = append(list, a)
	}
	return list, ok
}

// resolver reads ADDRESS, ADDRESS:PORT or [IPV6]:PORT.
func (l *line) resolver(t token) (netip.AddrPort, bool) {
	const dnsPort = 53
	bare := t.text
	if inner, ok := strings.CutPrefix(bare, "["); ok && strings.HasSuffix(inner, "]") {
		bare = inner[:len(inner)-1]
	}
	if a, err := netip.ParseAddr(bare); err == nil && (a.Is6() || bare == t.text) {
		return l.resolverAt(t, netip.AddrPortFrom(a, dnsPort))
	}
	if a, err := netip.ParseAddrPort(t.text); err == nil && a.Port() != 0 {
		return l.resolverAt(t, a)
	}
	if i := strings.LastIndexByte(t.text, ':'); i >= 0 {
		if _, err := netip.ParseAddr(strings.Trim(t.text[:i], "[]")); err == nil {
			l.errorf(t, "E09", "port %q of resolver %q is not a number from 1 to 65535", t.text[i+1:], t.text)
			return netip.AddrPort{}, false
		}
	}
	l.errorf(t, "E03", "%q is not the address of a resolver, as 10.0.0.53 or [2001:db8::53]:5353; a name would have to be resolved itself", t.text)
	return netip.AddrPort{}, false
}

func (l *line) resolverAt(t token, a netip.AddrPort) (netip.AddrPort, bool) {
	if ip := a.Addr(); ip.IsUnspecified() || ip.IsMulticast() || ip == netip.AddrFrom4([4]byte{255, 255, 255, 255}) {
		l.errorf(t, "E03", "%s cannot be the address of a resolver", ip)
		return a, false
	}
	return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()), true
}
