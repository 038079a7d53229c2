package netns

import (
	"os"
	"slices"

	"golang.org/x/sys/unix"
)

// kept are the capabilities (capabilities(7)) that root in a container has with
// most engines: files, users and ports, and nothing about networks, mounts,
// other processes' memory or the kernel.
var kept = []int{
	unix.CAP_CHOWN, unix.CAP_DAC_OVERRIDE, unix.CAP_FOWNER, unix.CAP_FSETID, unix.CAP_KILL, unix.CAP_SETGID, unix.CAP_SETUID,
	unix.CAP_SETPCAP, unix.CAP_NET_BIND_SERVICE, unix.CAP_SYS_CHROOT, unix.CAP_AUDIT_WRITE, unix.CAP_SETFCAP,
}

// DropRights takes from whatever the calling thread starts from now on the
// capabilities by which root could leave its network namespace or change what
// rules there. The thread keeps its own. It needs CAP_SETPCAP.
func DropRights() error {
	for c := 0; c <= unix.CAP_LAST_CAP; c++ {
		if slices.Contains(kept, c) {
			continue
		}
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, uintptr(c), 0, 0, 0); err != nil && err != unix.EINVAL { // unknown to this kernel
			return os.NewSyscallError("prctl", err)
		}
	}
	if err := unix.Prctl(unix.PR_CAP_AMBIENT, unix.PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0); err != nil {
		return os.NewSyscallError("prctl", err)
	}
	// What is inheritable would survive the bounding set.
	h := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var d [2]unix.CapUserData
	if err := unix.Capget(&h, &d[0]); err != nil {
		return os.NewSyscallError("capget", err)
	}
	d[0].Inheritable, d[1].Inheritable = 0, 0
	return os.NewSyscallError("capset", unix.Capset(&h, &d[0]))
}
