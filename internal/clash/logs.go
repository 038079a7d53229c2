package clash

import (
	"bytes"
	"context"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// Logs gives what is logged to whoever watches. The zero value has no watcher.
type Logs struct {
	watching atomic.Int32
	mu       sync.Mutex
	watchers map[chan logLine]slog.Level
}

type logLine struct {
	Type    string `json:"type"`
	Payload string `json:"payload"`
}

// queuedLines is how many lines wait for a watcher that does not read; more are
// lost to it.
const queuedLines = 256

// Handler returns a handler that hands everything on to next, and to the watchers
// what they want, which can be more than next wants.
func (l *Logs) Handler(next slog.Handler) slog.Handler {
	return &tee{logs: l, next: next, with: func(h slog.Handler) slog.Handler { return h }}
}

// watch returns a channel of lines from a level on, until end is called.
func (l *Logs) watch(from slog.Level) (lines <-chan logLine, end func()) {
	c := make(chan logLine, queuedLines)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.watchers == nil {
		l.watchers = map[chan logLine]slog.Level{}
	}
	l.watchers[c] = from
	l.watching.Add(1)
	return c, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.watchers, c)
		l.watching.Add(-1)
	}
}

// wants tells whether a watcher wants a level.
func (l *Logs) wants(level slog.Level) bool {
	if l.watching.Load() == 0 {
		return false
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, from := range l.watchers {
		if level >= from {
			return true
		}
	}
	return false
}

func (l *Logs) tell(level slog.Level, text string) {
	line := logLine{word(level), text}
	l.mu.Lock()
	defer l.mu.Unlock()
	for c, from := range l.watchers {
		if level >= from {
			select {
			case c <- line:
			default:
			}
		}
	}
}

// word is how Clash spells a level.
func word(level slog.Level) string {
	switch {
	case level >= slog.LevelError:
		return "error"
	case level >= slog.LevelWarn:
		return "warning"
	case level >= slog.LevelInfo:
		return "info"
	}
	return "debug"
}

// tee is a slog.Handler with watchers.
type tee struct {
	logs *Logs
	next slog.Handler
	with func(slog.Handler) slog.Handler // what was called on this handler
}

func (t *tee) Enabled(ctx context.Context, level slog.Level) bool {
	return t.next.Enabled(ctx, level) || t.logs.wants(level)
}

func (t *tee) Handle(ctx context.Context, r slog.Record) error {
	if t.logs.wants(r.Level) {
		var b bytes.Buffer
		text := slog.NewTextHandler(&b, &slog.HandlerOptions{Level: slog.Level(-1 << 10), ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			if len(groups) == 0 && (a.Key == slog.TimeKey || a.Key == slog.LevelKey) {
				return slog.Attr{}
			}
			return a
		}})
		if err := t.with(text).Handle(ctx, r); err == nil {
			t.logs.tell(r.Level, strings.TrimSuffix(strings.TrimPrefix(b.String(), slog.MessageKey+"="), "\n"))
		}
	}
	if !t.next.Enabled(ctx, r.Level) {
		return nil
	}
	return t.next.Handle(ctx, r)
}

func (t *tee) WithAttrs(attrs []slog.Attr) slog.Handler {
	with := t.with
	return &tee{t.logs, t.next.WithAttrs(attrs), func(h slog.Handler) slog.Handler { return with(h).WithAttrs(attrs) }}
}

func (t *tee) WithGroup(name string) slog.Handler {
	with := t.with
	return &tee{t.logs, t.next.WithGroup(name), func(h slog.Handler) slog.Handler { return with(h).WithGroup(name) }}
}

func (a *api) logStream(w http.ResponseWriter, r *http.Request) {
	from := slog.LevelInfo
	switch level := r.URL.Query().Get("level"); level {
	case "", "info":
	case "debug":
		from = slog.LevelDebug
	case "warning":
		from = slog.LevelWarn
	case "error":
		from = slog.LevelError
	case "silent":
		from = slog.LevelError + 1<<10
	default:
		fail(w, http.StatusBadRequest, "level: want debug, info, warning, error or silent")
		return
	}
	structured := r.URL.Query().Get("format") == "structured"
	a.stream(w, r, func(ctx context.Context, send func(any) error) {
		lines, end := a.o.Logs.watch(from)
		defer end()
		if f, ok := w.(http.Flusher); ok && !upgrades(r) {
			f.Flush() // the first line can be long in coming
		}
		for {
			select {
			case <-ctx.Done():
				return
			case l := <-lines:
				var v any = l
				if structured {
					v = map[string]any{"time": time.Now().Format(time.TimeOnly), "level": l.Type, "message": l.Payload, "fields": []any{}}
				}
				if send(v) != nil {
					return
				}
			}
		}
	})
}
