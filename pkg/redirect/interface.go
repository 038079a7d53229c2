package redirect

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// interfaces names the interfaces of a network namespace. It has a socket of
// its own, so that who asks in the path of a flow does not wait for an Apply.
type interfaces struct{ file *os.File }

// dialInterfaces connects in the network namespace of the calling thread.
func dialInterfaces() (*interfaces, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("redirect: socket: %w", err)
	}
	return &interfaces{os.NewFile(uintptr(fd), "interfaces")}, nil
}

func (i *interfaces) close() error { return i.file.Close() }

// InterfaceName returns the name that an interface has at this moment in the
// network namespace of the Redirect, by its index as InboundInterface and
// flow.Datagram give it. It is empty for lo, which flows of this host itself
// come in by, for 0, and for an interface that is gone. It is one system call,
// and waits for nobody.
func (r *Redirect) InterfaceName(index int) string {
	if index <= loIndex {
		return ""
	}
	raw, err := r.interfaces.file.SyscallConn()
	if err != nil {
		return ""
	}
	req, err := unix.NewIfreq("none") // a name is demanded, and replaced
	if err != nil {
		return ""
	}
	req.SetUint32(uint32(index))
	if e := raw.Control(func(fd uintptr) { err = unix.IoctlIfreq(int(fd), unix.SIOCGIFNAME, req) }); e != nil || err != nil {
		return ""
	}
	return req.Name()
}
