package relay

import (
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/netip"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/tproxyd/tproxyd/pkg/flow"
	"golang.org/x/sys/unix"
)

// FuzzUDP has clients, servers, rules and time do whatever they can do, in any
// order. After each step what the loop holds must agree with its counters; each
// datagram that arrives must be of the flow that it says; after Close there must
// be nothing.
func FuzzUDP(f *testing.F) {
	for seed := range uint64(12) {
		r := rand.New(rand.NewPCG(seed, 1))
		steps := make([]byte, 3*200)
		for i := range steps {
			steps[i] = byte(r.Uint32())
		}
		f.Add(steps)
	}
	f.Fuzz(func(t *testing.T, steps []byte) {
		w := newUDPWorld(t)
		for ; len(steps) >= 3 && w.steps < 300 && !t.Failed(); steps = steps[3:] {
			w.step(steps[0], steps[1], steps[2])
		}
		if t.Failed() {
			t.Log(strings.Join(w.done, "\n"))
		}
	})
}

const (
	worldClients = 4
	worldServers = worldClients // of worldHost
	worldPort    = 20777
)

// udpWorld is a rig with clients that have sockets, and what is known of it.
type udpWorld struct {
	*udpRig
	steps   int
	done    []string
	sockets [worldClients]int // of clients
	addrs   [worldClients]netip.AddrPort
	direct  int // server of destinations that are asked directly; server is the other
	relay   int
	far     <-chan *net.TCPConn
	ends    []*net.TCPConn // of control connections

	outlets []seenOutlet // the last ones

	// Guarded by udpRig.mu.
	mode  int // turns the rules
	fails int // what Way.Open does
	let   chan error
	owner map[netip.AddrPort]netip.AddrPort // of outlets: client
}

// seenOutlet is where a datagram came to a server from.
type seenOutlet struct {
	at     netip.AddrPort
	direct bool
	dst    netip.AddrPort
}

func newUDPWorld(t *testing.T) *udpWorld {
	w := &udpWorld{let: make(chan error), owner: map[netip.AddrPort]netip.AddrPort{}}
	var own flowSockets
	w.udpRig = newUDPRig(t, UDPOptions{FlowSocket: own.open, MaxFlows: 12, MaxSessions: 3, MaxSockets: 9, MaxQueued: 40_000})
	w.SetLimits(w.o.tick*5, w.o.tick*2)
	w.far = w.controls()
	control := w.open
	w.direct, w.relay = w.socket(worldHost(worldServers)), w.socket(worldHost(worldServers))
	for i := range w.sockets {
		w.sockets[i] = w.socket(worldHost(i))
		w.addrs[i] = rawName(unix.SYS_GETSOCKNAME, w.sockets[i])
	}
	w.decides(func(v *Verdict, client, dst netip.AddrPort) {
		to, key := w.relay, "list"
		switch w.kind(dst) {
		case 2, 3, 7:
			v.Header, v.Named = nameHeader(worldName(dst), dst.Port()), true
		case 4:
			v.Header, v.Short = nil, true
			to, key = w.direct, fmt.Sprint("direct ", dst)
		case 5:
			key, v.Idle = "another", 3*w.o.tick
		case 6:
			v.Way = nil
			return
		}
		server := rawName(unix.SYS_GETSOCKNAME, to)
		v.Way = &Way{Key: key, Refusal: refusalOfTest, Open: func(ctx context.Context, first any) (Outlet, error) {
			return w.openFor(ctx, client, server, v.Header != nil, control)
		}}
	})
	t.Cleanup(func() {
		w.close()
		for _, fd := range w.sockets {
			unix.Close(fd)
		}
		unix.Close(w.direct)
		unix.Close(w.relay)
	})
	return w
}

// kind says what becomes of a destination by the rules of now.
func (w *udpWorld) kind(dst netip.AddrPort) int { return (int(dst.Addr().As4()[3]) + w.mode) % 8 }

// openFor is the Open of all ways.
func (w *udpWorld) openFor(ctx context.Context, client, server netip.AddrPort, controlled bool, control func(context.Context, *Outlet) error) (Outlet, error) {
	w.mu.Lock()
	fails := w.fails
	w.mu.Unlock()
	switch fails {
	case 1:
		return Outlet{}, failure(RefuseHost)
	case 2:
		if err := held(w.let)(ctx, nil); err != nil {
			return Outlet{}, err
		}
	}
	// In one piece, since the port may have been another client's, and what the
	// server answers there is this one's from now on.
	w.mu.Lock()
	o, err := outletTo(server)
	if err == nil {
		w.owner[netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), o.Socket.LocalAddrPort().Port())] = client
	}
	w.mu.Unlock()
	if err != nil {
		return o, err
	}
	if controlled {
		if err = control(ctx, &o); err != nil {
			o.Socket.Close()
		}
	}
	return o, err
}

// worldHost is the address of a client or of the servers. Each has its own, since
// a port of 127.0.0.1, where outlets are, can have been an outlet's that is still
// answered, here or in a process that fuzzes beside this one.
func worldHost(i int) netip.Addr {
	pid := os.Getpid()
	return netip.AddrFrom4([4]byte{127, byte(128 + pid>>8&127), byte(pid), byte(1 + i)})
}

func (w *udpWorld) socket(at netip.Addr) int {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_NONBLOCK|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		w.t.Fatal(err)
	}
	if e := rawAddr(unix.SYS_BIND, fd, netip.AddrPortFrom(at, 0)); e != 0 {
		w.t.Fatal(e)
	}
	return fd
}

func worldDst(i int) netip.AddrPort {
	return netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 77, 1, byte(i)}), worldPort+uint16(i/7))
}

func worldName(dst netip.AddrPort) string { return fmt.Sprintf("d%d.example", dst.Addr().As4()[3]) }

// step does something.
func (w *udpWorld) step(op, a, b byte) {
	w.steps++
	what := ""
	client, dst := int(a)%worldClients, worldDst(int(b)%8)
	switch op %= 32; {
	case op < 14:
		what = w.clientSends(client, dst, 1+int(a>>4)*int(op), op%3 == 0)
	case op < 20 && len(w.outlets) > 0:
		what = w.serverAnswers(w.outlets[int(a)%len(w.outlets)], int(b), 1+int(op)*50)
	case op < 21:
		what = fmt.Sprintf("rules %d", a%8)
		w.mu.Lock()
		w.mode = int(a) % 8
		w.mu.Unlock()
		w.Invalidate()
	case op < 22 && len(w.ends) > 0:
		what = "a control connection ends"
		i := int(a) % len(w.ends)
		w.ends[i].Close()
		w.ends = slices.Delete(w.ends, i, i+1)
	case op < 24:
		what = fmt.Sprintf("outlets open as %d", a%3)
		w.mu.Lock()
		w.fails = int(a) % 3
		w.mu.Unlock()
	case op < 26:
		var err error
		if a%3 == 0 {
			err = failure(RefuseNet)
		}
		select {
		case w.let <- err:
			what = fmt.Sprintf("one that waits is let: %v", err)
		default:
		}
	case op < 27:
		what = "a client comes back with another socket"
		unix.Close(w.sockets[client])
		w.sockets[client] = w.socket(worldHost(client))
		w.addrs[client] = rawName(unix.SYS_GETSOCKNAME, w.sockets[client])
	case op < 28:
		what = "the server's relay comes back elsewhere"
		unix.Close(w.relay)
		relay := w.socket(worldHost(worldServers))
		w.mu.Lock()
		w.relay = relay
		w.mu.Unlock()
	default:
		what = "a tick"
		w.tick(1)
	}
	w.done = append(w.done, what)
	w.settle()
	w.look()
	w.check()
}

// clientSends sends a batch of datagrams that say whose they are.
func (w *udpWorld) clientSends(client int, dst netip.AddrPort, n int, alike bool) string {
	var ds []flow.Datagram
	k := flowKey{w.addrs[client], dst}
	own := false
	w.inside(func(sh *shard) { own = sh.flows[k] != nil && sh.flows[k].fd >= 0 })
	n = min(n, 100)
	for i := range n {
		length := 600
		if !alike {
			length = i * 97 % 1500
		}
		text := fmt.Sprintf("%s %s ", w.addrs[client], dst)
		text += strings.Repeat("x", max(0, length-len(text)))
		if i%20 == 19 {
			text = ""
		}
		if own {
			unix.Sendto(w.sockets[client], []byte(text), 0, &unix.SockaddrInet4{Port: int(dst.Port()), Addr: dst.Addr().As4()})
		} else {
			ds = append(ds, flow.Datagram{Data: []byte(text), Src: w.addrs[client], Dst: dst})
		}
	}
	w.src.put(ds...)
	return fmt.Sprintf("%s sends %d to %s, own socket %v", w.addrs[client], n, dst, own)
}

// serverAnswers answers by an outlet, in one way or another. The text says who
// may get it, and from whom.
func (w *udpWorld) serverAnswers(o seenOutlet, how, n int) string {
	w.mu.Lock() // until it is sent: the port stays whose it is
	defer w.mu.Unlock()
	client := w.owner[o.at]
	from := o.dst
	var head []byte
	switch how % 6 {
	case 0, 1:
		head = header(o.dst)
	case 2:
		head = nameHeader("alias.example", o.dst.Port())
	case 3:
		from = netip.AddrPortFrom(netip.MustParseAddr("127.77.1.200"), o.dst.Port())
		head = header(from)
	case 4:
		from = worldDst(how / 6 % 8)
		head = header(from)
	case 5:
		head = []byte("rubbish")
	}
	fd := w.relay
	if o.direct {
		fd, head = w.direct, nil
	}
	text := fmt.Sprintf("%s %s %s ", client, o.dst, from)
	for range n % 70 {
		unix.Sendto(fd, append(slices.Clip(head), text...), 0, &unix.SockaddrInet4{Port: int(o.at.Port()), Addr: o.at.Addr().As4()})
	}
	return fmt.Sprintf("the server answers %d times by %v as %q", n%70, o, head)
}

// look takes what has arrived anywhere.
func (w *udpWorld) look() {
	b := make([]byte, 1<<16)
	receive := func(fd int, got func(from netip.AddrPort, text string)) {
		for {
			n, sa, err := unix.Recvfrom(fd, b, unix.MSG_DONTWAIT)
			if err != nil {
				return
			}
			at := sa.(*unix.SockaddrInet4)
			got(netip.AddrPortFrom(netip.AddrFrom4(at.Addr), uint16(at.Port)), string(b[:n]))
		}
	}
	for _, direct := range []bool{false, true} {
		fd := w.relay
		if direct {
			fd = w.direct
		}
		receive(fd, func(outlet netip.AddrPort, d string) { w.atServer(outlet, direct, d) })
	}
	for i, fd := range w.sockets {
		receive(fd, func(from netip.AddrPort, text string) {
			w.atClient(fmt.Sprintf("%s > %s: %s", from, w.addrs[i], text))
		})
	}
	for range len(w.src.replies) {
		w.atClient(<-w.src.replies)
	}
	for range len(w.refused) {
		<-w.refused
	}
	for range len(w.tooBig) {
		<-w.tooBig
	}
	for range len(w.opens) {
		<-w.opens
	}
	for range len(w.ended) {
		<-w.ended
	}
	for range len(w.far) {
		w.ends = append(w.ends, <-w.far)
	}
}

func (w *udpWorld) atServer(outlet netip.AddrPort, direct bool, d string) {
	w.mu.Lock()
	owner := w.owner[outlet]
	w.mu.Unlock()
	text := d
	to := netip.AddrPort{}
	name := ""
	if !direct {
		addr, nm, n, err := parseHeader([]byte(d))
		if err != nil {
			w.t.Errorf("at the server: %.60q: %v", d, err)
			return
		}
		to, name, text = addr, string(nm), d[n:]
	}
	if text == "" {
		return
	}
	var client, dst string
	fmt.Sscan(text, &client, &dst)
	asked := netip.MustParseAddrPort(dst)
	if client != owner.String() || !direct && to != asked && (name != worldName(asked) || to.Port() != asked.Port()) {
		w.t.Errorf("%.60q came by the outlet of %s, for %s or %q", text, owner, to, name)
	}
	w.outlets = append(w.outlets, seenOutlet{outlet, direct, asked})
	w.outlets = w.outlets[max(0, len(w.outlets)-16):]
}

// atClient is told "from > client: text".
func (w *udpWorld) atClient(line string) {
	var from, client, owner, asked, other string
	fmt.Sscanf(line, "%s > %s %s %s %s", &from, &client, &owner, &asked, &other)
	if client != owner+":" {
		w.t.Errorf("at a client: %q", line)
	}
	if from == asked || from == other {
		return
	}
	// What comes from an address that was not asked is the answer of the name on
	// its port.
	named := netip.MustParseAddrPort(from)
	if kind := w.kind(named); kind != 2 && kind != 3 && kind != 7 || named.Port() != netip.MustParseAddrPort(other).Port() {
		w.t.Errorf("at a client: %q", line)
	}
}
