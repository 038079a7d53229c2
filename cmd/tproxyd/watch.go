package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/tproxyd/tproxyd/internal/daemon"
	"golang.org/x/sys/unix"
)

// view shows flows, once or again and again. On a terminal what is shown stands
// still: each time it is written over what was there. Anything else gets one table
// after the other, with an empty line between them.
type view struct {
	out  io.Writer
	json bool

	before map[uint64]daemon.FlowStatus // that were shown last
	at     time.Time                    // when
}

// print shows flows as they are.
func (v *view) print(list []daemon.FlowStatus) error {
	if v.json {
		return json.NewEncoder(v.out).Encode(list)
	}
	_, err := v.out.Write(v.table(list, 0))
	return err
}

// next shows flows with what has moved since the last time.
func (v *view) next(list []daemon.FlowStatus, now time.Time) error {
	if v.json {
		return v.print(list)
	}
	since := time.Duration(0)
	if !v.at.IsZero() {
		since = now.Sub(v.at)
	}
	text := v.table(list, since)
	width, height, terminal := terminalSize(v.out)
	switch {
	case terminal:
		text = screen(text, width, height)
	case !v.at.IsZero():
		text = append([]byte("\n"), text...)
	}
	v.at, v.before = now, map[uint64]daemon.FlowStatus{}
	for _, f := range list {
		v.before[f.ID] = f
	}
	_, err := v.out.Write(text)
	return err
}

// table spells flows, with rates over the time given; 0: without.
func (v *view) table(list []daemon.FlowStatus, since time.Duration) []byte {
	var b bytes.Buffer
	t := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	fmt.Fprint(t, "ID\tAGE\tPROTO\tCLIENT\tDESTINATION\tRULE\tACTION\tSERVER\tUP\tDOWN")
	if since > 0 {
		fmt.Fprint(t, "\tUP/S\tDOWN/S")
	}
	fmt.Fprintln(t)
	for _, f := range list {
		age := span(time.Duration(f.Age * float64(time.Second)))
		server := f.Server
		if server == "" {
			server = "-"
		}
		fmt.Fprintf(t, "%d\t%s\t%s\t%v\t%s\t%s\t%s\t%s\t%s\t%s", f.ID, age, f.Network, f.Client, target(f), f.Rule, f.Action, server, size(f.Up), size(f.Down))
		if since > 0 {
			old := v.before[f.ID]
			fmt.Fprintf(t, "\t%s\t%s", rate(f.Up-old.Up, since), rate(f.Down-old.Down, since))
		}
		fmt.Fprintln(t)
	}
	t.Flush() // into memory
	return b.Bytes()
}

func rate(bytes uint64, over time.Duration) string {
	return size(uint64(float64(bytes) / over.Seconds()))
}

// screen writes a table over what a terminal shows, as far as there is room.
func screen(table []byte, width, height int) []byte {
	const home, toEnd, below = "\x1b[H", "\x1b[K", "\x1b[J"
	lines := strings.Split(strings.TrimRight(string(table), "\n"), "\n")
	flows := len(lines) - 1
	room := max(height-2, 1) // the line about all of them, and the cursor's
	if more := len(lines) - room; more > 0 {
		lines = append(lines[:room-1:room-1], fmt.Sprintf("… and %d more", more+1))
	}
	lines = append([]string{fmt.Sprintf("%d flows; Ctrl-C ends", flows)}, lines...)
	var b strings.Builder
	b.WriteString(home)
	for _, l := range lines {
		if r := []rune(l); len(r) > width {
			l = string(r[:width])
		}
		b.WriteString(l + toEnd + "\n")
	}
	b.WriteString(below)
	return []byte(b.String())
}

// terminalSize returns how many columns and lines a terminal has; false: it is
// none.
func terminalSize(w io.Writer) (width, height int, terminal bool) {
	f, ok := w.(*os.File)
	if !ok {
		return 0, 0, false
	}
	s, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil || s.Col == 0 || s.Row == 0 {
		return 0, 0, false
	}
	return int(s.Col), int(s.Row), true
}
