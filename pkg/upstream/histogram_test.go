package upstream

import (
	"testing"
	"time"
)

// TestHistogram: a bucket holds what is in those below it, and what took longer
// than all of them is in the count alone.
func TestHistogram(t *testing.T) {
	var s spans
	if h := s.histogram(); h.Count != 0 || h.Buckets != nil {
		t.Errorf("of nothing: %+v", h)
	}
	for _, d := range []time.Duration{0, time.Millisecond, 2 * time.Millisecond, 30 * time.Second, time.Minute} {
		s.add(d)
	}
	h := s.histogram()
	if h.Count != 5 || h.Sum != 90.003 || len(h.Buckets) != len(bounds) {
		t.Errorf("%+v", h)
	}
	for bound, want := range map[float64]uint64{.001: 2, .0025: 3, 10: 3, 30: 4} {
		if got := h.Buckets[bound]; got != want {
			t.Errorf("at most %v s: %d, want %d", bound, got, want)
		}
	}
}
