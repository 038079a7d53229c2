package main

import (
	"errors"
	"fmt"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/tproxyd/tproxyd/internal/config"
	"github.com/tproxyd/tproxyd/pkg/routes"
)

// way is where the flows of a namespace go, as the flags of run and attach say.
type way struct {
	routes string // file of rules
	socks  string // or a list of servers for everything, as after @=

	credential  string // name of the user name and password for the servers of the list
	credentials string // file of them; empty: the user's own, or that of the host

	resolvers []string // for names that are resolved here; empty: those of resolv.conf
}

// commonFlags are those of run and attach alike.
func (w *way) commonFlags(c *cobra.Command) {
	f := c.Flags()
	f.StringArrayVar(&w.resolvers, "resolver", nil, "`ADDRESS` of a resolver for names that are resolved here, and for what else than\naddresses is asked, through the servers (default those of resolv.conf)")
	f.StringVar(&w.credential, "credential", "", "`NAME` of the user name and password for the servers of --socks")
	f.StringVar(&w.credentials, "credentials", "", "`FILE` of user names and passwords (default ~/.config/tproxyd/credentials.toml,\nelse /etc/tproxyd/credentials.toml)")
}

// resolverList reads --resolver.
func (w *way) resolverList() (list []netip.AddrPort, err error) {
	for _, s := range w.resolvers {
		a, err := config.ParseResolver(s)
		if err != nil {
			return nil, fmt.Errorf("--resolver: %w", err)
		}
		list = append(list, a)
	}
	return list, nil
}

// errNoWay says that nothing tells where to go.
var errNoWay = errors.New("no way out is named: give --socks SERVER or --routes FILE, or set ALL_PROXY or SOCKS_SERVER")

// load returns what reads the rules. The environment is asked once, so that
// a mistake in it is found before anything is started.
func (w *way) load(e *env) (func() (*routes.Table, config.Credentials, routes.Diagnostics), error) {
	own := config.Credentials{}
	if user := firstOf(e, "SOCKS_USERNAME", "SOCKS5_USER"); user != "" && w.credential == "" {
		own[fromEnvironment] = config.Credential{Username: user, Password: firstOf(e, "SOCKS_PASSWORD", "SOCKS5_PASSWD", "SOCKS5_PASSWORD")}
	}
	text, where := "SOCKD5 @="+w.socks+" *\n", "--socks"
	switch {
	case w.routes != "":
		if w.credential != "" {
			return nil, errors.New("--credential goes with --socks; in a file of rules it is SERVER NAME HOST credential=NAME")
		}
	case strings.ContainsAny(w.socks, " \t\r\n#"):
		return nil, fmt.Errorf("--socks: %q is not a list of servers, as 10.0.3.1,proxy.example:1081", w.socks)
	case w.socks == "":
		p, err := environmentProxy(e)
		if err != nil {
			return nil, err
		}
		text, where = p.rules, p.variable
		if p.user != nil {
			password, _ := p.user.Password()
			own[fromEnvironment] = config.Credential{Username: p.user.Username(), Password: password}
		}
	}
	credential := w.credential
	if _, ok := own[fromEnvironment]; ok {
		credential = fromEnvironment
	}
	return func() (*routes.Table, config.Credentials, routes.Diagnostics) {
		var t *routes.Table
		var diags routes.Diagnostics
		if w.routes != "" {
			t, diags = routes.ParseFile(w.routes, routes.Options{})
		} else {
			t, diags = routes.Parse(where, strings.NewReader(text), routes.Options{})
		}
		if diags.HasErrors() {
			return nil, nil, diags
		}
		if w.routes == "" {
			for _, s := range t.Servers() {
				s.Credential = credential // the table is nobody else's yet
			}
		}
		creds, more := config.LoadCredentials(w.credentialsFile(e, t), e.getenv("CREDENTIALS_DIRECTORY"))
		if creds != nil {
			for name, c := range own {
				creds[name] = c
			}
		}
		return t, creds, append(diags, more...)
	}, nil
}

// fromEnvironment is the name of the credential that the environment holds. No
// file can say it.
const fromEnvironment = "from the environment"

// credentialsFile is the file to be read: the one that was named, or the first
// that is there, if a server needs one.
func (w *way) credentialsFile(e *env, t *routes.Table) string {
	needed := slices.ContainsFunc(t.Servers(), func(s *routes.Server) bool { return s.Credential != "" && s.Credential != fromEnvironment })
	if w.credentials != "" || !needed {
		return w.credentials
	}
	files := []string{"/etc/tproxyd/credentials.toml"}
	dir := e.getenv("XDG_CONFIG_HOME")
	if home := e.getenv("HOME"); dir == "" && home != "" {
		dir = filepath.Join(home, ".config")
	}
	if dir != "" {
		files = slices.Insert(files, 0, filepath.Join(dir, "tproxyd", "credentials.toml"))
	}
	for _, f := range files {
		if _, err := os.Stat(f); err == nil {
			return f
		}
	}
	return ""
}

// proxy is what a variable of the environment says, in the words of the rules.
type proxy struct {
	variable, rules string
	user            *url.Userinfo
}

// The schemes of ALL_PROXY, as curl(1) has them. Names are resolved by the
// server in each case.
var schemes = map[string]string{
	"socks": "SOCKD5", "socks5": "SOCKD5", "socks5h": "SOCKD5", "socks4": "SOCKD4A", "socks4a": "SOCKD4A", "http": "HTTP", "https": "HTTP",
}

func environmentProxy(e *env) (p proxy, err error) {
	for _, v := range []string{"ALL_PROXY", "all_proxy"} {
		s := e.getenv(v)
		if s == "" {
			continue
		}
		if !strings.Contains(s, "://") {
			s = "http://" + s // curl's default
		}
		u, err := url.Parse(s)
		if err != nil || u.Hostname() == "" || schemes[u.Scheme] == "" { // the error would tell the password
			return p, fmt.Errorf("%s: it is not the URL of a proxy, as socks5h://10.0.3.1:1080", v)
		}
		server, option := u.Host, ""
		if u.Scheme == "https" {
			option = " tls"
			if u.Port() == "" {
				server += ":443"
			}
		}
		action := schemes[u.Scheme]
		p = proxy{variable: v, rules: fmt.Sprintf("SERVER proxy %s%s\n%s @=proxy *\n", server, option, action), user: u.User}
		return p, nil
	}
	for _, known := range [][2]string{{"SOCKS_SERVER", "SOCKD5"}, {"SOCKS5_SERVER", "SOCKD5"}, {"SOCKS4_SERVER", "SOCKD4A"}} {
		v, action := known[0], known[1]
		s := e.getenv(v)
		if s == "" {
			continue
		}
		if strings.ContainsAny(s, " \t\r\n#,>@/") {
			return p, fmt.Errorf("%s: it is not the address of a server, as 10.0.3.1:1080", v)
		}
		return proxy{variable: v, rules: action + " @=" + s + " *\n"}, nil
	}
	return p, errNoWay
}

// firstOf returns the first variable that is set.
func firstOf(e *env, variables ...string) string {
	for _, v := range variables {
		if s := e.getenv(v); s != "" {
			return s
		}
	}
	return ""
}

// withoutProxies is an environment without what names a way out: programs that
// know a proxy would speak to it, and not to whom they mean.
func withoutProxies(environ []string) []string {
	return slices.DeleteFunc(slices.Clone(environ), func(kv string) bool {
		name, _, _ := strings.Cut(kv, "=")
		name = strings.ToLower(name)
		return strings.HasSuffix(name, "_proxy") || strings.HasPrefix(name, "socks_") || strings.HasPrefix(name, "socks4_") ||
			strings.HasPrefix(name, "socks5_") || name == strings.ToLower(stageVariable)
	})
}
