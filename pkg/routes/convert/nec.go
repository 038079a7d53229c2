package convert

import (
	"fmt"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// necServer are the first words of lines that only a server's file has.
var necServer = []string{"ban", "auth", "interface", "permit", "deny"}

// nec reads a libsocks5.conf. Lines are
//
//	socks5|socks4|noproxy COMMANDS HOST PORT [USERS [SERVERS]]
//	set VARIABLE VALUE
func (b *builder) nec(text string) {
	type line struct {
		source
		words []string
	}
	var all []line
	var modes, names []string // where names are resolved, and which names rules name
	credential := ""          // for all servers, as the variables were
	server := false
	lines(text, func(s source, words []string) {
		if strings.Contains(strings.ToUpper(s.text), "PASSW") && words[0][0] == '#' {
			b.leaveOut(s, "a comment that may hold a password")
			return
		}
		if b.commented(s) {
			return
		}
		word := strings.ToLower(words[0])
		server = server || slices.Contains(necServer, word)
		if word == "set" {
			s.text = "" // it may hold a password
			if len(words) > 1 {
				modes = append(modes, strings.ToUpper(words[1]))
			}
		}
		all = append(all, line{s, words})
		switch {
		case word == "set":
		case len(words) < 3 || !isName(words[2]) || strings.Contains(words[2], "/"):
		case words[2][0] == '.':
			names = append(names, "*"+words[2])
		default:
			names = append(names, words[2])
		}
	})
	if server {
		for _, l := range all {
			b.refuse(l.source, "the file is that of a server (socks5.conf); its lines are not a client's matter")
		}
		b.add("DEFAULT DENY", "nothing was said by the file")
		return
	}
	switch {
	case slices.Contains(modes, "SOCKS5_FAKEALLHOSTS"):
		b.add("RESOLVE remote *", "SOCKS5_FAKEALLHOSTS: servers resolve all names")
	case slices.Contains(modes, "SOCKS5_LOCALDNSONLY"):
		b.add("RESOLVE local *", "SOCKS5_LOCALDNSONLY: no name is sent to a server, so rules for names cannot match")
	default:
		slices.Sort(names)
		for _, n := range slices.Compact(names) {
			b.add("RESOLVE remote "+n, "a name with a line of its own is decided by it")
		}
		b.add("RESOLVE local-then-remote *", "a name that is not known here is sent to a server, as the library did")
	}
	if slices.Contains(modes, "SOCKS5_USER") || slices.Contains(modes, "SOCKS5_PASSWD") {
		credential = "nec"
	}
	for _, l := range all {
		b.necLine(l.source, l.words, credential)
	}
	b.add("DEFAULT DIRECT", "what no line matches this client connected to directly")
}

func (b *builder) necLine(s source, words []string, credential string) {
	word := strings.ToLower(words[0])
	action := map[string]string{"socks5": "SOCKD5", "socks4": "SOCKD4", "noproxy": "DIRECT"}[word]
	refuse := b.refuse
	if strings.HasPrefix(word, "noproxy") {
		refuse = b.dismiss
	}
	switch {
	case word == "set":
		b.necVariable(s, words)
		return
	case slices.Contains([]string{"socks5-", "socks4-", "noproxy-"}, word):
		refuse(s, "a blank is missing: write %s -", strings.TrimSuffix(words[0], "-"))
		return
	case action == "":
		b.refuse(s, "%q is no keyword of this format%s", words[0], looksLike(words))
		return
	case len(words) < 4:
		refuse(s, "a line is KEYWORD COMMANDS HOST PORT [USERS [SERVERS]]; %d fields are missing", 4-len(words))
		return
	}
	host, hostNote, err := necHost(words[2])
	if err != nil {
		refuse(s, "%v", err)
		return
	}
	port, err := necPort(words[3])
	if err != nil {
		refuse(s, "%v", err)
		return
	}
	options, commandNote, err := necCommands(words[1])
	if err != nil {
		b.dismiss(s, "%v", err)
		return
	}
	about := slices.Concat(host, port, options)
	how := slices.DeleteFunc([]string{hostNote, commandNote}, func(n string) bool { return n == "" })
	users, servers := "-", "-"
	if len(words) > 4 {
		users = words[4]
	}
	if len(words) > 5 {
		servers = words[5]
	}
	why := ""
	switch {
	case len(words) > 6:
		why = fmt.Sprintf("%q is too much", strings.Join(words[6:], " "))
	case action == "DIRECT":
	case servers == "-" && len(words) == 5 && strings.Count(users, ".") >= 3:
		why = fmt.Sprintf("%s stands where users do, the servers are the sixth field: write %s", users, strings.Join(append(slices.Clone(words[:4]), "-", users), " "))
	case servers == "-":
		why = "no server is named; it was that of SOCKS5_SERVER: write it as the sixth field"
	}
	switch {
	case why != "" && action == "DIRECT":
		b.dismiss(s, "%s", why)
		return
	case why != "":
		b.deny(s, about, "%s", why)
		return
	}
	out := []string{action}
	if action != "DIRECT" {
		out = append(out, "@="+b.necServers(s, servers, credential))
	} else if servers != "-" {
		how = append(how, "noproxy needs no servers")
	}
	if users != "-" {
		out = append(out, "*="+users)
	}
	b.write(s, strings.Join(slices.Concat(out, about), " "), strings.Join(how, "; "))
}

// necServers gives each server of a list its SERVER line, if there is a
// credential for it.
func (b *builder) necServers(s source, list, credential string) string {
	if credential == "" {
		return list
	}
	names := strings.Split(list, ",")
	for i, at := range names {
		names[i] = b.server(source{line: s.line}, strings.ReplaceAll(at, ":", "-"), at, "", credential)
	}
	return strings.Join(names, ",")
}

// necVariable tells of a line set that was not read for the head.
func (b *builder) necVariable(s source, words []string) {
	name := ""
	if len(words) > 1 {
		name = strings.ToUpper(words[1])
	}
	switch name {
	case "SOCKS5_FAKEALLHOSTS", "SOCKS5_LOCALDNSONLY": // at the head
	case "SOCKS5_USER", "SOCKS5_PASSWD":
		b.leaveOut(s, "user name and password go into credentials.toml, and the servers have credential=")
	default:
		b.leaveOut(s, "the variable has no meaning here")
	}
}

// necHost reads a pattern of hosts.
func necHost(w string) (to []string, how string, err error) {
	addr, mask, hasMask := strings.Cut(w, "/")
	octets := strings.Split(strings.TrimSuffix(w, "."), ".")
	switch {
	case w == "-":
		return []string{"*"}, "", nil
	case hasMask && mask == "a":
		return []string{"*"}, "", nil
	case hasMask && mask == "n":
		a, err := netip.ParseAddr(addr)
		if err != nil || !a.Is4() {
			return nil, "", fmt.Errorf("%q is not an address with /n", w)
		}
		bits := 24
		switch first := a.As4()[0]; {
		case first < 128:
			bits = 8
		case first < 192:
			bits = 16
		}
		return []string{netip.PrefixFrom(a, bits).Masked().String()}, fmt.Sprintf("/n is the network of its class, /%d", bits), nil
	case hasMask && mask == "s":
		return nil, "", fmt.Errorf("%q: /s was the subnet of the host that the file is on; write its prefix length", w)
	case hasMask && mask == "h":
		return []string{addr}, "", nil
	case hasMask && isQuad(mask):
		return []string{addr, mask}, "", nil
	case hasMask:
		return []string{w}, "", nil
	case strings.HasSuffix(w, ".") && len(octets) < 4 && strings.Trim(w, "0123456789.") == "":
		full := strings.Join(append(slices.Clone(octets), slices.Repeat([]string{"0"}, 4-len(octets))...), ".")
		return []string{full + "/" + strconv.Itoa(8*len(octets))}, "", nil
	case strings.HasPrefix(w, "."):
		return []string{"*" + w}, "", nil
	}
	return []string{w}, "", nil
}

// necPort reads a pattern of ports: a number, a service, or a range whose ends
// are each in or out of it.
func necPort(w string) ([]string, error) {
	if w == "-" {
		return nil, nil
	}
	if !strings.ContainsAny(w, "[](),") {
		return []string{"eq", w}, nil
	}
	wrong := fmt.Errorf("%q is not a range of ports, as [1024,2000)", w)
	if len(w) < 5 {
		return nil, wrong
	}
	from, to, ok := strings.Cut(w[1:len(w)-1], ",")
	a, err1 := strconv.ParseUint(from, 10, 16)
	z, err2 := strconv.ParseUint(to, 10, 16)
	switch {
	case !ok || err1 != nil || err2 != nil || !strings.ContainsRune("[(", rune(w[0])) || !strings.ContainsRune("])", rune(w[len(w)-1])):
		return nil, wrong
	}
	if w[0] == '(' {
		a++
	}
	if w[len(w)-1] == ')' {
		z--
	}
	if a > z || z > 65535 {
		return nil, fmt.Errorf("%q holds no port", w)
	}
	return []string{fmt.Sprintf("%d-%d", max(a, 1), z)}, nil
}

// necCommands reads what a client may do: c connect, b bind, u UDP, p ping,
// t traceroute.
func necCommands(w string) (options []string, how string, err error) {
	if w == "-" {
		return nil, "", nil
	}
	var tcp, udp bool
	var lost []string
	for _, c := range strings.Split(w, ",") {
		switch c {
		case "c":
			tcp = true
		case "u":
			udp = true
		case "b":
			lost = append(lost, "BIND")
		case "p", "t":
			lost = append(lost, map[string]string{"p": "ping", "t": "traceroute"}[c])
		default:
			return nil, "", fmt.Errorf("%q: a command is c, b, u, p or t", w)
		}
	}
	if lost != nil {
		how = strings.Join(lost, " and ") + " cannot be carried"
	}
	switch {
	case tcp && udp:
	case tcp:
		options = []string{"proto=tcp"}
	case udp:
		options = []string{"proto=udp"}
	default:
		return nil, "", fmt.Errorf("%q: %s", w, how)
	}
	return options, how, nil
}
