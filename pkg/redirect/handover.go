package redirect

import (
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
	"time"

	"github.com/tproxyd/tproxyd/pkg/flow"
	"golang.org/x/sys/unix"
)

// Hold is what a Redirect holds the kernel by. Another process that has these
// descriptors too has the same hold: what the kernel ties to a process it ties to
// the last one that closes them.
type Hold struct {
	Socket *os.File // owns the tables
	Lock   *os.File // in place of owning, where the kernel knows no owners; nil: not needed
	Alive  Marks    // of the table that ends with the Socket; zero: there is none
}

// Close closes the descriptors.
func (h *Hold) Close() error {
	var errs []error
	for _, f := range []*os.File{h.Socket, h.Lock} {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	return errors.Join(errs...)
}

// Lend returns descriptors of their own for what r holds, for Options.Taken of a
// process that takes the place of this one. The caller closes them. From then on
// r does nothing to the kernel and asks it nothing but InterfaceName: methods
// return net.ErrClosed, until TakeBack.
func (r *Redirect) Lend() (h Hold, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || r.lent {
		return Hold{}, net.ErrClosed
	}
	if h.Socket, err = dup(r.nf.fd, "nfnetlink"); err != nil {
		return Hold{}, err
	}
	if l, ok := r.lock.(*net.UnixListener); ok {
		if h.Lock, err = dupOf(l); err != nil {
			h.Close()
			return Hold{}, err
		}
	}
	h.Alive = r.alive
	r.lent = true
	return h, nil
}

// TakeBack ends Lend: the other process has failed, and uses the hold no more.
// What it has done to the kernel is put right.
func (r *Redirect) TakeBack() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.lent = false
	r.nf.seq = uint32(time.Now().UnixNano()) // its answers may still be there
	if r.closed || r.plan == nil {
		return nil
	}
	if _, err := r.policy.ensure(r.plan, divertRules); err != nil {
		return err
	}
	if err := r.healTable(); err != nil {
		return err
	}
	if _, err := r.policy.ensure(r.plan, guardRules); err != nil {
		return err
	}
	return r.policy.drop(r.plan)
}

// Release ends the hold without a word to the kernel: another process has it.
// InterfaceName works until Close, which does nothing more than end that.
func (r *Redirect) Release() {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.closed {
		r.release()
	}
}

// take makes the hold of another process that of r.
func (r *Redirect) take(h *Hold) (err error) {
	if r.nf, err = takeNfnl(h.Socket); err != nil {
		return err
	}
	r.alive = h.Alive
	if h.Lock != nil {
		if r.lock, err = net.FileListener(h.Lock); err != nil {
			return fmt.Errorf("redirect: lock: %w", err)
		}
	}
	return nil
}

// takeNfnl makes a connection of a socket that another process has made. Answers
// that it has not read are told from ours by their numbers.
func takeNfnl(socket *os.File) (*nfnl, error) {
	fd, err := ownFD(socket)
	if err != nil {
		return nil, err
	}
	c := &nfnl{fd: fd, buf: make([]byte, 64<<10), seq: uint32(time.Now().UnixNano())}
	name, err := unix.Getsockname(fd)
	if nl, ok := name.(*unix.SockaddrNetlink); ok && err == nil {
		c.pid = nl.Pid
		return c, nil
	}
	unix.Close(fd)
	return nil, errors.New("redirect: what was handed over is no netlink socket")
}

// recall reads what the table that is there lets pass because of Admit of a
// Redirect before this one.
func (r *Redirect) recall() error {
	sets, err := r.nf.names(unix.NFT_MSG_GETSET)
	if err != nil || len(sets) == 0 {
		return err
	}
	r.live, r.recalled = present{sets: sets}.live(), true
	now := time.Now()
	list, err := r.inKernel()
	if errors.Is(err, unix.ENOENT) { // of another version: it is not kept either
		r.recalled = false
		return nil
	}
	if err == nil {
		_, err = r.admitted.add(list, now)
	}
	return err
}

func dup(fd int, name string) (*os.File, error) {
	n, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("redirect: dup: %w", err)
	}
	return os.NewFile(uintptr(n), name), nil
}

// Files returns descriptors of their own for the listeners, V4 first, for
// TakeTCP. The caller closes them.
func (l *Listener) Files() (files []*os.File, err error) {
	for _, ln := range l.Listeners() {
		f, err := dupOf(ln)
		if err != nil {
			return closeFiles(files), err
		}
		files = append(files, f)
	}
	return files, nil
}

// TakeTCP makes a Listener of what Files of another one returned, be it in
// another process. The files stay the caller's.
func TakeTCP(files []*os.File) (*Listener, error) {
	if len(files) < 1 || len(files) > 2 {
		return nil, fmt.Errorf("redirect: %d descriptors are no pair of listeners", len(files))
	}
	l := &Listener{}
	for _, f := range files {
		ln, err := net.FileListener(f)
		tcp, ok := ln.(*net.TCPListener)
		if err == nil && !ok {
			ln.Close()
			err = errors.New("it is no TCP listener")
		}
		if err != nil {
			l.Close()
			return nil, fmt.Errorf("redirect: a listener that was handed over: %w", err)
		}
		if l.V4 == nil {
			l.V4 = tcp
		} else {
			l.V6 = tcp
		}
	}
	return l, nil
}

// Files returns descriptors of their own for the sockets, those of one shard
// behind those of the one before, IPv4 first, and how many a shard has; for
// TakeUDP. The caller closes them.
func (u *UDPListener) Files() (files []*os.File, each int, err error) {
	for _, s := range u.shards {
		each = len(s)
		for _, c := range s {
			f, err := c.(*packetConn).file()
			if err != nil {
				return closeFiles(files), 0, err
			}
			files = append(files, f)
		}
	}
	return files, each, nil
}

// TakeUDP makes a UDPListener of what Files of another one returned, be it in
// another process. The files stay the caller's.
func TakeUDP(m Marks, files []*os.File, each int) (*UDPListener, error) {
	if each < 1 || each > 2 || len(files) == 0 || len(files)%each != 0 {
		return nil, fmt.Errorf("redirect: %d descriptors are no shards of %d sockets", len(files), each)
	}
	u := &UDPListener{}
	for ; len(files) > 0; files = files[each:] {
		pair, port, err := takePair(m, files[:each])
		if err != nil {
			u.Close()
			return nil, err
		}
		u.port = port
		sources := []flow.PacketSource{}
		for _, c := range pair {
			c.rush = true
			sources = append(sources, c)
		}
		u.shards = append(u.shards, sources)
	}
	return u, nil
}

// StopReceiving closes the sockets that datagrams come to, which another process
// has. What is sent from them leaves by other sockets, until Close.
func (u *UDPListener) StopReceiving() error {
	var errs []error
	for _, s := range u.shards {
		for _, c := range s {
			errs = append(errs, c.(*packetConn).recv.close())
		}
	}
	return errors.Join(errs...)
}

// Files returns descriptors of their own for the sockets of datagrams and for
// the listeners, for TakeDNS. The caller closes them.
func (d *DNS) Files() (udp, tcp []*os.File, err error) {
	for _, c := range d.UDP {
		f, err := c.(*packetConn).file()
		if err != nil {
			return closeFiles(udp), nil, err
		}
		udp = append(udp, f)
	}
	if tcp, err = d.TCP.Files(); err != nil {
		return closeFiles(udp), nil, err
	}
	return udp, tcp, nil
}

// TakeDNS makes a DNS of what Files of another one returned, be it in another
// process. The files stay the caller's.
func TakeDNS(m Marks, udp, tcp []*os.File) (*DNS, error) {
	l, err := TakeTCP(tcp)
	if err != nil {
		return nil, err
	}
	pair, port, err := takePair(m, udp)
	if err != nil {
		l.Close()
		return nil, err
	}
	d := &DNS{TCP: l, port: port}
	for _, c := range pair {
		d.UDP = append(d.UDP, c)
	}
	return d, nil
}

// takePair makes packetConns of sockets of one port.
func takePair(m Marks, files []*os.File) (pair []*packetConn, port uint16, err error) {
	for _, f := range files {
		c, p, err := takeUDP(m, f)
		if err == nil && port != 0 && p != port {
			c.Close()
			err = fmt.Errorf("redirect: sockets of the ports %d and %d are no pair", port, p)
		}
		if err != nil {
			for _, c := range pair {
				c.Close()
			}
			return nil, 0, err
		}
		pair, port = append(pair, c), p
	}
	return pair, port, nil
}

func takeUDP(m Marks, f *os.File) (*packetConn, uint16, error) {
	fd, err := ownFD(f)
	if err != nil {
		return nil, 0, err
	}
	s := &socket{fd: fd}
	name, err := unix.Getsockname(fd)
	_, v6 := name.(*unix.SockaddrInet6)
	_, v4 := name.(*unix.SockaddrInet4)
	kind, kerr := unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_TYPE)
	if err != nil || kerr != nil || !v4 && !v6 || kind != unix.SOCK_DGRAM {
		s.close()
		return nil, 0, errors.New("redirect: what was handed over is no UDP socket")
	}
	port, err := s.localPort()
	if err != nil {
		s.close()
		return nil, 0, err
	}
	c, err := newPacketConn(s, v6, m)
	if err != nil {
		s.close()
		return nil, 0, err
	}
	return c, port, nil
}

// file returns a descriptor of its own for the socket that is received from.
func (c *packetConn) file() (f *os.File, err error) {
	err = c.recv.control(func(fd int) error {
		f, err = dup(fd, "packets")
		return err
	})
	return f, err
}

func closeFiles(files []*os.File) []*os.File {
	for _, f := range files {
		f.Close()
	}
	return nil
}

// dupOf returns another descriptor of the open file of c.
func dupOf(c syscall.Conn) (*os.File, error) {
	fd, err := ownFD(c)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "dup"), nil
}

// ownFD returns another descriptor, which nobody closes but the caller.
func ownFD(c syscall.Conn) (fd int, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return -1, fmt.Errorf("redirect: %w", err)
	}
	if e := raw.Control(func(orig uintptr) { fd, err = unix.FcntlInt(orig, unix.F_DUPFD_CLOEXEC, 0) }); e != nil {
		err = e
	}
	if err != nil {
		return -1, fmt.Errorf("redirect: dup: %w", err)
	}
	return fd, nil
}
