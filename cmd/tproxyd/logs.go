package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"

	"github.com/spf13/cobra"
)

// logFlags are the flags of run and attach about what is written.
type logFlags struct {
	verbose bool
	file    string
}

func (l *logFlags) flags(c *cobra.Command) {
	c.Flags().BoolVarP(&l.verbose, "verbose", "v", false, "a line on standard error for each flow")
	c.Flags().StringVar(&l.file, "log", "", "append what is logged, a line for each flow, to `FILE`")
}

// logger writes what --log and -v ask for. Without them only what an operator
// must know is written.
func (l *logFlags) logger(e *env) (*slog.Logger, error) {
	var all []slog.Handler
	if l.file != "" {
		f, err := os.OpenFile(l.file, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
		if err != nil {
			return nil, fmt.Errorf("--log: %w", err)
		}
		all = append(all, slog.NewTextHandler(f, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	short := &slog.HandlerOptions{Level: slog.LevelWarn, ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
		if len(groups) == 0 && (a.Key == slog.TimeKey || a.Key == slog.LevelKey || a.Key == "part") {
			return slog.Attr{}
		}
		return a
	}}
	if l.verbose {
		short.Level = slog.LevelDebug
	}
	screen := slog.Handler(slog.NewTextHandler(e.stderr, short))
	if l.verbose {
		screen = flowsAndWarnings{screen}
	}
	return slog.New(slog.NewMultiHandler(append(all, screen)...)), nil
}

// flowsAndWarnings leaves out what is not a flow and no warning.
type flowsAndWarnings struct{ slog.Handler }

func (h flowsAndWarnings) Handle(ctx context.Context, rec slog.Record) error {
	if rec.Level < slog.LevelWarn && rec.Message != "flow" && rec.Message != "session" {
		return nil
	}
	return h.Handler.Handle(ctx, rec)
}

func (h flowsAndWarnings) WithAttrs(a []slog.Attr) slog.Handler {
	return flowsAndWarnings{h.Handler.WithAttrs(a)}
}

func (h flowsAndWarnings) WithGroup(name string) slog.Handler {
	return flowsAndWarnings{h.Handler.WithGroup(name)}
}
