package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"github.com/tproxyd/tproxyd/internal/handover"
	"github.com/tproxyd/tproxyd/pkg/redirect"
	"golang.org/x/sys/unix"
)

// This file is the side of the daemon that serves and is asked for its place;
// see estate.go for what is said.

// errTakenOver is why a daemon does not do what another one does now.
var errTakenOver = errors.New("daemon: another process has taken over; ask that")

// call is a process that wants to be the successor.
type call struct {
	*handover.Conn
	hello
	pid int
}

// callLimit is how long a process waits for one before it, which may just have
// failed: what it had then goes back first.
const callLimit = time.Second

// called hears what a process wants that has asked for the daemon's place, and
// passes it on to the task that hands it over. It runs in the request's
// goroutine, until ctx ends at the latest.
func (d *Daemon) called(ctx context.Context, u *net.UnixConn) {
	c := &call{Conn: handover.New(u)}
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	c.SetDeadline(time.Now().Add(stepLimit))
	pid, _, err := c.Peer() // the user is known to be one who may: see internal/control
	if err == nil {
		_, err = c.Receive(&c.hello)
	}
	if err != nil {
		d.log.Warn("a process asked to take over", "pid", pid, "err", err)
		c.Close()
		return
	}
	c.pid = pid
	select {
	case d.calls <- c:
	case <-time.After(callLimit):
		refuse(c.Conn, false, "another process is taking over")
	case <-ctx.Done():
		c.Close()
	}
}

// handOver gives the daemon's place to a process. True: the process serves, and
// this one does not any longer. Else all is as it was, but that taking may have
// been stopped; with an error it cannot be so.
func (d *Daemon) handOver(ctx context.Context, c *call, taking *part) (gone bool, err error) {
	d.mu.Lock() // no reload meanwhile
	defer d.mu.Unlock()
	if why, files := d.setup.unfit(&c.hello); why != "" {
		d.log.Warn("a process cannot take over", "pid", c.pid, "err", why)
		refuse(c.Conn, files, "%s", why)
		return false, nil
	}
	began := time.Now()
	e, left, err := d.part(taking)
	if err == nil {
		err = pass(ctx, c, e)
	} else {
		refuse(c.Conn, false, "%v", err)
	}
	defer e.close()
	if err != nil {
		c.end(err)
		d.log.Error("a process has not taken over, this one goes on", "pid", c.pid, "err", err, "dur", time.Since(began).Round(time.Millisecond))
		return false, d.goOn(ctx, e, left)
	}
	d.kernel.Release()
	d.names.Release()
	d.udp.StopReceiving()
	d.flows.Close()
	for _, s := range left.streams {
		s.Conn.Close()
	}
	d.takenOver = true
	notifyMain(c.pid)
	d.log.Info("handed over", "pid", c.pid, "dur", time.Since(began).Round(time.Millisecond))
	return true, nil
}

// idRange is how many IDs of flows a process has for itself, so that one ID is one
// flow among all that were taken over.
const idRange = 1_000_000_000

// remains is what the daemon needs to go on where it stopped.
type remains struct {
	unanswered
	stopped, lent, held bool // taking flows, the kernel, the names
}

// part stops taking flows and returns what the successor needs for that. What is
// carried goes on. Also with an error goOn is to be called, if it is not the end.
func (d *Daemon) part(taking *part) (e *estate, r *remains, err error) {
	e, r = &estate{Version: takeoverVersion, Pid: os.Getpid(), Rules: d.setup.decidedBy(), Notify: os.Getenv("NOTIFY_SOCKET")}, &remains{}
	if err := d.addSockets(e); err != nil {
		return e, r, err
	}
	for _, l := range []struct {
		name string
		ln   net.Listener
	}{{fileControl, d.socket}, {fileMetrics, d.metrics}, {fileClash, d.clash}} {
		if l.ln == nil {
			continue
		}
		f, err := handover.Dup(l.ln.(syscall.Conn))
		if err != nil {
			return e, r, err
		}
		e.add(l.name, f)
	}
	e.Metrics, e.Clash = d.setup.Config.Control.Metrics, d.setup.Config.Control.Clash

	e.Servers = d.servers.Known()
	if last, err := d.kernel.Tallies(); err == nil {
		d.lastTallies.Store(&last)
	}

	taking.stop() // accepts nothing more, and closes the sockets of DNS
	r.stopped = true
	r.questions, r.streams = d.names.Left()
	r.datagrams = d.packets.Detach()
	e.Questions, e.Datagrams = r.questions, r.datagrams
	for _, s := range r.streams {
		f, err := handover.Dup(s.Conn)
		if err != nil {
			return e, r, err
		}
		e.add(fileStream, f)
		e.Streams = append(e.Streams, stream{s.Read, s.IfIndex})
	}
	hold, err := d.kernel.Lend()
	if err != nil {
		return e, r, err
	}
	r.lent, e.Alive = true, hold.Alive
	e.add(fileKernel, hold.Socket)
	if hold.Lock != nil {
		e.add(fileLock, hold.Lock)
	}
	names, err := d.names.Lend()
	r.held = true
	if err != nil {
		return e, r, err
	}
	if names.Dir != nil {
		e.add(fileState, names.Dir)
	}
	e.log, e.Whole, e.Pinned = names.Log, names.Whole, names.Pinned
	e.Admitted = d.gateway.Remembered()
	e.Counts, _ = d.counts(d.reloads)
	e.Counts = e.Counts.some()
	e.FirstID = (d.gateway.NextID()/idRange + 1) * idRange
	return e, r, nil
}

// addSockets adds those that flows and questions come to.
func (d *Daemon) addSockets(e *estate) error {
	tcp, err := d.flows.Files()
	e.add(fileTCP, tcp...)
	if err != nil {
		return err
	}
	udp, err := d.udp.Files()
	e.add(fileUDP, udp...)
	if err != nil || d.dns == nil {
		return err
	}
	udp, tcp, err = d.dns.Files()
	e.add(fileDNSUDP, udp...)
	e.add(fileDNSTCP, tcp...)
	return err
}

// hurryLimit is how long a successor that may go has to serve, when this daemon is
// told to stop meanwhile.
const hurryLimit = 2 * time.Second

var errStopped = errors.New("daemon: this one was told to stop")

// pass gives the estate to the successor and returns when that serves. When ctx
// ends it gives up, but not once it has said "go": the successor may serve by
// then, and only what it says, or its end, tells whose the kernel's table is.
func pass(ctx context.Context, c *call, e *estate) error {
	stop := context.AfterFunc(ctx, func() { c.Close() })
	defer stop()
	c.SetDeadline(time.Now().Add(stepLimit))
	err := c.Send(handover.Message{Body: e, Blob: e.log, Files: e.files})
	if err == nil {
		c.SetDeadline(time.Now().Add(stepLimit)) // its own time, however large that was
		err = c.hear(wordPrepared)
	}
	if !stop() {
		return errStopped
	}
	if err == nil {
		err = c.say(wordGo)
	}
	if err != nil {
		return err
	}
	hurry := context.AfterFunc(ctx, func() { c.SetReadDeadline(time.Now().Add(hurryLimit)) })
	defer hurry()
	return c.hear(wordServing)
}

// end makes sure that a successor that has failed does nothing more. It may have
// half of what is needed to serve, so one that has stopped to answer is killed.
func (c *call) end(err error) {
	if errors.Is(err, os.ErrDeadlineExceeded) {
		unix.Kill(c.pid, unix.SIGKILL)
		c.SetDeadline(time.Now().Add(time.Second))
		for err = nil; err == nil || errors.Is(err, errOtherWord); { // its end closes the connection
			err = c.hear("")
		}
	}
	c.Close()
}

// goOn takes everything back that is in the estate, for take. With no descriptor
// left that has to wait for one: what is carried is worth more than to end.
func (d *Daemon) goOn(ctx context.Context, e *estate, r *remains) (err error) {
	d.lastTallies.Store(nil)
	if r.lent {
		if err := d.kernel.TakeBack(); err != nil {
			d.log.Error("the kernel's table", "err", err) // it stays closed, and heals
		}
	}
	if r.held {
		d.names.TakeBack()
	}
	d.noteDecided(d.setup)
	d.unanswered = r.unanswered
	if !r.stopped || d.dns == nil {
		return nil
	}
	e.keep(fileDNSUDP, fileDNSTCP)
	for tries := range goOnLimit / goOnPause {
		d.dns, err = redirect.TakeDNS(d.mark, e.of(fileDNSUDP), e.of(fileDNSTCP))
		if err == nil || ctx.Err() != nil {
			break
		}
		if tries == 0 {
			d.log.Error("nothing is taken before this works", "err", err)
		}
		time.Sleep(goOnPause)
	}
	return err
}

const (
	goOnPause = 50 * time.Millisecond
	goOnLimit = time.Minute
)

// words is a message of one word, or of why there is none.
type words struct {
	Word   string
	Failed string `json:",omitempty"`
}

// The words that are said.
const (
	wordPrepared = "prepared"
	wordGo       = "go"
	wordServing  = "serving"
)

var errOtherWord = errors.New("daemon: the other process said something else")

func (c *call) say(word string) error { return c.Send(handover.Message{Body: words{Word: word}}) }

// hear waits for a word.
func (c *call) hear(word string) error {
	var w words
	_, err := c.Receive(&w)
	switch {
	case errors.Is(err, io.EOF):
		return fmt.Errorf("daemon: it has ended before it was %q", word)
	case err != nil:
		return err
	case w.Failed != "":
		return errors.New(w.Failed)
	case w.Word != word:
		return fmt.Errorf("%w: %q, not %q", errOtherWord, w.Word, word)
	}
	return nil
}

// stopAnswering leaves the control socket and the metrics to the successor, who
// has the same open files, and what changes by itself.
func (d *Daemon) stopAnswering(reach *part) {
	if u, ok := d.socket.(*net.UnixListener); ok {
		u.SetUnlinkOnClose(false)
	}
	reach.stop()
}
