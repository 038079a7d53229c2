package gateway

import (
	"cmp"
	"crypto/tls"
	"fmt"
	"slices"

	"github.com/tproxyd/tproxyd/pkg/routes"
	"github.com/tproxyd/tproxyd/pkg/socks"
	"github.com/tproxyd/tproxyd/pkg/upstream"
)

// Plan is what the rules of one moment say, ready to be followed: immutable,
// and replaced whole at a reload.
type Plan struct {
	table   *routes.Table
	local   routes.LocalNames
	groups  []*upstream.Group // by Rule.Index: what the rule's list means upstream
	keys    []string          // by Rule.Index: see listKey
	proxy   *upstream.Group   // PROXY_NAME's list
	all     []*upstream.Server
	tallies []*tally // by Rule.Index
}

// NewPlan makes a plan of a table. Auth gives the user name and password for a
// credential's name; local says which names stay local.
func NewPlan(t *routes.Table, local routes.LocalNames, auth func(credential string) *socks.Auth) (*Plan, error) {
	n := len(t.Rules())
	p := &Plan{table: t, local: local, groups: make([]*upstream.Group, n), keys: make([]string, n), tallies: make([]*tally, n)}
	m := maker{auth: auth, made: map[string]*upstream.Server{}}
	group := func(chains []routes.Chain, action routes.Action, order routes.Strategy) *upstream.Group {
		g := &upstream.Group{Order: upstream.Order(order)}
		for _, c := range chains {
			g.Servers = append(g.Servers, m.chain(c, action))
		}
		return g
	}
	for i, r := range t.Rules() {
		p.groups[i] = group(r.Servers, r.Action, r.Balance)
		p.keys[i] = listKey(p.groups[i].Servers, r)
		p.tallies[i] = &tally{}
	}
	p.proxy = group(t.ProxyName(), routes.Socks5, routes.First)
	for _, s := range t.Servers() { // those that no rule has, too
		c := routes.Chain{s}
		if !slices.ContainsFunc(m.all, func(u *upstream.Server) bool { return u.Name == s.Name }) {
			m.chain(c, c.Protocol(0, routes.Socks))
		}
	}
	p.all = m.all
	return p, m.err
}

// maker makes the servers of a plan: one for each way to a server.
type maker struct {
	auth func(credential string) *socks.Auth
	made map[string]*upstream.Server
	all  []*upstream.Server
	err  error
}

var protocols = map[routes.Action]upstream.Protocol{
	routes.Socks: upstream.SocksAny, routes.Socks4: upstream.Socks4, routes.Socks4A: upstream.Socks4A,
	routes.Socks5: upstream.Socks5, routes.HTTP: upstream.HTTP,
}

// chain returns the server at the end of a chain, asked in the protocol of an
// action.
func (m *maker) chain(c routes.Chain, action routes.Action) *upstream.Server {
	n := len(c) - 1
	last, protocol := c[n], protocols[c.Protocol(n, action)]
	k := fmt.Sprintf("%s %v", c, protocol)
	if s := m.made[k]; s != nil {
		return s
	}
	s := &upstream.Server{
		Name:          c.String(),
		Host:          last.Host,
		Addr:          last.AddrPort(),
		Protocol:      protocol,
		From:          upstream.Local{Addr: last.Source, If: last.If},
		Pipeline:      upstream.Pipeline(last.Pipeline),
		UDP:           upstreamUDP(last.UDP),
		Cold:          last.Cold,
		MaxFlows:      last.Flows,
		MaxHandshakes: last.Handshakes,
	}
	if last.TLS {
		s.TLS = &tls.Config{ServerName: cmp.Or(last.SNI, last.Host, last.Addr.String()), MinVersion: tls.VersionTLS12}
	}
	if n > 0 {
		s.Via = m.chain(c[:n], c.Protocol(n-1, routes.Socks5))
	}
	if last.Credential != "" {
		if s.Auth = m.auth(last.Credential); s.Auth == nil && m.err == nil {
			m.err = fmt.Errorf("gateway: server %s: no credential %q", last.Name, last.Credential)
		}
	}
	if slices.ContainsFunc(m.all, func(other *upstream.Server) bool { return other.Name == s.Name }) {
		s.Name += " (" + protocol.String() + ")" // so that status and metrics can tell them apart
	}
	m.made[k] = s
	m.all = append(m.all, s)
	return s
}

// Table returns the rules that the plan was made of.
func (p *Plan) Table() *routes.Table { return p.table }

// Servers returns the servers of the plan, in the order of the file.
func (p *Plan) Servers() []*upstream.Server { return p.all }

// upstreamUDP says in the words of upstream how a server is asked for UDP.
func upstreamUDP(m routes.UDPMode) upstream.UDPMode {
	switch m {
	case routes.UDPZero:
		return upstream.UDPZero
	case routes.UDPOff:
		return upstream.UDPOff
	case routes.UDPChain:
		return upstream.UDPChain
	}
	return upstream.UDPOwn
}
