package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestServeLog: text and JSON, with a date where it goes to a file; with the
// priority and no date where it goes to the journal.
func TestServeLog(t *testing.T) {
	for _, tt := range []struct {
		name, format, want string
		journal            bool
	}{
		{"text to the journal", "text", "<6>msg=started part=x n=1\n<4>msg=slow part=x\n<3>msg=over part=x\n", true},
		{"json to the journal", "json", "<6>{\"msg\":\"started\",\"part\":\"x\",\"n\":1}\n<4>{\"msg\":\"slow\",\"part\":\"x\"}\n<3>{\"msg\":\"over\",\"part\":\"x\"}\n", true},
		{"text to a file", "text", "", false},
		{"json to a file", "json", "", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f, err := os.CreateTemp(t.TempDir(), "log")
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			var st unix.Stat_t
			if err := unix.Fstat(int(f.Fd()), &st); err != nil {
				t.Fatal(err)
			}
			stream := "1:2" // of somebody else
			if tt.journal {
				stream = fmt.Sprintf("%d:%d", st.Dev, st.Ino)
			}
			l := serveLog{"info", tt.format}
			log, err := l.logger(&env{stderr: f, getenv: func(string) string { return stream }})
			if err != nil {
				t.Fatal(err)
			}
			log = log.With("part", "x")
			log.Debug("not asked for")
			log.Info("started", "n", 1)
			log.Warn("slow")
			log.Error("over")
			b, err := os.ReadFile(f.Name())
			if err != nil {
				t.Fatal(err)
			}
			if tt.want != "" {
				if string(b) != tt.want {
					t.Errorf("%q, want %q", b, tt.want)
				}
				return
			}
			lines := strings.Split(strings.TrimSpace(string(b)), "\n")
			for _, line := range lines {
				if tt.format == "text" && (!strings.HasPrefix(line, "time=") || !strings.Contains(line, "level=")) {
					t.Errorf("%q has no date or level", line)
				}
				var record struct{ Time, Level string }
				if err := json.Unmarshal([]byte(line), &record); tt.format == "json" && (err != nil || record.Time == "" || record.Level == "") {
					t.Errorf("%q: %v", line, err)
				}
			}
			if len(lines) != 3 {
				t.Errorf("%d lines:\n%s", len(lines), b)
			}
		})
	}
	for _, l := range []serveLog{{"loud", "text"}, {"info", "xml"}} {
		if _, err := l.logger(&env{getenv: func(string) string { return "" }}); err == nil {
			t.Errorf("%v is taken", l)
		}
	}
}

// TestDumpState: one line for each signal, with the whole state.
func TestDumpState(t *testing.T) {
	var out bytes.Buffer
	ctx, cancel := context.WithCancel(t.Context())
	signals, done := make(chan os.Signal), make(chan struct{})
	go func() {
		defer close(done)
		dumpState(ctx, signals, func() any { return map[string]int{"flows": 3} }, slog.New(slog.NewJSONHandler(&out, nil)))
	}()
	signals <- unix.SIGUSR1
	signals <- unix.SIGUSR1
	cancel()
	<-done
	if n := strings.Count(out.String(), `"msg":"state","status":{"flows":3}`); n == 0 || n != strings.Count(out.String(), "\n") {
		t.Errorf("%s", out.String())
	}
}

// TestPaced: lines about flows are counted by the second, others are not, and
// what was left out is told.
func TestPaced(t *testing.T) {
	var out bytes.Buffer
	h := slog.Handler(paced{slog.NewTextHandler(&out, nil), &pace{}})
	other := h.WithAttrs([]slog.Attr{slog.String("part", "gateway")})
	write := func(h slog.Handler, at time.Duration, msg string) {
		t.Helper()
		if err := h.Handle(context.Background(), slog.NewRecord(time.Unix(1000, 0).Add(at), slog.LevelInfo, msg, 0)); err != nil {
			t.Fatal(err)
		}
	}
	for i := range flowLines + 7 {
		write([]slog.Handler{h, other}[i%2], time.Millisecond, "flow")
		write(h, time.Millisecond, "reloaded")
	}
	if n := strings.Count(out.String(), "msg=flow"); n != flowLines {
		t.Errorf("%d lines in a second, want %d", n, flowLines)
	}
	if n := strings.Count(out.String(), "msg=reloaded"); n != flowLines+7 {
		t.Errorf("%d other lines, want all %d", n, flowLines+7)
	}
	out.Reset()
	write(other, 2*time.Second, "session")
	write(other, 2*time.Second, "session")
	if text := out.String(); strings.Count(text, "msg=session") != 2 || strings.Count(text, "lines=7") != 1 {
		t.Errorf("in the next second:\n%s", text)
	}
}
