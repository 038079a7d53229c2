package main

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/netip"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

const (
	udpWindow  = 128 // datagrams in flight, of all flows together
	udpAtOnce  = 32  // new flows that wait for their answer
	udpSmall   = 64  // bytes
	udpLarge   = 1200
	udpTurns   = 4 // of each flow, to warm it up
	udpSilence = 100 * time.Millisecond
)

// order is what a load of datagrams is told to do, in one line of JSON.
type order struct {
	Do    string        `json:"do"`    // hold, warm, echo or new
	Flows int           `json:"flows"` // with a source port each
	Size  int           `json:"size"`  // bytes of a datagram, for echo
	Span  time.Duration `json:"span"`  // for echo
}

// order has a process of the role udp do something.
func (p *process) order(o order) (r result, err error) {
	line, err := json.Marshal(o)
	if err != nil {
		return r, err
	}
	return r, p.ask(string(line), &r)
}

// udpRole is a load generator of datagrams to one address. Each line of its
// standard input is an order; the answer is what it found.
//
//	hold  have so many flows; each new one sends one datagram and has it back
//	warm  some turns of each of the first of the flows that are held
//	echo  datagrams there and back, in turn over the first of them, for a time
//	new   so many flows more, as hold does, and close them
func udpRole(args []string, out io.Writer) error {
	f := flag.NewFlagSet("udp", flag.ContinueOnError)
	to := f.String("to", "", "ADDR:PORT")
	if err := f.Parse(args); err != nil {
		return err
	}
	addr, err := netip.ParseAddrPort(*to)
	if err != nil {
		return err
	}
	u, err := newDatagrams(addr)
	if err != nil {
		return err
	}
	runtime.LockOSThread()
	fmt.Fprintln(out, "ready")
	for orders := json.NewDecoder(stdin()); ; {
		var o order
		if err := orders.Decode(&o); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		r, err := u.obey(o)
		if err != nil {
			return fmt.Errorf("%s: %w", o.Do, err)
		}
		if err := json.NewEncoder(out).Encode(r); err != nil {
			return err
		}
	}
}

// datagrams is the load: sockets that are connected to one address.
type datagrams struct {
	to    netip.AddrPort
	epoll int
	held  []int // sockets
	batch *batch
	room  [udpWindow][udpLarge]byte // by the place in the window
	next  int                       // of held: whose turn it is
	seq   uint64                    // of the last datagram
}

func newDatagrams(to netip.AddrPort) (*datagrams, error) {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return nil, err
	}
	return &datagrams{to: to, epoll: epoll, batch: newBatch(false)}, nil
}

func (u *datagrams) obey(o order) (r result, err error) {
	switch o.Do {
	case "hold":
		fds, r, err := u.begin(o.Flows - len(u.held))
		u.held = append(u.held, fds...)
		r.Count = len(u.held)
		return r, err
	case "new":
		fds, r, err := u.begin(o.Flows)
		for _, fd := range fds {
			unix.Close(fd)
		}
		return r, err
	case "warm", "echo":
		if o.Flows < 1 || o.Flows > len(u.held) {
			return r, fmt.Errorf("%d flows of %d", o.Flows, len(u.held))
		}
		if o.Do == "warm" {
			return u.echo(o.Flows, udpSmall, func(sent int) bool { return sent < udpTurns*o.Flows })
		}
		end := time.Now().Add(o.Span)
		return u.echo(o.Flows, o.Size, func(int) bool { return time.Now().Before(end) })
	}
	return r, fmt.Errorf("no such order")
}

// wait returns the sockets that have something to read, after 10 ms at the
// latest.
func (u *datagrams) wait(events []unix.EpollEvent) ([]unix.EpollEvent, error) {
	n, err := unix.EpollWait(u.epoll, events, 10)
	if err != nil && err != unix.EINTR {
		return nil, err
	}
	return events[:max(n, 0)], nil
}

// begin makes flows, some at once: a socket, one datagram, its answer. Who has
// no answer is closed; the others are returned open, so that no port is used
// twice.
func (u *datagrams) begin(n int) (fds []int, r result, err error) {
	var times []time.Duration
	waiting := map[int]time.Time{} // since when, by the socket
	events := make([]unix.EpollEvent, udpAtOnce)
	give := func(fd int) {
		delete(waiting, fd)
		unix.Close(fd)
		r.Failed++
	}
	after := u.seq
	began := time.Now()
	for r.Sent < n || len(waiting) > 0 {
		for r.Sent < n && len(waiting) < udpAtOnce {
			t := time.Now()
			fd, err := u.dial()
			if err != nil {
				return fds, r, err
			}
			waiting[fd] = t
			r.Sent++
			u.write(fd, [][]byte{u.datagram(fd, 0, udpSmall)})
		}
		ready, err := u.wait(events)
		if err != nil {
			return fds, r, err
		}
		for _, e := range ready {
			fd := int(e.Fd)
			since, ok := waiting[fd] // not one that is held and late
			wrong := u.read(fd, udpSmall, after, func(int, uint64) {
				times = append(times, time.Since(since))
				delete(waiting, fd)
				fds = append(fds, fd)
			})
			r.Wrong += wrong
			if _, still := waiting[fd]; ok && still && wrong == 0 {
				give(fd) // refused
			}
		}
		if len(ready) == 0 {
			for fd, since := range waiting {
				if time.Since(since) > time.Second {
					give(fd)
				}
			}
		}
	}
	r.Elapsed = time.Since(began)
	r.Count = len(times)
	r.timesFrom(times)
	return fds, r, nil
}

func (u *datagrams) dial() (fd int, err error) {
	if fd, err = openUDP(unix.SOCK_NONBLOCK); err != nil {
		return -1, err
	}
	err = unix.Connect(fd, &unix.SockaddrInet4{Port: int(u.to.Port()), Addr: u.to.Addr().As4()})
	if err == nil {
		err = unix.EpollCtl(u.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)})
	}
	if err != nil {
		unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// datagram makes one that tells whose it is: its socket, its place in the
// window and its number.
func (u *datagrams) datagram(fd, place, size int) []byte {
	u.seq++
	d := u.room[place][:size]
	binary.BigEndian.PutUint32(d, uint32(fd))
	binary.BigEndian.PutUint32(d[4:], uint32(place))
	binary.BigEndian.PutUint64(d[8:], u.seq)
	return d
}

func (u *datagrams) write(fd int, data [][]byte) {
	for i, d := range data {
		u.batch.put(i, d)
	}
	u.batch.send(fd, len(data))
}

// read takes what came to a socket and hands on those datagrams that were sent
// from there after a number. None may be an error by ICMP, or nothing. It
// returns how many were sent from another socket, or changed on their way.
func (u *datagrams) read(fd, size int, after uint64, answered func(place int, seq uint64)) (wrong int) {
	n, err := u.batch.receive(fd, unix.MSG_DONTWAIT)
	if err != nil {
		return 0
	}
	for i := range n {
		d := u.batch.data(i)
		if len(d) < 16 || binary.BigEndian.Uint32(d) != uint32(fd) {
			wrong++
			continue
		}
		seq := binary.BigEndian.Uint64(d[8:])
		switch {
		case seq <= after: // of an earlier order
		case len(d) != size:
			wrong++
		default:
			answered(int(binary.BigEndian.Uint32(d[4:])), seq)
		}
	}
	return wrong
}

// place is one of a window: the datagram in it, if any.
type place struct {
	seq  uint64 // 0: free
	sent time.Time
}

// echo keeps the window full, with datagrams of the first n flows in turn, as
// long as more, which is told how many were sent, says so. Count is what came
// back until then, Failed what had not come back when all was silent.
func (u *datagrams) echo(n, size int, more func(sent int) bool) (r result, err error) {
	var window [udpWindow]place
	free := make([]int, udpWindow)
	for i := range free {
		free[i] = i
	}
	received, after := 0, u.seq
	answered := func(i int, seq uint64) {
		received++
		if i < len(window) && window[i].seq == seq { // else it was late, and the place has another
			window[i].seq = 0
			free = append(free, i)
		}
	}
	events := make([]unix.EpollEvent, udpWindow)
	var data [][]byte
	began := time.Now()
	looked, heard := began, began
	for open := true; open || received < r.Sent; {
		now := time.Now()
		for open && len(free) > 0 {
			if open = more(r.Sent); !open {
				r.Count, r.Elapsed = received, time.Since(began)
				break
			}
			fd := u.held[u.next%n]
			u.next = (u.next + 1) % n
			data = data[:0]
			for range min((len(free)+n-1)/n, batchSize) {
				i := free[len(free)-1]
				free = free[:len(free)-1]
				data = append(data, u.datagram(fd, i, size))
				window[i] = place{u.seq, now}
			}
			u.write(fd, data)
			r.Sent += len(data)
		}
		ready, err := u.wait(events)
		if err != nil {
			return r, err
		}
		for _, e := range ready {
			r.Wrong += u.read(int(e.Fd), size, after, answered)
			heard = now
		}
		if now.Sub(looked) < udpSilence/5 {
			continue
		}
		looked = now
		for i := range window {
			if p := &window[i]; p.seq != 0 && now.Sub(p.sent) > udpSilence {
				p.seq = 0
				free = append(free, i)
			}
		}
		if !open && now.Sub(heard) > 2*udpSilence {
			break
		}
	}
	r.Failed = r.Sent - received
	return r, nil
}
