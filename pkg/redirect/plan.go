package redirect

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
)

// Networks says which transport protocols a Block is about. The zero value is
// Any.
type Networks uint8

// What a Block can be about.
const (
	Any Networks = iota // every protocol; with ports: TCP and UDP
	TCP
	UDP
)

// String returns "any", "tcp" or "udp".
func (n Networks) String() string {
	switch n {
	case TCP:
		return "tcp"
	case UDP:
		return "udp"
	}
	return "any"
}

// Range is a range of addresses of one family, both ends included.
type Range struct {
	From, To netip.Addr

	// Tag is what is counted together, see Redirect.Tallies; empty: nothing is. It
	// has no meaning in Block.Proxy.
	Tag string
}

// PortRange is a range of ports, both ends included.
type PortRange struct{ From, To uint16 }

// Block is a run of rules with the same conditions. A packet that meets all of
// them and whose destination is in one of the lists is decided by it; the
// lists must not share an address. A packet that no block decides is denied.
type Block struct {
	Networks Networks
	Ports    []PortRange    // destination ports; empty: any, and with Any every protocol
	Src      []netip.Prefix // sources; empty: any
	Ifs      []string       // interfaces that the packet entered by; empty: any, and this host's own too
	Client                  // and who else it is from

	// Final makes the block decide about what Admit lets in too; else that
	// passes whatever the block says.
	Final bool

	Direct []Range // may pass
	Deny   []Range // are rejected: TCP by a reset, all else as prohibited
	ICMP   []Range // are rejected: all as prohibited
	Drop   []Range // are not answered
	Proxy  []Range // are diverted to us if TCP or UDP, else refused
}

// Ports are those of the transparent listeners, on 127.0.0.1 and on [::1]
// alike. To a zero port nothing is diverted: it is refused at once, and so the
// zero value makes the closed table.
type Ports struct {
	TCP    uint16 // flows
	UDP    uint16 // datagrams of flows
	DNSTCP uint16 // DNS over TCP
	DNSUDP uint16 // DNS over UDP
}

// Plan is what the kernel should do. It must not be changed once it was handed
// to Apply, which keeps it for Heal.
type Plan struct {
	Interfaces []string         // flows that enter here; empty: no forwarded traffic
	Local      bool             // this host's own flows too
	DNS        bool             // port 53, whichever address it is sent to, goes to the DNS listeners
	Ports      Ports            // where it goes
	Marks      Marks            // our bits
	Table      int              // routing table, to be used by nobody else
	Blocks     []Block          // in order: the first that decides
	Synthetic  []netip.Prefix   // stand for names: TCP and UDP are always diverted, all else refused
	Servers    []netip.AddrPort // first hops: their TCP port may always be reached

	// Enclosed makes a namespace of its own, of a command or a container, lead
	// nowhere but to us: flows have a way into the table without an interface
	// and an address, and by interfaces nothing enters or leaves. It goes with
	// Local.
	Enclosed bool
	Keep     []Kept // of an enclosed namespace: what stays as it is

	// DivertDenied has what blocks deny of this host's own TCP and UDP diverted:
	// user space knows of programs what no packet shows.
	DivertDenied bool

	// Log are the tags of which Logged tells each flow that is let pass or refused;
	// the empty one is of addresses that Admit let in.
	Log []string

	Who *Who // what is to be known of those whose flows are diverted; nil: nothing

	// Readmit, if not nil, is what the dynamic sets hold once the plan is in
	// force, in the same transaction. If it is nil they keep what they hold.
	Readmit []Admission
}

// Closed returns the plan of the same host with nobody to divert to: what may
// pass does, what would be diverted is refused.
func (p Plan) Closed() Plan {
	p.Ports = Ports{}
	p.Readmit, p.Who, p.DivertDenied = nil, nil, false
	return p
}

func (p *Plan) check() error {
	var errs []error
	if err := p.Marks.check(); err != nil {
		errs = append(errs, err)
	}
	// 253 to 255 are default, main and local (rtnetlink(7)).
	if p.Table <= 0 || p.Table >= 253 && p.Table <= 255 || p.Table > 1<<31-1 {
		errs = append(errs, fmt.Errorf("redirect: routing table %d: it must be one of its own", p.Table))
	}
	if err := p.checkEnclosure(); err != nil {
		errs = append(errs, err)
	}
	names := slices.Clone(p.Interfaces)
	for _, k := range p.Keep {
		names = append(names, k.Name)
	}
	for i := range p.Blocks {
		names = append(names, p.Blocks[i].Ifs...)
	}
	for _, n := range names {
		if n == "" || len(n) > 15 || n == "." || n == ".." || hasByte(n, "/: \t\n\"*") {
			errs = append(errs, fmt.Errorf("redirect: %q is not the name of an interface", n))
		}
	}
	if slices.Contains(p.Interfaces, "lo") {
		errs = append(errs, errors.New("redirect: lo cannot be intercepted; Local takes this host's own flows"))
	}
	for _, s := range p.Synthetic {
		if !s.IsValid() {
			errs = append(errs, errors.New("redirect: an invalid synthetic prefix"))
		}
	}
	for _, s := range p.Servers {
		if !s.Addr().IsValid() || s.Port() == 0 {
			errs = append(errs, fmt.Errorf("redirect: server %s: no address or no port", s))
		}
	}
	for i := range p.Blocks {
		if err := p.Blocks[i].check(); err != nil {
			errs = append(errs, fmt.Errorf("redirect: block %d: %w", i, err))
		}
	}
	return errors.Join(errs...)
}

// cgroupNames returns the cgroups that the plan names, each once.
func (p *Plan) cgroupNames() (names []string) {
	if p.Who != nil {
		names = append(names, p.Who.Cgroups...)
	}
	for i := range p.Blocks {
		names = append(names, p.Blocks[i].Cgroups...)
	}
	slices.Sort(names)
	return slices.Compact(names)
}

func (b *Block) check() error {
	for _, r := range b.Ports {
		if r.From > r.To {
			return fmt.Errorf("ports %d-%d are the wrong way round", r.From, r.To)
		}
	}
	for _, k := range b.Marks {
		if k.Value&^k.Mask != 0 {
			return fmt.Errorf("mark %#x/%#x: the value must be within the mask", k.Value, k.Mask)
		}
	}
	for _, s := range b.Src {
		if !s.IsValid() {
			return errors.New("an invalid source prefix")
		}
	}
	for _, l := range [][]Range{b.Direct, b.Deny, b.ICMP, b.Drop, b.Proxy} {
		for _, r := range l {
			if !r.From.IsValid() || r.From.Is4() != r.To.Is4() || r.To.Less(r.From) ||
				r.From.Is4In6() || r.To.Is4In6() || r.From.Zone() != "" || r.To.Zone() != "" {
				return fmt.Errorf("%s-%s is not a range of addresses", r.From, r.To)
			}
		}
	}
	return nil
}

func hasByte(s, bytes string) bool {
	for i := range len(s) {
		for j := range len(bytes) {
			if s[i] == bytes[j] {
				return true
			}
		}
	}
	return false
}
