package gateway

import (
	"fmt"
	"sync/atomic"

	"github.com/tproxyd/tproxyd/pkg/routes"
	"github.com/tproxyd/tproxyd/pkg/socks"
	"github.com/tproxyd/tproxyd/pkg/upstream"
)

// Plan is what the rules of one moment say, ready to be followed: immutable,
// and replaced whole at a reload.
type Plan struct {
	table   *routes.Table
	local   routes.LocalNames
	servers [][]*upstream.Server // by Rule.Index: what the rule's list means upstream
	keys    []string             // by Rule.Index: see listKey
	proxy   []*upstream.Server   // PROXY_NAME's list
	all     []*upstream.Server
	hits    []atomic.Uint64 // by Rule.Index: flows that came to user space
}

// NewPlan makes a plan of a table. Auth gives the user name and password for a
// credential's name; local says which names stay local.
func NewPlan(t *routes.Table, local routes.LocalNames, auth func(credential string) *socks.Auth) (*Plan, error) {
	p := &Plan{table: t, local: local}
	made := map[*routes.Server]*upstream.Server{}
	list := func(chains []routes.Chain) []*upstream.Server {
		var l []*upstream.Server
		for _, c := range chains {
			l = append(l, made[c[0]])
		}
		return l
	}
	for _, s := range t.Servers() {
		u := &upstream.Server{Name: s.Name, Host: s.Host, Addr: s.AddrPort(), Pipeline: s.Pipeline != routes.PipelineOff, UDP: upstreamUDP(s.UDP)}
		if s.Credential != "" {
			if u.Auth = auth(s.Credential); u.Auth == nil {
				return nil, fmt.Errorf("gateway: server %s: no credential %q", s.Name, s.Credential)
			}
		}
		made[s] = u
		p.all = append(p.all, u)
	}
	p.servers = make([][]*upstream.Server, len(t.Rules()))
	p.keys = make([]string, len(t.Rules()))
	p.hits = make([]atomic.Uint64, len(t.Rules()))
	for i, r := range t.Rules() {
		p.servers[i] = list(r.Servers)
		p.keys[i] = listKey(p.servers[i], r)
	}
	p.proxy = list(t.ProxyName())
	return p, nil
}

// Table returns the rules that the plan was made of.
func (p *Plan) Table() *routes.Table { return p.table }

// Servers returns the servers of the plan, in the order of the file.
func (p *Plan) Servers() []*upstream.Server { return p.all }

// Hits returns how many flows the rule decided in user space since the plan
// was made.
func (p *Plan) Hits(r *routes.Rule) uint64 { return p.hits[r.Index].Load() }

// upstreamUDP says in the words of upstream how a server is asked for UDP.
func upstreamUDP(m routes.UDPMode) upstream.UDPMode {
	switch m {
	case routes.UDPZero:
		return upstream.UDPZero
	case routes.UDPOff:
		return upstream.UDPOff
	}
	return upstream.UDPOwn
}
