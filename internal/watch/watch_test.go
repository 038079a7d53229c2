package watch

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

// watched is a Watcher of files, with what it reports.
type watched struct {
	*Watcher
	t       testing.TB
	dir     string
	changes chan []string
	fail    atomic.Bool // what is reported cannot be followed
}

func newWatched(t testing.TB, w *Watcher, dir string, names ...string) *watched {
	t.Helper()
	x := &watched{Watcher: w, t: t, dir: dir, changes: make(chan []string, 16)}
	files := map[string]State{}
	for _, n := range names {
		files[filepath.Join(dir, n)] = State{}
	}
	w.Set(files)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.Run(ctx, func(paths []string) bool { x.changes <- slices.Clone(paths); return !x.fail.Load() })
	}()
	t.Cleanup(func() { cancel(); <-done })
	return x
}

// want fails the test unless these files, and no others, are reported, once.
func (x *watched) want(what string, names ...string) {
	x.t.Helper()
	select {
	case paths := <-x.changes:
		for i := range paths {
			paths[i] = strings.TrimPrefix(paths[i], x.dir+"/")
		}
		if !slices.Equal(paths, names) {
			x.t.Errorf("%s: %v was reported, want %v", what, paths, names)
		}
	case <-time.After(10 * time.Second):
		x.t.Errorf("%s: nothing was reported", what)
	}
	x.silent(what)
}

// silent fails the test if something is reported.
func (x *watched) silent(what string) {
	x.t.Helper()
	select {
	case paths := <-x.changes:
		x.t.Errorf("%s: %v was reported", what, paths)
	case <-time.After(quiet + 100*time.Millisecond):
	}
}

func (x *watched) path(name string) string { return filepath.Join(x.dir, name) }

func (x *watched) do(errs ...error) {
	x.t.Helper()
	for _, err := range errs {
		if err != nil {
			x.t.Fatal(err)
		}
	}
}

func write(path, text string) error { return os.WriteFile(path, []byte(text), 0o644) }

func TestWatch(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	for _, n := range []string{"a", "b", "other"} {
		if err := write(filepath.Join(dir, n), n); err != nil {
			t.Fatal(err)
		}
	}
	x := newWatched(t, New(Options{Look: time.Hour}), dir, "a", "b", "missing")
	x.silent("nothing has changed")

	x.do(write(x.path("other"), "x"), os.Remove(x.path("other")))
	x.silent("another file")
	x.do(write(x.path("a"), "1"))
	x.want("written over", "a")
	x.do(write(x.path("a"), "1"))
	x.want("written over with the same", "a")
	x.do(write(x.path("a"), "2"), write(x.path("b"), "2"), write(x.path("a"), "3"))
	x.want("two at once", "a", "b")
	x.do(write(x.path("new"), "4"), os.Rename(x.path("new"), x.path("a")))
	x.want("renamed over", "a")
	x.do(os.Remove(x.path("a")))
	x.want("removed", "a")
	x.do(write(x.path("missing"), "5"))
	x.want("appeared", "missing")

	// As an editor does: the old one away, a new one in its place.
	x.do(write(x.path("a"), "6"))
	x.want("there again", "a")
	x.do(os.Rename(x.path("a"), x.path("a~")), write(x.path("a"), "7"), os.Remove(x.path("a~")))
	x.want("edited", "a")

	// As a script does: slowly. Half of it is not reported.
	f, err := os.Create(x.path("b"))
	x.do(err)
	for range 3 {
		_, err := f.WriteString("line\n")
		x.do(err, write(x.path("other"), "x"), os.Remove(x.path("other")))
		x.silent("half of it")
	}
	x.do(f.Close())
	x.want("all of it", "b")

	x.do(os.Link(x.path("b"), x.path("c")), os.Rename(x.path("c"), x.path("a")))
	x.want("a hard link in its place", "a")
	x.Set(map[string]State{x.path("b"): {}})
	x.do(write(x.path("missing"), "x"))
	x.silent("a file that is not watched any longer")
}

// TestLinks: a path leads over links, as in a volume of Kubernetes, where the
// link to a directory is turned.
func TestLinks(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	x := &watched{t: t, dir: dir}
	x.do(os.Mkdir(x.path("one"), 0o755), os.Mkdir(x.path("two"), 0o755), write(x.path("one/list"), "1"), write(x.path("two/list"), "2"),
		os.Symlink("one", x.path("data")), os.Symlink("data/list", x.path("list")))
	x = newWatched(t, New(Options{Look: time.Hour}), dir, "list")
	x.do(write(x.path("one/list"), "3"))
	x.want("written behind the links", "list")
	x.do(os.Symlink("two", x.path("tmp")), os.Rename(x.path("tmp"), x.path("data")))
	x.want("the link is turned", "list")
	x.do(write(x.path("one/list"), "4"))
	x.silent("where it led before")
	x.do(write(x.path("two/list"), "5"))
	x.want("where it leads now", "list")
	x.do(os.Rename(x.path("two"), x.path("three")), os.Mkdir(x.path("two"), 0o755), write(x.path("two/list"), "6"))
	x.want("another directory in its place", "list")
	x.do(write(x.path("two/list"), "7"))
	x.want("and that is watched", "list")
}

// TestSince: what changes between reading and watching is reported.
func TestSince(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	x := newWatched(t, New(Options{Look: 100 * time.Millisecond}), dir)
	x.do(write(x.path("a"), "1"))
	info, err := os.Stat(x.path("a"))
	x.do(err)
	read := StateOf(info)
	x.Set(map[string]State{x.path("a"): read})
	x.silent("nothing has changed")
	x.do(write(x.path("a"), "22"))
	x.want("written", "a")
	x.Set(map[string]State{x.path("a"): read})
	x.want("read before it was written", "a")
	x.do(os.Remove(x.path("a")))
	x.want("removed", "a")
	x.Set(map[string]State{x.path("a"): read})
	x.want("removed since", "a")
}

// TestAgain: what could not be followed is reported again.
func TestAgain(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	x := &watched{t: t, dir: dir}
	x.do(write(x.path("a"), "1"))
	x = newWatched(t, New(Options{Look: time.Second}), dir, "a")
	x.fail.Store(true)
	x.do(write(x.path("a"), "2"))
	x.want("written", "a")
	x.fail.Store(false)
	x.want("again", "a")
}

// TestLooks: without inotify changes are found by looking, and a file that is
// being written is left alone.
func TestLooks(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	x := &watched{t: t, dir: dir}
	x.do(write(x.path("a"), "1"))
	blind := New(Options{Look: 100 * time.Millisecond})
	blind.in.Close()
	blind.in = nil
	x = newWatched(t, blind, dir, "a")
	f, err := os.OpenFile(x.path("a"), os.O_WRONLY|os.O_APPEND, 0)
	x.do(err)
	for range 20 {
		_, err := f.WriteString("line\n")
		x.do(err)
		time.Sleep(30 * time.Millisecond)
	}
	select {
	case <-x.changes:
		t.Error("half of it was reported")
	default:
	}
	x.do(f.Close())
	x.want("written", "a")
	x.do(os.Remove(x.path("a")))
	x.want("removed", "a")
}
