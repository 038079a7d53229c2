package upstream

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

// The tests run in bubbles of testing/synctest, with pipes for sockets: the
// clock is theirs, and whatever goroutine or connection is left behind fails
// them.

// behaviour is what a server does with who dials it.
type behaviour func(ctx context.Context) (net.Conn, error)

// lab is the network that a pool sees: a behaviour for each address. It notes
// who was dialled.
type lab struct {
	hosts  map[string]behaviour
	mu     sync.Mutex
	dialed []string
}

// pool returns a pool that lives in the lab, and as long as the test.
func (l *lab) pool(t *testing.T, o Options) *Pool {
	o.Dial = l.dial
	p := New(o, nil)
	t.Cleanup(p.Close)
	return p
}

func (l *lab) dial(ctx context.Context, _ Local, to netip.AddrPort) (net.Conn, error) {
	l.mu.Lock()
	if !slices.Contains(l.dialed, to.String()) { // a probe comes after the flow
		l.dialed = append(l.dialed, to.String())
	}
	does := l.hosts[to.String()]
	l.mu.Unlock()
	return does(ctx)
}

// set changes what a server does.
func (l *lab) set(addr string, b behaviour) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.hosts[addr] = b
}

// asked returns who was dialled since it was called last, each once.
func (l *lab) asked() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	s := strings.Join(l.dialed, " ")
	l.dialed = nil
	return s
}

// says answers each message of the client with one of the answers, and then
// only listens. The answer "EOF" closes.
func says(answers ...string) behaviour {
	return func(context.Context) (net.Conn, error) {
		client, server := net.Pipe()
		go func() {
			defer server.Close()
			b := make([]byte, 1024)
			for _, a := range answers {
				if _, err := server.Read(b); err != nil || a == "EOF" {
					return
				}
				io.WriteString(server, a)
			}
			io.Copy(io.Discard, server)
		}()
		return client, nil
	}
}

func replies(rep byte) behaviour {
	return says("\x05\x00", "\x05"+string([]byte{rep})+"\x00\x01\x00\x00\x00\x00\x00\x00")
}

// exhausted is this host without a descriptor.
func exhausted(context.Context) (net.Conn, error) {
	return nil, &net.OpError{Op: "dial", Err: syscall.EMFILE}
}

func refuses(context.Context) (net.Conn, error) { return nil, syscall.ECONNREFUSED }

func hangs(ctx context.Context) (net.Conn, error) {
	<-ctx.Done()
	return nil, ctx.Err()
}

var (
	serverA = &Server{Name: "a", Addr: netip.MustParseAddrPort("10.0.0.1:1")}
	serverB = &Server{Name: "b", Addr: netip.MustParseAddrPort("10.0.0.2:2")}
	serverC = &Server{Name: "c", Addr: netip.MustParseAddrPort("[2001:db8::3]:3")}
	target  = flow.Target{Name: "example.org", Port: 443}
)

const (
	addrA = "10.0.0.1:1"
	addrB = "10.0.0.2:2"
	addrC = "[2001:db8::3]:3"
)

// up returns the names of the servers that are not bad.
func up(p *Pool, servers ...*Server) string {
	var names []string
	for _, s := range p.Status(servers) {
		if s.Up {
			names = append(names, s.Name)
		}
	}
	return strings.Join(names, " ")
}

// carry asks servers for the target. The server that answered last is returned
// with its error, too.
func carry(ctx context.Context, p *Pool, servers ...*Server) (net.Conn, *Server, error) {
	c, err := p.Connect(ctx, &Group{Servers: servers}, Request{To: target})
	if err != nil {
		var one *ServerError
		if _, joined := err.(interface{ Unwrap() []error }); !joined && errors.As(err, &one) {
			return nil, one.Server, err
		}
		return nil, nil, err
	}
	c.Done()
	return c.Conn, c.Server, nil
}

// connect connects and hangs up, and returns the name of the server.
func connect(t *testing.T, p *Pool, servers ...*Server) string {
	t.Helper()
	conn, s, err := carry(t.Context(), p, servers...)
	if err != nil {
		return err.Error()
	}
	conn.Close()
	return s.Name
}
