package daemon

import (
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"time"

	"github.com/coreos/go-systemd/v22/activation"
	"github.com/tproxyd/tproxyd/internal/handover"
	"golang.org/x/sys/unix"
)

// systemd can keep open files for a service while it restarts
// (FileDescriptorStoreMax= in systemd.service(5)). It keeps the sockets that flows
// and questions come to, so that what comes between two processes waits there for
// the second one. When the service is stopped for good it closes them, and what
// nobody listens for is refused, as after a crash.

// passed returns what systemd has kept; nil: nothing.
func passed() *estate {
	files := activation.Files(true)
	if len(files) == 0 {
		return nil
	}
	e := &estate{}
	for _, f := range files {
		e.add(f.Name(), f)
	}
	return e
}

// store has systemd keep the sockets, if it says that it does, as it has since
// version 254; true: it has them.
func (d *Daemon) store() bool {
	path := os.Getenv("NOTIFY_SOCKET")
	room, _ := strconv.Atoi(os.Getenv("FDSTORE"))
	if path == "" || room == 0 || d.enclosure != nil {
		return false
	}
	e := &estate{}
	defer e.close()
	err := d.addSockets(e)
	if err == nil && len(e.files) > room {
		err = fmt.Errorf("daemon: there are %d, and it keeps %d: raise FileDescriptorStoreMax=", len(e.files), room)
	}
	if err == nil {
		err = e.store(path)
	}
	if err != nil {
		d.log.Warn("systemd does not keep the sockets: while the service restarts, new flows are refused", "err", err)
	}
	return err == nil
}

func (e *estate) store(path string) error {
	c, err := net.DialUnix("unixgram", nil, &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		return err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(stepLimit))
	for _, name := range []string{fileTCP, fileUDP, fileDNSUDP, fileDNSTCP} {
		// Those of before are the same, or of no use any longer.
		if _, err := c.Write([]byte("FDSTOREREMOVE=1\nFDNAME=" + name)); err != nil {
			return err
		}
		for files := range slices.Chunk(e.of(name), handover.AtOnce) {
			rights, err := handover.Rights(files)
			if err == nil {
				err = sendWith(c, "FDSTORE=1\nFDNAME="+name, rights)
			}
			if err != nil {
				return err
			}
		}
	}
	return nil
}

// sendWith sends a text with a control message; net.UnixConn does not for a
// connected datagram socket.
func sendWith(c *net.UnixConn, text string, control []byte) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	if e := raw.Write(func(fd uintptr) bool {
		err = unix.Sendmsg(int(fd), []byte(text), control, nil, 0)
		return err != unix.EAGAIN
	}); e != nil {
		return e
	}
	return os.NewSyscallError("sendmsg", err)
}
