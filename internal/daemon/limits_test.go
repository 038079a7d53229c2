package daemon

import (
	"strings"
	"testing"
	"time"

	"github.com/tproxyd/tproxyd/pkg/redirect"
)

// What has happened is trouble for a while, and then no more.
func TestTroubleNoFreeAddress(t *testing.T) {
	now := time.Now()
	var s Status
	if list := s.trouble(now); list != nil {
		t.Errorf("nothing happened: %q", list)
	}
	s.DNS.Pool.Full, s.DNS.Pool.LastFull = 3, now.Add(-time.Second)
	if list := s.trouble(now); len(list) != 1 || !strings.Contains(list[0], "no synthetic address is free: 3 questions") {
		t.Errorf("%q", list)
	}
	if list := s.trouble(now.Add(2 * troubleFor)); list != nil {
		t.Errorf("long after: %q", list)
	}
}

// What is nearly full is trouble, but for what is meant to be.
func TestTroubleNearLimit(t *testing.T) {
	var s Status
	s.Limits = s.limits(redirect.Tracked{Flows: 899, Max: 1000})
	if list := s.trouble(time.Now()); list != nil {
		t.Errorf("%q", list)
	}
	s.Relay.Conns, s.Relay.MaxConns, s.Relay.Pipes, s.Relay.MaxPipes = 90, 100, 10, 10
	s.Limits = s.limits(redirect.Tracked{Flows: 900, Max: 1000})
	list := s.trouble(time.Now())
	if len(list) != 2 || list[0] != "sockets: 90 of 100 are in use" || !strings.Contains(list[1], "900 flows of 1000") || !strings.Contains(list[1], "nf_conntrack_max") {
		t.Errorf("%q", list)
	}
}
