package daemon

import (
	"strings"
	"testing"
	"time"
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
