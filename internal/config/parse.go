package config

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/tproxyd/tproxyd/pkg/redirect"
	"github.com/tproxyd/tproxyd/pkg/routes"
)

// Load reads and checks the file at path. The Config is nil if there is an
// error among the diagnostics.
func Load(path string) (*Config, routes.Diagnostics) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, routes.Diagnostics{fileError(path, err)}
	}
	return Parse(path, b)
}

// LoadPartial is Load for who must do something whatever the file says: keys
// with an error have their defaults. The Config is nil if the file cannot be
// read.
func LoadPartial(path string) (*Config, routes.Diagnostics) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, routes.Diagnostics{fileError(path, err)}
	}
	return parse(path, b)
}

// Parse is Load for the content of a file; path names it in messages, and
// relative paths in it are taken from its folder.
func Parse(path string, b []byte) (*Config, routes.Diagnostics) {
	c, diags := parse(path, b)
	if diags.HasErrors() {
		return nil, diags
	}
	return c, diags
}

func parse(path string, b []byte) (*Config, routes.Diagnostics) {
	entries, diags := scan(path, b)
	c := Default(path)
	seen := map[string]bool{}
	for _, e := range entries {
		key := e.key()
		set, known := keys[key]
		if !known {
			diags = append(diags, e.errorf(path, codeUnknown, "unknown key %q%s", key, neighbours(key)))
			continue
		}
		if seen[key] {
			diags = append(diags, e.errorf(path, codeTwice, "%s is given twice", key))
			continue
		}
		seen[key] = true
		if err := set(c, e.value); err != nil {
			code := codeValue
			if errors.Is(err, errType) {
				code = codeType
			}
			diags = append(diags, e.errorf(path, code, "%s: %v", key, err))
		}
	}
	return c, diags
}

// keys is every key that tproxyd.toml may hold, with the check of its value.
var keys = map[string]func(*Config, any) error{
	"routes":      func(c *Config, v any) error { return setPath(&c.Routes, c.Path, v) },
	"credentials": func(c *Config, v any) error { return setPath(&c.Credentials, c.Path, v) },
	"sandbox":     func(c *Config, v any) error { return set(&c.Sandbox, v, "true or false") },

	"intercept.interfaces": func(c *Config, v any) error {
		return setList(&c.Intercept.Interfaces, v, parseInterface)
	},
	"intercept.local": func(c *Config, v any) error { return set(&c.Intercept.Local, v, "true or false") },
	"intercept.dns":   func(c *Config, v any) error { return set(&c.Intercept.DNS, v, "true or false") },
	"intercept.fail": func(c *Config, v any) error {
		var s string
		if err := set(&s, v, `"closed" or "open"`); err != nil {
			return err
		}
		switch s {
		case "closed":
			c.Intercept.Fail = FailClosed
		case "open":
			c.Intercept.Fail = FailOpen
		default:
			return fmt.Errorf(`%q is neither "closed" nor "open"`, s)
		}
		return nil
	},
	"intercept.mark": func(c *Config, v any) error {
		var s string
		if err := set(&s, v, `a string as "0x7000/0xf000"`); err != nil {
			return err
		}
		marks, err := redirect.ParseMarks(s)
		if err == nil {
			c.Intercept.Mark = marks
		}
		return err
	},
	"intercept.table": func(c *Config, v any) error {
		n, err := integer(v, 1, 1<<31-1)
		if err == nil && n >= 253 && n <= 255 {
			return fmt.Errorf("%d is one of the kernel's own tables (default, main, local)", n)
		}
		if err == nil {
			c.Intercept.Table = int(n)
		}
		return err
	},

	"intercept.drain": func(c *Config, v any) error {
		n, err := integer(v, 0, 30*86400)
		c.Intercept.Drain = time.Duration(n) * time.Second
		return err
	},

	"dns.resolvers": func(c *Config, v any) error { return setList(&c.DNS.Resolvers, v, ParseResolver) },
	"dns.search":    func(c *Config, v any) error { return setList(&c.DNS.Search, v, parseDomain) },
	"dns.pool4":     func(c *Config, v any) error { return setPool(&c.DNS.Pool4, v, 8, 29, netip.Addr.Is4) },
	"dns.pool6":     func(c *Config, v any) error { return setPool(&c.DNS.Pool6, v, 32, 124, netip.Addr.Is6) },
	"dns.ttl": func(c *Config, v any) error {
		n, err := integer(v, 1, 86400)
		c.DNS.TTL = time.Duration(n) * time.Second
		return err
	},

	"state.directory": func(c *Config, v any) error { return setPath(&c.State.Directory, c.Path, v) },
	"control.socket":  func(c *Config, v any) error { return setPath(&c.Control.Socket, c.Path, v) },
	"control.metrics": func(c *Config, v any) error { return setListener(&c.Control.Metrics, v, "127.0.0.1:9470") },
	"control.clash":   func(c *Config, v any) error { return setListener(&c.Control.Clash, v, "127.0.0.1:9090") },
	"control.secrets": func(c *Config, v any) error { return setPath(&c.Control.Secrets, c.Path, v) },
	"control.ui":      func(c *Config, v any) error { return setPath(&c.Control.UI, c.Path, v) },
}

// neighbours lists the keys that stand where an unknown one was given.
func neighbours(key string) string {
	table, _, _ := strings.Cut(key, ".")
	var near []string
	for k := range keys {
		if strings.HasPrefix(k, table+".") {
			near = append(near, strings.TrimPrefix(k, table+"."))
		}
	}
	if len(near) == 0 {
		return "; the file has routes, credentials, [intercept], [dns], [state] and [control]"
	}
	slices.Sort(near)
	return fmt.Sprintf("; the keys of [%s] are %s", table, strings.Join(near, ", "))
}

var errType = errors.New("wrong type")

func set[T any](dst *T, v any, want string) error {
	t, ok := v.(T)
	if !ok {
		return fmt.Errorf("%w: want %s", errType, want)
	}
	*dst = t
	return nil
}

func integer(v any, low, high int64) (int64, error) {
	var n int64
	if err := set(&n, v, "a whole number"); err != nil {
		return 0, err
	}
	if n < low || n > high {
		return 0, fmt.Errorf("%d is not between %d and %d", n, low, high)
	}
	return n, nil
}

func setPath(dst *string, conf string, v any) error {
	var s string
	if err := set(&s, v, "a path in quotes"); err != nil {
		return err
	}
	if s == "" {
		return errors.New("the path is empty")
	}
	if !filepath.IsAbs(s) {
		s = filepath.Join(filepath.Dir(conf), s)
	}
	*dst = s
	return nil
}

// setListener takes HOST:PORT, or an empty string for none.
func setListener(dst *string, v any, example string) error {
	if err := set(dst, v, fmt.Sprintf("a string as %q", example)); err != nil || *dst == "" {
		return err
	}
	_, port, err := net.SplitHostPort(*dst)
	if err == nil {
		_, err = net.LookupPort("tcp", port)
	}
	if err != nil {
		return fmt.Errorf("%q is not HOST:PORT, as in %q", *dst, example)
	}
	return nil
}

func setList[T any](dst *[]T, v any, parse func(string) (T, error)) error {
	var list []any
	if err := set(&list, v, `a list in brackets, as in ["a", "b"]`); err != nil {
		return err
	}
	var errs []error
	for _, item := range list {
		var s string
		if err := set(&s, item, "strings in the list"); err != nil {
			return err
		}
		t, err := parse(s)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		*dst = append(*dst, t)
	}
	if len(errs) > 0 { // on one line: a diagnostic is a line
		texts := make([]string, len(errs))
		for i, err := range errs {
			texts[i] = err.Error()
		}
		return errors.New(strings.Join(texts, "; "))
	}
	return nil
}

// parseInterface checks a name as the kernel does (dev_valid_name).
func parseInterface(s string) (string, error) {
	switch {
	case strings.ContainsAny(s, "*+"): // which the kernel takes, and nobody means
		return "", fmt.Errorf("%q: there are no patterns of interfaces; name each one", s)
	case s == "" || len(s) > 15 || s == "." || s == ".." || strings.ContainsAny(s, "/: \t\n"):
		return "", fmt.Errorf("%q is not an interface name", s)
	case s == "lo":
		return "", errors.New(`"lo" cannot be named; this host's own flows are taken with local = true`)
	}
	return s, nil
}

// ParseResolver reads the address of a resolver, with or without a port (53).
func ParseResolver(s string) (netip.AddrPort, error) {
	if a, err := netip.ParseAddr(s); err == nil {
		return netip.AddrPortFrom(a, 53), nil
	}
	if ap, err := netip.ParseAddrPort(s); err == nil && ap.Port() != 0 {
		return ap, nil
	}
	return netip.AddrPort{}, fmt.Errorf(`%q is not the address of a resolver, as "10.0.0.53" or "[2001:db8::53]:53"`, s)
}

func parseDomain(s string) (string, error) {
	d := strings.ToLower(strings.Trim(s, "."))
	if d == "" || len(d) > 253 || strings.ContainsAny(d, " \t*/:") {
		return "", fmt.Errorf("%q is not a domain", s)
	}
	return d, nil
}

func setPool(dst *netip.Prefix, v any, shortest, longest int, family func(netip.Addr) bool) error {
	var s string
	if err := set(&s, v, "a prefix in quotes"); err != nil {
		return err
	}
	p, err := netip.ParsePrefix(s)
	switch {
	case err != nil || !family(p.Addr()):
		return fmt.Errorf("%q is not a prefix of this family", s)
	case p != p.Masked():
		return fmt.Errorf("%s has bits outside its length; write %s", s, p.Masked())
	case p.Bits() < shortest || p.Bits() > longest:
		return fmt.Errorf("%s: the length must be between /%d and /%d", s, shortest, longest)
	case p.Addr().IsLoopback() || p.Addr().IsMulticast() || p.Addr().IsUnspecified() || p.Addr().IsLinkLocalUnicast():
		return fmt.Errorf("%s holds addresses that cannot be routed to", s)
	}
	*dst = p
	return nil
}
