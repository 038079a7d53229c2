package routes

import (
	"net/netip"
	"path"
	"slices"
	"strings"
)

// module reads the one word of BIND-MODULE and EXCLUDE-MODULE.
func (l *line) module(t token) (w token, ok bool) {
	if w, ok = l.word(); !ok {
		l.errorf(t.end(), "E29", "%s without a module", strings.ToUpper(t.text))
		return w, false
	}
	l.done()
	return w, true
}

// bindModule reads the program that may listen by a SOCKS server.
func (l *line) bindModule(t token) {
	if w, ok := l.module(t); ok {
		l.warnf(t, "E27", "BIND-MODULE %s has no effect: nothing that is intercepted asks a server to listen", w.text)
	}
}

// excludeModule reads what of this host is DIRECT before all rules: a unit, a
// cgroup, or a program, which the kernel does not tell of a packet.
func (l *line) excludeModule(t token) {
	w, ok := l.module(t)
	if !ok {
		return
	}
	r := &Rule{File: l.file, Line: t.line, Text: l.text(), Action: Direct, col: t.col, number: l.diags.current}
	name := strings.TrimPrefix(w.text, "/sys/fs/cgroup")
	switch {
	case isCgroup(name):
		r.Cgroups = []string{strings.TrimSuffix(name, "/")}
		r.dest = dest{prefixes: []netip.Prefix{all4, all6}, anyName: true}
		l.excluded = append(l.excluded, r)
	case slices.Contains([]string{".exe", ".dll"}, strings.ToLower(path.Ext(name))):
		l.warnf(t, "E27", "EXCLUDE-MODULE %s names a Windows program: kept as a tag, it has no effect", w.text)
	case path.Clean(name) != name || strings.Contains(name, "/") && name[0] != '/':
		l.errorf(w, "E29", "%q is neither a unit, a cgroup, nor a program: write tunnel.service, /machine.slice/web, /usr/bin/ssh or ssh", w.text)
	default:
		r.Program = name
		l.programs = append(l.programs, r)
	}
}

// runs tells whether a program is the one that the rule names: by its path, or by
// the last part of it.
func (r *Rule) runs(program string) bool {
	return program != "" && (r.Program == program || r.Program == path.Base(program))
}

// unitSuffixes are those of the units of systemd that are cgroups.
var unitSuffixes = []string{".service", ".slice", ".scope", ".socket", ".mount", ".swap"}

// programPlaces are where programs are and cgroups are not.
var programPlaces = []string{"/usr/", "/bin/", "/sbin/", "/lib/", "/opt/", "/home/", "/root/", "/snap/", "/srv/", "/var/", "/run/", "/tmp/", "/mnt/", "/media/", "/nix/", "/gnu/"}

// isCgroup tells whether a word names a unit or a cgroup: its path, or the end of
// its path with a unit in it.
func isCgroup(name string) bool {
	clean := strings.TrimSuffix(name, "/")
	if clean == "" || path.Clean("/"+clean) != "/"+strings.TrimPrefix(clean, "/") {
		return false
	}
	for _, label := range strings.Split(clean, "/") {
		if slices.ContainsFunc(unitSuffixes, func(s string) bool { return strings.HasSuffix(label, s) && label != s }) {
			return true
		}
	}
	return clean[0] == '/' && !slices.ContainsFunc(programPlaces, func(p string) bool { return strings.HasPrefix(clean, p) })
}

// Loop is a server on this host whose own flows would come back to it, where this
// host's flows are intercepted.
type Loop struct {
	Server *Server
	Rule   *Rule // that sends them there
}

// Loops returns the servers that are programs of this host, and to which a rule
// sends everything that the host says, theirs included, with no rule before it
// that makes processes of this host DIRECT. Own tells this host's addresses.
func (t *Table) Loops(own func(netip.Addr) bool) (list []Loop) {
	seen := map[*Server]bool{}
	for _, r := range t.rules {
		switch {
		case r.Action == Direct && (r.own() || r.Program != ""):
			return list
		case !r.Action.proxied() || !r.anyone() || !r.anyAddress():
			continue
		}
		for _, c := range r.Servers {
			s := c[0]
			here := s.Host == "localhost" || s.Addr.IsValid() && (s.Addr.IsLoopback() || own(s.Addr))
			if here && !seen[s] {
				seen[s] = true
				list = append(list, Loop{s, r})
			}
		}
	}
	return list
}
