package daemon

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/tproxyd/tproxyd/internal/clash"
	"github.com/tproxyd/tproxyd/internal/gateway"
	"github.com/tproxyd/tproxyd/pkg/flow"
	"github.com/tproxyd/tproxyd/pkg/redirect"
	"github.com/tproxyd/tproxyd/pkg/routes"
	"github.com/tproxyd/tproxyd/pkg/upstream"
)

// This file says in the words of Clash what the daemon is and does.

// clashOptions is what the address of the Clash API is given.
func (d *Daemon) clashOptions(version string) clash.Options {
	return clash.Options{
		Secrets:  d.clashSecrets,
		Version:  version,
		UI:       d.setup.Config.Control.UI,
		Flows:    d.clashFlows,
		Kill:     d.clashKill,
		Rules:    d.clashRules,
		Servers:  d.clashServers,
		Lists:    d.clashLists,
		Totals:   d.totals,
		Pin:      d.gateway.Pin,
		Delay:    d.serverDelay,
		Reload:   d.Reload,
		FlushDNS: d.names.Reset,
		Logs:     d.logs,
	}
}

func (d *Daemon) clashKill(ids ...string) {
	var list []uint64
	for _, id := range ids {
		if n, err := strconv.ParseUint(id, 10, 64); err == nil {
			list = append(list, n)
		}
	}
	d.Kill(list...)
}

func (d *Daemon) clashSecrets() clash.Secrets {
	d.mu.Lock()
	defer d.mu.Unlock()
	return clash.Secrets(d.setup.secrets)
}

// totals are the bytes of TCP and UDP that were carried since the start, also by
// processes that were taken over, and those that the kernel let pass by itself.
func (d *Daemon) totals() (up, down uint64) {
	t, u := d.gateway.Stats(), d.packets.Stats()
	up, down = d.before.bytes()
	k := d.direct.read(d.kernel)
	return up + t.Up + u.Up + k[0], down + t.Down + u.Down + k[1]
}

// directBytes is how many bytes of clients, and to them, the kernel let pass. They do
// not shrink when somebody else has removed the table and it is put back.
type directBytes struct {
	mu         sync.Mutex
	sum, table [2]uint64 // of tables that are gone; of the one that is there
}

func (b *directBytes) read(k *redirect.Redirect) [2]uint64 {
	b.mu.Lock()
	defer b.mu.Unlock()
	if c, err := k.Counters(); err == nil { // else it is what it was, and status says so
		b.saw([2]uint64{c.Direct.Bytes, c.Answers.Bytes})
	}
	return [2]uint64{b.sum[0] + b.table[0], b.sum[1] + b.table[1]}
}

func (b *directBytes) saw(bytes [2]uint64) {
	for i, n := range bytes {
		if n < b.table[i] {
			b.sum[i] += b.table[i]
		}
		b.table[i] = n
	}
}

// clashRules is kept for a moment, and longer where there are very many rules,
// since dashboards ask all the time.
func (d *Daemon) clashRules() []clash.Rule {
	s := &d.shown
	s.mu.Lock()
	defer s.mu.Unlock()
	began, plan := time.Now(), d.gateway.Plan()
	if plan == s.plan && began.Sub(s.at) < max(shownFor, 10*s.took) {
		return s.rules
	}
	c, _ := d.counts(reloadCount{}) // without the kernel's, status says so
	s.rules = make([]clash.Rule, 0, len(c.Rules))
	for _, r := range c.Rules {
		kind, payload := clashKind(r.rule)
		s.rules = append(s.rules, clash.Rule{
			Kind: kind, Payload: payload, To: clashWay(r.rule.Action, r.list), Text: r.Text,
			Position: r.Position, Flows: r.Flows, Up: r.Up, Down: r.Down, Kernel: r.Bytes,
		})
	}
	s.plan, s.at, s.took = plan, time.Now(), time.Since(began)
	return s.rules
}

const shownFor = 400 * time.Millisecond

// shownRules are rules as dashboards were told of them.
type shownRules struct {
	mu    sync.Mutex
	plan  *gateway.Plan
	at    time.Time
	took  time.Duration
	rules []clash.Rule // not changed any more
}

// clashWay is where a rule leads to.
func clashWay(a routes.Action, list string) string {
	switch a {
	case routes.Deny:
		return clash.Reject
	case routes.Direct:
		return clash.Direct
	}
	return list
}

// clashKind returns what a rule is about: the kind is that of its destination, or
// of what else it asks for if any destination will do.
func clashKind(r *routes.Rule) (kind, payload string) {
	_, text, _ := strings.Cut(r.Text, " ") // the action
	words := strings.Fields(text)
	for len(words) > 0 && (strings.HasPrefix(words[0], "@=") || strings.HasPrefix(words[0], "*=")) {
		words = words[1:]
	}
	if r.Default || len(words) == 0 {
		return "Match", ""
	}
	word := words[0]
	suffix, isSuffix := strings.CutPrefix(word, "*.")
	switch {
	case word == "*" && len(r.Src) > 0:
		return "SrcIPCIDR", r.Src[0].String()
	case word == "*" && len(r.Ports) > 0:
		return "DstPort", ports(r.Ports)
	case word == "*":
		return "Match", ""
	case word[0] == '$':
		return "RuleSet", word[1:]
	case isSuffix:
		return "DomainSuffix", suffix
	case strings.Contains(word, ":") || strings.Trim(word, "0123456789./-") == "":
		if len(words) > 1 {
			if mask, err := netip.ParseAddr(words[1]); err == nil && mask.Is4() {
				return "IPCIDR", word + "/" + maskLength(mask)
			}
		}
		return "IPCIDR", word
	}
	return "Domain", word
}

// maskLength is the length of a mask as 255.255.0.0; an odd one stays as it is.
func maskLength(mask netip.Addr) string {
	b := mask.As4()
	if ones, bits := net.IPv4Mask(b[0], b[1], b[2], b[3]).Size(); bits != 0 {
		return strconv.Itoa(ones)
	}
	return mask.String()
}

func ports(list []routes.PortRange) string {
	var words []string
	for _, p := range list {
		if p.From == p.To {
			words = append(words, strconv.Itoa(int(p.From)))
		} else {
			words = append(words, fmt.Sprintf("%d-%d", p.From, p.To))
		}
	}
	return strings.Join(words, "/")
}

func (d *Daemon) clashFlows() []clash.Flow {
	type about struct{ kind, payload string }
	seen := map[*routes.Rule]about{} // a flow has its rule, or a copy of it
	var list []clash.Flow
	for _, f := range d.Flows() {
		c := clash.Flow{
			ID: strconv.FormatUint(f.ID, 10), Network: f.Network, Client: f.Client, Destination: f.Destination, Name: f.Name,
			Interface: f.Interface, Start: f.Start, Up: f.Up, Down: f.Down, Rule: f.Rule, Server: f.Server, List: f.List,
		}
		if r := f.By; r != nil {
			if _, known := seen[r]; !known {
				kind, payload := clashKind(r)
				seen[r] = about{kind, payload}
			}
			c.Kind, c.Payload = seen[r].kind, seen[r].payload
		}
		if c.Server == "" {
			c.Server = clash.Direct
		}
		list = append(list, c)
	}
	return list
}

// clashTypes are the protocols of servers.
var clashTypes = map[string]string{"socks5": "Socks5", "socks4": "Socks4", "socks4a": "Socks4A", "socks": "Socks", "http": "Http"}

func (d *Daemon) clashServers() []clash.Server {
	var list []clash.Server
	for _, s := range d.servers.Status(d.gateway.Plan().Servers()) {
		list = append(list, clash.Server{
			Name: s.Name, Type: clashTypes[s.Protocol], Address: s.Address, Up: s.Up, UDP: s.UDP != "no",
			Delay: time.Duration(s.Setup * float64(time.Second)), Flows: s.Flows, Carried: s.Carried + s.Associations, Faults: s.Faults,
		})
	}
	return list
}

func (d *Daemon) clashLists() []clash.List {
	var list []clash.List
	for _, l := range d.gateway.Plan().Lists() {
		c := clash.List{Name: l.Name, Ordered: l.Order == routes.First}
		for _, s := range l.Servers {
			c.Servers = append(c.Servers, s.Name)
		}
		if l.Pinned != nil {
			c.Pinned = l.Pinned.Name
		}
		list = append(list, c)
	}
	return list
}

// serverDelay fetches the head of what a URL names by a server, and returns how
// long that took. The server resolves the name.
func (d *Daemon) serverDelay(ctx context.Context, server, address string) (time.Duration, error) {
	group := &upstream.Group{}
	for _, s := range d.gateway.Plan().Servers() {
		if s.Name == server {
			group.Servers = append(group.Servers, s)
		}
	}
	if len(group.Servers) == 0 {
		return 0, fmt.Errorf("daemon: no server is called %s", server)
	}
	u, err := url.Parse(address)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" {
		return 0, errors.New("daemon: not the URL of a web server")
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodHead, address, nil)
	if err != nil {
		return 0, err
	}
	t := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, to string) (net.Conn, error) {
		target, err := targetOf(to)
		if err != nil {
			return nil, err
		}
		c, err := d.servers.Connect(ctx, group, upstream.Request{To: target})
		if err != nil {
			return nil, err
		}
		return &probed{Conn: c.Conn, done: c.Done}, nil
	}}
	defer t.CloseIdleConnections()
	began := time.Now()
	r, err := t.RoundTrip(req) // and no redirection
	if err != nil {
		return 0, err
	}
	r.Body.Close()
	return time.Since(began), nil
}

// targetOf reads HOST:PORT.
func targetOf(to string) (flow.Target, error) {
	host, port, err := net.SplitHostPort(to)
	if err != nil {
		return flow.Target{}, err
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return flow.Target{}, err
	}
	if a, err := netip.ParseAddr(host); err == nil {
		return flow.Target{Addr: a, Port: uint16(n)}, nil
	}
	return flow.Target{Name: strings.ToLower(host), Port: uint16(n)}, nil
}

// probed is a connection that tells its server's count when it is over.
type probed struct {
	net.Conn
	done func()
}

// Close ends both, once.
func (p *probed) Close() error {
	if p.done != nil {
		p.done()
		p.done = nil
	}
	return p.Conn.Close()
}
