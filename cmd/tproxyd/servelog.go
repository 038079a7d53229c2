package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"
)

// serveLog is what serve's flags say of its log.
type serveLog struct{ level, format string }

func (l *serveLog) flags(c *cobra.Command) {
	c.Flags().StringVar(&l.level, "log-level", "info", "debug, info, warn or error; debug writes one line per flow")
	c.Flags().StringVar(&l.format, "log-format", "text", "text or json")
}

// logger writes to standard error. Where that is the journal each line begins
// with its priority (sd-daemon(3)) and has no date, which the journal adds.
func (l *serveLog) logger(e *env) (*slog.Logger, error) {
	o := &slog.HandlerOptions{}
	var min slog.Level
	if err := min.UnmarshalText([]byte(l.level)); err != nil {
		return nil, fmt.Errorf("--log-level: %q is not debug, info, warn or error", l.level)
	}
	o.Level = min
	write := func(w io.Writer) slog.Handler { return slog.NewTextHandler(w, o) }
	switch l.format {
	case "text":
	case "json":
		write = func(w io.Writer) slog.Handler { return slog.NewJSONHandler(w, o) }
	default:
		return nil, fmt.Errorf("--log-format: %q is not text or json", l.format)
	}
	if !e.toJournal() {
		return slog.New(paced{write(e.stderr), &pace{}}), nil
	}
	o.ReplaceAttr = func(groups []string, a slog.Attr) slog.Attr {
		if len(groups) == 0 && (a.Key == slog.TimeKey || a.Key == slog.LevelKey) {
			return slog.Attr{}
		}
		return a
	}
	return slog.New(paced{priorities{
		write(prefixed{"<7>", e.stderr}), write(prefixed{"<6>", e.stderr}), write(prefixed{"<4>", e.stderr}), write(prefixed{"<3>", e.stderr}),
	}, &pace{}}), nil
}

// flowLines is how many lines about flows are written in a second. A disk that
// cannot follow must not hold up those who write them.
const flowLines = 500

// paced leaves out lines about flows that come faster than flowLines, and says
// how many it has left out with the next one that it writes.
type paced struct {
	slog.Handler
	pace *pace // that of all handlers made of this one
}

// pace counts the lines of a second.
type pace struct {
	mu            sync.Mutex
	began         time.Time
	written, left int
}

// take tells whether one more line may be written, and how many were left out
// before it since that was said last.
func (p *pace) take(now time.Time) (ok bool, left int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if d := now.Sub(p.began); d >= time.Second || d < 0 {
		p.began, p.written = now, 0
	}
	if p.written == flowLines {
		p.left++
		return false, 0
	}
	p.written++
	left, p.left = p.left, 0
	return true, left
}

// Handle is that of slog.Handler.
func (h paced) Handle(ctx context.Context, r slog.Record) error {
	if r.Message != "flow" && r.Message != "session" {
		return h.Handler.Handle(ctx, r)
	}
	ok, left := h.pace.take(r.Time)
	if !ok {
		return nil
	}
	if left > 0 {
		note := slog.NewRecord(r.Time, slog.LevelWarn, "lines about flows were left out", 0)
		note.AddAttrs(slog.Int("lines", left))
		if err := h.Handler.Handle(ctx, note); err != nil {
			return err
		}
	}
	return h.Handler.Handle(ctx, r)
}

// WithAttrs is that of slog.Handler.
func (h paced) WithAttrs(a []slog.Attr) slog.Handler { return paced{h.Handler.WithAttrs(a), h.pace} }

// WithGroup is that of slog.Handler.
func (h paced) WithGroup(name string) slog.Handler { return paced{h.Handler.WithGroup(name), h.pace} }

// toJournal tells whether standard error is the stream to the journal that
// JOURNAL_STREAM names by device and inode (systemd.exec(5)).
func (e *env) toJournal() bool {
	named := e.getenv("JOURNAL_STREAM")
	f, ok := e.stderr.(*os.File)
	if named == "" || !ok {
		return false
	}
	var st unix.Stat_t
	return unix.Fstat(int(f.Fd()), &st) == nil && named == fmt.Sprintf("%d:%d", st.Dev, st.Ino)
}

// priorities is a handler for each level: debug, info, warn, error.
type priorities [4]slog.Handler

func (p priorities) of(l slog.Level) slog.Handler {
	return p[min(3, max(0, (int(l)-int(slog.LevelDebug))/4))]
}

// Enabled is that of slog.Handler.
func (p priorities) Enabled(ctx context.Context, l slog.Level) bool { return p.of(l).Enabled(ctx, l) }

// Handle is that of slog.Handler.
func (p priorities) Handle(ctx context.Context, r slog.Record) error {
	return p.of(r.Level).Handle(ctx, r)
}

// WithAttrs is that of slog.Handler.
func (p priorities) WithAttrs(a []slog.Attr) slog.Handler {
	for i, h := range p {
		p[i] = h.WithAttrs(a)
	}
	return p
}

// WithGroup is that of slog.Handler.
func (p priorities) WithGroup(name string) slog.Handler {
	for i, h := range p {
		p[i] = h.WithGroup(name)
	}
	return p
}

// prefixed writes each line, which comes in one piece, behind a prefix.
type prefixed struct {
	prefix string
	to     io.Writer
}

// Write is that of io.Writer.
func (p prefixed) Write(b []byte) (int, error) {
	_, err := p.to.Write(append([]byte(p.prefix), b...))
	return len(b), err
}

// dumpState writes the state as one line of the log for each signal, until ctx
// ends.
func dumpState(ctx context.Context, signals <-chan os.Signal, state func() any, log *slog.Logger) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-signals:
			b, err := json.Marshal(state())
			if err != nil {
				log.Warn("the state cannot be written", "err", err)
				continue
			}
			log.Info("state", "status", json.RawMessage(b))
		}
	}
}
