package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tproxyd/tproxyd/internal/control"
	"github.com/tproxyd/tproxyd/internal/handover"
)

// caller asks the daemon for its place, as a successor does.
func (r *running) caller() *call {
	r.t.Helper()
	u, err := control.NewClient(filepath.Join(r.dir, "control.sock")).TakeOver(context.Background())
	if err != nil {
		r.t.Fatal(err)
	}
	c := &call{Conn: handover.New(u)}
	c.SetDeadline(time.Now().Add(patience))
	r.t.Cleanup(func() { c.Close() })
	return c
}

// says says hello for the files of the daemon, changed by change, and returns what
// comes of it.
func (r *running) says(c *call, change func(h *hello)) *estate {
	r.t.Helper()
	h := hello{takeoverVersion, lastingOf(r.setup.Config), r.setup.decidedBy(), time.Minute}
	change(&h)
	if err := c.Send(handover.Message{Body: h}); err != nil {
		r.t.Fatal(err)
	}
	e := &estate{}
	m, err := c.Receive(e)
	if err != nil {
		r.t.Fatal(err)
	}
	e.files = m.Files
	r.t.Cleanup(e.close)
	return e
}

// TestTakeoverFails: whatever a successor does, or leaves undone, the daemon goes
// on with all that it had, and with what came meanwhile.
func TestTakeoverFails(t *testing.T) {
	r := serve(t, "")
	flow := carried(t)
	address := ask(t, "www.example.org.")
	for _, tt := range []struct {
		name string
		then func(t *testing.T, c *call)
		log  string
	}{
		{"silence at once", func(_ *testing.T, c *call) { c.Close() }, "asked to take over"},
		{"no hello", func(_ *testing.T, c *call) { c.Send(handover.Message{Body: "hello"}); c.Close() }, "cannot unmarshal"},
		{"another version", func(t *testing.T, c *call) {
			if e := r.says(c, func(h *hello) { h.Version = 99 }); !strings.Contains(e.Refused, "version 99") || e.Files || len(e.files) != 0 {
				t.Errorf("%+v", e)
			}
		}, "version 99"},
		{"another mark and table", func(t *testing.T, c *call) {
			e := r.says(c, func(h *hello) { h.Lasting.Mark, h.Lasting.Table = "0x10/0xf0", "99" })
			if e.Refused != "changed: [intercept] mark, [intercept] table; stop the daemon for that, or change it back" || !e.Files {
				t.Errorf("%+v", e)
			}
		}, "[intercept] mark, [intercept] table"},
		{"it ends with the estate", func(t *testing.T, c *call) {
			if e := r.says(c, func(*hello) {}); e.hold() == nil || len(e.of(fileTCP)) == 0 || len(e.of(fileUDP)) == 0 || len(e.of(fileDNSUDP)) == 0 || e.one(fileState) == nil {
				t.Errorf("%v", e.Names)
			}
			c.Close()
		}, `ended before it was \"prepared\"`},
		{"it cannot", func(_ *testing.T, c *call) {
			r.says(c, func(*hello) {})
			c.Send(handover.Message{Body: words{Failed: "no room on this host"}})
		}, "no room on this host"},
		{"nonsense", func(_ *testing.T, c *call) {
			r.says(c, func(*hello) {})
			c.say("perhaps")
		}, "something else"},
		{"it ends when it may go", func(t *testing.T, c *call) {
			r.says(c, func(*hello) {})
			if err := errors.Join(c.say(wordPrepared), c.hear(wordGo)); err != nil {
				t.Error(err)
			}
			c.Close()
		}, `ended before it was \"serving\"`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.then(t, r.caller())
			for end := time.Now().Add(patience); !strings.Contains(r.log.String(), tt.log); time.Sleep(time.Millisecond) {
				if time.Now().After(end) {
					t.Fatalf("the log says nothing of %q", tt.log)
				}
			}
			echoes(t, flow)
			carried(t).Close()
			if now := ask(t, "www.example.org."); now != address {
				t.Errorf("the name was at %s and is at %s", address, now)
			}
			ask(t, fmt.Sprintf("new-%p.example.org.", t))
			if s := r.Status(); s.Kernel.Error != "" || s.DNS.Pool.StoreError != "" {
				t.Errorf("%q, %q", s.Kernel.Error, s.DNS.Pool.StoreError)
			}
		})
	}
	r.routes(fmt.Sprintf(rules, r.setup.Table.Servers()[0].AddrPort()) + "# a reload\n")
	echoes(t, flow)
}

// TestTakeoverAlone: two at once, of which one is told so, while the other one has
// all it needs.
func TestTakeoverAlone(t *testing.T) {
	r := serve(t, "")
	first, second := r.caller(), r.caller()
	r.says(first, func(*hello) {})
	if e := r.says(second, func(*hello) {}); e.Refused != "another process is taking over" || e.Files {
		t.Errorf("%+v", e)
	}
	first.Close()
	carried(t)
}

// TestTakeover: a second daemon serves what the first one did; each carries what
// it has, the first until that has ended, by the rules of the second.
func TestTakeover(t *testing.T) {
	r := serve(t, "")
	flow := carried(t)
	address := ask(t, "www.example.org.")
	setup, diags := Load(filepath.Join(r.dir, "tproxyd.toml"), "")
	if diags.HasErrors() {
		t.Fatal(diags)
	}
	d, err := TakeOver(context.Background(), setup, slog.New(slog.NewTextHandler(r.log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- d.Run(ctx, Signals{}) }()
	defer func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	}()
	told := ""
	for range 2 { // in any order
		told += r.hears("")
	}
	if !strings.Contains(told, fmt.Sprintf("MAINPID=%d", pid)) || !strings.Contains(told, "READY=1") {
		t.Errorf("systemd heard %q", told)
	}
	echoes(t, flow)
	if now := ask(t, "www.example.org."); now != address {
		t.Errorf("the name was at %s and is at %s", address, now)
	}
	mine := carried(t)
	if n := d.gateway.Stats().Live; n != 1 {
		t.Errorf("the second carries %d flows, want its own", n)
	}
	if err := r.Reload(); !errors.Is(err, errTakenOver) {
		t.Errorf("the first reloads: %v", err)
	}
	if err := d.Reload(); err != nil {
		t.Error(err)
	}
	if s := d.Status(); len(s.Before) != 1 || s.Before[0].Flows != 1 {
		t.Errorf("before: %+v", s.Before)
	}
	flows := d.Flows()
	if len(flows) != 2 || flows[0].Process != pid || flows[1].Process != 0 || flows[0].ID == flows[1].ID {
		t.Fatalf("flows: %+v", flows)
	}
	if n := d.Kill(flows[1].ID + 1); n != 0 {
		t.Errorf("%d flows ended that there are not", n)
	}
	echoes(t, flow)
	if n := d.Kill(flows[0].ID); n != 1 {
		t.Errorf("%d flows ended, of the first daemon", n)
	}
	if _, err := flow.Read(make([]byte, 1)); !errors.Is(err, syscall.ECONNRESET) {
		t.Errorf("the flow that was ended: %v", err)
	}
	select {
	case err := <-r.ended:
		if r.ended <- err; err != nil {
			t.Error(err)
		}
	case <-time.After(patience):
		t.Fatal("the first does not end with what it carried")
	}
	for end := time.Now().Add(patience); len(d.Status().Before) > 0; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the second does not hear that the first has ended")
		}
	}
	if n := len(d.Flows()); n != 1 {
		t.Errorf("%d flows are left", n)
	}
	echoes(t, mine)
	carried(t)
	refused(t, denied)
}

// TestTakeoverOfNobody: without a daemon it is a start as any other.
func TestTakeoverOfNobody(t *testing.T) {
	r := serve(t, "")
	r.stop()
	d, err := TakeOver(context.Background(), r.setup, slog.New(slog.NewTextHandler(io.Discard, nil)))
	if err != nil {
		t.Fatal(err)
	}
	d.release(true)
}

// TestStopWhileHandedOver: a daemon that is told to stop gives up before "go", and
// hears what becomes of its place after it.
func TestStopWhileHandedOver(t *testing.T) {
	t.Parallel()
	prepared := func(c *call) error { return errors.Join(c.say(wordPrepared), c.hear(wordGo)) }
	for name, tt := range map[string]struct {
		before, after func(c *call) error // the stop, at the successor
		want          error               // nil: it serves
	}{
		"before it is prepared": {func(c *call) error { return nil }, func(c *call) error {
			if prepared(c) == nil {
				return errors.New("it may go")
			}
			return nil
		}, errStopped},
		"before it serves": {prepared, func(c *call) error {
			time.Sleep(20 * time.Millisecond)
			return c.say(wordServing)
		}, nil},
		"it is silent": {prepared, func(c *call) error { return nil }, os.ErrDeadlineExceeded},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			old, successor := twoEnds(t)
			ctx, cancel := context.WithCancel(context.Background())
			passed := make(chan error, 1)
			go func() { passed <- pass(ctx, old, &estate{}) }()
			_, err := successor.Receive(&estate{})
			if err == nil {
				err = tt.before(successor)
			}
			cancel()
			if err = errors.Join(err, tt.after(successor)); err != nil {
				t.Error(err)
			}
			if err := <-passed; !errors.Is(err, tt.want) {
				t.Errorf("%v, want %v", err, tt.want)
			}
		})
	}
}

// twoEnds returns a connection between two processes that are this one.
func twoEnds(t *testing.T) (old, successor *call) {
	t.Helper()
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "s"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	a, err := net.DialUnix("unix", nil, ln.Addr().(*net.UnixAddr))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	b, err := ln.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.Close() })
	return &call{Conn: handover.New(a)}, &call{Conn: handover.New(b)}
}

// TestAsk: a process before this one that is silent is not waited for long, and what
// it answers too late is no answer to another question.
func TestAsk(t *testing.T) {
	t.Parallel()
	heir, before := twoEnds(t)
	p := &predecessor{call: heir, answers: make(chan answer, 1), over: make(chan struct{})}
	heir.pid = 7
	log := slog.New(slog.DiscardHandler)
	if a := p.ask(question{Within: time.Millisecond}, log); a.Number != 0 {
		t.Errorf("a silent one answers %+v", a)
	}
	p.answers <- answer{Number: 1, Killed: 1}
	go func() {
		var r ruling
		for range 2 {
			before.Receive(&r)
		}
		p.answers <- answer{Number: r.Ask.Number, Flows: []FlowStatus{{ID: 3}, {ID: 4, Process: 5}}}
	}()
	a := p.ask(question{Within: patience}, log)
	if a.Number != 2 || len(a.Flows) != 2 || a.Flows[0].Process != 7 || a.Flows[1].Process != 5 {
		t.Errorf("the answer is %+v", a)
	}
	close(p.over)
	if a := p.ask(question{Within: patience}, log); a.Number != 0 {
		t.Errorf("one that has ended answers %+v", a)
	}
}
