package convert

import (
	"fmt"
	"slices"
	"strconv"
	"strings"
)

// dante reads a socks.conf(5). Its client goes through the routes once for each
// protocol, direct, version 4, version 5, HTTP, and takes the first that matches
// in each pass; so does the order of what is written here.
func (b *builder) dante(text string) {
	f := parseDante(text)
	if f.server != 0 {
		b.report = append(b.report, Entry{f.server, Refused, "the file is that of a server (sockd.conf, danted.conf); its lines are not a client's matter"})
		b.add("DEFAULT DENY", "nothing was said by the file")
		return
	}
	for _, w := range f.wrong {
		b.refuse(w.source, "%s", w.why)
	}
	resolve, why := "local", "names are resolved by this host, which is Dante's default; so routes for names cannot match"
	for _, s := range f.settings {
		switch value := s.value; {
		case s.name == "resolveprotocol" && value == "fake":
			resolve, why = "remote", "resolveprotocol: fake"
		case s.name == "resolveprotocol":
			why = "resolveprotocol: " + value + "; routes for names cannot match"
		case s.name == "timeout.connect" && value != "0":
			b.write(s.source, "TIMEOUT connect="+value+"s", "")
		case s.name == "route.badexpire":
			b.write(s.source, "HEALTH badexpire="+value+"s", "")
		case s.name == "route.maxfail" && value != "0":
			b.write(s.source, "HEALTH maxfail="+value, "")
		default:
			b.leaveOut(s.source, "it has no meaning here")
		}
	}
	b.add("RESOLVE "+resolve+" *", why)
	b.danteRoutes(f.routes)
	if len(f.routes) == 0 && len(f.wrong) == 0 {
		b.add("DEFAULT DIRECT", "without a route Dante connects to everything directly")
		return
	}
	b.add("DEFAULT DENY", "what no route matches is unreachable, unless SOCKS_DIRECTROUTE_FALLBACK was set: then write DEFAULT DIRECT")
	b.note(0, "Dante adds routes for the networks that the client is in; here the hosts of a LAN reach each other without us")
}

// danteRule is what is made of a route, apart from its servers.
type danteRule struct {
	source
	action  string
	server  string
	match   string // destination, ports and options: what two routes share of which one is for when the other fails
	changed []string
}

// pass is a round of Dante's client through the routes.
type pass uint8

const (
	passDirect pass = iota
	passV4
	passV5
	passHTTP
)

// danteRoutes writes the routes, pass by pass. Routes that differ in nothing but
// the server become one rule: the later one is asked when the first fails.
func (b *builder) danteRoutes(list []danteRoute) {
	var rules []*danteRule
	byMatch := map[string]*danteRule{}
	var passes [][]*danteRoute
	for i := range list {
		if r := &list[i]; !slices.ContainsFunc([]pass{passDirect, passV4, passV5, passHTTP}, r.speaks) {
			b.dismiss(r.source, "no flow takes the route: version 4 has no user name and password")
		}
	}
	both := oneSocksPass(list)
	for p := range passHTTP + 1 {
		var in []*danteRoute
		for i := range list {
			if list[i].speaks(p) && !(p == passV4 && both) {
				in = append(in, &list[i])
			}
		}
		passes = append(passes, in)
	}
	for p, in := range passes {
		for _, r := range in {
			rule, err := r.rule(pass(p))
			if err != nil {
				if pass(p) == passV4 && r.speaks(passV5) {
					continue // what version 4 cannot do version 5 does
				}
				b.refuse(r.source, "%v", err)
				continue
			}
			if rule.server != "" {
				if r.credential() {
					name, _, _ := strings.Cut(rule.server, ":")
					rule.server = b.server(r.source, name, rule.server, "", "dante")
				}
				key := rule.action + " " + rule.match
				if first := byMatch[key]; first != nil {
					if !slices.Contains(strings.Split(first.server, ","), rule.server) {
						first.server += "," + rule.server
						b.note(r.line, "%s is asked when the server of line %d fails", rule.server, first.line)
					}
					continue
				}
				byMatch[key] = rule
			}
			rules = append(rules, rule)
		}
	}
	last := 0
	for _, r := range rules {
		if r.line < last {
			r.changed = append(r.changed, "it stands where Dante comes to it: direct routes are looked at first, then those of version 4, 5 and HTTP")
		}
		last = max(last, r.line)
		words := []string{r.action}
		if r.server != "" {
			words = append(words, "@="+r.server)
		}
		b.write(r.source, strings.Join(append(words, r.match), " "), strings.Join(slices.Compact(r.changed), "; "))
	}
}

// oneSocksPass tells whether the passes of versions 4 and 5, one after the other,
// find what a single one would in the order of the file: no route is of version 4
// alone, and none of version 5 alone stands in front of one that has both.
func oneSocksPass(list []danteRoute) bool {
	only5 := false
	for _, r := range list {
		v4, v5 := r.speaks(passV4), r.speaks(passV5)
		if v4 && (!v5 || only5) {
			return false
		}
		only5 = only5 || v5 && !v4
	}
	return true
}

// speaks tells whether a pass looks at the route.
func (r *danteRoute) speaks(p pass) bool {
	if r.via.word == "direct" {
		return p == passDirect
	}
	list := r.options["proxyprotocol"]
	if len(list) == 0 {
		list = []string{"socks_v4", "socks_v5"}
	}
	methods := slices.Concat(r.options["method"], r.options["socksmethod"])
	plain := len(methods) == 0 || slices.Contains(methods, "none") // version 4 has no other
	return p == passV4 && plain && slices.Contains(list, "socks_v4") || p == passV5 && slices.Contains(list, "socks_v5") ||
		p == passHTTP && (slices.Contains(list, "http") || slices.Contains(list, "http_v1.0")) ||
		p == passV5 && slices.Contains(list, "upnp") // it is refused there
}

// credential tells whether the server wants a user name and password.
func (r *danteRoute) credential() bool {
	return slices.Contains(r.options["method"], "username") || slices.Contains(r.options["socksmethod"], "username")
}

// rule makes what a pass does of the route. The error says why it cannot be said.
func (r *danteRoute) rule(p pass) (*danteRule, error) {
	out := &danteRule{source: r.source}
	tcp, udp, err := r.networks(out)
	if err != nil {
		return nil, err
	}
	switch p {
	case passDirect:
		out.action = "DIRECT"
	case passV4:
		out.action, udp = "SOCKD4", false
		if r.speaks(passV5) {
			out.action = "SOCKD5"
		}
	case passV5:
		out.action = "SOCKD5"
	case passHTTP:
		out.action, udp = "HTTP", false
	}
	if !tcp && !udp {
		return nil, fmt.Errorf("%s cannot carry UDP", out.action)
	}
	if p != passDirect {
		if out.server, err = r.via.server(p); err != nil {
			return nil, err
		}
	}
	match, err := r.to.destination(p == passV4)
	if err != nil {
		return nil, err
	}
	ports, err := r.to.ports()
	if err != nil {
		return nil, err
	}
	src, err := r.from.source()
	if err != nil {
		return nil, err
	}
	match = slices.Concat(match[:1], ports, match[1:], src)
	switch {
	case tcp && udp:
	case tcp && p != passHTTP && p != passV4:
		match = append(match, "proto=tcp")
	case udp:
		match = append(match, "proto=udp")
	}
	out.match = strings.Join(match, " ")
	for _, name := range []string{"gssapi.servicename", "gssapi.enctype", "clientcompatibility"} {
		if r.options[name] != nil {
			out.changed = append(out.changed, name+" is left out, GSSAPI is not built in")
		}
	}
	if slices.Equal(r.options["method"], []string{"gssapi"}) {
		return nil, fmt.Errorf("GSSAPI is not built in")
	}
	return out, nil
}

// networks are those of protocol: and command:.
func (r *danteRoute) networks(out *danteRule) (tcp, udp bool, err error) {
	tcp, udp = true, true
	if list := r.options["protocol"]; list != nil {
		tcp, udp = slices.Contains(list, "tcp"), slices.Contains(list, "udp")
	}
	if list := r.options["command"]; list != nil {
		connect, associate := slices.Contains(list, "connect"), slices.Contains(list, "udpassociate")
		if !connect && !associate {
			return false, false, fmt.Errorf("command: %s is for connections from outside, which no rule here is about", strings.Join(list, " "))
		}
		if slices.ContainsFunc(list, func(c string) bool { return c == "bind" || c == "bindreply" }) {
			out.changed = append(out.changed, "bind is left out")
		}
		tcp, udp = tcp && connect, udp && associate
	}
	return tcp, udp, nil
}

// server returns where a route leads.
func (a *danteAddr) server(p pass) (string, error) {
	w := a.word
	switch {
	case strings.HasPrefix(w, "."), w == "":
		return "", fmt.Errorf("via: %q is no server", w)
	case !strings.ContainsAny(w, ".:"):
		return "", fmt.Errorf("via: %s is an interface or UPnP, which cannot carry a flow here", w)
	}
	if strings.Contains(w, ":") {
		w = "[" + w + "]"
	}
	if i := strings.IndexByte(w, '/'); i >= 0 {
		w = w[:i]
	}
	switch {
	case len(a.port) == 0:
		return w, nil
	case len(a.port) == 1 || len(a.port) == 2 && slices.Contains([]string{"=", "eq"}, a.port[0]):
		port := a.port[len(a.port)-1]
		if number, err := strconv.ParseUint(port, 10, 16); err == nil && (number == 1080 && p != passHTTP) {
			return w, nil // the default
		}
		if port == "socks" {
			return w, nil
		}
		return w + ":" + port, nil
	}
	return "", fmt.Errorf("via: port %s is not one port", strings.Join(a.port, " "))
}

// destination returns it as the language does, with the options that restrict
// it to names or addresses. V4: to IPv4 addresses, which is all that version 4
// knows.
func (a *danteAddr) destination(v4 bool) ([]string, error) {
	w := a.word
	name := w == "." || strings.HasPrefix(w, ".") || isName(w)
	switch {
	case v4 && (name || strings.Contains(w, ":")):
		return nil, fmt.Errorf("version 4 knows IPv4 addresses only")
	case w == ".":
		return []string{"*", "by=name"}, nil
	case strings.HasPrefix(w, "."):
		return []string{"*" + w}, nil
	case name && !strings.Contains(w, "."):
		return nil, fmt.Errorf("to: %s is the name of an interface, or of a host without its domain", w)
	case name:
		return []string{w}, nil
	case v4 && (w == "0/0" || w == "0.0.0.0/0"):
		return []string{"0.0.0.0/0", "by=address", "proto=tcp"}, nil
	case w == "0/0":
		return []string{"*", "by=address"}, nil
	}
	addr, mask, hasMask := strings.Cut(w, "/")
	if !hasMask && !strings.Contains(w, ":") {
		return nil, fmt.Errorf("to: %s has no mask; Dante does not take it either: write %s/32", w, w)
	}
	to := w
	if isQuad(mask) {
		to = addr + " " + mask
	}
	var options []string
	if mask == "0" || mask == "0.0.0.0" {
		options = append(options, "by=address")
	}
	if v4 {
		options = append(options, "proto=tcp")
	}
	return append([]string{to}, options...), nil
}

// source returns the option for who the client is.
func (a *danteAddr) source() ([]string, error) {
	w := a.word
	addr, mask, _ := strings.Cut(w, "/")
	switch {
	case w == "0/0":
		return nil, nil
	case len(a.port) > 0:
		return nil, fmt.Errorf("from: ports of clients cannot be told apart")
	case isName(w) || strings.HasPrefix(w, "."):
		return nil, fmt.Errorf("from: %s is not an address", w)
	case isQuad(mask):
		for bits := range 33 {
			if dottedMask(bits) == mask {
				return []string{"src=" + addr + "/" + strconv.Itoa(bits)}, nil
			}
		}
		return nil, fmt.Errorf("from: mask %s is not contiguous", mask)
	}
	return []string{"src=" + w}, nil
}

// danteOperators are Dante's words for those of the language.
var danteOperators = map[string]string{
	"eq": "eq", "=": "eq", "ne": "ne", "neq": "ne", "!=": "ne", "ge": "ge", ">=": "ge", "le": "le", "<=": "le", "gt": "gt", ">": "gt", "lt": "lt", "<": "lt",
}

// ports returns the ports of the destination.
func (a *danteAddr) ports() ([]string, error) {
	switch p := a.port; {
	case len(p) == 0:
		return nil, nil
	case len(p) == 2 && danteOperators[p[0]] != "":
		return []string{danteOperators[p[0]], p[1]}, nil
	case len(p) == 3 && p[1] == "-":
		return []string{p[0] + "-" + p[2]}, nil
	case len(p) == 1 && strings.Contains(p[0], "-"):
		return []string{p[0]}, nil
	case len(p) == 1:
		return []string{"eq", p[0]}, nil
	}
	return nil, fmt.Errorf("port %s cannot be read", strings.Join(a.port, " "))
}
