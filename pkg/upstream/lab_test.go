package upstream

import (
	"context"
	"io"
	"net"
	"net/netip"
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

func (l *lab) dial(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	l.mu.Lock()
	l.dialed = append(l.dialed, to.String())
	l.mu.Unlock()
	return l.hosts[to.String()](ctx)
}

// asked returns who was dialled since it was called last.
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

// connect connects and hangs up, and returns the name of the server.
func connect(t *testing.T, p *Pool, servers ...*Server) string {
	t.Helper()
	conn, s, err := p.Connect(t.Context(), servers, false, target)
	if err != nil {
		return err.Error()
	}
	conn.Close()
	return s.Name
}
