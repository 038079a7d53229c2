package redirect

import (
	"fmt"
	"net"
)

// Count is a number of packets and of their bytes.
type Count struct{ Packets, Bytes uint64 }

// Counters is what the table has counted since it was made, in packets. A
// reload does not reset it.
type Counters struct {
	Diverted  Count // to the TCP listener: the first packet of each connection
	Datagrams Count // to the UDP listener or the socket of a flow: each one
	DNS       Count // to the DNS listeners: each datagram, the first packet of each connection
	Direct    Count // may pass
	Answers   Count // left by one of Plan.Interfaces, and are not ours: answers to what is direct, and what this host says itself
	Denied    Count // by a rule that says DENY, or for want of a rule
	Refused   Count // would be proxied, but nobody is there, or it is neither TCP nor UDP
	Guard     Count // had a divert mark and was about to leave
}

// Counters reads the counters of the table.
func (r *Redirect) Counters() (Counters, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || r.lent {
		return Counters{}, net.ErrClosed
	}
	n, err := r.nf.counters()
	if err != nil {
		return Counters{}, fmt.Errorf("redirect: counters: %w", err)
	}
	return Counters{Diverted: n[countDiverted], Datagrams: n[countDatagrams], DNS: n[countDNS], Direct: n[countDirect], Answers: n[countAnswers],
		Denied: n[countDenied], Refused: n[countRefused], Guard: n[countGuard]}, nil
}
