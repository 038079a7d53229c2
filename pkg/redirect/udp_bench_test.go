package redirect

import (
	"errors"
	"fmt"
	"net/netip"
	"runtime"
	"testing"
	"time"
	"unsafe"

	"github.com/tproxyd/tproxyd/pkg/flow"
	"golang.org/x/sys/unix"
)

// benchBurst is how many datagrams are under way at once, of as many flows as
// there are.
const benchBurst = batch

// benchSize is the payload of a datagram, in bytes.
const benchSize = 1200

// answerer is a way to take datagrams from the kernel and answer each with the
// same bytes. It takes as many as there are and returns how many.
type answerer interface{ answer() (int, error) }

// BenchmarkAnswer compares ways to receive and answer. A client's sockets,
// connected to one destination each, send a burst; the gateway answers all of
// it; the client reads all of it: one after the other, on one thread. The time
// is the CPU's: gateway-ns is that of receiving and answering, with the answers'
// way to the client's sockets, all-ns that of everything, the rules and the
// search for the socket, which happen as the client sends, included.
func BenchmarkAnswer(b *testing.B) {
	for _, way := range []struct {
		name string
		make func(w *world, fs []benchFlow) answerer
	}{
		{"FlowSockets", func(w *world, fs []benchFlow) answerer { return newFlowSockets(w, fs, false) }},
		{"FlowSocketsGSO", func(w *world, fs []benchFlow) answerer { return newFlowSockets(w, fs, true) }},
		{"ReplySockets", newReplySockets},
		{"RawSender", newRawSender},
	} {
		for _, n := range []int{1, 100, 5000} {
			b.Run(fmt.Sprintf("%s/flows=%d", way.name, n), func(b *testing.B) { benchmarkAnswer(b, n, way.make) })
		}
	}
}

// benchFlow is a client's socket and its addresses.
type benchFlow struct {
	fd          int
	client, dst netip.AddrPort
}

func benchmarkAnswer(b *testing.B, n int, make func(*world, []benchFlow) answerer) {
	w := newWorld(b)
	p := w.start(worldPlan())
	w.unlisten()
	var err error
	w.gateway.do(func() { w.udp, err = ListenUDP(testMarks, 1) })
	if err != nil {
		b.Fatal(err)
	}
	p.Ports = Ports{UDP: w.udp.Port()}
	p.DNS = false
	w.apply(p)
	flows := benchFlows(w, n)
	a := make(w, flows)
	payload := [benchSize]byte{}
	var in [benchSize]byte

	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	inGateway, next := time.Duration(0), 0
	began := threadTime()
	b.ResetTimer()
	rounds := 0
	for ; rounds*benchBurst < b.N; rounds++ {
		first := next
		for range benchBurst {
			if _, err := unix.Write(flows[next].fd, payload[:]); err != nil {
				b.Fatal(err)
			}
			next = (next + 1) % n
		}
		t := threadTime()
		for got := 0; got < benchBurst; {
			k, err := a.answer()
			if err != nil {
				b.Fatal(err)
			}
			got += k
		}
		inGateway += threadTime() - t
		for i := range benchBurst {
			fd := flows[(first+i)%n].fd
			for {
				k, err := unix.Read(fd, in[:])
				if err == nil && k == benchSize {
					break
				}
				if !errors.Is(err, unix.EAGAIN) {
					b.Fatal(k, err)
				}
			}
		}
	}
	all := threadTime() - began
	b.StopTimer()
	datagrams := float64(rounds * benchBurst)
	b.ReportMetric(float64(inGateway)/datagrams, "gateway-ns/datagram")
	b.ReportMetric(float64(all)/datagrams, "all-ns/datagram")
}

// threadTime is the CPU time of the calling thread.
func threadTime() time.Duration {
	var t unix.Timespec
	unix.ClockGettime(unix.CLOCK_THREAD_CPUTIME_ID, &t)
	return time.Duration(t.Nano())
}

// benchFlows opens n sockets of the client, each to a destination of its own.
func benchFlows(w *world, n int) []benchFlow {
	fs := make([]benchFlow, n)
	var err error
	w.client.do(func() {
		for i := range fs {
			f := &fs[i]
			f.dst = netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(20 + i%200)}), uint16(1000+i/200))
			f.fd, err = openSocket(false, unix.SOCK_DGRAM, 0, func(fd int) error {
				if err := unix.Bind(fd, &unix.SockaddrInet4{Addr: [4]byte{10, 7, 1, 2}, Port: 20000 + i}); err != nil {
					return err
				}
				return unix.Connect(fd, sockaddr(f.dst))
			})
			if err != nil {
				return
			}
			f.client = netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 7, 1, 2}), uint16(20000+i))
		}
	})
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		for _, f := range fs {
			unix.Close(f.fd)
		}
	})
	return fs
}

// messages are buffers for one recvmmsg or sendmmsg.
type messages struct {
	msgs   [batch]mmsghdr
	iovecs [batch]unix.Iovec
	names  [batch]unix.RawSockaddrInet4
	data   [batch * benchSize]byte
}

func newMessages(named bool) *messages {
	m := &messages{}
	for i := range m.msgs {
		m.iovecs[i].Base = &m.data[i*benchSize]
		m.iovecs[i].SetLen(benchSize)
		m.msgs[i].hdr.Iov = &m.iovecs[i]
		m.msgs[i].hdr.SetIovlen(1)
		if named {
			m.msgs[i].hdr.Name = (*byte)(unsafe.Pointer(&m.names[i]))
			m.msgs[i].hdr.Namelen = unix.SizeofSockaddrInet4
		}
	}
	return m
}

// flowSockets has a connected socket for each flow, which an epoll descriptor
// watches. With gso several answers to one leave as one.
type flowSockets struct {
	epoll  int
	gso    bool
	events [batch]unix.EpollEvent
	m      *messages
}

func newFlowSockets(w *world, fs []benchFlow, gso bool) answerer {
	s := &flowSockets{gso: gso, m: newMessages(false)}
	var err error
	if s.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { unix.Close(s.epoll) })
	w.gateway.do(func() {
		for _, f := range fs {
			var fd int
			if fd, err = testMarks.ConnectUDP(f.client, f.dst); err != nil {
				return
			}
			w.t.Cleanup(func() { unix.Close(fd) })
			if gso {
				err = unix.SetsockoptInt(fd, unix.SOL_UDP, unix.UDP_SEGMENT, benchSize)
			}
			if err = errors.Join(err, unix.EpollCtl(s.epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: unix.EPOLLIN, Fd: int32(fd)})); err != nil {
				return
			}
		}
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}

func (s *flowSockets) answer() (int, error) {
	n, err := unix.EpollWait(s.epoll, s.events[:], 0)
	if err != nil && !errors.Is(err, unix.EINTR) {
		return 0, err
	}
	total := 0
	for _, e := range s.events[:max(n, 0)] {
		if n > benchBurst/2 { // of each there is about one, and a look for a second costs
			k, err := unix.Read(int(e.Fd), s.m.data[:benchSize])
			if err == nil {
				_, err = unix.Write(int(e.Fd), s.m.data[:k])
			}
			if err != nil {
				return 0, err
			}
			total++
			continue
		}
		k, errno := recvmmsg(int(e.Fd), s.m.msgs[:])
		if errno == unix.EAGAIN {
			continue
		}
		if errno != 0 {
			return 0, errno
		}
		if err := s.send(int(e.Fd), k); err != nil {
			return 0, err
		}
		total += k
	}
	return total, nil
}

// maxSegments is how many answers of benchSize one message of GSO can have.
const maxSegments = maxPayload / benchSize

func (s *flowSockets) send(fd, k int) error {
	for from := 0; from < k; {
		if s.gso {
			n := min(k-from, maxSegments)
			if _, err := unix.Write(fd, s.m.data[from*benchSize:(from+n)*benchSize]); err != nil {
				return err
			}
			from += n
			continue
		}
		n, errno := sendmmsg(fd, s.m.msgs[from:k])
		if errno != 0 {
			return errno
		}
		from += n
	}
	return nil
}

// listened receives by the listener, and finds the flow of each datagram.
type listened struct {
	source flow.PacketSource
	ds     []flow.Datagram
	flows  map[[2]netip.AddrPort]int
}

func newListened(w *world, fs []benchFlow) listened {
	l := listened{source: w.udp.Shards()[0][0], ds: make([]flow.Datagram, benchBurst), flows: map[[2]netip.AddrPort]int{}}
	for i := range l.ds {
		l.ds[i].Data = make([]byte, benchSize)
	}
	for i, f := range fs {
		l.flows[[2]netip.AddrPort{f.client, f.dst}] = i
	}
	return l
}

// receive returns what has come and, for each, the number of its flow.
func (l *listened) receive(numbers *[benchBurst]int) ([]flow.Datagram, error) {
	n, err := l.source.TryReadBatch(l.ds)
	for i := range l.ds[:n] {
		var known bool
		if numbers[i], known = l.flows[[2]netip.AddrPort{l.ds[i].Src, l.ds[i].Dst}]; !known {
			return nil, fmt.Errorf("%s to %s is no flow", l.ds[i].Src, l.ds[i].Dst)
		}
	}
	return l.ds[:n], err
}

// replySockets has a socket bound to each destination, connected to nobody.
// What is to leave by the same one leaves by one call.
type replySockets struct {
	listened
	sockets map[netip.AddrPort]int
	m       *messages
}

func newReplySockets(w *world, fs []benchFlow) answerer {
	s := &replySockets{listened: newListened(w, fs), sockets: map[netip.AddrPort]int{}, m: newMessages(true)}
	var err error
	w.gateway.do(func() {
		for _, f := range fs {
			var fd int
			fd, err = openSocket(false, unix.SOCK_DGRAM, 0, func(fd int) error {
				if err := transparent(fd, false, testMarks); err != nil {
					return err
				}
				return unix.Bind(fd, sockaddr(f.dst))
			})
			if err != nil {
				return
			}
			w.t.Cleanup(func() { unix.Close(fd) })
			s.sockets[f.dst] = fd
		}
	})
	if err != nil {
		w.t.Fatal(err)
	}
	return s
}

func (s *replySockets) answer() (int, error) {
	var numbers [benchBurst]int
	ds, err := s.receive(&numbers)
	if err != nil {
		return 0, err
	}
	for from := 0; from < len(ds); {
		to := from
		for ; to < len(ds) && ds[to].Dst == ds[from].Dst; to++ {
			s.m.iovecs[to].Base = unsafe.SliceData(ds[to].Data)
			s.m.iovecs[to].SetLen(len(ds[to].Data))
			port := ds[to].Src.Port()
			s.m.names[to] = unix.RawSockaddrInet4{Family: unix.AF_INET, Port: port<<8 | port>>8, Addr: ds[to].Src.Addr().As4()}
		}
		fd := s.sockets[ds[from].Dst]
		for from < to {
			n, errno := sendmmsg(fd, s.m.msgs[from:to])
			if errno != 0 {
				return 0, errno
			}
			from += n
		}
	}
	return len(ds), nil
}

// rawSender answers by WriteBatch.
type rawSender struct {
	listened
	replies []flow.Datagram
}

func newRawSender(w *world, fs []benchFlow) answerer {
	return &rawSender{newListened(w, fs), make([]flow.Datagram, benchBurst)}
}

func (s *rawSender) answer() (int, error) {
	var numbers [benchBurst]int
	ds, err := s.receive(&numbers)
	if err != nil {
		return 0, err
	}
	for i, d := range ds {
		s.replies[i] = flow.Datagram{Data: d.Data, Src: d.Dst, Dst: d.Src}
	}
	n, err := s.source.WriteBatch(s.replies[:len(ds)])
	if err == nil && n != len(ds) {
		err = fmt.Errorf("%d of %d were sent", n, len(ds))
	}
	return n, err
}

// BenchmarkConnectUDP opens and closes the socket of a flow, beside 5,000 others
// that are to as many destinations, or all to the same.
func BenchmarkConnectUDP(b *testing.B) {
	const others = 5000
	for _, same := range []bool{false, true} {
		b.Run(fmt.Sprintf("same=%v", same), func(b *testing.B) {
			n := newNetns(b)
			n.batch("addr add 10.7.1.1/24 dev lo")
			dst := func(i int) netip.AddrPort {
				if same {
					i = 0
				}
				return netip.AddrPortFrom(netip.AddrFrom4([4]byte{203, 0, 113, byte(i % 200)}), uint16(1000+i/200))
			}
			client := func(i int) netip.AddrPort {
				return netip.AddrPortFrom(netip.AddrFrom4([4]byte{10, 7, 1, 2}), uint16(20000+i))
			}
			var fds []int
			var err error
			n.do(func() {
				for i := range others {
					var fd int
					if fd, err = testMarks.ConnectUDP(client(i), dst(i)); err != nil {
						return
					}
					fds = append(fds, fd)
				}
				b.ResetTimer()
				for range b.N {
					var fd int
					if fd, err = testMarks.ConnectUDP(client(others), dst(others)); err != nil {
						return
					}
					unix.Close(fd)
				}
				b.StopTimer()
			})
			for _, fd := range fds {
				unix.Close(fd)
			}
			if err != nil {
				b.Fatal(err)
			}
		})
	}
}
