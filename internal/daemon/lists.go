package daemon

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"

	"github.com/tproxyd/tproxyd/internal/watch"
	"github.com/tproxyd/tproxyd/pkg/routes"
	"golang.org/x/sys/unix"
)

// This file keeps the LISTs as their files are: when one changes, those alone
// are read again.

// opened opens files of rules and remembers in which state each was read.
type opened map[string]watch.State

func (o opened) open(path string) (io.ReadCloser, error) {
	// A FIFO would have the daemon wait for somebody who writes.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = &fs.PathError{Op: "open", Path: path, Err: errors.New("not a regular file")}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	o[path] = watch.StateOf(info)
	return f, nil
}

// lists returns the files of a table's LISTs with their states; what is not known
// is zero.
func (o opened) lists(t *routes.Table) map[string]watch.State {
	lists := map[string]watch.State{}
	for _, path := range t.ListFiles() {
		lists[path] = o[path]
	}
	return lists
}

// relisted returns what s says with the files of its LISTs as they are now. The
// other files may be in the middle of being edited, and are not read.
func (s *Setup) relisted() (*Setup, routes.Diagnostics) {
	o := opened{}
	t, diags := s.Table.Reread(routes.Options{Open: o.open})
	if diags.HasErrors() {
		return nil, diags
	}
	next := *s
	next.Table, next.lists = t, o.lists(t)
	return &next, diags
}

// watchLists follows the files of LISTs until ctx ends. What is wrong with them
// is in the log.
func (d *Daemon) watchLists(ctx context.Context) error {
	return d.watcher.Run(ctx, d.relist)
}

// relist puts the LISTs in force whose files have changed, or changes nothing and
// says why. False: it is the kernel's fault, and worth another attempt.
func (d *Daemon) relist(paths []string) bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.takenOver {
		return true // the successor follows its own
	}
	defer frugal()()
	next, diags := d.setup.relisted()
	err := error(diags)
	if !diags.HasErrors() {
		if next.Table.Sum() == d.setup.Table.Sum() {
			d.watcher.Set(next.lists)
			return true
		}
		for _, w := range diags {
			if _, ok := next.lists[w.File]; ok { // the others were told of when the rules were read
				d.log.Warn(w.String())
			}
		}
		err = d.put(next)
	}
	if err != nil {
		d.reloads.Refused++
		d.log.Error("a list has changed and is not followed, what was read before stays in force", "files", paths, "err", err)
		return diags.HasErrors()
	}
	d.reloads.Done++
	d.log.Info("a list has changed and is in force", "files", paths)
	return true
}
