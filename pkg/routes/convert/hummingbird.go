package convert

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// hummingbird reads a socks.cnf. Its language is ours but for a few slips that
// its own client lets pass.
func (b *builder) hummingbird(text string) {
	lines(text, func(s source, words []string) {
		if !b.commented(s) {
			b.classic(s, words, nil)
		}
	})
	b.add("DEFAULT DENY", "what no line matches is denied")
}

// cstc reads a socks.conf(5) of SOCKS version 4, which knows one protocol and
// resolves all names on the client.
func (b *builder) cstc(text string) {
	var names []string
	lines(text, func(s source, words []string) {
		words = afterUsers(words[1:])
		if s.text[0] != '#' && len(words) > 0 && isName(words[0]) {
			names = append(names, words[0])
		}
	})
	slices.Sort(names)
	for _, n := range slices.Compact(names) {
		b.add("RESOLVE remote "+n, "a name that a line names is decided by it")
	}
	b.add("RESOLVE local *", "a version 4 client resolves names itself")
	lines(text, func(s source, words []string) {
		if !b.commented(s) {
			b.classic(s, words, map[string]string{"DENY": "DENY", "DIRECT": "DIRECT", "SOCKD": "SOCKD4"})
		}
	})
	b.add("DEFAULT DENY", "what no line matches is denied")
}

// classicWords are the first words of lines of socks.cnf.
var classicWords = []string{"DENY", "DIRECT", "SOCKD", "SOCKD4", "SOCKD5", "BALANCE", "PROXY_NAME", "BIND-MODULE", "EXCLUDE-MODULE", "GSS"}

// classic reads a line of either kind. Actions are what the keywords mean; nil:
// themselves.
func (b *builder) classic(s source, words []string, actions map[string]string) {
	var how []string
	word := strings.ToUpper(words[0])
	switch {
	case actions == nil && !slices.Contains(classicWords, word), actions != nil && actions[word] == "":
		b.refuse(s, "%q is no keyword of this format%s", words[0], looksLike(words))
		return
	case actions != nil && actions[word] != word:
		how = append(how, fmt.Sprintf("%s of this format is %s", words[0], actions[word]))
		word = actions[word]
	}
	switch word {
	case "BALANCE", "PROXY_NAME":
		b.write(s, strings.Join(append([]string{word}, words[1:]...), " "), "")
		return
	case "BIND-MODULE", "EXCLUDE-MODULE":
		b.write(s, strings.Join(append([]string{word}, words[1:]...), " "), "it names programs of Windows")
		return
	case "GSS":
		b.refuse(s, "GSSAPI is not built in; servers are asked without it, or by user name and password")
		return
	}
	rest := afterUsers(words[1:])
	out := append([]string{word}, words[1:len(words)-len(rest)]...)
	switch {
	case len(rest) == 0:
		b.refuse(s, "the destination is missing")
		return
	case actions != nil && word == "SOCKD4" && isName(rest[0]):
		b.refuse(s, "version 4 is sent addresses alone, so %s is resolved here and then its address decides; write a line for that", rest[0])
		return
	}
	if i := slices.Index(rest, ":"); i > 0 {
		how = append(how, "the shell command is left out, nothing is run")
		rest = rest[:i]
	}
	to, note := destination(rest)
	if note != "" {
		how = append(how, note)
	}
	out, rest = append(out, to...), rest[min(len(rest), maskLength(rest)):]
	if len(rest) == 1 && strings.Trim(rest[0], "0123456789") == "" {
		how = append(how, "a port without an operator is taken as eq")
		rest = []string{"eq", rest[0]}
	}
	b.write(s, strings.Join(append(out, rest...), " "), strings.Join(how, "; "))
	if strings.HasPrefix(to[0], "0.0.0.0") && word != "SOCKD4" {
		b.note(s.line, "by 0.0.0.0 no IPv6 address is matched; write ::/0 for these in a line of its own")
	}
}

// afterUsers are the words behind those for servers and users.
func afterUsers(words []string) []string {
	for len(words) > 0 && (strings.HasPrefix(words[0], "@=") || strings.HasPrefix(words[0], "*=")) {
		words = words[1:]
	}
	return words
}

// isName tells whether a destination is a name, or a pattern of names.
func isName(w string) bool { return strings.ContainsFunc(w, isLetter) && !strings.Contains(w, ":") }

// maskLength is how many words the destination takes: two with a mask.
func maskLength(words []string) int {
	if len(words) > 1 && isQuad(words[1]) {
		return 2
	}
	return 1
}

// isQuad tells whether a word is meant as an address of four numbers.
func isQuad(w string) bool {
	return strings.Count(strings.TrimSuffix(w, "."), ".") == 3 && strings.Trim(w, "0123456789.") == ""
}

// destination returns an address with its mask, or a name, as the language
// writes it, and what had to be changed.
func destination(words []string) (to []string, how string) {
	to = slices.Clone(words[:maskLength(words)])
	for i, w := range to {
		if isQuad(w) && strings.HasSuffix(w, ".") {
			to[i] = strings.TrimSuffix(w, ".")
			how = fmt.Sprintf("%q has a dot too much", w)
		}
	}
	if len(to) < 2 {
		return to, how
	}
	if p, err := netip.ParsePrefix(to[0]); err == nil && p.Addr().Is4() && to[1] == dottedMask(p.Bits()) {
		return to[:1], fmt.Sprintf("%s %s says its mask twice", to[0], to[1])
	}
	if isName(to[0]) {
		return to[:1], "a name takes no mask"
	}
	return to, how
}

func isLetter(r rune) bool { return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' }

// dottedMask is the mask of a prefix length, as 255.255.255.0.
func dottedMask(bits int) string {
	v := uint32(uint64(0xffffffff) << (32 - bits))
	return netip.AddrFrom4([4]byte{byte(v >> 24), byte(v >> 16), byte(v >> 8), byte(v)}).String()
}

// looksLike says what file a line may come from instead.
func looksLike(words []string) string {
	first := strings.ToLower(strings.TrimSuffix(words[0], ":"))
	switch {
	case slices.Contains([]string{"socks4", "socks5", "noproxy", "permit", "auth", "ban", "interface", "set"}, first):
		return "; the file looks like one of NEC: --from nec"
	case slices.Contains([]string{"route", "resolveprotocol", "internal", "external", "method", "logoutput", "clientmethod", "socksmethod"}, first):
		return "; the file looks like one of Dante: --from dante"
	case slices.Contains(classicWords, strings.ToUpper(first)):
		return "; the file looks like one of Hummingbird: --from hummingbird"
	case slices.Contains([]string{"strict_chain", "dynamic_chain", "random_chain", "[proxylist]", "proxy_dns", "localnet"}, first):
		return "; the file looks like one of proxychains: --from proxychains"
	case slices.Contains([]string{"local", "path", "server", "server_type"}, first):
		return "; the file looks like one of tsocks: --from tsocks"
	case slices.Contains([]string{"base", "redsocks", "redudp"}, first):
		return "; the file looks like one of redsocks: --from redsocks"
	}
	return ""
}
