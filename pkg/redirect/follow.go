package redirect

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// A rule names a cgroup, the kernel knows numbers: those of the groups that are
// there. So who names some has to follow what comes and goes.

// lookAgain is how often cgroups are looked for where the kernel cannot tell of new
// ones (fs.inotify.max_user_watches).
const lookAgain = time.Second

// followCgroups puts the plan in force anew when what its names of cgroups mean
// has changed, until ctx ends.
func (r *Redirect) followCgroups(ctx context.Context, onEvent func(string)) error {
	select {
	case <-ctx.Done():
		return nil
	case <-r.named:
	}
	mount, err := cgroupMount()
	if err != nil {
		return err
	}
	fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err != nil {
		return fmt.Errorf("redirect: inotify: %w", err)
	}
	f := os.NewFile(uintptr(fd), "inotify")
	defer f.Close()
	defer context.AfterFunc(ctx, func() { f.SetReadDeadline(time.Unix(1, 0)) })()
	b := make([]byte, 64<<10) // what happened is not read, only that something did
	for said := false; ; {
		wait := time.Time{}
		if err := watchCgroups(fd, mount); err != nil {
			if !said && ctx.Err() == nil {
				r.log.Warn("new cgroups are known late", "within", lookAgain, "err", err)
			}
			said, wait = true, time.Now().Add(lookAgain)
		}
		if r.cgroupsChanged() {
			onEvent("cgroup")
		}
		f.SetReadDeadline(wait)
		if ctx.Err() != nil {
			return nil // after the deadline was set, since the other one may have been before
		}
		if _, err := f.Read(b); err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
			return fmt.Errorf("redirect: inotify: %w", err)
		}
	}
}

// watchCgroups has the kernel tell of groups that come and go. One that comes while
// this runs is an event of its parent's.
func watchCgroups(fd int, mount string) error {
	var failed error
	err := eachCgroup(mount, func(path string) {
		_, err := unix.InotifyAddWatch(fd, filepath.Join(mount, path),
			unix.IN_CREATE|unix.IN_DELETE|unix.IN_MOVED_FROM|unix.IN_MOVED_TO|unix.IN_ONLYDIR)
		if err != nil && !errors.Is(err, unix.ENOENT) {
			failed = err
		}
	})
	return errors.Join(err, failed)
}

// cgroupsChanged looks for the groups of the plan, and puts it in force anew if
// they are others than then.
func (r *Redirect) cgroupsChanged() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || r.plan == nil {
		return false
	}
	now, err := findCgroups(r.plan.cgroupNames())
	if err == nil && slices.Equal(now, r.cgroups) {
		return false
	}
	if err == nil {
		err = r.healTable()
	}
	if err != nil {
		r.log.Error("rules for cgroups that have come or gone are not in force", "err", err)
	}
	return err == nil
}
