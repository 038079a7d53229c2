package convert

import (
	"cmp"
	"errors"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// Comments and refused lines of these files are not kept whole, since they may
// hold passwords.

// proxychains reads a proxychains.conf.
func (b *builder) proxychains(text string) {
	mode, list := "strict_chain", false
	modeAt := source{}
	length := "2"
	resolve := "local"
	var hops []proxy
	broken := 0 // the line of the first server that was refused; 0: none was
	lines(text, func(s source, words []string) {
		word := strings.ToLower(words[0])
		whole := s.text
		if s.text = ""; !list { // what follows the first word may be a password
			s.text = words[0]
		}
		switch {
		case word[0] == '#':
		case word == "[proxylist]":
			list = true
		case list:
			p, err := readProxy(words)
			p.source = s
			if err != nil {
				b.refuse(p.source, "%v", err)
				broken = cmp.Or(broken, s.line)
				return
			}
			hops = append(hops, p)
		case slices.Contains([]string{"strict_chain", "dynamic_chain", "random_chain", "round_robin_chain"}, word):
			mode, modeAt = word, s
		case word == "chain_len":
			length = strings.TrimSpace(strings.TrimPrefix(strings.Join(words[1:], ""), "="))
		case word == "proxy_dns", strings.HasPrefix(word, "proxy_dns_"):
			resolve = "remote"
		case word == "localnet" && len(words) > 1:
			b.localnet(source{s.line, whole}, words[1])
		case word == "dnat":
			b.refuse(s, "a destination cannot be exchanged for another one")
		case slices.Contains([]string{"quiet_mode", "remote_dns_subnet", "tcp_read_time_out"}, word):
			b.leaveOut(s, "it has no meaning here")
		case word == "tcp_connect_time_out" && len(words) > 1:
			b.write(s, "TIMEOUT connect="+words[1]+"ms", "")
		default:
			b.refuse(s, "%q is not read%s", words[0], looksLike(words))
		}
	})
	b.add("RESOLVE "+resolve+" *", "proxy_dns "+map[string]string{"local": "is not set: names are resolved here", "remote": "is set: the last server resolves names"}[resolve])
	switch {
	case broken > 0 && mode != "random_chain" && mode != "round_robin_chain":
		// Without it flows would go by a way that was never meant.
		b.refuse(source{line: broken}, "a chain is not made without one of its servers")
	case len(hops) > 0:
		b.chain(mode, length, modeAt, hops, resolve == "remote")
	}
	b.add("DEFAULT DENY", "nothing is left: the chain is for everything")
	b.note(0, "UDP, which the library lets pass beside the chain, goes through a single SOCKD5 server, and is refused otherwise")
}

// localnet writes what is reached directly: ADDRESS[:PORT]/MASK.
func (b *builder) localnet(s source, word string) {
	addr, mask, ok := strings.Cut(word, "/")
	if !ok {
		b.refuse(s, "a network is ADDRESS[:PORT]/MASK")
		return
	}
	words := []string{"DIRECT"}
	port := ""
	if strings.HasPrefix(addr, "[") {
		addr, port, _ = strings.Cut(addr[1:], "]")
		port = strings.TrimPrefix(port, ":")
	} else if strings.Count(addr, ":") == 1 {
		addr, port, _ = strings.Cut(addr, ":")
	}
	if isQuad(mask) {
		words = append(words, addr, mask)
	} else {
		words = append(words, addr+"/"+mask)
	}
	if port != "" {
		words = append(words, "eq", port)
	}
	b.write(s, strings.Join(words, " "), "")
}

// proxy is a line of a list of servers.
type proxy struct {
	source
	kind, endpoint string
	secret         bool // it had a user name and password
}

// readProxy reads TYPE HOST PORT [USER PASSWORD].
func readProxy(words []string) (p proxy, err error) {
	if len(words) < 3 {
		return p, errors.New("a server is TYPE HOST PORT [USER PASSWORD]")
	}
	p.kind = strings.ToLower(words[0])
	if !slices.Contains([]string{"socks4", "socks5", "http"}, p.kind) {
		return p, errors.New("the type of a server is socks4, socks5 or http")
	}
	p.endpoint, err = endpoint(words[1], words[2])
	p.secret = len(words) > 3
	return p, err
}

// endpoint joins a host and a port as the language does.
func endpoint(host, port string) (string, error) {
	if n, err := strconv.ParseUint(port, 10, 16); err != nil || n == 0 {
		return "", errors.New("the port of the server is not a number from 1 to 65535")
	}
	if a, err := netip.ParseAddr(host); err == nil && a.Is6() {
		host = "[" + host + "]"
	}
	return host + ":" + port, nil
}

// chain writes the rule for everything.
func (b *builder) chain(mode, length string, at source, hops []proxy, remote bool) {
	separator, balance, how := ">", "", ""
	switch mode {
	case "dynamic_chain":
		how = "dynamic_chain leaves out servers that are down; here each of the chain is needed"
	case "random_chain", "round_robin_chain":
		if length != "1" {
			b.refuse(at, "%s with chain_len = %s: chains of servers that are drawn cannot be said; with chain_len = 1 they can", mode, length)
			return
		}
		separator, balance = ",", " balance="+map[string]string{"random_chain": "random", "round_robin_chain": "roundrobin"}[mode]
	}
	var names []string
	action := ""
	for i, h := range hops {
		kind := map[string]string{"socks5": "SOCKD5", "socks4": "SOCKD4", "http": "HTTP"}[h.kind]
		typ := h.kind
		if kind == "SOCKD4" && remote {
			kind, typ = "SOCKD4A", "socks4a"
		}
		if separator == "," && action != "" && kind != action {
			b.refuse(h.source, "servers of a list that one is drawn from speak one protocol; the first speaks %s", action)
			continue
		}
		action = kind
		credential := ""
		if h.secret {
			credential = "proxychains" + strconv.Itoa(i+1)
		}
		names = append(names, b.server(h.source, "proxy"+strconv.Itoa(i+1), h.endpoint, " type="+typ, credential))
	}
	b.add(action+" @="+strings.Join(names, separator)+" *"+balance, strings.TrimPrefix(how+"; "+mode, "; "))
}

// tsocks reads a tsocks.conf(5): local networks, paths with servers of their
// own, and the server for all else.
func (b *builder) tsocks(text string) {
	type server struct {
		host, port, kind string
		secret           bool
		reaches          []source
		at               source
	}
	general := &server{port: "1080", kind: "4"}
	in := general
	var paths []*server
	b.add("RESOLVE local *", "names are resolved by the client's own resolver")
	lines(text, func(s source, words []string) {
		line := strings.Join(words, " ")
		key, value, ok := strings.Cut(line, "=")
		key, value = strings.ToLower(strings.TrimSpace(key)), strings.TrimSpace(value)
		if s.text = key; !ok {
			s.text = "" // it may hold a password
		}
		switch {
		case line[0] == '#':
		case strings.ToLower(words[0]) == "path" && strings.HasSuffix(line, "{"):
			in = &server{port: "1080", kind: "4", at: s}
			paths = append(paths, in)
		case line == "}":
			in = general
		case !ok:
			b.refuse(s, "%q is not read%s", words[0], looksLike(words))
		case key == "local":
			b.localnet(s, value)
		case key == "reaches":
			in.reaches = append(in.reaches, source{s.line, value}) // no secret
		case key == "server":
			in.host, in.at = value, s
		case key == "server_port":
			in.port = value
		case key == "server_type":
			in.kind = value
		case key == "default_user", key == "default_pass":
			in.secret = true
		case key == "fallback" && strings.EqualFold(value, "yes"):
			b.refuse(s, "a flow does not go out directly when no server answers; it is refused")
		case key == "fallback":
			b.leaveOut(s, "it is always so here")
		default:
			b.refuse(s, "%q is not read%s", key, looksLike([]string{key}))
		}
	})
	name := func(i int, v *server) (action, server string, ok bool) {
		action = map[string]string{"4": "SOCKD4", "5": "SOCKD5"}[v.kind]
		e, err := endpoint(v.host, v.port)
		switch {
		case v.host == "":
			b.refuse(v.at, "no server is named")
			return "", "", false
		case action == "":
			b.refuse(v.at, "server_type is neither 4 nor 5")
			return "", "", false
		case err != nil:
			b.refuse(v.at, "%v", err)
			return "", "", false
		}
		if v.secret {
			return action, b.server(v.at, "server"+strconv.Itoa(i), e, "", "tsocks"+strconv.Itoa(i)), true
		}
		return action, e, true
	}
	for i, p := range paths {
		action, server, ok := name(i+1, p)
		for _, r := range p.reaches {
			if !ok {
				b.refuse(r, "its path has no server")
				continue
			}
			addr, mask, _ := strings.Cut(r.text, "/")
			addr, ports, _ := strings.Cut(addr, ":")
			words := []string{action, "@=" + server, addr, mask}
			switch {
			case ports == "":
			case strings.Contains(ports, "-"):
				words = append(words, ports)
			default:
				words = append(words, "eq", ports)
			}
			b.write(r, strings.Join(words, " "), "")
		}
	}
	if general.host != "" || len(paths) == 0 {
		if action, server, ok := name(0, general); ok {
			b.write(general.at, action+" @="+server+" *", "")
		}
	}
	b.add("DEFAULT DENY", "nothing is left to the client's own network")
}

// redsocks reads a redsocks.conf: sections of settings. Which flows come to it
// the firewall decides, so all of them go to its server here.
func (b *builder) redsocks(text string) {
	b.add("RESOLVE remote *", "names are sent to the server; redsocks never sees one")
	var values map[string]string
	var begin source
	section := ""
	done := map[string]bool{}
	for i, line := range strings.Split(text, "\n") {
		line, _, _ = strings.Cut(line, "//")
		line, _, _ = strings.Cut(line, "#")
		for rest := strings.TrimSpace(line); rest != ""; rest = strings.TrimSpace(rest) {
			var part string
			part, rest = redsocksPart(rest)
			s := source{line: i + 1} // without its text, which may hold a password
			key, value, ok := strings.Cut(part, "=")
			switch {
			case part == "":
			case strings.HasSuffix(part, "{"):
				section, values, begin = strings.ToLower(strings.TrimSpace(strings.TrimSuffix(part, "{"))), map[string]string{}, s
			case part == "}":
				if section == "" {
					b.refuse(s, "no section is open")
					continue
				}
				b.redsocksSection(begin, section, values, done)
				section = ""
			case ok && section != "":
				values[strings.ToLower(strings.TrimSpace(key))] = strings.Trim(strings.TrimSpace(value), `"`)
			default:
				b.refuse(s, "it is not read; a file is SECTION { KEY = VALUE; }%s", looksLike(strings.Fields(part)[:1]))
			}
		}
	}
	if section != "" {
		b.refuse(begin, "the section has no end")
	}
	b.add("DEFAULT DENY", "what redsocks was not given its firewall rules let pass: write DIRECT rules for those networks above")
	b.note(0, "which flows come to it redsocks leaves to the firewall: networks that its rules let pass need DIRECT lines before the last rule")
}

// redsocksPart takes the first of what stands on a line: a section's name with
// its brace, a closing brace, or a setting without its semicolon.
func redsocksPart(line string) (part, rest string) {
	i := strings.IndexAny(line, ";{}")
	switch {
	case i < 0:
		return line, ""
	case line[i] == '{':
		return line[:i+1], line[i+1:]
	case line[i] == '}' && i == 0:
		return "}", line[1:]
	case line[i] == '}':
		return strings.TrimSpace(line[:i]), line[i:]
	}
	return strings.TrimSpace(line[:i]), line[i+1:]
}

func (b *builder) redsocksSection(s source, section string, v map[string]string, done map[string]bool) {
	switch section {
	case "base":
		b.leaveOut(s, "the section has no meaning here")
		return
	case "dnstc", "dnsu2t", "autoproxy":
		b.leaveOut(s, "DNS is answered here, or goes through the server")
		return
	case "redsocks", "redudp":
	default:
		b.refuse(s, "there is no section of this name in this format")
		return
	}
	action := map[string]string{"socks4": "SOCKD4", "socks5": "SOCKD5", "http-connect": "HTTP", "http-relay": "HTTP"}[strings.ToLower(v["type"])]
	options := " proto=tcp"
	if section == "redudp" {
		action, options = "SOCKD5", " proto=udp"
	}
	e, err := endpoint(v["ip"], v["port"])
	if v["relay"] != "" {
		e, err = v["relay"], nil
	}
	switch {
	case done[section]:
		b.refuse(s, "one section %s is for all flows; the firewall told which came to the others", section)
		return
	case action == "":
		b.refuse(s, "type is none of socks4, socks5, http-connect and http-relay")
		return
	case err != nil:
		b.refuse(s, "%v", err)
		return
	}
	done[section] = true
	server := e
	if v["login"] != "" || v["password"] != "" {
		server = b.server(s, section+"1", e, "", section)
	}
	b.write(s, action+" @="+server+" *"+options, "")
}
