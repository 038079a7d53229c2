package daemon

import (
	"fmt"
	"os"
	"time"

	"github.com/tproxyd/tproxyd/pkg/redirect"
	"golang.org/x/sys/unix"
)

// Limit is something of which there is only so much.
type Limit struct {
	Name string `json:"name"`
	Used int    `json:"used"`
	Max  int    `json:"max"`
}

// limits are all of them, in an order that does not change.
func (s *Status) limits(tracked redirect.Tracked) []Limit {
	used, most := descriptors()
	return []Limit{
		{"descriptors", used, most},
		{"sockets", s.Relay.Conns, s.Relay.MaxConns},
		{"pipes", s.Relay.Pipes, s.Relay.MaxPipes},
		{"udp_sessions", s.UDP.Sessions, s.UDP.MaxSessions},
		{"udp_flows", s.UDP.Flows, s.UDP.MaxFlows},
		{"udp_sockets", s.UDP.Sockets, s.UDP.MaxSockets},
		{"names", s.DNS.Pool.Names, s.DNS.Pool.Max},
		{"conntrack", tracked.Flows, tracked.Max},
	}
}

// descriptors returns how many descriptors the process has, and may have. If it
// has not even one for looking, all are taken.
func descriptors() (used, most int) {
	var r unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &r); err == nil {
		most = int(min(r.Cur, 1<<31))
	}
	dir, err := os.Open("/proc/self/fd")
	if err != nil {
		return most, most
	}
	defer dir.Close()
	names, _ := dir.Readdirnames(-1)
	return len(names) - 1, most // without dir
}

const (
	troubleFor = time.Minute // how long what has happened is trouble
	nearLimit  = 0.9         // how much of a limit is
)

// trouble says what is wrong, one sentence each.
func (s *Status) trouble(now time.Time) (list []string) {
	say := func(format string, args ...any) { list = append(list, fmt.Sprintf(format, args...)) }
	if r := s.Relay; r.LastRefused.After(now.Add(-troubleFor)) {
		say("connections are reset, or not made, for want of descriptors: %d so far, the last %v ago; raise LimitNOFILE= of the unit", r.Refused, now.Sub(r.LastRefused).Round(time.Second))
	}
	if e := s.DNS.Pool.StoreError; e != "" {
		say("synthetic addresses are not kept on disk, and the newest will not outlive a restart: %s", e)
	}
	if e := s.Kernel.Error; e != "" {
		say("the kernel's counters cannot be read: %s", e)
	}
	for _, l := range s.Limits {
		// Every pipe is of use, and a name that is not used gives way to another.
		switch near := l.Max > 0 && float64(l.Used) >= nearLimit*float64(l.Max); {
		case l.Name == "pipes" || l.Name == "names" || !near:
		case l.Name == "conntrack":
			say("the kernel tracks %d flows of %d, and then drops packets of new ones: raise net.netfilter.nf_conntrack_max", l.Used, l.Max)
		default:
			say("%s: %d of %d are in use", l.Name, l.Used, l.Max)
		}
	}
	p := s.DNS.Pool
	if p.Max > 0 && float64(p.Pinned) >= nearLimit*float64(p.Max) {
		say("names: %d of %d have living flows, and no other can take their place; use a larger pool", p.Pinned, p.Max)
	}
	if p.LastFull.After(now.Add(-troubleFor)) {
		say("names: no synthetic address is free: %d questions without an answer so far, the last %v ago; use a larger pool", p.Full, now.Sub(p.LastFull).Round(time.Second))
	}
	bad := 0
	for _, u := range s.Servers {
		if !u.Up {
			bad++
		}
	}
	if bad > 0 {
		say("%d of %d servers are at fault", bad, len(s.Servers))
	}
	return list
}
