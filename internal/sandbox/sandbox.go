// Package sandbox takes from this process, once it has what it needs, the rights
// that it will not need: capabilities, files and system calls. It is for good, for
// every thread, and nothing can be executed any more.
//
// What a kernel does not have is left out and reported: less is taken, and all
// else goes on.
package sandbox

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"unsafe"

	"github.com/landlock-lsm/go-landlock/landlock"
	ll "github.com/landlock-lsm/go-landlock/landlock/syscall"
	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/psx"
)

// Files is what may be opened from then on. A path that does not exist is left
// out; a folder stands for all below it.
type Files struct {
	Read  []string // folders and files to read
	Write []string // folders to read, to make and remove files in and to write them
}

// system is what the standard library and the kernel's figures are read from.
var system = []string{"/etc", "/proc", "/sys", "/run/systemd/resolve", "/usr/share/zoneinfo",
	"/usr/share/ca-certificates", "/usr/local/share/ca-certificates", "/var/lib/ca-certificates"}

// keep are the capabilities that a serving daemon uses, as far as it has them.
var keep = []uint{
	unix.CAP_NET_ADMIN,        // nftables, routing, transparent sockets, marks
	unix.CAP_NET_RAW,          // answers from the address that was asked
	unix.CAP_NET_BIND_SERVICE, // the same from a port below 1024
	unix.CAP_BPF,              // the classifier, when it has to be put back
	unix.CAP_SYS_RESOURCE,     // pipes beyond the limit of a user
	unix.CAP_DAC_OVERRIDE,     // files of somebody else, as sudo leads to; Files bounds them
}

// Enter takes the rights. Missing tells, a line each, what this kernel or the
// rights of the caller did not allow to take; nil: all of it was.
func Enter(f Files) (missing []string) {
	return enter(keep, func() error { return limitFiles(f) })
}

// EnterToLook is Enter for a process that looks at others in /proc and does nothing
// else. Of capabilities it keeps CAP_SYS_PTRACE alone, and landlock, which would hide
// the others, is not used.
func EnterToLook() (missing []string) {
	return enter([]uint{unix.CAP_SYS_PTRACE}, func() error { return nil })
}

func enter(keep []uint, files func() error) (missing []string) {
	for _, step := range []struct {
		what string
		do   func() error
	}{
		{"no new rights", func() error { return every(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0) }},
		{"capabilities", func() error { return dropCapabilities(keep) }},
		{"files (landlock)", files},
		{"system calls (seccomp)", limitCalls},
	} {
		if err := step.do(); err != nil {
			missing = append(missing, fmt.Sprintf("%s: %v", step.what, err))
		}
	}
	return missing
}

// every makes a system call in every thread.
func every(nr, a, b, c uintptr) error {
	if _, _, e := psx.Syscall6(nr, a, b, c, 0, 0, 0); e != 0 {
		return e
	}
	return nil
}

// dropCapabilities leaves what the process has of keep, and nothing to come by more.
func dropCapabilities(keep []uint) error {
	head := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var have [2]unix.CapUserData
	if err := unix.Capget(&head, &have[0]); err != nil {
		return err
	}
	var kept [2]uint32
	for _, c := range keep {
		kept[c/32] |= 1 << (c % 32)
	}
	if have[unix.CAP_SETPCAP/32].Effective&(1<<(unix.CAP_SETPCAP%32)) != 0 {
		for c := uint(0); c < 64; c++ {
			// EINVAL: beyond the last one that the kernel knows.
			if kept[c/32]&(1<<(c%32)) == 0 && every(unix.SYS_PRCTL, unix.PR_CAPBSET_DROP, uintptr(c), 0) == unix.EINVAL {
				break
			}
		}
	}
	every(unix.SYS_PRCTL, unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0) // without ambient ones there is nothing to clear
	for i := range have {
		have[i].Permitted &= kept[i]
		have[i].Effective, have[i].Inheritable = have[i].Permitted, 0
	}
	err := every(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&head)), uintptr(unsafe.Pointer(&have[0])), 0)
	runtime.KeepAlive(&head)
	runtime.KeepAlive(&have)
	return err
}

// limitFiles is landlock(7). Files of /proc and of other processes stay guarded by
// the kernel's own rules; what is open stays open.
func limitFiles(f Files) error {
	const (
		read  = landlock.AccessFSSet(ll.AccessFSReadFile | ll.AccessFSReadDir)
		write = read | ll.AccessFSWriteFile | ll.AccessFSTruncate | ll.AccessFSRemoveFile | ll.AccessFSMakeReg | ll.AccessFSMakeSock
	)
	if v, err := ll.LandlockGetABIVersion(); err != nil || v < 1 {
		return errors.New("not in this kernel")
	}
	rules := []landlock.Rule{landlock.PathAccess(ll.AccessFSReadFile|ll.AccessFSWriteFile, os.DevNull).IgnoreIfMissing()}
	add := func(paths []string, access landlock.AccessFSSet) {
		for _, p := range paths {
			a := access
			if info, err := os.Stat(p); err == nil && !info.IsDir() {
				a &= ll.AccessFSReadFile | ll.AccessFSWriteFile | ll.AccessFSTruncate
			}
			rules = append(rules, landlock.PathAccess(a, p).IgnoreIfMissing())
		}
	}
	add(system, read)
	add(f.Read, read)
	add(f.Write, write)
	return landlock.V5.BestEffort().RestrictPaths(rules...)
}

// Folders returns the folders that paths and what they are links to stand in,
// each once; empty paths are left out. A file that another one replaces by its
// name stays within reach so.
func Folders(paths ...string) (dirs []string) {
	for _, p := range paths {
		if p == "" {
			continue
		}
		dirs = append(dirs, filepath.Dir(p))
		if real, err := filepath.EvalSymlinks(p); err == nil {
			dirs = append(dirs, filepath.Dir(real))
		}
	}
	slices.SortFunc(dirs, strings.Compare)
	return slices.Compact(dirs)
}
