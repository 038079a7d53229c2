package daemon

import "testing"

func TestCrowd(t *testing.T) {
	var c crowd
	for i, s := range []struct {
		n     int
		begun uint64
		inUse int
		calm  bool
	}{
		{0, 0, 5 << 20, true}, // what was read at the start
		{0, 0, 6 << 20, false},
		{900, 900, 9 << 20, false}, // they come
		{3000, 3000, 15 << 20, false},
		{3100, 3100, 16 << 20, true}, // few do
		{3100, 3100, 17 << 20, false},
		{3100, 9000, 21 << 20, false}, // others in their place
		{3100, 9010, 21 << 20, true},
		{800, 9010, 21 << 20, false}, // they go
		{775, 9010, 21 << 20, true},
		{770, 9010, 21 << 20, false},
		{0, 9010, 21 << 20, true},
		{0, 9010, 21 << 20, false},
	} {
		got := c.calm(s.n, s.begun, func() int { return s.inUse })
		if got != s.calm {
			t.Errorf("step %d, %d of %d flows with %d bytes in use: calm is %v, want %v", i, s.n, s.begun, s.inUse, got, s.calm)
		}
		if got {
			c.kept = s.inUse
		}
	}
	if inUse() < 100<<10 {
		t.Errorf("%d bytes in use", inUse())
	}
}
