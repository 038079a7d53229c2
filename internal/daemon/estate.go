package daemon

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/tproxyd/tproxyd/internal/config"
	"github.com/tproxyd/tproxyd/internal/control"
	"github.com/tproxyd/tproxyd/internal/gateway"
	"github.com/tproxyd/tproxyd/internal/handover"
	"github.com/tproxyd/tproxyd/pkg/fakedns"
	"github.com/tproxyd/tproxyd/pkg/flow"
	"github.com/tproxyd/tproxyd/pkg/redirect"
	"github.com/tproxyd/tproxyd/pkg/upstream"
)

// A process that takes the place of another one, the successor, talks to it by a
// connection that it has from the control socket:
//
//	successor                          the one that serves
//	hello ────────────────────────────► can it be? else refused, and all stays
//	                                    takes no more flows; they wait
//	◄──────────────────────── estate    descriptors, names, what was read
//	makes everything, the kernel's plan
//	prepared ─────────────────────────►
//	◄──────────────────────────── word  "go": it is the successor's
//	serves flows, and if it lacks nothing for that
//	serving ──────────────────────────► closes its copies, carries on what it has
//	◄────────────────────── carrier …   what is left, until it ends
//	rules … ──────────────────────────► after a reload
//	question … ───────────────────────► which flows? end those
//	◄─────────────────────── answer …
//
// Until "serving" whoever of the two fails, or is silent for stepLimit, leaves
// the other one as it was: the one that serves takes everything back and goes
// on, with what waited meanwhile.
const (
	takeoverVersion = 2
	stepLimit       = 10 * time.Second
)

// hello is what a successor says of itself.
type hello struct {
	Version int           // takeoverVersion
	Lasting lasting       // of its files
	Rules   string        // decidedBy
	Drain   time.Duration // how long the one before may carry its flows on
}

// lasting is what of a configuration must not differ.
type lasting struct {
	Mark, Table, DNS, Pool4, Pool6, Directory, Socket string
}

func lastingOf(c *config.Config) lasting {
	return lasting{
		Mark: c.Intercept.Mark.String(), Table: fmt.Sprint(c.Intercept.Table), DNS: fmt.Sprint(c.Intercept.DNS),
		Pool4: c.DNS.Pool4.String(), Pool6: c.DNS.Pool6.String(),
		Directory: c.State.Directory, Socket: c.Control.Socket,
	}
}

// changed names the keys that differ.
func (l lasting) changed(next lasting) (keys []string) {
	for _, k := range []struct{ key, old, next string }{
		{"[intercept] mark", l.Mark, next.Mark}, {"[intercept] table", l.Table, next.Table}, {"[intercept] dns", l.DNS, next.DNS},
		{"[dns] pool4", l.Pool4, next.Pool4}, {"[dns] pool6", l.Pool6, next.Pool6},
		{"[state] directory", l.Directory, next.Directory}, {"[control] socket", l.Socket, next.Socket},
	} {
		if k.old != k.next {
			keys = append(keys, k.key)
		}
	}
	return keys
}

// estate is what a successor gets. With Refused there is nothing else.
type estate struct {
	Refused string `json:",omitempty"` // why it cannot be
	Files   bool   `json:",omitempty"` // its files are the reason

	Version int
	Pid     int
	Rules   string   // decidedBy
	Names   []string // of the descriptors, one for each
	Metrics string   // address of that listener
	Clash   string   // likewise

	Alive     redirect.Marks
	Whole     bool // see fakedns.Handover; the log is the message's blob
	Pinned    []netip.Addr
	Admitted  []gateway.Remembered
	FirstID   uint64 // IDs of flows are above it
	Servers   []upstream.Known
	Counts    counts
	Questions []flow.Datagram
	Streams   []stream
	Datagrams [][]flow.Datagram // of each shard
	Notify    string            // where systemd is told, if the successor was not started by it

	files []*os.File
	log   []byte
}

// stream is a fakedns.Stream without its connection.
type stream struct {
	Read    []byte
	IfIndex int
}

// The names of descriptors.
const (
	fileKernel  = "kernel"
	fileLock    = "lock"
	fileTCP     = "tcp"
	fileUDP     = "udp"
	fileDNSUDP  = "dns-udp"
	fileDNSTCP  = "dns-tcp"
	fileState   = "state"
	fileControl = "control"
	fileMetrics = "metrics"
	fileClash   = "clash"
	fileStream  = "dns-stream"
)

// add adds descriptors, which are the estate's from then on.
func (e *estate) add(name string, files ...*os.File) {
	for _, f := range files {
		e.Names, e.files = append(e.Names, name), append(e.files, f)
	}
}

// of returns the descriptors of a name; they stay the estate's. A nil estate has
// none, as it has nothing of anything.
func (e *estate) of(name string) (files []*os.File) {
	if e == nil {
		return nil
	}
	for i, n := range e.Names {
		if n == name {
			files = append(files, e.files[i])
		}
	}
	return files
}

// one returns the descriptor of a name, nil if there is none.
func (e *estate) one(name string) *os.File {
	if files := e.of(name); len(files) > 0 {
		return files[0]
	}
	return nil
}

// close closes the descriptors.
func (e *estate) close() {
	if e != nil {
		for _, f := range e.files {
			f.Close()
		}
		e.files, e.Names = nil, nil
	}
}

// keep closes the descriptors of all names but those.
func (e *estate) keep(names ...string) {
	var kept estate
	for i, n := range e.Names {
		if slices.Contains(names, n) {
			kept.add(n, e.files[i])
		} else {
			e.files[i].Close()
		}
	}
	e.Names, e.files = kept.Names, kept.files
}

// hold is the kernel's; nil: there is none.
func (e *estate) hold() *redirect.Hold {
	if e.one(fileKernel) == nil {
		return nil
	}
	return &redirect.Hold{Socket: e.one(fileKernel), Lock: e.one(fileLock), Alive: e.Alive}
}

// The sockets, inherited or new. Those that systemd has kept are of an earlier
// process, and if they are of no use new ones are.

func (e *estate) tcp(m redirect.Marks) (*redirect.Listener, error) {
	return either(e, fileTCP, func(files []*os.File) (*redirect.Listener, error) { return redirect.TakeTCP(m, files) },
		func() (*redirect.Listener, error) { return redirect.ListenTCP(m) })
}

func (e *estate) udp(m redirect.Marks) (*redirect.UDPListener, error) {
	return either(e, fileUDP, func(files []*os.File) (*redirect.UDPListener, error) { return redirect.TakeUDP(m, files) },
		func() (*redirect.UDPListener, error) { return redirect.ListenUDP(m, runtime.GOMAXPROCS(0)) })
}

func (e *estate) dns(m redirect.Marks) (*redirect.DNS, error) {
	return either(e, fileDNSUDP, func(files []*os.File) (*redirect.DNS, error) { return redirect.TakeDNS(m, files, e.of(fileDNSTCP)) },
		func() (*redirect.DNS, error) { return redirect.ListenDNS(m) })
}

func either[T any](e *estate, name string, take func([]*os.File) (T, error), listen func() (T, error)) (T, error) {
	if files := e.of(name); files != nil {
		if t, err := take(files); err == nil || e.hold() != nil {
			return t, err
		}
	}
	return listen()
}

func (e *estate) control(path string) (net.Listener, error) {
	f := e.one(fileControl)
	if f == nil {
		return control.Listen(path)
	}
	return net.FileListener(f) // which leaves the path; see claim
}

func (e *estate) metrics(address string) (net.Listener, error) {
	if f := e.one(fileMetrics); f != nil && e.Metrics == address {
		return net.FileListener(f)
	}
	return net.Listen("tcp", address)
}

func (e *estate) clash(address string) (net.Listener, error) {
	if f := e.one(fileClash); f != nil && e.Clash == address {
		return net.FileListener(f)
	}
	return net.Listen("tcp", address)
}

// names is the table of synthetic addresses; nil: it was not inherited.
func (e *estate) names() *fakedns.Handover {
	if e == nil || e.log == nil {
		return nil
	}
	return &fakedns.Handover{Dir: e.one(fileState), Log: e.log, Whole: e.Whole, Pinned: e.Pinned}
}

// unanswered is what was read and not served. The streams are the caller's.
func (e *estate) unanswered() (u unanswered) {
	u.questions, u.datagrams = e.Questions, e.Datagrams
	for i, f := range e.of(fileStream) {
		c, err := net.FileConn(f)
		if tcp, ok := c.(*net.TCPConn); ok && err == nil && i < len(e.Streams) {
			u.streams = append(u.streams, fakedns.Stream{Conn: tcp, Read: e.Streams[i].Read, IfIndex: e.Streams[i].IfIndex})
		} else if err == nil {
			c.Close()
		}
	}
	return u
}

// unanswered is what was read and not served.
type unanswered struct {
	questions []flow.Datagram   // of DNS
	streams   []fakedns.Stream  // likewise
	datagrams [][]flow.Datagram // of flows, for each shard
}

// of returns the questions that came over IPv4, or those over IPv6.
func (u *unanswered) of(v4 bool) []flow.Datagram {
	return slices.DeleteFunc(slices.Clone(u.questions), func(d flow.Datagram) bool { return d.Src.Addr().Unmap().Is4() != v4 })
}

// refuse tells a process why it cannot be the successor.
func refuse(c *handover.Conn, files bool, format string, args ...any) error {
	defer c.Close()
	c.SetDeadline(time.Now().Add(stepLimit))
	text := fmt.Sprintf(format, args...)
	return c.Send(handover.Message{Body: estate{Refused: text, Files: files, Version: takeoverVersion}})
}

// unfit tells why h cannot be the successor of a daemon with the setup s; empty:
// it can. Files says that its configuration is the reason.
func (s *Setup) unfit(h *hello) (why string, files bool) {
	if h.Version != takeoverVersion {
		return fmt.Sprintf("it speaks version %d of the takeover, and this daemon version %d; stop the daemon first", h.Version, takeoverVersion), false
	}
	if keys := lastingOf(s.Config).changed(h.Lasting); keys != nil {
		return fmt.Sprintf("changed: %s; stop the daemon for that, or change it back", strings.Join(keys, ", ")), true
	}
	return "", false
}
