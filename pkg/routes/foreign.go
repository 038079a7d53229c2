package routes

import (
	"fmt"
	"slices"
	"strings"
)

// foreign are first words of the files of other programs, by the name that
// `tproxyd convert` has for their format.
var foreign = []struct {
	format string
	words  []string
}{
	{"nec", []string{"socks4", "socks5", "noproxy", "permit", "ban", "auth", "set", "interface"}},
	{"dante", []string{"route", "internal:", "external:", "method:", "clientmethod:", "socksmethod:", "logoutput:", "resolveprotocol:", "client", "socks", "pass", "block", "from:", "to:", "via:"}},
	{"proxychains", []string{"strict_chain", "dynamic_chain", "random_chain", "proxy_dns", "[proxylist]", "localnet"}},
	{"tsocks", []string{"local", "path", "server_type", "server_port", "reaches"}},
	{"redsocks", []string{"base", "redsocks", "redudp", "dnstc"}},
}

// unknown reports a first word that is none of words.
func (l *line) unknown(t token, words []string) {
	msg := fmt.Sprintf("unknown directive %q", t.text)
	if w := closest(t.text, words); w != "" {
		msg += fmt.Sprintf("; did you mean %s?", w)
	}
	for _, f := range foreign {
		if slices.Contains(f.words, strings.ToLower(t.text)) {
			of := f.format
			if of == "nec" || of == "dante" { // which have words in common
				of = "NEC or Dante"
			}
			msg += fmt.Sprintf("; this looks like a %s file: tproxyd convert --from %s makes rules of it", of, f.format)
			break
		}
	}
	l.errorf(t, "E01", "%s", msg)
}

// commonServices are names of services(5) that are often mistyped.
var commonServices = []string{"domain", "ftp", "ftps", "http", "https", "imap", "imaps", "ldap", "ldaps", "ntp", "pop3", "pop3s", "smtp", "snmp", "socks", "ssh", "submission", "telnet"}

// meant asks whether a word was meant, if one is near.
func meant(text string, words []string) string {
	if w := closest(text, words); w != "" {
		return fmt.Sprintf("; did you mean %s?", w)
	}
	return ""
}

// notAddress says why a word that looks like an address is none, and what to
// write.
func notAddress(text string) string {
	octets := strings.Split(text, ".")
	if strings.Trim(text, "0123456789.") != "" || len(octets) < 2 {
		return ""
	}
	for i, o := range octets {
		switch {
		case o == "" && i == 4 && len(octets) == 5:
			return "; there is a dot too many: " + strings.TrimSuffix(text, ".")
		case o == "":
			return ""
		case len(o) > 1 && o[0] == '0':
			return fmt.Sprintf("; write %s, without zeros in front", strings.TrimLeft(o[:len(o)-1], "0")+o[len(o)-1:])
		case len(o) > 3 || len(o) == 3 && o > "255":
			return fmt.Sprintf("; %s is more than 255", o)
		}
	}
	if len(octets) != 4 {
		return fmt.Sprintf("; it has %d numbers, and an IPv4 address four", len(octets))
	}
	return ""
}

// unused reports what is defined and nowhere used. Where a line has an error it is
// not known what it would have used.
func (p *parser) unused() {
	if len(p.diags.wrong) > 0 {
		return
	}
	servers := map[*Server]bool{}
	for _, chains := range append([][]Chain{p.proxyName}, p.ruleServers()...) {
		for _, c := range chains {
			for _, s := range c {
				servers[s] = true
			}
		}
	}
	for _, s := range p.servers {
		if p.defined[s.Name] == s && !servers[s] {
			p.diags.current = p.numbers[s]
			p.diags.add(s.File, token{line: s.Line, col: s.Col}, Warning, "W05", "SERVER %s is used by no rule", s.Name)
		}
	}
	for name, l := range p.lists {
		if !l.used {
			p.diags.current = l.number
			p.diags.add(l.file, token{line: l.line, col: l.col}, Warning, "W05", "LIST %s is used by no rule", name)
		}
	}
}

func (p *parser) ruleServers() (all [][]Chain) {
	for _, r := range p.rules {
		all = append(all, r.Servers)
	}
	return all
}
