package upstream

import (
	"fmt"
	"time"
)

// Known is what a pool knows of a server, for the pool of a process that goes on
// where this one stops.
type Known struct {
	Server     string // which one
	Fails      int    // faults in a row
	Bad        bool   // it is asked last, and then:
	Half       bool   // a probe has found it well
	Retry      time.Time
	Setup      time.Duration
	Trip       time.Duration
	Version    uint8
	Pipeline   Pipeline
	Learned    time.Time
	NoUDP      time.Time
	NoIPv6     time.Time
	Answered   spans
	Failed     spans
	Carried    uint64
	Faults     uint64
	Associated uint64
}

// id tells servers apart in another process.
func (k key) id() string {
	return fmt.Sprintf("%q %q %v %v %v %q", k.name, k.host, k.addr, k.protocol, k.tls, k.via)
}

// Known returns what is known of the servers in use.
func (p *Pool) Known() (list []Known) {
	p.mu.Lock()
	all := make(map[key]*health, len(p.health))
	for k, h := range p.health {
		all[k] = h
	}
	p.mu.Unlock()
	for k, h := range all {
		h.mu.Lock()
		list = append(list, Known{
			Server: k.id(), Fails: h.fails, Bad: h.bad, Half: h.half, Retry: h.retry, Setup: h.setup, Trip: h.trip.best, Version: h.version,
			Pipeline: h.pipeline, Learned: h.learned, NoUDP: h.noUDP, NoIPv6: h.noIPv6,
			Answered: h.answered, Failed: h.failed, Carried: h.carried, Faults: h.faults, Associated: h.associated,
		})
		h.mu.Unlock()
	}
	return list
}

// Adopt takes over what another pool knew, as far as the servers are in use and no
// flow has asked them yet. A server that is bad is probed from now on.
func (p *Pool) Adopt(list []Known) {
	by := map[string]Known{}
	for _, k := range list {
		by[k.Server] = k
	}
	p.mu.Lock()
	all := map[*health]Known{}
	for k, h := range p.health {
		if known, ok := by[k.id()]; ok {
			all[h] = known
		}
	}
	p.mu.Unlock()
	for h, k := range all {
		h.mu.Lock()
		h.fails, h.bad, h.half, h.retry = k.Fails, k.Bad, k.Half, k.Retry
		h.setup, h.version, h.pipeline, h.learned, h.noUDP, h.noIPv6 = k.Setup, k.Version, k.Pipeline, k.Learned, k.NoUDP, k.NoIPv6
		if k.Trip > 0 {
			h.trip.saw(k.Trip, time.Now())
		}
		h.answered, h.failed, h.carried, h.faults, h.associated = k.Answered, k.Failed, k.Carried, k.Faults, k.Associated
		if h.bad {
			h.watch()
		}
		h.mu.Unlock()
	}
}
