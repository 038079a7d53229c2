package routes

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"net"
	"os/user"
	"slices"
	"strconv"
	"strings"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

// nobody is what a user or group counts as that this host does not have: the
// number that no process can have (chown(2) means "unchanged" by it).
const nobody = 1<<32 - 1

func orUser(f func(string) (uint32, bool)) func(string) (uint32, bool) {
	if f != nil {
		return f
	}
	return func(name string) (uint32, bool) {
		u, err := user.Lookup(name)
		if err != nil {
			return 0, false
		}
		return number(u.Uid)
	}
}

func orGroup(f func(string) (uint32, bool)) func(string) (uint32, bool) {
	if f != nil {
		return f
	}
	return func(name string) (uint32, bool) {
		g, err := user.LookupGroup(name)
		if err != nil {
			return 0, false
		}
		return number(g.Gid)
	}
}

func number(s string) (uint32, bool) {
	n, err := strconv.ParseUint(s, 10, 32)
	return uint32(n), err == nil && n != nobody
}

// clientOption applies an option that asks who the client is, or says how its
// flows are carried.
func (l *line) clientOption(r *Rule, t token, key, value string) {
	malformed := func() { l.errorf(t, "E29", "%q: write %s", t.text, optionForms[key]) }
	switch key {
	case "uid":
		if r.UIDs != nil {
			l.errorf(t, "E29", "users are given twice, by *= and uid=")
		}
		r.UIDs = l.ids(t, value, "user", l.user)
	case "gid":
		r.GIDs = l.ids(t, value, "group", l.group)
	case "cgroup":
		for _, c := range strings.Split(value, ",") {
			if c != "/" {
				c = strings.TrimSuffix(c, "/")
			}
			if c == "" || strings.Contains(c, "//") || strings.Contains("/"+c+"/", "/../") || strings.Contains("/"+c+"/", "/./") {
				malformed()
				continue
			}
			r.Cgroups = append(r.Cgroups, c)
		}
		slices.Sort(r.Cgroups)
		r.Cgroups = slices.Compact(r.Cgroups)
	case "mark":
		for _, m := range strings.Split(value, ",") {
			mark, ok := parseMark(m)
			if !ok {
				malformed()
			}
			r.Marks = append(r.Marks, mark)
		}
	case "mac":
		for _, m := range strings.Split(value, ",") {
			mac, err := net.ParseMAC(m)
			if err != nil || len(mac) != 6 || flow.MAC(mac) == (flow.MAC{}) {
				malformed()
				continue
			}
			r.MACs = append(r.MACs, flow.MAC(mac))
		}
	case "auth":
		l.auth(r, t, value)
	case "bind":
		switch strings.ToLower(value) {
		case "off":
		case "ftp":
			l.warnf(t, "E27", "bind=ftp has no effect here yet: FTP in active mode finds no way back")
		default:
			malformed()
		}
	case "timeout":
		l.duration(t, value, &r.Idle)
	}
}

// parseMark reads a hexadecimal value, with a mask behind a slash or not.
func parseMark(s string) (m Mark, ok bool) {
	value, mask, masked := strings.Cut(s, "/")
	if m.Value, ok = parseHex(value); !ok || !masked {
		m.Mask = 1<<32 - 1
		return m, ok
	}
	m.Mask, ok = parseHex(mask)
	return m, ok && m.Mask != 0 && m.Value&^m.Mask == 0
}

func parseHex(s string) (uint32, bool) {
	digits := strings.TrimPrefix(strings.ToLower(s), "0x")
	b, err := hex.DecodeString(strings.Repeat("0", max(0, 8-len(digits))) + digits)
	if err != nil || len(b) != 4 || digits == "" {
		return 0, false
	}
	return binary.BigEndian.Uint32(b), true
}

// ids reads users or groups: names, numbers, and files that hold such.
func (l *line) ids(t token, value, what string, lookup func(string) (uint32, bool)) []uint32 {
	list := []uint32{}
	one := func(word string) {
		id, ok := number(word)
		if !ok {
			if id, ok = lookup(word); !ok {
				l.warnf(t, "W08", "this host has no %s %q: the rule does not match it, until there is one and the rules are read again", what, word)
				id = nobody
			}
		}
		list = append(list, id)
	}
	for _, word := range strings.Split(value, ",") {
		switch {
		case word == "":
			l.errorf(t, "E29", "%q: write names or numbers, with commas between them", t.text)
		case word[0] == '/':
			l.idFile(t, word, one)
		default:
			one(word)
		}
	}
	if len(list) == 0 { // of files alone, which are empty: nobody, and not anybody
		if !l.diags.wrong[l.diags.current] {
			l.warnf(t, "W08", "%q names no %s: the rule does not match, until it does and the rules are read again", t.text, what)
		}
		list = append(list, nobody)
	}
	slices.Sort(list)
	list = slices.Compact(list)
	binary.Write(l.reader.sum, binary.NativeEndian, list) // what a name means is part of what was read
	return list
}

// idFile gives the words of a file to f; a comment begins with #.
func (l *line) idFile(t token, path string, f func(word string)) {
	file, err := l.open(path)
	if err != nil {
		l.errorf(t, "E24", "%v", err)
		return
	}
	defer file.Close()
	sc := bufio.NewScanner(file)
	for sc.Scan() {
		text, _, _ := strings.Cut(sc.Text(), "#")
		for _, w := range strings.Fields(text) {
			f(w)
		}
	}
	if err := sc.Err(); err != nil {
		l.errorf(t, "E24", "%s: %v", path, err)
	}
}

// ofOneClient reports conditions that no flow meets together: a flow enters by
// an interface, or it is one of this host's processes.
func (l *line) ofOneClient(r *Rule, set map[string]token) {
	if !r.own() {
		return
	}
	for _, key := range []string{"if", "mac"} {
		if t, ok := set[key]; ok {
			l.errorf(t, "E29", "users, groups and cgroups are those of this host's own processes, whose flows enter by no interface: the rule would never match")
		}
	}
}

// auth checks that the servers of a rule are asked with credentials or without,
// as it says.
func (l *line) auth(r *Rule, t token, value string) {
	want := false
	switch strings.ToLower(value) {
	case "any":
		return
	case "none":
	case "userpass":
		want = true
	case "gssapi":
		l.errorf(t, "E28", "auth=gssapi: GSSAPI is not built in; use auth=userpass")
		return
	default:
		l.errorf(t, "E29", "%q: write %s", t.text, optionForms["auth"])
		return
	}
	if !r.Action.proxied() {
		l.errorf(t, "E29", "%s has no servers to authenticate to", r.Action)
	}
	for _, c := range r.Servers {
		switch s := c[len(c)-1]; {
		case want && s.Credential == "":
			l.errorf(t, "E20", "auth=userpass, but server %s has no credential=", s.Name)
		case !want && s.Credential != "":
			l.errorf(t, "E20", "auth=none, but server %s has credential=%s", s.Name, s.Credential)
		}
	}
}

// commands applies cmd= and resolve=, which mean what other words say too.
func (l *line) commands(r *Rule, set map[string]token) {
	if t, ok := set["cmd"]; ok {
		l.command(r, t, set)
	}
	if t, ok := set["resolve"]; ok {
		l.resolveOption(r, t)
	}
}

// command applies cmd=: what is asked of a server for a TCP flow is connect,
// for UDP an association, and nothing here asks for bind.
func (l *line) command(r *Rule, t token, set map[string]token) {
	_, value, _ := strings.Cut(t.text, "=")
	asks := map[string]bool{}
	for _, c := range strings.Split(strings.ToLower(value), ",") {
		if !slices.Contains([]string{"connect", "bind", "udp"}, c) {
			l.errorf(t, "E29", "%q: write %s", t.text, optionForms["cmd"])
			return
		}
		asks[c] = true
	}
	if _, twice := set["proto"]; twice {
		l.errorf(t, "E29", "cmd= and proto= say the same; write one")
		return
	}
	switch {
	case asks["connect"] && asks["udp"]:
	case asks["connect"]:
		r.Protocols = OnlyTCP
	case asks["udp"]:
		r.Protocols = OnlyUDP
	default:
		l.errorf(t, "E29", "cmd=bind: nothing that is intercepted asks for it, so that the rule would never match")
		return
	}
	if asks["bind"] {
		l.warnf(t, "E27", "cmd=bind has no effect: nothing that is intercepted asks for it")
	}
	set["proto"] = t
}

// resolveOption applies resolve=: a RESOLVE line for each name of the rule, in
// its place.
func (l *line) resolveOption(r *Rule, t token) {
	_, value, _ := strings.Cut(t.text, "=")
	mode, ok := resolveModes[strings.ToLower(value)]
	if !ok {
		l.errorf(t, "E29", "%q: write %s", t.text, optionForms["resolve"])
		return
	}
	if r.dest.noName() {
		l.errorf(t, "E29", "resolve= is for rules with names")
		return
	}
	if r.dest.list != nil {
		l.errorf(t, "E29", "resolve= is not for a LIST: write a RESOLVE line for it")
		return
	}
	add := func(e resolveRule) {
		e.mode, e.file, e.line = mode, l.file, t.line
		l.resolves = append(l.resolves, &e)
	}
	if r.dest.anyName {
		add(resolveRule{all: true})
	}
	for n := range r.dest.names.all() {
		add(resolveRule{name: n})
	}
	for s := range r.dest.suffixes.all() {
		add(resolveRule{suffix: s})
	}
}
