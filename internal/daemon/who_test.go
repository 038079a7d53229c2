package daemon

import (
	"bufio"
	"strings"
	"testing"
)

func TestIDMap(t *testing.T) {
	m := readIDMap(bufio.NewScanner(strings.NewReader("         0       1000          1\n         1     100000      65536\n")))
	for inside, want := range map[uint32]uint32{0: 1000, 1: 100000, 100: 100099, 65536: 165535, 65537: 65537, 1<<32 - 1: 1<<32 - 1} {
		if got := m.outside(inside); got != want {
			t.Errorf("%d is %d outside, want %d", inside, got, want)
		}
	}
	host := readIDMap(bufio.NewScanner(strings.NewReader("         0          0 4294967295\n")))
	if got := host.outside(1<<32 - 1); got != 1<<32-1 {
		t.Errorf("nobody is %d", got)
	}
}
