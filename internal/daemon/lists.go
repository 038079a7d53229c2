package daemon

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"

	"github.com/tproxyd/tproxyd/internal/watch"
	"github.com/tproxyd/tproxyd/pkg/routes"
	"golang.org/x/sys/unix"
)

// This file keeps the LISTs as their files are: when one changes, those alone
// are read again.

// opened opens files of rules and remembers in which state each was read.
type opened struct {
	states map[string]watch.State
	copies string              // where the copies of LISTs are, see keepLists; empty: nowhere
	only   map[string]struct{} // whose copies may be read; nil: all
	gone   map[string]struct{} // whose were, since there is no file any longer
}

// newOpened opens files for rules that keep their state in a directory.
func newOpened(state string, only map[string]struct{}) *opened {
	return &opened{states: map[string]watch.State{}, copies: state, only: only, gone: map[string]struct{}{}}
}

func (o *opened) open(path string) (io.ReadCloser, error) {
	// A FIFO would have the daemon wait for somebody who writes.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		if _, may := o.only[path]; errors.Is(err, fs.ErrNotExist) && o.copies != "" && (may || o.only == nil) {
			if f, e := os.Open(copyOf(o.copies, path)); e == nil {
				o.states[path], o.gone[path] = watch.State{}, struct{}{}
				return f, nil
			}
		}
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
	o.states[path] = watch.StateOf(info)
	return f, nil
}

// lists returns the files of a table's LISTs with their states; what is not known
// is zero.
func (o *opened) lists(t *routes.Table) map[string]watch.State {
	lists := map[string]watch.State{}
	for _, path := range t.ListFiles() {
		lists[path] = o.states[path]
	}
	return lists
}

// warnings says of which files a copy was read.
func (o *opened) warnings() (diags routes.Diagnostics) {
	for _, path := range slices.Sorted(maps.Keys(o.gone)) {
		diags = append(diags, routes.Diagnostic{File: path, Line: 1, Col: 1, Severity: routes.Warning, Code: "W09", Msg: goneList(o.copies, path)})
	}
	return diags
}

// goneList says what is in force of a LIST whose file is not there.
func goneList(state, path string) string {
	when := ""
	if info, err := os.Stat(copyOf(state, path)); err == nil {
		when = ", as of " + info.ModTime().Format("2006-01-02 15:04")
	}
	return "the file is gone, and what it held is in force" + when + "; put it back, or take it out of the rules"
}

// goneLists says which files of LISTs are gone at this moment.
func (s *Setup) goneLists() (list []string) {
	for _, path := range slices.Sorted(maps.Keys(s.lists)) {
		if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
			list = append(list, "LIST "+path+": "+goneList(s.Config.State.Directory, path))
		}
	}
	return list
}

// copyOf is where the copy of a LIST's file is.
func copyOf(state, path string) string {
	if abs, err := filepath.Abs(path); err == nil {
		path = abs
	}
	return filepath.Join(state, fmt.Sprintf("%s%x", copyPrefix, sha256.Sum256([]byte(path))))
}

const copyPrefix = "list-"

// keepLists copies the files of the LISTs in force to the state directory, with their
// times, so that a start does not fail because one of them is gone. Copies of others
// are removed.
func (s *Setup) keepLists() (err error) {
	state := s.Config.State.Directory
	if state == "" {
		return nil
	}
	keep := map[string]bool{}
	for path, read := range s.lists {
		to := copyOf(state, path)
		keep[to] = true
		err = errors.Join(err, copyList(path, to, read))
	}
	old, _ := filepath.Glob(filepath.Join(state, copyPrefix+"*"))
	for _, f := range old {
		if !keep[f] {
			err = errors.Join(err, os.Remove(f))
		}
	}
	return err
}

// copyList copies a file as it was read. One that has changed since, or is gone, is
// left for the next time.
func copyList(from, to string, read watch.State) error {
	f, err := os.OpenFile(from, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil || watch.StateOf(info) != read {
		return err
	}
	if is, err := os.Stat(to); err == nil && is.Size() == info.Size() && is.ModTime().Equal(info.ModTime()) {
		return nil
	}
	w, err := os.OpenFile(to+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(w, f)
	err = errors.Join(err, w.Sync(), w.Close())
	if err == nil {
		err = os.Chtimes(to+".new", info.ModTime(), info.ModTime())
	}
	if after, e := f.Stat(); err == nil && (e != nil || watch.StateOf(after) != read) {
		return errors.Join(e, os.Remove(to+".new"))
	}
	if err == nil {
		err = os.Rename(to+".new", to)
	}
	return err
}

// keepCopies follows the LISTs in force with their copies until ctx ends.
func (d *Daemon) keepCopies(ctx context.Context) error {
	for {
		d.mu.Lock()
		s, theirs := d.setup, d.takenOver
		d.mu.Unlock()
		if !theirs && s.enclosure == nil {
			if err := s.keepLists(); err != nil {
				d.log.Warn("a start will fail if the file of a LIST is gone: its copy cannot be kept", "err", err)
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-d.relisted:
		}
	}
}

// relisted returns what s says with the files of its LISTs as they are now. The
// other files may be in the middle of being edited, and are not read.
func (s *Setup) relisted() (*Setup, routes.Diagnostics) {
	o := newOpened(s.Config.State.Directory, s.gone)
	t, diags := s.Table.Reread(routes.Options{Open: o.open})
	if diags.HasErrors() {
		return nil, diags
	}
	next := *s
	next.Table, next.lists, next.gone = t, o.lists(t), o.gone
	return &next, append(diags, o.warnings()...)
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
