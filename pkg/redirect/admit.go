package redirect

import (
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"time"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"github.com/tproxyd/tproxyd/pkg/flow"
)

// Admission lets an address pass for a time, as if the first rule of all sent
// it DIRECT.
type Admission struct {
	Addr    netip.Addr
	Scopes  []Scope       // what of it; empty: every port and protocol
	Timeout time.Duration // how long; less than a second counts as one
}

// Scope is a part of what an address can be asked.
type Scope struct {
	Network flow.Network
	Ports   PortRange // the zero value is every port
}

// maxScopePorts is how many ports a Scope may name one by one.
const maxScopePorts = 256

// admission is one element of the dynamic sets: proto is 0 for any protocol,
// port 0 for any port.
type admission struct {
	addr  netip.Addr
	proto l4
	port  uint16
}

func (a admission) part() part {
	switch {
	case a.proto == 0:
		return partAddr
	case a.port == 0:
		return partProto
	}
	return partPort
}

// setElements are elements of one set.
type setElements struct {
	set      *set
	elements []nftables.SetElement
}

// expand returns the elements that an admission means.
func (a Admission) expand() ([]admission, error) {
	addr := a.Addr.Unmap().WithZone("")
	if !addr.IsValid() {
		return nil, fmt.Errorf("redirect: admission of no address")
	}
	if len(a.Scopes) == 0 {
		return []admission{{addr: addr}}, nil
	}
	var es []admission
	for _, s := range a.Scopes {
		p := tcp
		if s.Network == flow.UDP {
			p = udp
		}
		if s.Ports == (PortRange{}) || s.Ports == (PortRange{0, 65535}) {
			es = append(es, admission{addr, p, 0})
			continue
		}
		n := int(s.Ports.To) - int(s.Ports.From) + 1
		if s.Ports.From == 0 || n < 1 || n > maxScopePorts {
			return nil, fmt.Errorf("redirect: admission of %s: ports %d-%d: at most %d can be named", addr, s.Ports.From, s.Ports.To, maxScopePorts)
		}
		for port := int(s.Ports.From); port <= int(s.Ports.To); port++ {
			es = append(es, admission{addr, p, uint16(port)})
		}
	}
	return es, nil
}

// admissions is what is in the dynamic sets because of us, and until when. It
// is what a table that somebody else has removed is filled from again.
type admissions struct {
	until map[admission]time.Time
	prune int // size at which what has ended is forgotten
}

// add enters what a list of admissions means, and returns the elements whose
// time has become longer. An address that one name keeps for an hour does not
// lose it because another name has it for a minute.
func (s *admissions) add(list []Admission, now time.Time) ([]admission, error) {
	longer := map[admission]bool{}
	for _, a := range list {
		es, err := a.expand()
		if err != nil {
			return nil, err
		}
		until := now.Add(max(a.Timeout, time.Second))
		for _, e := range es {
			// Answers from a cache are good to a second, so each would be a
			// little longer than the one before.
			if until.Sub(s.until[e]) >= time.Second {
				s.until[e] = until
				longer[e] = true
			}
		}
	}
	if len(s.until) > s.prune {
		maps.DeleteFunc(s.until, func(_ admission, until time.Time) bool { return !now.Before(until) })
		s.prune = max(1024, 2*len(s.until))
	}
	return slices.Collect(maps.Keys(longer)), nil
}

func (s *admissions) clear() { s.until, s.prune = map[admission]time.Time{}, 1024 }

// all returns what has not ended, never nil.
func (s *admissions) all(now time.Time) []setElements {
	var es []admission
	for e, until := range s.until {
		if until.After(now) {
			es = append(es, e)
		}
	}
	return s.elements(es, now)
}

// elements sorts elements into their sets, with the time that is left to each.
func (s *admissions) elements(es []admission, now time.Time) []setElements {
	type where struct {
		f family
		p part
	}
	index := map[where]int{}
	sets := []setElements{}
	for _, e := range es {
		w := where{familyOf(e.addr), e.part()}
		i, ok := index[w]
		if !ok {
			i = len(sets)
			index[w] = i
			sets = append(sets, setElements{set: dynamicSet(admittedSet, w.f, w.p)})
		}
		left := max(s.until[e].Sub(now), time.Second).Truncate(time.Millisecond)
		sets[i].elements = append(sets[i].elements, nftables.SetElement{Key: w.p.key(e.addr, e.proto, e.port), Timeout: left})
	}
	return sets
}

// Admit lets addresses pass from before it returns until their times are over,
// to a second; what is admitted already stays at least as long as it would have.
// An error can be that a set is full: each holds 131,072. An address
// stays on while packets to it keep coming, and for two hours and four minutes
// (RFC 5382) after the last of them, so that a connection does not end with the
// DNS answer that it was made of. Only what is in force is admitted: without an
// Apply there is an error.
func (r *Redirect) Admit(a []Admission) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.plan == nil || r.lent {
		return errNotApplied
	}
	now := time.Now()
	es, err := r.admitted.add(a, now)
	if err != nil || len(es) == 0 {
		return err
	}
	msgs, err := r.admitMessages(r.admitted.elements(es, now))
	if err == nil {
		err = r.nf.commit(msgs)
	}
	if err != nil {
		for _, e := range es {
			delete(r.admitted.until, e) // so that the next attempt is made
		}
		return err
	}
	return nil
}

// admitMessages adds elements. A kernel before 6.12 keeps the time of an
// element that is there already, so there it is taken out in between; to add
// it first makes that possible whether it was there or not.
func (r *Redirect) admitMessages(sets []setElements) ([]netlink.Message, error) {
	nt := &nftables.Table{Name: tableName, Family: nftables.TableFamilyINet}
	return record(func(c *nftables.Conn) error {
		for _, s := range sets {
			for els := range slices.Chunk(s.elements, chunk) {
				ns := s.set.lib(nt, 1)
				if !r.can.refresh {
					bare := slices.Clone(els)
					for i := range bare {
						bare[i].Timeout = 0
					}
					if err := c.SetAddElements(ns, els); err != nil {
						return err
					}
					if err := c.SetDeleteElements(ns, bare); err != nil {
						return err
					}
				}
				if err := c.SetAddElements(ns, els); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// Admitted returns what the kernel lets pass because of Admit at this moment,
// with the time that is left, addresses in use included; before the first Apply,
// what a Redirect before this one has left. It is what a caller
// looks through whose rules have changed, to Readmit what is still DIRECT.
func (r *Redirect) Admitted() ([]Admission, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.lent || r.plan == nil && !r.recalled {
		return nil, errNotApplied
	}
	return r.inKernel()
}

// inKernel is Admitted with the lock held.
func (r *Redirect) inKernel() ([]Admission, error) {
	longest := map[admission]time.Duration{}
	for _, f := range []family{ip4, ip6} {
		for q := partAddr; q <= partPort; q++ {
			for _, kind := range []string{admittedSet, r.live} {
				err := r.nf.elements(dynamicSet(kind, f, q).name, func(e element) {
					if a, ok := parseKey(f, q, e.key); ok {
						longest[a] = max(longest[a], e.left)
					}
				})
				if err != nil {
					return nil, err
				}
			}
		}
	}
	list := make([]Admission, 0, len(longest))
	for a, left := range longest {
		adm := Admission{Addr: a.addr, Timeout: left}
		if a.proto != 0 {
			s := Scope{Ports: PortRange{a.port, a.port}}
			if a.proto == udp {
				s.Network = flow.UDP
			}
			adm.Scopes = []Scope{s}
		}
		list = append(list, adm)
	}
	return list, nil
}

// parseKey is the reverse of part.key.
func parseKey(f family, p part, key []byte) (admission, bool) {
	n := 4
	if f == ip6 {
		n = 16
	}
	if len(key) != n+4*int(p) {
		return admission{}, false
	}
	a := admission{}
	a.addr, _ = netip.AddrFromSlice(key[:n])
	if p >= partProto {
		a.proto = l4(key[n])
	}
	if p >= partPort {
		a.port = uint16(key[n+4])<<8 | uint16(key[n+5])
	}
	return a, true
}
