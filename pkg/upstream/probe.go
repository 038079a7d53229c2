package upstream

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"strings"
	"time"

	"github.com/tproxyd/tproxyd/pkg/flow"
	"github.com/tproxyd/tproxyd/pkg/socks"
)

// Ability is one thing that a server was asked for.
type Ability struct {
	What    string `json:"what"`              // "greeting", "authentication", "connect name", "connect ipv4", "connect ipv6", "pipeline", "udp", "bind"
	Has     bool   `json:"has"`               // it can do it
	Unclear bool   `json:"unclear,omitempty"` // its answer does not tell whether it can
	Answer  string `json:"answer"`            // what it answered, or what went wrong
}

// probeLimit is for each thing that is asked.
const probeLimit = 5 * time.Second

// Greet asks a server for a greeting alone and returns how long that took, the
// connection to it included. The error says why there was none.
func (p *Pool) Greet(ctx context.Context, s *Server) (time.Duration, error) {
	start := time.Now()
	t, _, err := p.probing(ctx, s)
	took := time.Since(start)
	if err == nil {
		t.done(errProbed)
	}
	return took, err
}

// Probe asks s for all that a server can do, and returns the answers. It is
// asked to connect to Options.Probe, and for the kinds of address that that is
// not, or without it, to itself; a refusal by the destination shows the ability
// too. If s does not greet, that is the only answer, and what authentication it
// wants.
func (p *Pool) Probe(ctx context.Context, s *Server) []Ability {
	start := time.Now()
	t, proto, err := p.probing(ctx, s)
	list := []Ability{ability("greeting", err, fmt.Sprintf("%s, %v", proto, time.Since(start).Round(100*time.Microsecond)))}
	if err != nil {
		if errors.Is(err, socks.ErrNoAcceptableMethod) || errors.Is(err, socks.ErrAuth) {
			list = append(list, p.probeAuth(ctx, s, err))
		}
		return list
	}
	t.done(errProbed)
	switch proto {
	case Socks5:
		list = append(list, p.probeAuth(ctx, s, nil))
	case HTTP:
		list = append(list, p.probeAuthHTTP(ctx, s))
	}
	o := p.options.Load()
	for _, kind := range []struct {
		what string
		to   flow.Target
		is   func(flow.Target) bool
	}{
		{"name", flow.Target{Name: "localhost"}, func(t flow.Target) bool { return t.Name != "" }},
		{"ipv4", flow.Target{Addr: netip.AddrFrom4([4]byte{127, 0, 0, 1})}, func(t flow.Target) bool { return t.Name == "" && t.Addr.Is4() }},
		{"ipv6", flow.Target{Addr: netip.IPv6Loopback()}, func(t flow.Target) bool { return t.Name == "" && t.Addr.Is6() }},
	} {
		kind.to.Port = s.Addr.Port()
		if o.Probe != (flow.Target{}) && kind.is(o.Probe) {
			kind.to = o.Probe
		}
		list = append(list, p.probeConnect(ctx, s, "connect "+kind.what, kind.to))
	}
	if proto == Socks5 {
		got := p.learn(ctx, s, probeLimit)
		list = append(list, Ability{What: "pipeline", Has: got != PipelineOff, Answer: pipelineNames[got]})
	}
	list = append(list, p.probeUDP(ctx, s, proto))
	if proto != HTTP {
		list = append(list, p.probeBind(ctx, s, proto))
	}
	return list
}

// errProbed ends the talk of a probe.
var errProbed = errors.New("upstream: probed")

// probing returns a connection that is ready to be asked for something.
func (p *Pool) probing(ctx context.Context, s *Server) (*talk, Protocol, error) {
	return p.ready(ctx, s, time.Now().Add(p.options.Load().ConnectTimeout))
}

// ability makes an answer of an error.
func ability(what string, err error, done string) Ability {
	if err == nil {
		return Ability{What: what, Has: true, Answer: done}
	}
	text := err.Error()
	for _, place := range []string{"upstream: ", "socks: "} {
		text = strings.TrimPrefix(text, place)
	}
	var status socks.HTTPStatus
	return Ability{
		What: what, Has: judge(err) == destination, Answer: text,
		Unclear: errors.As(err, new(*silentEnd)) || errors.As(err, &status) && judge(err) == incapable || errors.Is(err, socks.GeneralFailure),
	}
}

// probeAuth finds out how s wants clients to authenticate; refused is why it has
// not greeted this one.
func (p *Pool) probeAuth(ctx context.Context, s *Server, refused error) Ability {
	const what = "authentication"
	end := time.Now().Add(min(probeLimit, p.options.Load().ConnectTimeout))
	conn, err := p.reach(ctx, s, end)
	if err != nil {
		return ability(what, err, "")
	}
	t := talkOn(ctx, conn)
	defer t.done(errProbed)
	var method string
	err = t.step(end, "greeting", func() (err error) {
		method, err = socks.AskMethod(conn)
		return err
	})
	given := s.given()
	a := Ability{What: what, Has: refused == nil, Answer: given}
	switch {
	case err != nil && refused == nil:
		return a
	case err != nil:
		return ability(what, err, "")
	case refused != nil && method == given:
		a.Answer = "it wants " + method + ", and not this one"
	case refused != nil:
		a.Answer = "it wants " + method + "; given is " + given
	case method != given:
		a.Answer = given + "; if all are offered it picks " + method
	}
	return a
}

// given is how s is authenticated to.
func (s *Server) given() string {
	if s.Auth != nil {
		return "user name and password"
	}
	return "none"
}

// probeAuthHTTP asks a proxy to connect to itself.
func (p *Pool) probeAuthHTTP(ctx context.Context, s *Server) Ability {
	const what = "authentication"
	t, proto, err := p.probing(ctx, s)
	if err == nil {
		defer t.done(errProbed)
		_, err = p.request(t, proto, s, Request{To: s.target()}, PipelineOff, probeLimit)
	}
	if errors.Is(err, socks.ErrAuth) {
		return ability(what, err, "")
	}
	return Ability{What: what, Has: true, Answer: s.given()} // whatever else it says
}

func (p *Pool) probeConnect(ctx context.Context, s *Server, what string, to flow.Target) Ability {
	t, proto, err := p.probing(ctx, s)
	if err != nil {
		return ability(what, err, "")
	}
	defer t.done(errProbed)
	_, err = p.request(t, proto, s, Request{To: to}, PipelineOff, probeLimit)
	if errors.Is(err, errNeedsAddress) {
		return Ability{What: what, Answer: "SOCKS4 takes no names: they are resolved here"}
	}
	return ability(what, err, "done")
}

func (p *Pool) probeUDP(ctx context.Context, s *Server, proto Protocol) Ability {
	if why := s.lacksUDP(); why != "" || proto != Socks5 {
		if why == "" {
			why = "it speaks SOCKS4"
		}
		return Ability{What: "udp", Answer: why}
	}
	if s.Via != nil {
		return p.probeChainUDP(ctx, s)
	}
	t, _, err := p.probing(ctx, s)
	if err != nil {
		return ability("udp", err, "")
	}
	defer t.done(errProbed)
	conn := t.conn
	var relay netip.AddrPort
	err = t.step(time.Now().Add(probeLimit), "reply", func() (err error) {
		relay, err = socks.AssociateGreeted(conn, netip.AddrPort{})
		return ended(err)
	})
	if err == nil {
		relay, err = relayAddr(relay, addrPort(conn.RemoteAddr()).Addr())
	}
	a := ability("udp", err, "relay at "+relay.String())
	a.Has, a.Unclear = err == nil, false // a rule against it is not the destination's
	return a
}

// probeChainUDP asks the servers of a chain, each for its relay.
func (p *Pool) probeChainUDP(ctx context.Context, s *Server) Ability {
	ctx, cancel := context.WithTimeout(ctx, 2*probeLimit)
	defer cancel()
	a, err := p.associate(ctx, s, p.of(s), 0)
	if err != nil {
		got := ability("udp", err, "")
		got.Has, got.Unclear = false, false
		return got
	}
	defer a.Close()
	relays := a.Relay.String()
	for _, hop := range a.Hops {
		relays += ", and by it at " + hop.String()
	}
	return Ability{What: "udp", Has: true, Answer: "relay at " + relays}
}

func (p *Pool) probeBind(ctx context.Context, s *Server, proto Protocol) Ability {
	t, _, err := p.probing(ctx, s)
	if err != nil {
		return ability("bind", err, "")
	}
	defer t.done(errProbed)
	conn := t.conn
	anybody := flow.Target{Addr: netip.IPv4Unspecified()}
	var bound netip.AddrPort
	err = t.step(time.Now().Add(probeLimit), "reply", func() (err error) {
		if proto == Socks5 {
			bound, err = socks.Bind(conn, anybody)
		} else {
			user := ""
			if s.Auth != nil {
				user = s.Auth.Username
			}
			bound, err = socks.Bind4(conn, anybody, user)
		}
		return ended(err)
	})
	if err == nil && (!bound.IsValid() || bound.Port() == 0) {
		err = errors.New("it does not say at which address it listens")
	}
	a := ability("bind", err, "listens at "+bound.String())
	a.Has, a.Unclear = err == nil, false
	return a
}
