package routes

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
)

// The catch-alls of both families.
var (
	all4 = netip.PrefixFrom(netip.IPv4Unspecified(), 0)
	all6 = netip.PrefixFrom(netip.IPv6Unspecified(), 0)
)

// destination reads the destination at t, and the mask that may follow it.
func (l *line) destination(t token) (d dest) {
	switch text := t.text; {
	case text == "*":
		return dest{prefixes: []netip.Prefix{all4, all6}, anyName: true}
	case text[0] == '$':
		if known := l.lists[text[1:]]; known != nil {
			known.used = true
			if d := known.dest; d.noName() && len(d.prefixes) == 0 {
				l.warnf(t, "E22", "rule can never match: LIST %s is empty", text[1:])
			}
			d := known.dest
			d.list = known
			return d
		}
		l.errorf(t, "E12", "LIST %q is not defined%s", text[1:], meant(text[1:], slices.Collect(maps.Keys(l.lists))))
	case isAddressLike(text):
		d.prefixes = l.addresses(t)
		d.anyName = slices.ContainsFunc(d.prefixes, func(p netip.Prefix) bool { return p.Bits() == 0 }) // R3: any mask of length 0
	default:
		if name, suffix, ok := l.pattern(t, text); !ok {
		} else if suffix != "" {
			d.suffixes = l.names.list(suffix)
		} else {
			d.names = l.names.list(name)
		}
	}
	return d
}

// isAddressLike tells whether a word is meant as an address: it has nothing
// but digits and dots, or a colon, before a slash or a dash.
func isAddressLike(text string) bool {
	if strings.Contains(text, ":") {
		return true
	}
	head, _, _ := strings.Cut(text, "/")
	if from, to, isRange := strings.Cut(head, "-"); isRange && isAddressLike(from) && isAddressLike(to) {
		return true
	}
	return strings.Contains(head, ".") && strings.Trim(head, "0123456789.") == ""
}

// addresses reads an address with or without mask or prefix length, or a range.
func (l *line) addresses(t token) []netip.Prefix {
	if from, to, isRange := strings.Cut(t.text, "-"); isRange {
		a, errA := netip.ParseAddr(from)
		b, errB := netip.ParseAddr(to)
		if errA != nil || errB != nil || a.Is4() != b.Is4() || a.Zone()+b.Zone() != "" {
			l.errorf(t, "E03", "%q is not a range of addresses, as 10.0.0.1-10.0.0.9", t.text)
			return nil
		}
		if b.Less(a) {
			l.errorf(t, "E03", "the range %s is reversed", t.text)
			return nil
		}
		return prefixesOf(Range{From: a, To: b})
	}
	p, err := parsePrefix(t.text)
	if err != nil {
		l.errorf(t, "E03", "%v", err)
	}
	masked, hasMask := l.mask(t, p, err == nil)
	switch {
	case err != nil:
		return nil
	case hasMask:
		p = masked
	case p.Addr().Is4() && !strings.Contains(t.text, "/") && p.Addr().As4()[3] == 0:
		l.warnf(t, "E06", "mask missing for %s; taken as the host %s/32, but it looks like a network", t.text, t.text)
	}
	l.hostBits(t, p, t.text)
	return []netip.Prefix{p.Masked()}
}

// mask takes the dotted quad that may follow an IPv4 address; ok is false if
// there is none.
func (l *line) mask(t token, p netip.Prefix, valid bool) (masked netip.Prefix, ok bool) {
	if len(l.rest) == 0 || valid && !p.Addr().Is4() {
		return p, false
	}
	m := l.rest[0]
	if !strings.Contains(m.text, ".") || strings.Trim(m.text, "0123456789.") != "" {
		return p, false
	}
	l.word()
	a, err := netip.ParseAddr(m.text)
	if err != nil {
		l.errorf(m, "E05", "%q is not a mask%s", m.text, notAddress(m.text))
		return p, true
	}
	ones, contiguous := maskLen(a)
	if !contiguous {
		hint := ""
		if _, ok := maskLen(inverse(a)); ok {
			hint = fmt.Sprintf("; bits that are SET are compared, the opposite of Cisco; did you mean %s?", inverse(a))
		}
		l.errorf(m, "E05", "mask %s is not contiguous%s", m.text, hint)
		return p, true
	}
	if !valid {
		return p, false
	}
	if strings.Contains(t.text, "/") {
		if p.Bits() != ones {
			l.errorf(m, "E04", "a prefix length and a mask that contradict each other: %q; write one", t.text+" "+m.text)
			return p, true
		}
		l.warnf(m, "E04", "both a prefix length and a mask given: %q; one is enough", t.text+" "+m.text)
	}
	return netip.PrefixFrom(p.Addr(), ones), true
}

// maskLen returns how many leading bits of a mask are set, and whether no
// others are.
func maskLen(m netip.Addr) (ones int, contiguous bool) {
	b := m.As4()
	v := uint32(b[0])<<24 | uint32(b[1])<<16 | uint32(b[2])<<8 | uint32(b[3])
	for v&(1<<31) != 0 {
		ones++
		v <<= 1
	}
	return ones, v == 0
}

func inverse(m netip.Addr) netip.Addr {
	b := m.As4()
	for i := range b {
		b[i] = ^b[i]
	}
	return netip.AddrFrom4(b)
}

// hostBits reports an address that is not the first of its network.
func (l *line) hostBits(t token, p netip.Prefix, text string) {
	if p != p.Masked() {
		l.warnf(t, "E07", "address %s has bits outside its mask /%d; masked to %s", p.Addr(), p.Bits(), p.Masked().Addr())
	}
}

// parsePrefix reads an address with or without a prefix length. An IPv4
// address that is written as an IPv6 one is an IPv4 address.
func parsePrefix(text string) (netip.Prefix, error) {
	head, length, hasLength := strings.Cut(text, "/")
	a, err := netip.ParseAddr(head)
	if err != nil || a.Zone() != "" {
		if octets := strings.Split(strings.Trim(head, "."), "."); strings.HasSuffix(head, ".") && len(octets) < 4 {
			full := strings.Join(append(octets, make([]string, 4-len(octets))...), ".")
			full = strings.ReplaceAll(strings.ReplaceAll(full+".", "..", ".0."), "..", ".0.")
			if a, err := netip.ParseAddr(strings.TrimSuffix(full, ".")); err == nil {
				return netip.Prefix{}, fmt.Errorf("%q is not an address (a NEC style prefix? write %s)", text, netip.PrefixFrom(a, 8*len(octets)))
			}
		}
		return netip.Prefix{}, fmt.Errorf("%q is not an address%s", text, notAddress(head))
	}
	n := a.BitLen()
	if hasLength {
		v, err := strconv.ParseUint(length, 10, 8)
		if err != nil || int(v) > a.BitLen() {
			return netip.Prefix{}, fmt.Errorf("%q: the prefix length is a number from 0 to %d", text, a.BitLen())
		}
		n = int(v)
	}
	if a.Is4In6() {
		if n < 96 {
			return netip.Prefix{}, fmt.Errorf("%q covers more than the IPv4 addresses in IPv6; write an IPv4 network", text)
		}
		a, n = a.Unmap(), n-96
	}
	return netip.PrefixFrom(a, n), nil
}

// pattern reads a name, "*.name" or ".name".
func (l *line) pattern(t token, text string) (name, suffix string, ok bool) {
	n := strings.ToLower(strings.TrimSuffix(text, "."))
	if rest, isSuffix := strings.CutPrefix(n, "*."); isSuffix {
		n, suffix = rest, rest
	} else if rest, isSuffix := strings.CutPrefix(n, "."); isSuffix {
		n, suffix = rest, rest
	}
	if strings.Contains(n, "*") {
		l.errorf(t, "E26", "name pattern %q: a star is allowed only as the first label, as *.example.org", text)
		return "", "", false
	}
	if err := checkName(n); err != nil {
		l.errorf(t, "E26", "%q is no destination: %v", text, err)
		return "", "", false
	}
	return n, suffix, true
}

// checkName tells what is wrong with a name. Underscores are in use, though
// RFC 952 has none.
func checkName(name string) error {
	if name == "" {
		return errors.New("an empty name")
	}
	if len(name) > 253 {
		return errors.New("longer than 253 bytes")
	}
	for label, rest, more := strings.Cut(name, "."); ; label, rest, more = strings.Cut(rest, ".") {
		if label == "" {
			return errors.New("an empty label")
		}
		if len(label) > 63 {
			return errors.New("a label longer than 63 bytes")
		}
		for _, c := range label {
			if !(c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '-' || c == '_') {
				if c > 127 {
					return fmt.Errorf("%q; write an international name in its xn-- form", c)
				}
				return fmt.Errorf("%q cannot be in a name", c)
			}
		}
		if !more {
			return nil
		}
	}
}

// operators are what compares ports, with the ports that they leave.
var operators = map[string]func(n uint16) []PortRange{
	"eq": portsEqual, "=": portsEqual,
	"ne": portsNotEqual, "neq": portsNotEqual, "!=": portsNotEqual,
	"lt": func(n uint16) []PortRange { return []PortRange{{0, n - 1}} }, "<": func(n uint16) []PortRange { return []PortRange{{0, n - 1}} },
	"le": func(n uint16) []PortRange { return []PortRange{{0, n}} }, "<=": func(n uint16) []PortRange { return []PortRange{{0, n}} },
	"ge": portsFrom, ">=": portsFrom,
	"gt": portsAbove, ">": portsAbove,
}

func portsEqual(n uint16) []PortRange { return []PortRange{{n, n}} }
func portsFrom(n uint16) []PortRange  { return []PortRange{{n, 65535}} }

func portsAbove(n uint16) []PortRange {
	if n == 65535 {
		return nil
	}
	return portsFrom(n + 1)
}

func portsNotEqual(n uint16) []PortRange { return append([]PortRange{{0, n - 1}}, portsAbove(n)...) }

// ports reads the ports that may follow a destination; empty: any.
func (l *line) ports(dest token) []PortRange {
	if len(l.rest) == 0 {
		return nil
	}
	t := l.rest[0]
	if op := operators[strings.ToLower(t.text)]; op != nil {
		l.word()
		p, ok := l.word()
		if !ok || isOption(p.text) || p.text == ":" {
			if ok {
				l.rest = slices.Insert(l.rest, 0, p)
			}
			l.errorf(t, "E10", "operator %q without a port", t.text)
			return nil
		}
		n, ok := l.port(p, p.text)
		if !ok {
			return nil
		}
		list := op(n)
		if list == nil {
			l.errorf(p, "E09", "no port is greater than 65535")
		}
		return list
	}
	if t.text == ":" || isOption(t.text) || strings.EqualFold(t.text, "log") {
		return nil
	}
	l.word()
	if strings.IndexAny(t.text, "<>!=") == 0 {
		l.errorf(t, "E10", "write a blank between the operator and the port: %q", t.text)
		return nil
	}
	var list []PortRange
	col := t.col
	for _, item := range strings.Split(t.text, ",") {
		at := token{text: item, line: t.line, col: col}
		col += len([]rune(item)) + 1
		if from, to, isRange := strings.Cut(item, "-"); isRange {
			// A service can have a dash in its name.
			if _, ok := lookupService(item); !ok {
				a, okA := l.port(at, from)
				b, okB := l.port(at, to)
				if okA && okB && b < a {
					l.errorf(at, "E09", "range %s is reversed", item)
				} else if okA && okB {
					list = append(list, PortRange{a, b})
				}
				continue
			}
		}
		if n, ok := l.port(at, item); ok {
			list = append(list, PortRange{n, n})
		}
	}
	if !strings.ContainsAny(t.text, ",-") && len(list) == 1 {
		l.warnf(t, "W01", "port %s without an operator is taken as eq %s", t.text, t.text)
	}
	return mergePorts(list)
}

// mergePorts sorts ranges and joins those that touch.
func mergePorts(list []PortRange) []PortRange {
	slices.SortFunc(list, func(a, b PortRange) int { return cmp.Compare(a.From, b.From) })
	merged := list[:0]
	for _, r := range list {
		if n := len(merged); n > 0 && int(r.From) <= int(merged[n-1].To)+1 {
			merged[n-1].To = max(merged[n-1].To, r.To)
		} else {
			merged = append(merged, r)
		}
	}
	return merged
}

// port reads a number or a service.
func (l *line) port(t token, text string) (uint16, bool) {
	if text != "" && strings.Trim(text, "0123456789") == "" {
		n, err := strconv.ParseUint(text, 10, 32)
		if err != nil || n < 1 || n > 65535 {
			l.errorf(t, "E09", "port %s out of range 1-65535", text)
			return 0, false
		}
		return uint16(n), true
	}
	if n, ok := lookupService(strings.ToLower(text)); ok {
		return n, true
	}
	l.errorf(t, "E08", "port %q is neither a number nor a service in /etc/services%s", text, meant(text, commonServices))
	return 0, false
}

// lookupService returns the port of a service of services(5). The resolver of
// the Go library knows the common ones even where that file is missing, and
// asks nobody.
func lookupService(name string) (uint16, bool) {
	r := net.Resolver{PreferGo: true}
	for _, network := range []string{"tcp", "udp"} {
		if n, err := r.LookupPort(context.Background(), network, name); err == nil && n > 0 {
			return uint16(n), true
		}
	}
	return 0, false
}
