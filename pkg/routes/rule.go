package routes

import (
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

// rule reads a line that decides flows.
func (l *line) rule(t token, action Action) {
	r := &Rule{File: l.file, Line: t.line, Text: l.text(), Action: action, col: t.col, number: l.diags.current}
	l.leading(r, t)
	at, ok := l.word()
	switch {
	case !ok || at.text == ":":
		l.errorf(at, "E02", "missing destination after %s", l.textBefore(at))
		return
	case isOption(at.text):
		l.errorf(at, "E02", "missing destination after %s; write * for any", l.textBefore(at))
		l.rest = slices.Insert(l.rest, 0, at)
	default:
		r.dest = l.destination(at)
		r.Ports = l.ports(at)
	}
	set := l.options(r)
	l.ofOneClient(r, set)
	l.commands(r, set)
	l.carries(r, at, set)
	r.restrict()
	if r.By == ByName && r.dest.noName() {
		l.errorf(set["by"], "E29", "by=name, but %s is an address", at.text)
	}
	if r.By == ByAddress && len(r.dest.prefixes) == 0 {
		l.errorf(set["by"], "E29", "by=address, but %s is a name", at.text)
	}
	r.Balance = l.takeBalance(r)
	if s, ok := set["balance"]; ok {
		_, value, _ := strings.Cut(s.text, "=")
		r.Balance = Strategy(max(slices.Index(strategyWords[:], strings.ToLower(value)), 0))
	}
	if r.Protocols == OnlyUDP {
		// Nothing is left for the servers: to all who ask it is what it does.
		if a := r.ActionFor(flow.UDP); a != r.Action {
			r.Action, r.Servers, r.Balance, r.UDP = a, nil, First, UDPSocks
		}
	}
	l.rules = append(l.rules, r)
}

// textBefore returns the words before t.
func (l *line) textBefore(t token) string {
	var words []string
	for _, w := range l.tokens {
		if w.line == t.line && w.col == t.col {
			break
		}
		words = append(words, w.text)
	}
	return strings.Join(words, " ")
}

// restrict applies by= to the destination.
func (r *Rule) restrict() {
	switch r.By {
	case ByName:
		r.dest.prefixes = nil
	case ByAddress:
		r.dest.anyName, r.dest.names, r.dest.suffixes = false, nameList{}, nameList{}
	}
}

func (d *dest) noName() bool { return !d.anyName && len(d.names.refs)+len(d.suffixes.refs) == 0 }

// leading reads the words with @= and *= before the destination.
func (l *line) leading(r *Rule, action token) {
	var servers bool
	for len(l.rest) > 0 {
		t := l.rest[0]
		switch {
		case strings.HasPrefix(t.text, "@="):
			l.word()
			if servers {
				l.errorf(t, "E29", "@= is given twice")
			}
			servers = true
			if !r.Action.proxied() {
				l.errorf(t, "E29", "%s takes no servers", r.Action)
			}
			r.Servers = l.serverList(t, r.Action)
		case strings.HasPrefix(t.text, "*="):
			l.word()
			l.warnf(t, "E23", "*=users matches only processes of this machine; such a rule never matches forwarded traffic")
			if r.UIDs != nil {
				l.errorf(t, "E29", "*= is given twice")
			}
			r.UIDs = l.ids(t, t.text[2:], "user", l.user)
		default:
			goto end
		}
	}
end:
	if !r.Action.proxied() {
		r.Servers = nil
		return
	}
	if !servers {
		if r.Servers = l.defaultServer; r.Servers == nil {
			l.errorf(action.end(), "E13", "%s without @= and no DEFAULT-SERVER", r.Action)
		}
	}
}

// carries reports what the protocol of the rule cannot do.
func (l *line) carries(r *Rule, at token, set map[string]token) {
	v6 := slices.ContainsFunc(r.dest.prefixes, func(p netip.Prefix) bool { return p.Addr().Is6() && p.Bits() > 0 })
	udp := r.Protocols == OnlyUDP && r.UDP == UDPSocks
	_, bind := set["bind"]
	tcpOnly := slices.IndexFunc(r.Servers, func(c Chain) bool { return len(c) > 1 && (bind || !c.CarriesUDP(r.Action)) })
	switch r.Action {
	case Socks4:
		if r.ownName() {
			l.nameless = append(l.nameless, nameless{l.statement, at, l.diags.current, r.dest})
		}
		fallthrough
	case Socks4A:
		if v6 {
			l.errorf(at, "E17", "%s cannot carry IPv6", r.Action)
		}
		fallthrough
	case HTTP:
		if udp {
			l.errorf(set["proto"], "E17", "%s cannot carry UDP", r.Action)
		}
	}
	if bind && r.Action == HTTP {
		l.errorf(set["bind"], "E18", "HTTP cannot carry bind")
	}
	if tcpOnly >= 0 && (bind || udp) {
		c := r.Servers[tcpOnly]
		l.errorf(l.tokens[1], "E19", "chain %s: %s is reached through %s, and neither UDP nor BIND can be chained; TCP only, or UDP if all speak SOCKS5 without TLS and those behind the first say udp=chain", c, c[len(c)-1].Name, c[0].Name)
	}
	if t, stated := set["udp"]; stated && r.Action.proxied() && r.Protocols == OnlyTCP {
		l.errorf(t, "E29", "udp= says nothing of a rule with proto=tcp")
	} else if (r.Action == Socks5 || r.Action == Socks) && r.UDP == UDPSocks && len(r.Servers) > 0 && (tcpOnly < 0 || !udp) && !r.CarriesUDP() {
		if !stated {
			t, stated = set["proto"], r.Protocols == OnlyUDP
		}
		if stated {
			l.warnf(t, "W04", "no server of the rule carries UDP (udp=off, tls, a chain without udp=chain, or another protocol), so that UDP is refused")
		}
	}
	for _, c := range r.Servers {
		if s := c[len(c)-1]; s.Type != Socks && s.Type != r.Action && (r.Action != Socks || s.Type == HTTP) {
			l.errorf(l.tokens[0], "E29", "%s, but server %s has type=%s (%s:%d)", r.Action, s.Name, typeWords[s.Type], s.File, s.Line)
		}
	}
}

// typeWords spell the values of Server.Type.
var typeWords = map[Action]string{Socks5: "socks5", Socks4: "socks4", Socks4A: "socks4a", HTTP: "http"}

// nameless is a SOCKD4 rule with names, which may be resolved by this host by a
// line that comes later.
type nameless struct {
	statement *statement
	at        token
	number    int
	dest      dest
}

// resolvedHere reports SOCKD4 rules with names that no RESOLVE line says to be
// resolved here.
func (p *parser) resolvedHere() {
	for _, n := range p.nameless {
		local := func(later *resolveRule) bool {
			i := slices.IndexFunc(p.resolves, func(r *resolveRule) bool { return r.covers(later) })
			return i >= 0 && p.resolves[i].mode == ResolveLocal
		}
		ok := true
		for s := range n.dest.names.all() {
			ok = ok && local(&resolveRule{name: s})
		}
		for s := range n.dest.suffixes.all() {
			ok = ok && local(&resolveRule{suffix: s})
		}
		if !ok {
			p.diags.current = n.number
			p.diags.at(n.statement.file, n.at, "E16", "SOCKD4 cannot carry a name; add RESOLVE local for %s or use SOCKD4A or SOCKD5", n.at.text)
		}
	}
}

// optionWords are the options of a rule.
var optionWords = []string{
	"auth", "balance", "bind", "by", "cgroup", "cmd", "gid", "if", "log", "mac", "mark", "proto", "reject", "resolve", "src",
	"tag", "timeout", "udp", "uid",
}

// isOption tells whether a word can only be an option.
func isOption(word string) bool {
	_, isOperator := operators[strings.ToLower(word)]
	key, _, ok := strings.Cut(word, "=")
	return ok && key != "" && !isOperator && word[0] != '<' && word[0] != '>' && word[0] != '!'
}

// options reads the rest of a rule and returns which options it has.
func (l *line) options(r *Rule) map[string]token {
	set := map[string]token{}
	for {
		t, ok := l.word()
		if !ok {
			return set
		}
		if t.text == ":" {
			l.errorf(t, "E21", "the shell command after %q is not run; rule refused", ":")
			return set
		}
		key, value, hasValue := strings.Cut(t.text, "=")
		key = strings.ToLower(key)
		switch _, twice := set[key]; {
		case !slices.Contains(optionWords, key):
			l.unknownOption(t, key, hasValue)
			continue
		case twice:
			l.errorf(t, "E29", "%s is given twice", key)
			continue
		case hasValue == (key == "log"), hasValue && value == "":
			l.errorf(t, "E29", "%q: write %s", t.text, optionForms[key])
			continue
		}
		set[key] = t
		l.option(r, t, key, value)
	}
}

// optionForms say how options are written.
var optionForms = map[string]string{
	"src": "src=10.0.0.0/8,10.1.2.3", "if": "if=lan0,lan1", "proto": "proto=tcp, udp or any", "by": "by=name or address",
	"reject": "reject=reset, icmp, drop, dns-refused or dns-nxdomain", "balance": "balance=random or first",
	"tag": "tag=WORD", "log": "log", "uid": "uid=user,1000", "gid": "gid=group,1000", "cgroup": "cgroup=/path or a name, as web.service",
	"mark": "mark=0x10 or mark=0x10/0xf0",
	"cmd":  "cmd=connect,bind,udp", "auth": "auth=none, userpass, gssapi or any", "resolve": "resolve=local, remote or local-then-remote",
	"bind": "bind=off or ftp", "udp": "udp=socks, deny or direct", "timeout": "timeout=30s", "mac": "mac=00:00:5e:00:53:01",
}

func (l *line) unknownOption(t token, key string, hasValue bool) {
	if operators[strings.ToLower(t.text)] != nil {
		l.word() // the port
		l.errorf(t, "E29", "%q is too much here: ports stand before the options", t.text)
		return
	}
	words := optionWords
	if w := closest(key, words); w != "" {
		l.errorf(t, "E29", "unknown option %q; did you mean %s?", t.text, optionForms[w])
	} else if hasValue {
		l.errorf(t, "E29", "unknown option %q; there are %s", t.text, strings.Join(words, ", "))
	} else {
		l.errorf(t, "E29", "%q is too much here: neither a port nor an option", t.text)
	}
}

// option applies one that has an effect.
func (l *line) option(r *Rule, t token, key, value string) {
	oneOf := func(words ...string) int {
		i := slices.Index(words, strings.ToLower(value))
		if i < 0 {
			l.errorf(t, "E29", "%q: write %s", t.text, optionForms[key])
		}
		return max(i, 0)
	}
	switch key {
	case "log":
		r.Log = true
	case "tag":
		r.Tag = value
	case "proto":
		r.Protocols = Protocols(oneOf("any", "tcp", "udp"))
	case "by":
		r.By = By(oneOf("any", "name", "address"))
	case "balance":
		if !r.Action.proxied() {
			l.errorf(t, "E29", "%s has no servers to balance", r.Action)
		}
		l.strategy(t, value)
	case "reject":
		l.reject(r, t, value)
	case "udp":
		if !r.Action.proxied() {
			l.errorf(t, "E29", "udp= is for rules with servers, not for %s", r.Action)
		}
		r.UDP = UDPUse(oneOf("socks", "deny", "direct"))
	case "if":
		for _, name := range strings.Split(value, ",") {
			if !isInterface(name) {
				l.errorf(t, "E29", "%q is not the name of an interface", name)
				continue
			}
			r.Ifs = append(r.Ifs, name)
		}
		slices.Sort(r.Ifs)
		r.Ifs = slices.Compact(r.Ifs)
	case "src":
		r.Src = l.sources(t, value)
	default:
		l.clientOption(r, t, key, value)
	}
}

// isInterface tells whether Linux would take a word for an interface's name.
func isInterface(name string) bool {
	return name != "" && len(name) <= 15 && !strings.ContainsAny(name, "/:*\"")
}

func (l *line) reject(r *Rule, t token, value string) {
	if r.Action != Deny {
		l.errorf(t, "E29", "reject= is for DENY, not for %s", r.Action)
		return
	}
	switch strings.ToLower(value) {
	case "reset":
	case "dns-refused":
		r.Reject = RejectRefused
	case "dns-nxdomain":
		r.Reject = RejectNXDomain
	case "icmp":
		r.Reject = RejectICMP
	case "drop":
		r.Reject = RejectDrop
	default:
		l.errorf(t, "E29", "%q: write %s", t.text, optionForms["reject"])
	}
}

// sources reads the networks of src=.
func (l *line) sources(t token, value string) (list []netip.Prefix) {
	for _, word := range strings.Split(value, ",") {
		if name, ok := strings.CutPrefix(word, "$"); ok {
			switch known := l.lists[name]; {
			case known == nil:
				l.errorf(t, "E12", "LIST %q is not defined%s", name, meant(name, slices.Collect(maps.Keys(l.lists))))
			case len(known.dest.prefixes) == 0 || !known.dest.noName():
				l.errorf(t, "E29", "LIST %s is not one of addresses alone", name)
			default:
				known.used = true
				list = append(list, known.dest.prefixes...)
			}
			continue
		}
		p, err := parsePrefix(word)
		if err != nil {
			l.errorf(t, "E03", "src=: %v", err)
			continue
		}
		l.hostBits(t, p, word)
		list = append(list, p.Masked())
	}
	slices.SortFunc(list, netip.Prefix.Compare)
	return slices.Compact(list)
}
