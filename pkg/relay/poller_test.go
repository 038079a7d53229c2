package relay

import (
	"testing"

	"golang.org/x/sys/unix"
)

// A loop may end while somebody is about to wake it: the descriptor can be
// another's by then.
func TestWakeAfterEnd(t *testing.T) {
	var p poller
	if err := p.open(); err != nil {
		t.Fatal(err)
	}
	p.release()
	for {
		fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
		if err != nil {
			t.Fatal(err)
		}
		defer unix.Close(fd)
		if fd < p.wakefd {
			continue
		}
		if fd > p.wakefd {
			t.Fatalf("descriptor %d is taken", p.wakefd)
		}
		p.wake()
		if _, err := unix.Read(fd, make([]byte, 8)); err != unix.EAGAIN {
			t.Errorf("another's eventfd was written: %v", err)
		}
		return
	}
}
