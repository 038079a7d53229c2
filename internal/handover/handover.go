// Package handover passes messages with open descriptors from one process to
// another over a UNIX socket (SCM_RIGHTS, unix(7)). It knows nothing of what they
// are for.
package handover

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// What a message may hold at most.
const (
	MaxText  = 64 << 20  // bytes of its JSON
	MaxBlob  = 512 << 20 // bytes behind it
	MaxFiles = 4096

	AtOnce = 200 // descriptors in one call; the kernel takes 253 (SCM_MAX_FD)
)

// A message on the wire: three numbers of four bytes (little-endian) that say
// how long its JSON is, how long its blob, and how many descriptors it has; one
// byte for each call that brings descriptors; the JSON; the blob.
const headLen = 12

// Message is what is passed in one piece.
type Message struct {
	Body  any        // encoded as JSON; to receive, a pointer
	Blob  []byte     // bytes as they are; nil: none
	Files []*os.File // the receiver gets descriptors of its own for the same open files
}

// Conn is one end of the connection. One goroutine may send while another one
// receives.
type Conn struct{ c *net.UnixConn }

// New takes c over, of which nothing may have been read that the other end sent
// by a Conn.
func New(c *net.UnixConn) *Conn { return &Conn{c} }

// Close closes the connection. The other end receives io.EOF.
func (c *Conn) Close() error { return c.c.Close() }

// SetDeadline bounds what is sent and received from now on; the zero time lifts
// the bound.
func (c *Conn) SetDeadline(t time.Time) error { return c.c.SetDeadline(t) }

// SetReadDeadline bounds what is received, likewise.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.c.SetReadDeadline(t) }

// SetWriteDeadline bounds what is sent, likewise.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.c.SetWriteDeadline(t) }

// Peer returns the process at the other end, as it was when it connected or
// listened.
func (c *Conn) Peer() (pid int, uid uint32, err error) {
	raw, err := c.c.SyscallConn()
	if err != nil {
		return 0, 0, err
	}
	var cred *unix.Ucred
	if e := raw.Control(func(fd uintptr) { cred, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }); e != nil {
		err = e
	}
	if err != nil {
		return 0, 0, fmt.Errorf("handover: SO_PEERCRED: %w", err)
	}
	return int(cred.Pid), cred.Uid, nil
}

// Send sends a message. Its files stay the caller's.
func (c *Conn) Send(m Message) error {
	text, err := json.Marshal(m.Body)
	if err != nil {
		return fmt.Errorf("handover: %w", err)
	}
	if len(text) > MaxText || len(m.Blob) > MaxBlob || len(m.Files) > MaxFiles {
		return fmt.Errorf("handover: a message of %d+%d bytes with %d descriptors is too large", len(text), len(m.Blob), len(m.Files))
	}
	head := make([]byte, 0, headLen)
	for _, n := range []int{len(text), len(m.Blob), len(m.Files)} {
		head = binary.LittleEndian.AppendUint32(head, uint32(n))
	}
	if _, err := c.c.Write(head); err != nil {
		return fmt.Errorf("handover: %w", err)
	}
	for files := m.Files; len(files) > 0; {
		n := min(len(files), AtOnce)
		if err := c.sendFiles(files[:n]); err != nil {
			return fmt.Errorf("handover: %w", err)
		}
		files = files[n:]
	}
	for _, b := range [][]byte{text, m.Blob} {
		if len(b) == 0 {
			continue // the other end may have all that it wants, and be gone
		}
		if _, err := c.c.Write(b); err != nil {
			return fmt.Errorf("handover: %w", err)
		}
	}
	return nil
}

func (c *Conn) sendFiles(files []*os.File) error {
	rights, err := Rights(files)
	if err == nil {
		_, _, err = c.c.WriteMsgUnix([]byte{'f'}, rights, nil)
	}
	return err
}

// Rights returns the control message (SCM_RIGHTS) that passes files; AtOnce of
// them at most.
func Rights(files []*os.File) ([]byte, error) {
	fds := make([]int, len(files))
	for i, f := range files {
		// Not Fd, which makes the open file blocking, for everybody who has it.
		raw, err := f.SyscallConn()
		if err == nil {
			err = raw.Control(func(fd uintptr) { fds[i] = int(fd) })
		}
		if err != nil {
			return nil, err
		}
	}
	return unix.UnixRights(fds...), nil
}

// Receive receives a message into body, which may be nil. The files are the
// caller's; if there is an error there are none. The end of the connection
// between two messages is io.EOF.
func (c *Conn) Receive(body any) (m Message, err error) {
	defer func() {
		if err != nil {
			closeAll(m.Files)
			m.Files = nil
		}
	}()
	var head [headLen]byte
	if _, err := io.ReadFull(c.c, head[:]); err != nil {
		if errors.Is(err, io.EOF) {
			return m, io.EOF
		}
		return m, fmt.Errorf("handover: %w", err)
	}
	sizes := [3]uint32{binary.LittleEndian.Uint32(head[:]), binary.LittleEndian.Uint32(head[4:]), binary.LittleEndian.Uint32(head[8:])}
	if sizes[0] > MaxText || sizes[1] > MaxBlob || sizes[2] > MaxFiles {
		return m, fmt.Errorf("handover: a message of %d+%d bytes with %d descriptors is too large", sizes[0], sizes[1], sizes[2])
	}
	text, blob, files := int(sizes[0]), int(sizes[1]), int(sizes[2])
	for len(m.Files) < files {
		got, err := c.receiveFiles()
		m.Files = append(m.Files, got...)
		if err == nil && len(got) != min(files-len(m.Files)+len(got), AtOnce) {
			err = fmt.Errorf("%d descriptors came, of %d: is RLIMIT_NOFILE reached?", len(m.Files), files)
		}
		if err != nil {
			return m, fmt.Errorf("handover: %w", err)
		}
	}
	b := make([]byte, text)
	if _, err := io.ReadFull(c.c, b); err != nil {
		return m, fmt.Errorf("handover: %w", err)
	}
	if body != nil {
		if err := json.Unmarshal(b, body); err != nil {
			return m, fmt.Errorf("handover: %w", err)
		}
	}
	m.Body = body
	m.Blob = make([]byte, blob)
	if _, err := io.ReadFull(c.c, m.Blob); err != nil {
		return m, fmt.Errorf("handover: %w", err)
	}
	return m, nil
}

// receiveFiles receives the descriptors of one call.
func (c *Conn) receiveFiles() (files []*os.File, err error) {
	b, oob := make([]byte, 1), make([]byte, unix.CmsgSpace(4*AtOnce))
	n, oobn, _, _, err := c.c.ReadMsgUnix(b, oob) // closed on exec: the runtime asks for that
	if err != nil {
		return nil, err
	}
	if n != 1 || b[0] != 'f' {
		return nil, errors.New("no descriptors where there should be some")
	}
	msgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return nil, err
	}
	for i := range msgs {
		fds, err := unix.ParseUnixRights(&msgs[i])
		if err != nil {
			continue // of another kind
		}
		for _, fd := range fds {
			files = append(files, os.NewFile(uintptr(fd), "handed over"))
		}
	}
	return files, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		f.Close()
	}
}

// Dup returns another descriptor of the open file behind c, for a Message. The
// caller owns it.
func Dup(c syscall.Conn) (*os.File, error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("handover: %w", err)
	}
	var dup int
	if e := raw.Control(func(fd uintptr) { dup, err = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) }); e != nil {
		err = e
	}
	if err != nil {
		return nil, fmt.Errorf("handover: dup: %w", err)
	}
	return os.NewFile(uintptr(dup), "dup"), nil
}
