package gateway

import (
	"fmt"
	"strings"

	"github.com/tproxyd/tproxyd/pkg/routes"
	"github.com/tproxyd/tproxyd/pkg/upstream"
)

// List is the servers of one rule or of several, in their order.
type List struct {
	Name    string // listName
	Order   routes.Strategy
	Servers []*upstream.Server
	Pinned  *upstream.Server // asked before all others; nil: none is
}

// listName is what a rule's list is called: its servers as written, and their order
// if that is not the one that they are written in. Empty: it has not two.
func listName(r *routes.Rule) string {
	if len(r.Servers) < 2 {
		return ""
	}
	names := make([]string, len(r.Servers))
	for i, c := range r.Servers {
		names[i] = c.String()
	}
	name := strings.Join(names, ",")
	if r.Balance != routes.First {
		name += " " + r.Balance.String()
	}
	return name
}

// Lists returns the lists of two servers and more, in the order of the rules. Those
// with the same name are one.
func (p *Plan) Lists() []List {
	var lists []List
	seen := map[string]bool{"": true}
	for i, r := range p.table.Rules() {
		name := listName(r)
		if seen[name] {
			continue
		}
		seen[name] = true
		g := p.groups[i]
		lists = append(lists, List{Name: name, Order: r.Balance, Servers: g.Servers, Pinned: g.Pinned()})
	}
	return lists
}

// Pin has a server of a list asked before the others, until the daemon ends or
// the list or the server is gone from the rules; an empty name takes that back.
// Flows that run keep their server, and so do sessions of UDP.
func (g *Gateway) Pin(list, server string) error {
	p := g.plan.Load()
	found := false
	for i, r := range p.table.Rules() {
		if list == "" || listName(r) != list {
			continue
		}
		found = true
		s := named(p.groups[i].Servers, server)
		if s == nil && server != "" {
			return fmt.Errorf("gateway: list %s has no server %s", list, server)
		}
		p.groups[i].Pin(s)
	}
	if !found {
		return fmt.Errorf("gateway: no rule has a list %s", list)
	}
	return nil
}

func named(servers []*upstream.Server, name string) *upstream.Server {
	for _, s := range servers {
		if s.Name == name {
			return s
		}
	}
	return nil
}

// pinAs pins what is pinned in old, as far as p has it.
func (p *Plan) pinAs(old *Plan) {
	pinned := map[string]*upstream.Server{}
	for _, l := range old.Lists() {
		if l.Pinned != nil {
			pinned[l.Name] = l.Pinned
		}
	}
	if len(pinned) == 0 {
		return
	}
	for i, r := range p.table.Rules() {
		if s := pinned[listName(r)]; s != nil {
			p.groups[i].Pin(same(p.groups[i].Servers, s))
		}
	}
}
