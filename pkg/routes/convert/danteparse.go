package convert

import (
	"fmt"
	"slices"
	"strings"
)

// danteFile is a socks.conf taken apart.
type danteFile struct {
	settings []danteSetting
	routes   []danteRoute
	wrong    []danteWrong
	server   int // the line by which it is a server's file; 0: it is not
}

type danteSetting struct {
	source
	name, value string
}

type danteWrong struct {
	source
	why string
}

// danteRoute is a block "route { … }".
type danteRoute struct {
	source
	from, to, via danteAddr
	options       map[string][]string
}

// danteAddr is an address with what stands behind "port".
type danteAddr struct {
	word string
	port []string
}

// danteToken is a word with its line.
type danteToken struct {
	text string
	line int
}

// danteTokens splits a text. Blanks around colons are free, braces stand alone,
// and # begins a comment anywhere.
func danteTokens(text string) (list []danteToken) {
	for i, line := range strings.Split(text, "\n") {
		line, _, _ = strings.Cut(line, "#")
		line = strings.NewReplacer("{", " { ", "}", " } ").Replace(line)
		for _, w := range strings.Fields(line) {
			list = append(list, danteToken{w, i + 1})
		}
	}
	return list
}

// danteServer are settings that only a server has.
var danteServer = []string{"internal", "external", "clientmethod", "socksmethod", "user.privileged", "user.unprivileged", "user.notprivileged"}

// parseDante takes a file apart. What it cannot read it skips to the next line
// or the end of the block, and says so.
func parseDante(text string) *danteFile {
	f := &danteFile{}
	tokens := danteTokens(text)
	originals := strings.Split(text, "\n")
	for len(tokens) > 0 {
		t := tokens[0]
		s := source{t.line, strings.TrimSpace(originals[t.line-1])}
		word := strings.ToLower(t.text)
		switch {
		case word == "route":
			end := slices.IndexFunc(tokens, func(t danteToken) bool { return t.text == "}" })
			if len(tokens) < 2 || tokens[1].text != "{" || end < 0 {
				f.wrong = append(f.wrong, danteWrong{s, "a route is route { from: … to: … via: … }"})
				tokens = nextLine(tokens)
				continue
			}
			var words []string
			for _, t := range tokens[:end+1] {
				words = append(words, t.text)
			}
			s.text = strings.Join(words, " ")
			if r, err := parseRoute(s, tokens[2:end]); err != nil {
				f.wrong = append(f.wrong, danteWrong{s, err.Error()})
			} else {
				f.routes = append(f.routes, r)
			}
			tokens = tokens[end+1:]
		case slices.Contains([]string{"client", "socks", "pass", "block", "hostid"}, word):
			if f.server == 0 {
				f.server = t.line
			}
			tokens = tokens[1:]
		default:
			name, values, rest := setting(tokens)
			if name == "" {
				f.wrong = append(f.wrong, danteWrong{s, fmt.Sprintf("%q is not read: a file is settings (NAME: VALUE) and route { … }%s", t.text, looksLike([]string{t.text}))})
				tokens = nextLine(tokens)
				continue
			}
			if slices.Contains(danteServer, name) && f.server == 0 {
				f.server = t.line
			}
			f.settings = append(f.settings, danteSetting{s, name, strings.Join(values, " ")})
			tokens = rest
		}
	}
	return f
}

// nextLine skips the rest of a line.
func nextLine(tokens []danteToken) []danteToken {
	i := slices.IndexFunc(tokens, func(t danteToken) bool { return t.line != tokens[0].line })
	if i < 0 {
		return nil
	}
	return tokens[i:]
}

// setting reads "NAME: VALUE…", up to the end of the line. Name is empty if
// there is no colon.
func setting(tokens []danteToken) (name string, values []string, rest []danteToken) {
	rest = nextLine(tokens)
	words := tokens[:len(tokens)-len(rest)]
	name, value, ok := strings.Cut(words[0].text, ":")
	words = words[1:]
	if !ok {
		if len(words) == 0 || !strings.HasPrefix(words[0].text, ":") {
			return "", nil, rest
		}
		value = words[0].text[1:]
		words = words[1:]
	}
	if value != "" {
		values = append(values, value)
	}
	for _, w := range words {
		values = append(values, w.text)
	}
	return strings.ToLower(name), values, rest
}

// routeKeys are the words with a colon inside a route.
var routeKeys = []string{
	"from", "to", "via", "command", "protocol", "proxyprotocol", "method", "socksmethod", "gssapi.servicename", "gssapi.enctype",
	"gssapi.keytab", "clientcompatibility", "extension",
}

// parseRoute reads what stands in the braces.
func parseRoute(s source, tokens []danteToken) (danteRoute, error) {
	r := danteRoute{source: s, options: map[string][]string{}}
	key := ""
	for i := 0; i < len(tokens); i++ {
		w := tokens[i].text
		name, value, colon := strings.Cut(w, ":")
		if !colon && i+1 < len(tokens) && strings.HasPrefix(tokens[i+1].text, ":") && slices.Contains(routeKeys, strings.ToLower(w)) {
			name, value, colon = w, tokens[i+1].text[1:], true
			i++
		}
		if name = strings.ToLower(name); colon && slices.Contains(routeKeys, name) {
			key = name
			r.options[key] = append(r.options[key], []string{}...)
			if w = value; w == "" {
				continue
			}
		}
		if key == "" {
			return r, fmt.Errorf("%q stands before the first word with a colon; there are %s", w, strings.Join(routeKeys, ", "))
		}
		r.options[key] = append(r.options[key], w)
	}
	for key, to := range map[string]*danteAddr{"from": &r.from, "to": &r.to, "via": &r.via} {
		words := r.options[key]
		if len(words) == 0 {
			return r, fmt.Errorf("the route has no %q", key+":")
		}
		to.word = strings.ToLower(words[0])
		if len(words) > 1 {
			if !strings.EqualFold(words[1], "port") || len(words) == 2 {
				return r, fmt.Errorf("%s: %q is too much behind %s", key, strings.Join(words[1:], " "), words[0])
			}
			to.port = splitOperator(words[2:])
		}
	}
	return r, nil
}

// splitOperator parts an operator from its port where they stand together, as
// =80, and the other way round.
func splitOperator(words []string) []string {
	if len(words) == 1 {
		n := strings.IndexFunc(words[0], func(r rune) bool { return !strings.ContainsRune("=<>!", r) })
		if n > 0 {
			return []string{words[0][:n], words[0][n:]}
		}
	}
	return words
}
