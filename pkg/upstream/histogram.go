package upstream

import "time"

// bounds are the upper ends of the buckets of a Histogram, in seconds.
var bounds = [...]float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30}

// Histogram says how long something took, how often.
type Histogram struct {
	Count uint64  `json:"count"`
	Sum   float64 `json:"sum_seconds"`
	// Buckets is how often it took at most so many seconds, each with what is in
	// those below it; nil: Count is 0.
	Buckets map[float64]uint64 `json:"-"`
}

// spans counts how long something took. Its owner locks it.
type spans struct {
	Count   uint64
	Sum     time.Duration
	Buckets [len(bounds)]uint64 // not cumulative
}

func (s *spans) add(d time.Duration) {
	s.Count++
	s.Sum += d
	for i, b := range bounds {
		if d.Seconds() <= b {
			s.Buckets[i]++
			return
		}
	}
}

func (s *spans) histogram() Histogram {
	h := Histogram{Count: s.Count, Sum: s.Sum.Seconds()}
	if s.Count == 0 {
		return h
	}
	h.Buckets = make(map[float64]uint64, len(bounds))
	below := uint64(0)
	for i, b := range bounds {
		below += s.Buckets[i]
		h.Buckets[b] = below
	}
	return h
}
