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
// another process, in any order. The files stay the caller's.
func TakeTCP(m Marks, files []*os.File) (*Listener, error) {
	l := &Listener{}
	for _, f := range files {
		ln, err := takeTCP(m, f)
		if err == nil {
			at := &l.V4
			if ln.Addr().(*net.TCPAddr).AddrPort().Addr().Is6() {
				at = &l.V6
			}
			if *at == nil {
				*at = ln
				continue
			}
			ln.Close()
			err = errors.New("there are two of one family")
		}
		l.Close()
		return nil, fmt.Errorf("redirect: a listener that was handed over: %w", err)
	}
	if l.V4 == nil || l.V6 != nil && l.V6.Addr().(*net.TCPAddr).Port != int(l.Port()) {
		l.Close()
		return nil, errors.New("redirect: the listeners that were handed over are no pair")
	}
	return l, nil
}

func takeTCP(m Marks, f *os.File) (*net.TCPListener, error) {
	ln, err := net.FileListener(f)
	if err != nil {
		return nil, err
	}
	tcp, ok := ln.(*net.TCPListener)
	if !ok {
		ln.Close()
		return nil, errors.New("it is no TCP listener")
	}
	raw, err := tcp.SyscallConn()
	if err == nil {
		network := "tcp4"
		if tcp.Addr().(*net.TCPAddr).AddrPort().Addr().Is6() {
			network = "tcp6"
		}
		err = control(raw, network, m, transparentTCP)
	}
	if err != nil {
		tcp.Close()
		return nil, err
	}
	return tcp, nil
}

// Files returns descriptors of their own for the sockets, for TakeUDP. The caller
// closes them.
func (u *UDPListener) Files() (files []*os.File, err error) {
	for _, s := range u.shards {
		for _, c := range s {
			f, err := c.(*packetConn).file()
			if err != nil {
				return closeFiles(files), err
			}
			files = append(files, f)
		}
	}
	return files, nil
}

// TakeUDP makes a UDPListener of what Files of another one returned, be it in
// another process, in any order. The files stay the caller's.
func TakeUDP(m Marks, files []*os.File) (*UDPListener, error) {
	v4, v6, port, err := takeSockets(m, files)
	if err != nil {
		return nil, err
	}
	u := &UDPListener{port: port}
	for i, c := range v4 {
		u.shards = append(u.shards, []flow.PacketSource{c})
		c.rush = true
		if len(v6) > 0 {
			u.shards[i] = append(u.shards[i], v6[i])
			v6[i].rush = true
		}
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
// process, in any order. The files stay the caller's.
func TakeDNS(m Marks, udp, tcp []*os.File) (*DNS, error) {
	l, err := TakeTCP(m, tcp)
	if err != nil {
		return nil, err
	}
	v4, v6, port, err := takeSockets(m, udp)
	if err == nil && len(v4) != 1 {
		closePackets(append(v4, v6...))
		err = fmt.Errorf("redirect: %d sockets of each family for DNS were handed over", len(v4))
	}
	if err != nil {
		l.Close()
		return nil, err
	}
	return newDNS(l, append(v4, v6...), port)
}

// takeSockets makes packetConns of sockets of one port: as many of IPv6 as of
// IPv4, or none.
func takeSockets(m Marks, files []*os.File) (v4, v6 []*packetConn, port uint16, err error) {
	for _, f := range files {
		c, p, err := takeUDP(m, f)
		if err == nil && port != 0 && p != port {
			c.Close()
			err = fmt.Errorf("redirect: sockets of the ports %d and %d were handed over as one", port, p)
		}
		if err != nil {
			closePackets(append(v4, v6...))
			return nil, nil, 0, err
		}
		port = p
		if c.v6 {
			v6 = append(v6, c)
		} else {
			v4 = append(v4, c)
		}
	}
	if len(v4) == 0 || len(v6) != 0 && len(v6) != len(v4) {
		closePackets(append(v4, v6...))
		return nil, nil, 0, fmt.Errorf("redirect: %d sockets of IPv4 and %d of IPv6 were handed over", len(v4), len(v6))
	}
	return v4, v6, port, nil
}

func closePackets(list []*packetConn) {
	for _, c := range list {
		c.Close()
	}
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
	if err := transparentUDP(fd, v6, m); err != nil {
		s.close()
		return nil, 0, fmt.Errorf("redirect: %w", err)
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
