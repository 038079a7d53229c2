package netns

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// NewPrivate makes an empty network namespace as New does, whose thread, and so
// what is started on it, has a mount namespace of its own too: what is mounted
// there is seen nowhere else, and ends with the last process in it.
func NewPrivate() (*Namespace, error) {
	return start(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET | unix.CLONE_NEWNS); err != nil {
			return os.NewSyscallError("unshare", err)
		}
		return mount("none", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	})
}

func mount(source, target, kind string, flags uintptr, data string) error {
	if err := unix.Mount(source, target, kind, flags, data); err != nil {
		return fmt.Errorf("mount on %s: %w", target, err)
	}
	return nil
}

// resolverDirs hold the sockets of programs that look names up for others
// (systemd-resolved, nscd, avahi): outside of the namespace, and so past it.
var resolverDirs = []string{"/run/systemd/resolve", "/run/nscd", "/var/run/nscd", "/run/avahi-daemon", "/var/run/avahi-daemon"}

// SetResolver makes the resolver at addr the only one of a namespace that
// NewPrivate made: resolv.conf names it alone, and the sockets of resolvers of
// the host are out of sight. To be called on the namespace's thread, before
// anything is started there.
func SetResolver(addr string) error {
	const path = "/etc/resolv.conf"
	text := []byte("# of this namespace; see tproxyd(8)\nnameserver " + addr + "\noptions edns0\n")
	target, err := filepath.EvalSymlinks(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	var hidden []string
	for _, d := range resolverDirs {
		d, err := filepath.EvalSymlinks(d)
		if err != nil { // there is none
			continue
		}
		if err := mount("tproxyd", d, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=755,size=64k"); err != nil {
			return err
		}
		hidden = append(hidden, d)
	}
	for _, d := range hidden {
		if strings.HasPrefix(target, d+"/") {
			if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
				return err
			}
			return os.WriteFile(target, text, 0o644)
		}
	}
	if target == "" {
		return nil // libraries ask 127.0.0.1 then
	}
	return bindFile(text, target)
}

// bindFile puts a file with this content over target. The file lives in a file
// system of its own, which has no place any more when this returns.
func bindFile(text []byte, target string) error {
	place := filepath.Dir(target) // any directory will do for a moment
	dir, err := os.Open(place)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := mount("tproxyd", place, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=755,size=64k"); err != nil {
		return err
	}
	file := filepath.Join(place, "resolv.conf")
	if err = os.WriteFile(file, text, 0o644); err == nil {
		// What lies below is reached by the descriptor from before.
		err = mount(file, fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), filepath.Base(target)), "", unix.MS_BIND, "")
	}
	return errors.Join(err, os.NewSyscallError("umount", unix.Unmount(place, unix.MNT_DETACH)))
}
