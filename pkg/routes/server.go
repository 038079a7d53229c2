package routes

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// The port of a server that states none.
const (
	socksPort = 1080
	httpPort  = 3128
)

// onlyServers reads a directive that is nothing but a server list. Before is
// what an earlier line of the same said.
func (l *line) onlyServers(t token, before []Chain) []Chain {
	if before != nil {
		l.errorf(t, "E29", "%s is given twice", strings.ToUpper(t.text))
	}
	w, ok := l.word()
	if !ok || !strings.HasPrefix(w.text, "@=") {
		l.errorf(w, "E29", "%s takes @=servers", strings.ToUpper(t.text))
		return nil
	}
	chains := l.serverList(w, Socks5)
	l.done()
	return chains
}

// serverList reads "@=a,b>c". A blank inside is reported once, and what stands
// behind it is still read.
func (l *line) serverList(t token, action Action) (chains []Chain) {
	text := strings.TrimPrefix(t.text, "@=")
	for len(l.rest) > 0 {
		next := l.rest[0].text
		open := text == "" || strings.ContainsAny(text[len(text)-1:], ",>")
		if !open && !strings.HasPrefix(next, ",") && !strings.HasPrefix(next, ">") {
			break
		}
		l.errorf(t, "E11", "blank inside the server list near %q; write @=a,b", text+" "+next)
		l.word()
		text += next
	}
	col := t.col + 2
	for _, hop := range strings.Split(text, ",") {
		at := token{hop, t.line, col}
		switch chain := l.chain(at, action); {
		case chain == nil:
		case slices.ContainsFunc(chains, func(c Chain) bool { return slices.Equal(c, chain) }):
			l.errorf(at, "E29", "%s is given twice", chain)
		default:
			chains = append(chains, chain)
		}
		col += len([]rune(hop)) + 1
	}
	return chains
}

// chain reads "a>b". Nil: it has been reported.
func (l *line) chain(t token, action Action) (c Chain) {
	col := t.col
	ok := true
	hops := strings.Split(t.text, ">")
	for i, text := range hops {
		at := token{text, t.line, col}
		col += len([]rune(text)) + 1
		protocol := action
		if i < len(hops)-1 {
			protocol = Socks5
		}
		s := l.endpoint(at, protocol)
		if s == nil {
			ok = false
			continue
		}
		if slices.Contains(c, s) {
			l.errorf(at, "E14", "chain %s passes through %s twice: proxy loop", t.text, s.Name)
			ok = false
		}
		c = append(c, s)
	}
	if !ok {
		return nil
	}
	return c
}

// endpoint finds the server that a word means: one of a SERVER line, or one
// that is spelled out.
func (l *line) endpoint(t token, action Action) *Server {
	if t.text == "" {
		l.errorf(t, "E12", "a server is missing in the list")
		return nil
	}
	if s := l.defined[t.text]; s != nil {
		return s
	}
	port := uint16(socksPort)
	if action == HTTP {
		port = httpPort
	}
	key := t.text + " " + strconv.Itoa(int(port))
	if s := l.inline[key]; s != nil {
		return s
	}
	if !strings.ContainsAny(t.text, ".:[") {
		names := slices.Sorted(maps.Keys(l.defined))
		known := "there is no SERVER line"
		if len(names) > 0 {
			const some = 8
			known = "SERVER lines: " + strings.Join(names[:min(len(names), some)], ", ")
			if len(names) > some {
				known += fmt.Sprintf(" and %d more", len(names)-some)
			}
		}
		l.errorf(t, "E12", "server %q is not defined (%s)%s", t.text, known, meant(t.text, names))
		return nil
	}
	s := l.spelled(t, port)
	if s != nil {
		l.inline[key] = s
		l.parser.servers = append(l.parser.servers, s)
	}
	return s
}

// spelled reads HOST, HOST:PORT, [IPV6] or [IPV6]:PORT.
func (l *line) spelled(t token, port uint16) *Server {
	s := &Server{Name: t.text, Type: Socks, Port: port, File: l.file, Line: t.line, Col: t.col}
	var host, number string
	hasPort := false
	if strings.HasPrefix(t.text, "[") {
		inner, rest, closed := strings.Cut(t.text[1:], "]")
		a, err := netip.ParseAddr(inner)
		if !closed || err != nil || !a.Is6() || a.Zone() != "" || rest != "" && rest[0] != ':' {
			l.errorf(t, "E03", "%q is not a server, as [2001:db8::1]:1080", t.text)
			return nil
		}
		s.Addr = a.Unmap()
		number, hasPort = strings.TrimPrefix(rest, ":"), rest != ""
	} else if strings.Count(t.text, ":") > 1 {
		l.errorf(t, "E03", "%q: an IPv6 address of a server stands in brackets, as [2001:db8::1]:1080", t.text)
		return nil
	} else {
		host, number, hasPort = strings.Cut(t.text, ":")
	}
	if hasPort {
		n, err := strconv.ParseUint(number, 10, 16)
		if err != nil || n == 0 {
			l.errorf(t, "E09", "port %q of server %q is not a number from 1 to 65535", number, t.text)
			return nil
		}
		s.Port = uint16(n)
	}
	if host == "" {
		if !s.Addr.IsValid() {
			l.errorf(t, "E03", "server %q has no address", t.text)
			return nil
		}
	} else if isAddressLike(host) {
		a, err := netip.ParseAddr(host)
		if err != nil {
			l.errorf(t, "E03", "%q is not an address", host)
			return nil
		}
		s.Addr = a
	} else {
		host = strings.ToLower(strings.TrimSuffix(host, "."))
		if err := checkName(host); err != nil {
			l.errorf(t, "E03", "%q is not a server: %v", t.text, err)
			return nil
		}
		s.Host = host
	}
	if s.Addr.IsValid() && (s.Addr.IsUnspecified() || s.Addr.IsMulticast()) {
		l.errorf(t, "E03", "%s cannot be the address of a server", s.Addr)
		return nil
	}
	return s
}

// server reads a SERVER line.
func (l *line) server() {
	name, ok := l.word()
	at, ok2 := l.word()
	if !ok || !ok2 {
		l.errorf(at, "E29", "SERVER NAME HOST[:PORT] [OPTION…]")
		return
	}
	bad := strings.ContainsAny(name.text, ",>@=:[]$*")
	if bad {
		l.errorf(name, "E29", "%q cannot name a server: letters, digits, dots, dashes", name.text)
	}
	s := l.serverOptions(name.text, at)
	if s == nil || bad {
		return
	}
	s.Name, s.Col = name.text, name.col
	if known := l.defined[name.text]; known != nil {
		l.errorf(name, "E29", "SERVER %s is given twice; the first is %s:%d", name.text, known.File, known.Line)
		return
	}
	l.defined[name.text] = s
	l.numbers[s] = l.diags.current
	l.parser.servers = append(l.parser.servers, s)
}

// serverOptions reads what follows a SERVER's name.
func (l *line) serverOptions(name string, at token) *Server {
	port := uint16(socksPort)
	if slices.ContainsFunc(l.rest, func(t token) bool { return strings.EqualFold(t.text, "type=http") }) {
		port = httpPort
	}
	s := l.spelled(at, port)
	valid := s != nil
	if !valid {
		s = &Server{} // the options may have mistakes of their own
	}
	var auth, sni token
	seen := map[string]bool{}
	for {
		t, ok := l.word()
		if !ok {
			break
		}
		key, value, hasValue := strings.Cut(t.text, "=")
		key = strings.ToLower(key)
		if seen[key] {
			l.errorf(t, "E29", "%s is given twice", key)
			continue
		}
		seen[key] = true
		if hasValue == (key == "tls") || hasValue && value == "" {
			l.errorf(t, "E29", "%q is not an option of SERVER; options are KEY=VALUE, and tls", t.text)
			continue
		}
		switch lower := strings.ToLower(value); key {
		case "type":
			s.Type = []Action{Socks5, Socks4, Socks4A, HTTP}[l.serverWord(t, lower, "socks5", "socks4", "socks4a", "http")]
		case "auth":
			auth = t
			if l.serverWord(t, lower, "none", "userpass", "any", "gssapi") == 3 {
				l.errorf(t, "E28", "auth=gssapi: GSSAPI is not built in; use auth=userpass")
			}
		case "credential":
			s.Credential = value
		case "pipeline":
			s.Pipeline = Pipeline(l.serverWord(t, lower, pipelineWords[1:]...)) + PipelineOff
		case "udp":
			s.UDP = UDPMode(l.serverWord(t, lower, udpWords[:]...))
		case "warm":
			s.Cold = l.serverWord(t, lower, "auto", "off") == 1
		case "tls":
			s.TLS = true
		case "sni":
			sni = t
			if s.SNI = lower; checkName(lower) != nil {
				l.errorf(t, "E29", "%q: sni is the name in the server's certificate", t.text)
			}
		case "source":
			a, err := netip.ParseAddr(value)
			if err != nil || a.Zone() != "" || a.IsUnspecified() || a.IsMulticast() {
				l.errorf(t, "E29", "%q: source is an address of this host", t.text)
			}
			s.Source = a.Unmap()
		case "if":
			if s.If = value; !isInterface(value) {
				l.errorf(t, "E29", "%q is not the name of an interface", value)
			}
		case "flows":
			s.Flows = l.limit(t, value)
		case "handshakes":
			s.Handshakes = l.limit(t, value)
		case "gss-service", "gss-level":
			l.errorf(t, "E28", "%s: GSSAPI is not built in", key)
		default:
			msg := "unknown option %q of SERVER"
			if w := closest(key, []string{"type", "auth", "credential", "pipeline", "udp", "warm", "sni", "source", "if", "flows", "handshakes"}); w != "" {
				msg += "; did you mean " + w + "=?"
			}
			l.errorf(t, "E29", msg, t.text)
		}
	}
	switch {
	case strings.EqualFold(auth.text, "auth=userpass") && s.Credential == "":
		l.errorf(auth, "E20", "auth=userpass, but server %s has no credential; add credential=NAME", name)
	case strings.EqualFold(auth.text, "auth=none") && s.Credential != "":
		l.errorf(auth, "E20", "auth=none, but server %s has a credential", name)
	}
	if sni.text != "" && !s.TLS {
		l.errorf(sni, "E29", "sni= without tls")
	}
	if !valid {
		return nil
	}
	return s
}

// udpWords spell the values of UDPMode.
var udpWords = [...]string{"own", "zero", "off", "chain"}

// serverWord returns which of the words a value is, the first if it is none.
func (l *line) serverWord(t token, value string, words ...string) int {
	i := slices.Index(words, value)
	if i < 0 {
		key, _, _ := strings.Cut(strings.ToLower(t.text), "=")
		l.errorf(t, "E29", "%q: %s is one of %s", t.text, key, strings.Join(words, ", "))
	}
	return max(i, 0)
}

// limit reads a number of flows.
func (l *line) limit(t token, value string) int {
	n, err := strconv.ParseUint(value, 10, 31)
	if err != nil || n == 0 {
		l.errorf(t, "E29", "%q: a limit is a number from 1 on", t.text)
	}
	return int(n)
}
