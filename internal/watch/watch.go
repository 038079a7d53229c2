// Package watch tells when files have changed that were read before.
//
// It promises that a file is not reported while somebody is writing it, as far
// as the kernel says when that ends; that one that is renamed into its place,
// or to which a symbolic link is turned, is as good as one that was written;
// and that no change is missed for good: what inotify(7) does not tell, as on a
// network file system, is found by looking.
package watch

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Times of a Watcher.
const (
	quiet   = 250 * time.Millisecond // after the last sign of a change, as there can be several for one
	patient = 3 * time.Second        // but no longer than this after the first
	look    = 15 * time.Second       // between looks at what inotify may not tell; two must agree
	rest    = 4                      // times what was done about a change, before the next one
)

// State is what tells one content of a file from another without reading it.
// The zero value is that of a file that is not there.
type State struct {
	dev, ino uint64
	size     int64
	mod      time.Time
	changed  syscall.Timespec
}

// StateOf returns the state of a file by what os.Stat says, or by that of one that
// is open.
func StateOf(info os.FileInfo) (s State) {
	s.size, s.mod = info.Size(), info.ModTime()
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		s.dev, s.ino, s.changed = uint64(st.Dev), uint64(st.Ino), st.Ctim // 32 bits on MIPS
	}
	return s
}

// now returns the state of what a path leads to.
func now(path string) State {
	info, err := os.Stat(path)
	if err != nil {
		return State{}
	}
	return StateOf(info)
}

// Options are those of New. The zero value works.
type Options struct {
	Log  *slog.Logger  // nil: silence
	Look time.Duration // between looks at what inotify may not tell; 0: 15 s
}

// Watcher watches a set of files. Its methods may be used by any number of
// goroutines.
type Watcher struct {
	log  *slog.Logger
	look time.Duration
	in   *os.File // inotify; nil: there is none, and the files are looked at

	blind error // why in is nil

	mu    sync.Mutex
	files map[string]*file
	dirs  map[string]int // watched, with their watch descriptors
}

// file is one that is watched.
type file struct {
	read    State    // what was read, or reported to have changed
	seen    State    // at the last look
	entries []string // see entriesOf
	dirty   bool     // to be reported
}

// New returns a watcher of nothing. Without inotify, for want of instances of it,
// it looks at the files from time to time, and says so in the log. End it by Run
// or Close.
func New(o Options) *Watcher {
	w := &Watcher{log: o.Log, look: cmp.Or(o.Look, look), files: map[string]*file{}, dirs: map[string]int{}}
	if w.log == nil {
		w.log = slog.New(slog.DiscardHandler)
	}
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err == nil {
		w.in = os.NewFile(uintptr(fd), "inotify")
	}
	w.blind = err
	return w
}

// Close ends the watcher, if Run has not.
func (w *Watcher) Close() {
	if w.in != nil {
		w.in.Close()
	}
}

// Set replaces the files that are watched. Each comes with the state in which
// it was read; the zero State is that of this moment. Of one that has changed
// since, before it was watched, nobody knows whether it is still being written: it
// is reported once two looks agree.
func (w *Watcher) Set(files map[string]State) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if len(files) > 0 && len(w.files) == 0 && w.blind != nil {
		w.log.Warn("no inotify: changes of files are found a moment later", "err", w.blind)
	}
	next := map[string]*file{}
	for path, read := range files {
		f := w.files[path]
		if f == nil {
			f = &file{}
		}
		w.enter(path, f)
		f.seen = now(path) // behind enter: a change in between is seen by both
		f.read = read
		if read == (State{}) {
			f.read = f.seen
		}
		next[path] = f // dirty or not: an event since it was read counts
	}
	w.files = next
	w.leave()
}

// enter watches the directories of a file.
func (w *Watcher) enter(path string, f *file) {
	f.entries = entriesOf(path)
	if w.in == nil {
		return
	}
	for _, e := range f.entries {
		d := filepath.Dir(e)
		if _, ok := w.dirs[d]; ok {
			continue
		}
		wd := -1
		var err error
		if e := w.control(func(fd int) {
			wd, err = unix.InotifyAddWatch(fd, d, unix.IN_CLOSE_WRITE|unix.IN_MOVED_TO|unix.IN_MOVED_FROM|unix.IN_CREATE|unix.IN_DELETE|
				unix.IN_DELETE_SELF|unix.IN_MOVE_SELF|unix.IN_ONLYDIR)
		}); e != nil || err != nil {
			w.log.Debug("a directory that cannot be watched", "path", d, "err", errors.Join(e, err))
			continue // it is looked at
		}
		w.dirs[d] = wd
	}
}

// leave gives up the directories that no file needs any longer.
func (w *Watcher) leave() {
	needed := map[string]bool{}
	for _, f := range w.files {
		for _, e := range f.entries {
			needed[filepath.Dir(e)] = true
		}
	}
	for d, wd := range w.dirs {
		if !needed[d] {
			w.control(func(fd int) { unix.InotifyRmWatch(fd, uint32(wd)) })
			delete(w.dirs, d)
		}
	}
}

func (w *Watcher) control(f func(fd int)) error {
	c, err := w.in.SyscallConn()
	if err != nil {
		return err
	}
	return c.Control(func(fd uintptr) { f(int(fd)) })
}

// entriesOf returns the entries of directories that have a say in where a path
// leads: the file, and the symbolic links on the way.
func entriesOf(path string) (entries []string) {
	const maxLinks = 40 // as in path_resolution(7)
	path, err := filepath.Abs(path)
	if err != nil {
		return nil
	}
	at, rest, links := "/", strings.Split(path[1:], "/"), 0
	for len(rest) > 0 {
		next := filepath.Join(at, rest[0])
		rest = rest[1:]
		info, err := os.Lstat(next)
		switch {
		case err != nil:
			return append(entries, next) // where it would appear
		case info.Mode()&os.ModeSymlink != 0:
			to, err := os.Readlink(next)
			entries = append(entries, next)
			if links++; err != nil || links > maxLinks {
				return entries
			}
			if filepath.IsAbs(to) {
				at = "/"
			}
			rest = append(strings.Split(strings.Trim(to, "/"), "/"), rest...)
			continue
		case len(rest) == 0:
			entries = append(entries, next)
		}
		at = next
	}
	return entries
}

// Run calls changed, one call at a time, with the paths that have changed, until
// ctx ends. What changed returns false for is reported again, after two looks.
// After each call there is a rest of several times as long as it took. Run ends
// the Watcher.
func (w *Watcher) Run(ctx context.Context, changed func(paths []string) bool) error {
	events := make(chan struct{})
	done := make(chan struct{})
	if w.in != nil {
		go func() { defer close(done); w.read(ctx, events) }()
		defer func() { w.in.Close(); <-done }()
	}
	tick := time.NewTicker(w.look)
	defer tick.Stop()
	var first time.Time // of the changes that are not reported yet
	var rested time.Time
	wait := time.NewTimer(time.Hour)
	defer wait.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-events:
		case <-tick.C:
			w.lookAt()
		case <-wait.C:
			first = time.Time{}
			if paths := w.take(); len(paths) > 0 {
				began := time.Now()
				if !changed(paths) {
					w.unread(paths)
				}
				rested = time.Now().Add(rest * time.Since(began))
			}
			continue
		}
		if !w.any() {
			continue
		}
		if first.IsZero() {
			first = time.Now()
		}
		wait.Reset(max(min(quiet, patient-time.Since(first)), time.Until(rested), 0))
	}
}

// any tells whether a file is to be reported.
func (w *Watcher) any() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, f := range w.files {
		if f.dirty {
			return true
		}
	}
	return false
}

// take returns the files to be reported, which they then were.
func (w *Watcher) take() (paths []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, path := range slices.Sorted(maps.Keys(w.files)) {
		if f := w.files[path]; f.dirty {
			f.dirty = false
			f.read = now(path)
			f.seen = f.read
			paths = append(paths, path)
		}
	}
	return paths
}

// unread has the next looks find files changed.
func (w *Watcher) unread(paths []string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, path := range paths {
		if f := w.files[path]; f != nil {
			f.read = State{size: -1}
		}
	}
}

// lookAt looks at all files: where inotify does not watch, or not any longer,
// what it does not tell. One that is being written changes from look to look.
func (w *Watcher) lookAt() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for path, f := range w.files {
		w.enter(path, f)
		s := now(path)
		f.dirty = f.dirty || s != f.read && s == f.seen
		f.seen = s
	}
	w.leave()
}

// read reads events until the descriptor is closed.
func (w *Watcher) read(ctx context.Context, events chan<- struct{}) {
	buf := make([]byte, 64<<10)
	for {
		n, err := w.in.Read(buf)
		if err != nil {
			return
		}
		if !w.note(buf[:n]) {
			continue
		}
		select {
		case events <- struct{}{}:
		case <-ctx.Done():
			return
		}
	}
}

// note takes events in, and tells whether a file is to be reported.
func (w *Watcher) note(b []byte) (dirty bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for len(b) >= unix.SizeofInotifyEvent {
		wd := int(int32(binary.NativeEndian.Uint32(b)))
		mask, size := binary.NativeEndian.Uint32(b[4:]), int(binary.NativeEndian.Uint32(b[12:]))
		if len(b) < unix.SizeofInotifyEvent+size {
			break
		}
		name := strings.TrimRight(string(b[unix.SizeofInotifyEvent:unix.SizeofInotifyEvent+size]), "\x00")
		b = b[unix.SizeofInotifyEvent+size:]
		dirty = w.event(wd, mask, name) || dirty
	}
	return dirty
}

// event takes one event in. What it tells of an entry is looked at, but for the
// end of a write: after that the file is another one, even if its size and time
// are as before.
func (w *Watcher) event(wd int, mask uint32, name string) (dirty bool) {
	dir := ""
	for d, n := range w.dirs {
		if n == wd {
			dir = d
		}
	}
	all := mask&unix.IN_Q_OVERFLOW != 0
	if mask&(unix.IN_IGNORED|unix.IN_MOVE_SELF|unix.IN_DELETE_SELF) != 0 {
		if mask&unix.IN_IGNORED == 0 {
			w.control(func(fd int) { unix.InotifyRmWatch(fd, uint32(wd)) })
		}
		delete(w.dirs, dir) // what has its name now is entered below
		all = true
	}
	entry := filepath.Join(dir, name)
	if mask&unix.IN_CREATE != 0 && beingMade(entry) {
		return false
	}
	for path, f := range w.files {
		if !all && !slices.Contains(f.entries, entry) {
			continue
		}
		if mask&unix.IN_CLOSE_WRITE != 0 || now(path) != f.read {
			f.dirty, dirty = true, true
		}
		w.enter(path, f)
	}
	w.leave()
	return dirty
}

// beingMade tells whether what was created is a file that somebody has just begun
// to write: its end is told by IN_CLOSE_WRITE. A link is complete.
func beingMade(path string) bool {
	var st unix.Stat_t
	return unix.Lstat(path, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFREG && st.Nlink == 1
}
