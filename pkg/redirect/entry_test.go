package redirect

import (
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// Signals do not keep the classifier away: without it the guard would stop what is
// DIRECT.
func TestEntryInterrupted(t *testing.T) {
	t.Parallel()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	thread, stop, stopped := unix.Gettid(), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-stop:
				return
			default:
				unix.Tgkill(unix.Getpid(), thread, unix.SIGURG) // as the runtime does
			}
		}
	}()
	defer func() { close(stop); <-stopped }()
	for i := range 1000 {
		fd, err := loadEntry(Marks{Value: 0x7000, Mask: 0xf000})
		if err != nil {
			t.Fatalf("after %d times: %v", i, err)
		}
		unix.Close(fd)
	}
}
