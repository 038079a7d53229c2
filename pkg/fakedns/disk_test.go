package fakedns

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func TestStoreFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=256k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		var log strings.Builder
		p, err := openPool(&Options{Dir: dir, Pool4: pool4, Quarantine: time.Hour, Log: slog.New(slog.NewTextHandler(&log, nil))})
		if err != nil {
			t.Fatal(err)
		}
		logged := func() string { // the pool logs with its lock held
			p.mu.Lock()
			defer p.mu.Unlock()
			return log.String()
		}
		addr4(p, "before.example")
		filler := filepath.Join(dir, "filler")
		fill, err := os.Create(filler)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.Copy(fill, zeros{}); !errors.Is(err, unix.ENOSPC) {
			t.Fatalf("the disk is not full: %v", err)
		}
		fill.Close()
		// Service goes on, with the error in the log once and in the status.
		for i := range 500 {
			if !addr4(p, fmt.Sprintf("host%d.example", i)).IsValid() {
				t.Fatalf("no address for name %d", i)
			}
		}
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if s := p.status(); s.StoreErrors == 0 || !strings.Contains(s.StoreError, "no space") || strings.Count(logged(), "level=ERROR") != 1 {
			t.Errorf("%+v, log %q", s, logged())
		}
		if _, err := os.Stat(filepath.Join(dir, logName+".new")); err == nil {
			t.Error("a renewal that failed still takes room")
		}
		// What was there before is still whole but for its end.
		b, err := os.ReadFile(filepath.Join(dir, logName))
		if err != nil || !bytes.Contains(b, []byte("before.example")) {
			t.Errorf("%d bytes, %v", len(b), err)
		}
		// Room again: everything is written, by itself.
		if err := os.Remove(filler); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if s := p.status(); s.StoreError != "" || !strings.Contains(logged(), "again") {
			t.Errorf("%+v, log %q", s, logged())
		}
		if got, want := written(t, dir), names(p.t); len(want) != 501 || !cmp.Equal(got, want) {
			t.Error(cmp.Diff(got, want))
		}
		addr4(p, "after.example")
		if written(t, dir)["after.example"] == 0 {
			t.Error("after.example is not on file")
		}
		if err := p.close(); err != nil {
			t.Error(err)
		}
	})
	// Full from the beginning, with a file that is good.
	if err := os.WriteFile(filepath.Join(dir, "filler"), make([]byte, 200<<10), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(filepath.Join(dir, "filler"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	io.Copy(f, zeros{})
	f.Close()
	p, err := openPool(&Options{Dir: dir, Pool4: pool4, Log: discard})
	if err != nil {
		t.Fatal(err)
	}
	if p.t.size != 502 || !addr4(p, "more.example").IsValid() {
		t.Errorf("%d names of a good file on a full disk", p.t.size)
	}
	if err := p.close(); err == nil {
		t.Error("close says that everything is on disk")
	}
	if got := written(t, dir); len(got) != 502 {
		t.Errorf("%d names left in the file", len(got))
	}
}

// A directory that is read-only is like a full disk.
func TestStoreReadOnly(t *testing.T) {
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", unix.MS_RDONLY, "size=64k"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	s, err := New(Options{Dir: dir, Pool4: pool4})
	if err != nil {
		t.Fatal(err)
	}
	if !addr4(s.pool, "host.example").IsValid() || !strings.Contains(s.Stats().Pool.StoreError, "read-only") {
		t.Errorf("%+v", s.Stats().Pool)
	}
	if err := s.Close(); err == nil {
		t.Error("close says that everything is on disk")
	}
}

type zeros struct{}

func (zeros) Read(b []byte) (int, error) { clear(b); return len(b), nil }
