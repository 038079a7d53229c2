package daemon

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"sync"
	"time"

	"github.com/tproxyd/tproxyd/internal/control"
	"github.com/tproxyd/tproxyd/internal/gateway"
	"github.com/tproxyd/tproxyd/internal/handover"
	"github.com/tproxyd/tproxyd/pkg/redirect"
)

// This file is the side of the successor; see estate.go for what is said.

// pid is this process.
var pid = os.Getpid()

// RefusedError says that the daemon that serves does not give up its place.
type RefusedError struct {
	Text  string
	Files bool // what the files say is the reason
}

func (e *RefusedError) Error() string { return "the daemon that serves goes on: " + e.Text }

// TakeOver is New in the place of a daemon that serves by the same files: its
// sockets, names and hold on the kernel are this one's from then on, and what it
// carries it carries to its end, for drain at most. If there is no daemon it is
// New. With an error the other one goes on as if nothing had been.
func TakeOver(ctx context.Context, setup *Setup, log *slog.Logger) (*Daemon, error) {
	dialing, cancel := context.WithTimeout(ctx, stepLimit)
	defer cancel()
	u, err := control.NewClient(setup.Config.Control.Socket).TakeOver(dialing)
	if errors.Is(err, control.ErrNobody) {
		log.Info("there is no daemon to take over from", "socket", setup.Config.Control.Socket)
		return New(setup, log)
	}
	if err != nil {
		return nil, fmt.Errorf("daemon: %w", err)
	}
	c := &call{Conn: handover.New(u)}
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	d, err := c.takeOver(setup, log)
	if err != nil {
		c.Close()
		return nil, err
	}
	return d, nil
}

func (c *call) takeOver(setup *Setup, log *slog.Logger) (*Daemon, error) {
	c.SetDeadline(time.Now().Add(2 * stepLimit))
	if err := c.Send(handover.Message{Body: hello{takeoverVersion, lastingOf(setup.Config), setup.decidedBy(), setup.Config.Intercept.Drain}}); err != nil {
		return nil, err
	}
	e := &estate{}
	m, err := c.Receive(e)
	if err != nil {
		return nil, fmt.Errorf("daemon: the one that serves: %w", err)
	}
	e.files, e.log = m.Files, m.Blob
	switch {
	case e.Refused != "":
		e.close()
		return nil, &RefusedError{e.Refused, e.Files}
	case e.Version != takeoverVersion || len(e.files) != len(e.Names) || e.hold() == nil:
		e.close()
		return nil, fmt.Errorf("daemon: what was handed over makes no sense (version %d, %d descriptors)", e.Version, len(e.files))
	}
	d, err := inherit(setup, log, e)
	e.close()
	if err == nil {
		if err = c.say(wordPrepared); err == nil {
			err = c.hear(wordGo)
		}
		if err != nil {
			d.release(true)
		}
	} else {
		c.Send(handover.Message{Body: words{Failed: err.Error()}})
	}
	if err != nil {
		return nil, err
	}
	c.pid = e.Pid
	d.before = &predecessor{call: c, now: []Carrier{{Pid: e.Pid}}, counts: e.Counts, pinned: e.Pinned, answers: make(chan answer, 1), over: make(chan struct{})}
	if os.Getenv("NOTIFY_SOCKET") == "" && e.Notify != "" {
		os.Setenv("NOTIFY_SOCKET", e.Notify)
	}
	log.Info("took over", "pid", e.Pid)
	return d, nil
}

// inherit takes what belongs to the rooms that are there by now, and returns
// what Plan.Readmit shall be: what the kernel lets pass by name stays as far as
// the rules say so.
func (d *Daemon) inherit(e *estate, plan *gateway.Plan) ([]redirect.Admission, error) {
	if e.hold() == nil {
		return d.setup.readmitAtStart(), nil
	}
	d.unanswered = e.unanswered()
	for _, a := range e.Pinned {
		d.names.Pin(a)
	}
	d.gateway.Remember(e.Admitted)
	d.gateway.CountFrom(e.FirstID)
	d.servers.Adopt(e.Servers)
	if e.Rules == d.setup.decidedBy() {
		return nil, nil
	}
	inForce, err := d.inForce()
	if err != nil {
		return nil, err
	}
	return toKernel(d.gateway.Readmit(plan, inForce)), nil
}

// disown leaves everything that was inherited to the process that had it.
func (d *Daemon) disown() {
	if d.kernel != nil {
		d.kernel.Release()
	}
	if d.names != nil {
		d.names.Release()
	}
	for _, s := range d.unanswered.streams {
		s.Conn.Close()
	}
}

// predecessor is the process that this one has taken over from, and what it
// still carries. A nil one has ended.
type predecessor struct {
	call   *call
	pinned []netip.Addr // names that its flows need

	sending sync.Mutex // one message at a time
	asking  sync.Mutex // one question at a time; guards asked
	asked   uint64
	answers chan answer   // the last one; there is room for it
	over    chan struct{} // closed when it has ended

	mu     sync.Mutex
	now    []Carrier
	counts counts // what it last said, its end does not change it
}

func (p *predecessor) ended() bool {
	if p == nil {
		return true
	}
	select {
	case <-p.over:
		return true
	default:
		return false
	}
}

// carriers is what it last said, those before it included.
func (p *predecessor) carriers() []Carrier {
	if p == nil {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.now
}

// count adds what it, and those before it, have counted.
func (p *predecessor) count(c *counts) {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	c.add(&p.counts)
}

// bytes are what it, and those before it, have carried.
func (p *predecessor) bytes() (up, down uint64) {
	if p == nil {
		return 0, 0
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	c := &p.counts
	return c.Flows.Up + c.UDP.Up, c.Flows.Down + c.UDP.Down
}

// tell tells it by which rules flows are decided from now on.
func (p *predecessor) tell(rules string) { p.say(ruling{Rules: rules}) }

// leave ends the connection to it. It ends too if what took its place was stopped by
// somebody who asked for that, and else carries on what it has.
func (p *predecessor) leave(asked bool) {
	if p == nil {
		return
	}
	if asked {
		p.say(ruling{Stop: true})
	}
	p.call.Close()
}

func (p *predecessor) say(r ruling) {
	if p.ended() {
		return
	}
	p.sending.Lock()
	defer p.sending.Unlock()
	p.call.SetWriteDeadline(time.Now().Add(stepLimit))
	p.call.Send(handover.Message{Body: r}) // its end is heard by watch
}

// askLimit is how long an answer is waited for. The process that is asked waits half
// as long for the one before it.
const askLimit = 2 * time.Second

// ask has it answer a question; the zero answer if it has ended or is silent.
func (p *predecessor) ask(q question, log *slog.Logger) (a answer) {
	if p.ended() {
		return a
	}
	p.asking.Lock()
	defer p.asking.Unlock()
	p.asked++
	q.Number = p.asked
	p.say(ruling{Ask: &q})
	for limit := time.After(q.Within); a.Number != q.Number; { // another one was waited for in vain
		select {
		case a = <-p.answers:
		case <-p.over: // perhaps with this answer
			select {
			case a = <-p.answers:
			default:
				return answer{}
			}
		case <-limit:
			log.Warn("the process before this one does not say what it carries", "pid", p.call.pid)
			return answer{}
		}
	}
	for i := range a.Flows {
		a.Flows[i].Process = cmp.Or(a.Flows[i].Process, p.call.pid)
	}
	return a
}

// watch hears what the predecessor still carries until it ends. Then the names
// that its flows needed may be given up. Before its first word it tells systemd
// whose process the main one is from now on, and systemd listens to no other.
func (d *Daemon) watch(ctx context.Context) error {
	p := d.before
	stop := context.AfterFunc(ctx, func() { p.call.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	for first := true; ; first = false {
		var r report
		_, err := p.call.Receive(&r)
		if first && ctx.Err() == nil {
			d.announce()
		}
		if err != nil {
			break
		}
		if r.Answer != nil {
			select {
			case <-p.answers:
			default:
			}
			p.answers <- *r.Answer
			continue
		}
		p.mu.Lock()
		if r.Counts != nil {
			p.counts = *r.Counts
		} else {
			p.now = r.Carriers
		}
		p.mu.Unlock()
	}
	if ctx.Err() != nil {
		return nil
	}
	p.mu.Lock()
	p.now = nil
	p.mu.Unlock()
	close(p.over)
	for _, a := range p.pinned {
		d.names.Unpin(a)
	}
	d.log.Info("the process before this one has ended", "pid", p.call.pid)
	return nil
}
