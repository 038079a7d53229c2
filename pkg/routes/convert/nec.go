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
	server := false
	lines(text, func(s source, words []string) {
		if b.commented(s) {
			return
		}
		all = append(all, line{s, words})
		word := strings.ToLower(words[0])
		server = server || slices.Contains(necServer, word)
		if word == "set" && len(words) > 1 {
			modes = append(modes, strings.ToUpper(words[1]))
		}
		switch {
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
	for _, l := range all {
		b.necLine(l.source, l.words)
	}
	b.add("DEFAULT DIRECT", "what no line matches this client connected to directly")
}

func (b *builder) necLine(s source, words []string) {
	word := strings.ToLower(words[0])
	action := map[string]string{"socks5": "SOCKD5", "socks4": "SOCKD4", "noproxy": "DIRECT"}[word]
	switch {
	case word == "set":
		if len(words) > 1 && slices.Contains([]string{"SOCKS5_FAKEALLHOSTS", "SOCKS5_LOCALDNSONLY"}, strings.ToUpper(words[1])) {
			return // at the head
		}
		b.leaveOut(s, "the variable has no meaning here")
		return
	case strings.HasSuffix(word, "-") && slices.Contains([]string{"socks5-", "socks4-", "noproxy-"}, word):
		b.refuse(s, "a blank is missing: write %s -", strings.TrimSuffix(words[0], "-"))
		return
	case action == "":
		b.refuse(s, "%q is no keyword of this format%s", words[0], looksLike(words))
		return
	case len(words) < 4:
		b.refuse(s, "a line is KEYWORD COMMANDS HOST PORT [USERS [SERVERS]]; %d fields are missing", 4-len(words))
		return
	case len(words) > 6:
		b.refuse(s, "%q is too much", strings.Join(words[6:], " "))
		return
	}
	var how []string
	out := []string{action}
	users, servers := "-", "-"
	if len(words) > 4 {
		users = words[4]
	}
	if len(words) > 5 {
		servers = words[5]
	}
	if action != "DIRECT" {
		if servers == "-" && len(words) == 5 && strings.Count(users, ".") >= 3 {
			b.refuse(s, "%s stands where users do, the servers are the sixth field: write %s", users, strings.Join(append(slices.Clone(words[:4]), "-", users), " "))
			return
		}
		if servers == "-" {
			b.refuse(s, "no server is named; it was that of SOCKS5_SERVER: write it as the sixth field")
			return
		}
		out = append(out, "@="+servers)
	} else if servers != "-" {
		how = append(how, "noproxy needs no servers")
	}
	if users != "-" {
		out = append(out, "*="+users)
	}
	host, note, err := necHost(words[2])
	if err != nil {
		b.refuse(s, "%v", err)
		return
	}
	if note != "" {
		how = append(how, note)
	}
	port, err := necPort(words[3])
	if err != nil {
		b.refuse(s, "%v", err)
		return
	}
	options, note, err := necCommands(words[1])
	if err != nil {
		b.refuse(s, "%v", err)
		return
	}
	if note != "" {
		how = append(how, note)
	}
	b.write(s, strings.Join(slices.Concat(out, host, port, options), " "), strings.Join(how, "; "))
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
