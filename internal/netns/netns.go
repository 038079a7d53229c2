// Package netns makes network namespaces and lets work be done inside them.
//
// A namespace belongs to a thread, not to a process or a goroutine, so each
// Namespace owns one thread that lives in it for good and does nothing but the
// work handed to it. Sockets made there stay in the namespace whichever
// goroutine uses them afterwards, and processes started there are born there.
package netns

import (
	"fmt"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// Namespace is a network namespace with a thread of this process inside. Its
// methods may be used by any number of goroutines. Close ends it.
type Namespace struct {
	work chan func()
	done chan struct{} // closed when the thread has ended
	path string
	once sync.Once
}

// New makes an empty network namespace, its loopback interface still down. It
// needs CAP_SYS_ADMIN.
func New() (*Namespace, error) {
	return start(func() error { return unix.Unshare(unix.CLONE_NEWNET) })
}

// Open enters the namespace at path, such as /run/netns/NAME or
// /proc/PID/ns/net.
func Open(path string) (*Namespace, error) {
	return start(func() error {
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		return unix.Setns(int(f.Fd()), unix.CLONE_NEWNET)
	})
}

func start(enter func() error) (*Namespace, error) {
	n := &Namespace{work: make(chan func()), done: make(chan struct{})}
	entered := make(chan error)
	go n.run(enter, entered)
	if err := <-entered; err != nil {
		return nil, fmt.Errorf("netns: %w", err)
	}
	return n, nil
}

// run is the life of the namespace's thread. It never unlocks the thread: Go
// ends a locked thread together with its goroutine, and so nothing else of the
// process can come to run in the namespace.
func (n *Namespace) run(enter func() error, entered chan<- error) {
	defer close(n.done)
	runtime.LockOSThread()
	if err := enter(); err != nil {
		entered <- err
		return
	}
	n.path = fmt.Sprintf("/proc/%d/task/%d/ns/net", os.Getpid(), unix.Gettid())
	entered <- nil
	for f := range n.work {
		f()
	}
}

// Do runs f on the namespace's thread and returns its error. One f runs at a
// time, so it must not block for long and must not call Do.
func (n *Namespace) Do(f func() error) error {
	result := make(chan error, 1)
	n.work <- func() { result <- f() }
	return <-result
}

// Path names the namespace for others as long as it is not closed.
func (n *Namespace) Path() string { return n.path }

// Close ends the thread. The namespace itself lives on while a socket or a
// process is in it. Do must not be called afterwards.
func (n *Namespace) Close() {
	n.once.Do(func() { close(n.work) })
	<-n.done
}
