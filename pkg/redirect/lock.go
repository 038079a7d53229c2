package redirect

import (
	"errors"
	"fmt"
	"net"
	"os"

	"golang.org/x/sys/unix"
)

// lockName is an abstract UNIX address (unix(7)); those belong to the network
// namespace, as the table does, and end with their process. It stands for
// owning the table where the kernel knows no owners.
const lockName = "@tproxyd-redirect"

// takeLock returns the lock; ErrInUse if somebody has it who could have a
// table. Anybody may bind an abstract address, so one that an ordinary user
// holds keeps nobody out: then what is returned does nothing.
func takeLock() (net.Listener, error) {
	l, err := net.Listen("unix", lockName)
	if err == nil {
		return l, nil
	}
	if !errors.Is(err, unix.EADDRINUSE) {
		return nil, fmt.Errorf("redirect: %w", err)
	}
	if holder, err := lockHolder(); err == nil && holder != 0 && holder != uint32(os.Geteuid()) {
		return noLock{}, nil
	}
	return nil, ErrInUse
}

// lockHolder returns the user who listens at the address.
func lockHolder() (uint32, error) {
	c, err := net.Dial("unix", lockName)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	raw, err := c.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	if e := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); e != nil {
		return 0, e
	}
	if err != nil {
		return 0, err
	}
	return cred.Uid, nil
}

// noLock is a listener that is none.
type noLock struct{ net.Listener }

func (noLock) Close() error { return nil }
