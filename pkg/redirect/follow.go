package redirect

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// A rule names a cgroup, the kernel knows numbers: those of the groups that are
// there. So who names some has to follow what comes and goes.

// lookAgain is how often cgroups are looked for where the kernel cannot tell of new
// ones (fs.inotify.max_user_watches).
const lookAgain = time.Second

// followCgroups has the table follow when what the plan's names of cgroups mean has
// changed, until ctx ends.
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

// findNamed looks for what a plan names, which is followed from then on.
func (r *Redirect) findNamed(p *Plan) (cgroups, error) {
	names := p.cgroupNames()
	if len(names) > 0 {
		select {
		case r.named <- struct{}{}:
		default:
		}
	}
	return findCgroups(names)
}

// namedCgroups are the sets of what is named in one place.
type namedCgroups struct {
	names []string
	sets  map[int]string // by level
}

// cgroupSets makes a set of each level of what is named in one place.
func (t *table) cgroupSets(names []string, prefix string) iter.Seq2[int, *set] {
	n := &namedCgroups{names, map[int]string{}}
	t.named = append(t.named, n)
	return func(yield func(int, *set) bool) {
		for level, groups := range t.cgroups.levels(names) {
			s := t.set(cgroupSet(prefix+strconv.Itoa(level), groups))
			n.sets[level] = s.name
			if !yield(level, s) {
				return
			}
		}
	}
}

// cgroupsChanged looks for the groups of the plan, and has the table follow if they
// are others than then.
func (r *Redirect) cgroupsChanged() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || r.lent || r.plan == nil {
		return false
	}
	now, err := findCgroups(r.plan.cgroupNames())
	if err == nil && slices.Equal(now, r.cgroups) {
		return false
	}
	if err == nil && !r.changeCgroups(now) {
		err = r.healTable()
	}
	if err != nil {
		r.log.Error("rules for cgroups that have come or gone are not in force", "err", err)
	}
	return err == nil
}

// changeCgroups makes the sets in force those of other groups; false if it cannot:
// a level of groups that there was none of needs rules.
func (r *Redirect) changeCgroups(now cgroups) bool {
	gone := without(r.cgroups, now)
	come := without(now, r.cgroups)
	nt := &nftables.Table{Name: tableName, Family: nftables.TableFamilyINet}
	complete := true
	msgs, err := record(func(c *nftables.Conn) error {
		for _, n := range r.within {
			for _, d := range []struct {
				groups cgroups
				change func(*nftables.Set, []nftables.SetElement) error
			}{{gone, c.SetDeleteElements}, {come, c.SetAddElements}} {
				for level, groups := range d.groups.levels(n.names) {
					name, ok := n.sets[level]
					complete = complete && ok
					s := cgroupSet(name, groups)
					for els := range slices.Chunk(s.elements, chunk) {
						if err := d.change(s.lib(nt, 1), els); err != nil {
							return err
						}
					}
				}
			}
		}
		return nil
	})
	if err != nil || !complete {
		return false
	}
	r.notebook.set(r.plan, now) // before a new one can be noted
	if err := r.nf.commit(msgs); err != nil {
		r.log.Debug("the sets of cgroups cannot be changed", "err", err)
		return false
	}
	r.cgroups = now
	r.epoch++
	return true
}

// without returns those of a that are not in b.
func without(a, b cgroups) cgroups {
	return slices.DeleteFunc(slices.Clone(a), func(c cgroup) bool { return slices.Contains(b, c) })
}
