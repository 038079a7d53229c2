// Package routes is the language that says what goes where: it reads rules,
// reports what is wrong with them, and decides flows and names by them.
//
// It promises that the first rule that matches decides, in the order of the
// file and with no hidden priority; that every mistake of the files is reported
// in one run, each with its line and column; that what it hands to the kernel
// (see Table.Kernel) decides exactly as Table.Match does; and that a decision
// allocates nothing and is not linear in the number of address and name rules.
//
// The language is a superset of Hummingbird's socks.cnf, itself the heir of
// CSTC's socks.conf(5); the manual is tproxyd-socks.cnf(5).
package routes

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

// Action is what a rule does with a flow.
type Action uint8

// The actions. Those with servers are the protocol in which the last one of a
// chain is asked.
const (
	Deny    Action = iota
	Direct         // without a server
	Socks          // SOCKD: version 5, else 4
	Socks4         // SOCKD4: names are resolved by this host
	Socks4A        // SOCKD4A: names are sent
	Socks5         // SOCKD5
	HTTP           // HTTP CONNECT
)

var actionWords = [...]string{"DENY", "DIRECT", "SOCKD", "SOCKD4", "SOCKD4A", "SOCKD5", "HTTP"}

// String returns the keyword of the language.
func (a Action) String() string { return actionWords[a] }

// proxied tells whether the action needs a server.
func (a Action) proxied() bool { return a >= Socks }

// Strategy is the order in which a rule's servers are tried.
type Strategy uint8

// The strategies.
const (
	First      Strategy = iota // as written
	Random                     // shuffled for each flow: BALANCE
	RoundRobin                 // each flow begins with the next one
	Hash                       // the same client and destination begin with the same one
	LeastLoad                  // the one with the fewest flows
)

var strategyWords = [...]string{"first", "random", "roundrobin", "hash", "leastload"}

// String returns the word of the language.
func (s Strategy) String() string { return strategyWords[s] }

// Reject is how a DENY rule refuses.
type Reject uint8

// The ways to refuse: TCP with a reset and all else with an ICMP error; the same
// after the question for the name was refused already; everything with an ICMP
// error; without a word. A connection that was accepted before it could be
// decided is reset, whatever the way.
const (
	RejectReset Reject = iota
	RejectRefused
	RejectNXDomain
	RejectICMP
	RejectDrop
)

var rejectWords = [...]string{"reset", "dns-refused", "dns-nxdomain", "icmp", "drop"}

// String returns the word of the language.
func (r Reject) String() string { return rejectWords[r] }

// Pipeline is what a server is sent before it has answered.
type Pipeline uint8

// How much is sent ahead.
const (
	PipelineAuto     Pipeline = iota // what the server is known to take
	PipelineOff                      // nothing: one message, one answer
	PipelineGreeting                 // greeting, authentication and request together
	PipelineData                     // and the first bytes of the flow
)

var pipelineWords = [...]string{"", "off", "greeting", "data"}

// UDPMode is what a server is told of where datagrams will come from, when it
// is asked for a UDP association (RFC 1928 section 7).
type UDPMode uint8

// The modes.
const (
	UDPOwn   UDPMode = iota // the address and port of the socket that will send
	UDPZero                 // zeros, as one that does not know them
	UDPOff                  // the server is never asked: it carries no UDP
	UDPChain                // zeros; behind another server its relay is reached by that one's
)

// UDPUse is what becomes of UDP that a rule with servers decides.
type UDPUse uint8

// The uses.
const (
	UDPSocks  UDPUse = iota // its servers carry it; it is refused if they cannot
	UDPDeny                 // as a DENY rule would have it
	UDPDirect               // as a DIRECT rule would have it
)

// Server is a SOCKS server as the rules name it.
type Server struct {
	Name       string     // as written: the word of a SERVER line, or the endpoint itself
	Host       string     // a name to be resolved by this host; empty: Addr is valid
	Addr       netip.Addr // where it is; invalid if Host is set
	Port       uint16     // TCP
	Type       Action     // of type=: Socks5, Socks4, Socks4A or HTTP; Socks: not stated
	TLS        bool       // it is spoken to by TLS
	SNI        string     // the name that its certificate is for; empty: Host or Addr
	Source     netip.Addr // of this host, from which it is connected to; invalid: any
	If         string     // of this host, by which; empty: any
	Credential string     // name of the user name and password to use; empty: none
	Pipeline   Pipeline
	UDP        UDPMode
	Cold       bool   // no connections are made to it ahead of need
	Flows      int    // that it is given at once; 0: no limit
	Handshakes int    // that are under way with it at once; 0: no limit
	File       string // where it was first written
	Line       int
	Col        int
}

// AddrPort returns where the server listens; with Host set only the port is
// valid.
func (s *Server) AddrPort() netip.AddrPort { return netip.AddrPortFrom(s.Addr, s.Port) }

// Chain is the way to a destination: its hops, the nearest first. It has at
// least one.
type Chain []*Server

// Protocol returns what hop i is asked in, by a rule of an action: the last one
// in that of the action, the others as their type= says, or else SOCKS5. It is
// Socks, Socks4, Socks4A, Socks5 or HTTP.
func (c Chain) Protocol(i int, a Action) Action {
	switch s := c[i]; {
	case i == len(c)-1 && (a != Socks || s.Type == Socks):
		return a
	case s.Type != Socks:
		return s.Type
	}
	return Socks5
}

// CarriesUDP tells whether a rule of an action can ask the chain to carry UDP:
// by SOCKS version 5 at each hop, none behind TLS, and all but the first with
// udp=chain.
func (c Chain) CarriesUDP(a Action) bool {
	for i, s := range c {
		if p := c.Protocol(i, a); p != Socks5 && p != Socks || s.TLS || s.UDP == UDPOff || i > 0 && s.UDP != UDPChain {
			return false
		}
	}
	return true
}

// String returns the chain as the language writes it.
func (c Chain) String() string {
	if len(c) == 1 {
		return c[0].Name
	}
	names := make([]string, len(c))
	for i, s := range c {
		names[i] = s.Name
	}
	return strings.Join(names, ">")
}

// Protocols says which transport protocols a rule or a Block is about.
type Protocols uint8

// The protocols; AnyProtocol includes those that are neither TCP nor UDP,
// unless the rule has ports.
const (
	AnyProtocol Protocols = iota
	OnlyTCP
	OnlyUDP
)

// By says which flows a rule is about: those with a name, those without, both.
type By uint8

// What a rule can be restricted to.
const (
	ByAny By = iota
	ByName
	ByAddress
)

// PortRange is a range of ports, both ends included.
type PortRange struct{ From, To uint16 }

// Rule is one line that decides flows. It is immutable.
type Rule struct {
	File  string // empty: the DEFAULT that no line states
	Line  int
	Text  string // as written, blanks and comment aside
	Index int    // its place in Table.Rules

	Action  Action
	Servers []Chain // of a proxied rule, in the order written
	Balance Strategy
	Reject  Reject
	UDP     UDPUse        // of a proxied rule that is not about TCP alone; see ActionFor
	Idle    time.Duration // as Limits.Idle and Limits.UDP, for its flows; 0: not stated
	Log     bool          // each flow is worth a line in the log
	Tag     string        // goes into that line
	Default bool          // the DEFAULT, which matches what no other rule matches

	Protocols Protocols
	Ports     []PortRange // sorted, disjoint; empty: any
	Client                // who the flow is from
	Program   string      // of EXCLUDE-MODULE: that of the flow's process, a path or a last part of one; no packet shows it
	By        By
	dest      dest

	col, number int // of the first word, and of the statement, for messages
}

// dest is a destination, taken apart into what is looked up in different
// places. By is already applied to it.
type dest struct {
	prefixes []netip.Prefix // of addresses; masked
	anyName  bool           // every flow with a name
	names    nameList       // exact, lower case, no final dot
	suffixes nameList       // "*.example.org" as "example.org"
	list     *list          // that all of this is from; nil: it is spelled out
}

// Position returns FILE:LINE, or "DEFAULT" for the one that no line states.
func (r *Rule) Position() string {
	if r.File == "" {
		return "DEFAULT"
	}
	return r.File + ":" + strconv.Itoa(r.Line)
}

// Bare returns a rule that says the same of itself and holds no LIST, for who
// keeps it longer than its Table: r, or a copy of it.
func (r *Rule) Bare() *Rule {
	if r.dest.list == nil {
		return r
	}
	bare := *r
	bare.dest = dest{}
	return &bare
}

// ActionFor returns what the rule does with flows of a network: Action, but for
// UDP what udp= says of a rule with servers. A rule with servers of which none
// carries UDP (see CarriesUDP) refuses it all the same.
func (r *Rule) ActionFor(n flow.Network) Action {
	if n == flow.UDP && r.Action.proxied() {
		switch r.UDP {
		case UDPDeny:
			return Deny
		case UDPDirect:
			return Direct
		}
	}
	return r.Action
}

// CarriesUDP tells whether the rule has a server that can be asked to carry
// UDP; see Chain.CarriesUDP. What the server answers is another matter.
func (r *Rule) CarriesUDP() bool {
	a := r.ActionFor(flow.UDP)
	return a.proxied() && slices.ContainsFunc(r.Servers, func(c Chain) bool { return c.CarriesUDP(a) })
}

// conditional tells whether the rule asks for more than a destination.
func (r *Rule) conditional() bool { return r.partial() || r.byClient() }

// partial tells whether the rule is about some ports or protocols only.
func (r *Rule) partial() bool { return r.Protocols != AnyProtocol || len(r.Ports) > 0 }

// byClient tells whether the rule asks who the client is.
func (r *Rule) byClient() bool { return !r.Client.anyone() }

// anyAddress tells whether the rule's destination has every address of both
// families.
func (r *Rule) anyAddress() bool {
	v4, v6 := r.anyAddressOf()
	return v4 && v6
}

func (r *Rule) anyAddressOf() (v4, v6 bool) {
	for _, p := range r.dest.prefixes {
		if p.Bits() == 0 {
			if p.Addr().Is4() {
				v4 = true
			} else {
				v6 = true
			}
		}
	}
	return v4, v6
}

// ownName tells whether the rule names names, as opposed to catching all.
func (r *Rule) ownName() bool { return len(r.dest.names.refs)+len(r.dest.suffixes.refs) > 0 }

// Limits are the durations of TIMEOUT lines; zero: not stated.
type Limits struct {
	Connect    time.Duration // TCP to a server, or to a DIRECT destination
	Handshake  time.Duration // from the greeting to the server's reply
	Idle       time.Duration // a flow without a byte in either direction
	HalfClosed time.Duration // the same once one direction has ended
	UDP        time.Duration // the same for UDP, which has no end of its own
	DNS        time.Duration // for an answer from a resolver
}

// Health is what HEALTH lines say; zero: not stated.
type Health struct {
	MaxFail   int           // faults in a row that make a server bad
	BadExpire time.Duration // how long it then waits for a flow to try it, if no probe finds it well
	Interval  time.Duration // between probes of a server that is well
	Probe     flow.Target   // what a probe has a server connect to
}

// ResolveMode is where a name is resolved.
type ResolveMode uint8

// The modes of RESOLVE.
const (
	ResolveRemote     ResolveMode = iota // by the SOCKS server
	ResolveLocal                         // by this host
	ResolveLocalFirst                    // by this host if it can
)

// resolveModes are the words of the language.
var resolveModes = map[string]ResolveMode{"remote": ResolveRemote, "local": ResolveLocal, "local-then-remote": ResolveLocalFirst}

// below tells whether name is a name below domain (not the domain itself).
func below(name, domain string) bool {
	n := len(name) - len(domain)
	return n > 1 && name[n-1] == '.' && name[n:] == domain
}
