package daemon

import (
	"context"
	"io"
	"os"

	"github.com/tproxyd/tproxyd/internal/watch"
	"github.com/tproxyd/tproxyd/pkg/routes"
)

// This file keeps the LISTs as their files are: when one changes, those alone
// are read again.

// opened opens files of rules and remembers in which state each was read.
type opened map[string]watch.State

func (o opened) open(path string) (io.ReadCloser, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	if s, err := watch.StateOf(f); err == nil { // else that of the moment when watching begins
		o[path] = s
	}
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
// says why.
func (d *Daemon) relist(paths []string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.takenOver {
		return
	}
	defer frugal()()
	next, diags := d.setup.relisted()
	err := error(diags)
	if !diags.HasErrors() {
		if next.Table.Sum() == d.setup.Table.Sum() {
			d.watcher.Set(next.lists)
			return
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
		return
	}
	d.reloads.Done++
	d.log.Info("a list has changed and is in force", "files", paths)
}
