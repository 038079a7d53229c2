package redirect

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"iter"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// cgroup is a group that a plan names, as it is in the kernel now.
type cgroup struct {
	path  string // below the mount, "/" for the root
	level int    // how many labels the path has
	id    uint64 // the kernel's number, that of the directory
}

// cgroups are all of them, sorted by path.
type cgroups []cgroup

// is tells whether a group is what a plan names: a path, or the end of one.
func (c cgroup) is(name string) bool {
	return c.path == name || !strings.HasPrefix(name, "/") && strings.HasSuffix(c.path, "/"+name)
}

// levels gives the groups that the names mean, level by level from
// the deepest on. The root is on level 0, where every socket is.
func (all cgroups) levels(names []string) iter.Seq2[int, cgroups] {
	byLevel := map[int]cgroups{}
	deepest := 0
	for _, c := range all {
		if slices.ContainsFunc(names, c.is) {
			byLevel[c.level] = append(byLevel[c.level], c)
			deepest = max(deepest, c.level)
		}
	}
	return func(yield func(int, cgroups) bool) {
		for l := deepest; l >= 0; l-- {
			if len(byLevel[l]) > 0 && !yield(l, byLevel[l]) {
				return
			}
		}
	}
}

// pathOf returns the path of a group by its number; empty: it is none that is named.
func (all cgroups) pathOf(id uint64) string {
	for _, c := range all {
		if c.id == id {
			return c.path
		}
	}
	return ""
}

// cgroupMounts are where cgroup v2 is mounted, alone or beside version 1.
var cgroupMounts = [...]string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"}

// cgroupMount returns where cgroup v2 is mounted.
func cgroupMount() (string, error) {
	for _, dir := range cgroupMounts {
		var st unix.Statfs_t
		if unix.Statfs(dir, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC {
			return dir, nil
		}
	}
	return "", errors.New("redirect: cgroup v2 is not mounted on " + cgroupMounts[0] + " or " + cgroupMounts[1])
}

// findCgroups returns those that exist of what the names mean. Where a group is
// named by its end, all are looked at.
func findCgroups(names []string) (cgroups, error) {
	if len(names) == 0 {
		return nil, nil
	}
	mount, err := cgroupMount()
	if err != nil {
		return nil, err
	}
	var found cgroups
	add := func(path string) {
		var st unix.Stat_t
		if unix.Stat(filepath.Join(mount, path), &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFDIR {
			c := cgroup{path: path, id: st.Ino}
			if path != "/" {
				c.level = strings.Count(path, "/")
			}
			found = append(found, c)
		}
	}
	walk := false
	for _, n := range names {
		if strings.HasPrefix(n, "/") {
			add(n)
		} else {
			walk = true
		}
	}
	if walk {
		err = eachCgroup(mount, func(path string) {
			if slices.ContainsFunc(names, func(n string) bool { return !strings.HasPrefix(n, "/") && cgroup{path: path}.is(n) }) {
				add(path)
			}
		})
	}
	slices.SortFunc(found, func(a, b cgroup) int { return cmp.Compare(a.path, b.path) })
	return slices.Compact(found), err
}

// eachCgroup gives the path of each group, the root's first.
func eachCgroup(mount string, f func(path string)) error {
	err := filepath.WalkDir(mount, func(p string, e fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, os.ErrNotExist):
			return nil // it has just ended
		case err != nil:
			return err
		case e.IsDir():
			f(cmp.Or(strings.TrimPrefix(p, mount), "/"))
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("redirect: cgroups: %w", err)
	}
	return nil
}
