package daemon

import (
	"context"
	"net"
	"net/netip"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/tproxyd/tproxyd/pkg/relay"
	"github.com/tproxyd/tproxyd/pkg/upstream"
	"golang.org/x/sys/unix"
)

// ServerReport is what a server was seen to be able to do.
type ServerReport struct {
	Name      string             `json:"name"`
	Abilities []upstream.Ability `json:"abilities"`
}

// Probe asks every server of the rules, in every protocol and by every chain
// that they use, what it can do. It needs no daemon. Names of servers are
// resolved as this host resolves them.
func (s *Setup) Probe(ctx context.Context) ([]ServerReport, error) {
	plan, err := s.plan()
	if err != nil {
		return nil, err
	}
	list := make([]ServerReport, len(plan.Servers()))
	s.askAll(plan.Servers(), func(pool *upstream.Pool, i int, srv *upstream.Server) {
		list[i] = ServerReport{srv.Name, pool.Probe(ctx, srv)}
	})
	return list, ctx.Err()
}

// Greeting is how a server answered.
type Greeting struct {
	Name string
	Took time.Duration // until it had greeted, the connection included
	Err  error         // why it did not; nil: it did
}

// Greet is Probe for the greeting alone.
func (s *Setup) Greet(ctx context.Context) ([]Greeting, error) {
	plan, err := s.plan()
	if err != nil {
		return nil, err
	}
	list := make([]Greeting, len(plan.Servers()))
	s.askAll(plan.Servers(), func(pool *upstream.Pool, i int, srv *upstream.Server) {
		took, err := pool.Greet(ctx, srv)
		list[i] = Greeting{srv.Name, took, err}
	})
	return list, ctx.Err()
}

// askAll calls ask for all servers at once, with a pool that connects as any
// program of this host does, and waits.
func (s *Setup) askAll(servers []*upstream.Server, ask func(pool *upstream.Pool, i int, srv *upstream.Server)) {
	limits, health := s.Table.Limits(), s.Table.Health()
	pool := upstream.New(upstream.Options{
		Dial: func(ctx context.Context, from upstream.Local, to netip.AddrPort) (net.Conn, error) {
			d := net.Dialer{}
			if from.Addr.IsValid() {
				d.LocalAddr = net.TCPAddrFromAddrPort(netip.AddrPortFrom(from.Addr, 0))
			}
			if from.If != "" {
				d.Control = bindTo(from.If)
			}
			return d.DialContext(ctx, "tcp", to.String())
		},
		Resolve: func(ctx context.Context, host string) ([]netip.Addr, error) {
			return net.DefaultResolver.LookupNetIP(ctx, "ip", host)
		},
		Packet: func(from upstream.Local) (upstream.PacketSocket, error) {
			return relay.NewPacket(from.Addr, nil) // it is not used
		},
		ConnectTimeout:   limits.Connect,
		HandshakeTimeout: limits.Handshake,
		Probe:            health.Probe,
	}, servers)
	defer pool.Close()
	var all sync.WaitGroup
	for i, srv := range servers {
		all.Go(func() { ask(pool, i, srv) })
	}
	all.Wait()
}

// bindTo ties a socket to an interface.
func bindTo(name string) func(network, address string, c syscall.RawConn) error {
	return func(_, _ string, c syscall.RawConn) (err error) {
		if e := c.Control(func(fd uintptr) {
			err = os.NewSyscallError("setsockopt SO_BINDTODEVICE "+name, unix.BindToDevice(int(fd), name))
		}); e != nil {
			return e
		}
		return err
	}
}
