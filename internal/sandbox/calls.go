package sandbox

import (
	"errors"
	"runtime"

	seccomp "github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
	"golang.org/x/sys/unix"
)

// calls is every system call that a serving daemon may make, those of each flow
// first. Names that an architecture does not have are left out for it.
var calls = []string{
	// Bytes and events.
	"splice", "recvfrom", "sendto", "read", "write", "epoll_pwait", "epoll_wait", "epoll_ctl", "futex", "nanosleep",
	"recvmsg", "sendmsg", "recvmmsg", "sendmmsg", "recvmmsg_time64", "readv", "writev", "tee", "vmsplice", "ioctl",
	"accept4", "connect", "close", "shutdown", "bind", "listen", "getsockname", "getpeername", "getsockopt", "setsockopt",
	"accept", "recv", "send", "pipe2", "pipe", "fcntl", "fcntl64", "dup", "dup3", "dup2", "socketpair",
	"poll", "ppoll", "ppoll_time64", "select", "pselect6", "pselect6_time64", "_newselect",
	"epoll_create1", "epoll_create", "epoll_pwait2", "eventfd2", "eventfd", "sendfile", "sendfile64", "copy_file_range",
	// Time.
	"clock_gettime", "clock_gettime64", "gettimeofday", "time", "clock_getres", "clock_getres_time64",
	"clock_nanosleep", "clock_nanosleep_time64", "setitimer", "getitimer",
	"timer_create", "timer_settime", "timer_settime64", "timer_gettime", "timer_gettime64", "timer_delete",
	"timerfd_create", "timerfd_settime", "timerfd_settime64", "timerfd_gettime", "timerfd_gettime64",
	// Memory and threads.
	"mmap", "mmap2", "munmap", "mprotect", "madvise", "brk", "mremap", "mincore", "memfd_create", "membarrier",
	"futex_time64", "sched_yield", "sched_getaffinity", "set_robust_list", "get_robust_list", "rseq", "set_tid_address",
	"exit", "exit_group", "gettid", "getpid", "getppid", "tgkill", "tkill", "kill", "prctl", "arch_prctl", "set_thread_area",
	"cacheflush", "set_tls", "getrandom", "sysinfo", "uname", "getrusage", "getcpu", "prlimit64", "getrlimit", "ugetrlimit", "capget",
	"rt_sigaction", "rt_sigprocmask", "rt_sigreturn", "sigaltstack", "rt_sigtimedwait", "rt_sigpending", "rt_sigsuspend",
	"sigreturn", "restart_syscall", "pidfd_open", "pidfd_send_signal", "wait4", "waitid", "riscv_flush_icache",
	// Files; which ones is for landlock to say.
	"open", "openat", "openat2", "creat", "lseek", "_llseek", "pread64", "pwrite64", "preadv", "pwritev", "ftruncate", "ftruncate64", "truncate", "truncate64",
	"fsync", "fdatasync", "sync_file_range", "fallocate", "fadvise64", "fadvise64_64", "arm_fadvise64_64", "flock",
	"stat", "stat64", "lstat", "lstat64", "fstat", "fstat64", "fstatat64", "newfstatat", "statx", "statfs", "statfs64", "fstatfs", "fstatfs64",
	"access", "faccessat", "faccessat2", "readlink", "readlinkat", "getcwd", "getdents", "getdents64", "name_to_handle_at",
	"rename", "renameat", "renameat2", "unlink", "unlinkat", "mkdir", "mkdirat", "rmdir", "chmod", "fchmod", "fchmodat", "umask", "utimensat",
	"inotify_init1", "inotify_init", "inotify_add_watch", "inotify_rm_watch",
	"getuid", "getuid32", "geteuid", "geteuid32", "getgid", "getgid32", "getegid", "getegid32", "getgroups", "getgroups32",
	// The classifier that lets DIRECT pass where rp_filter is on.
	"bpf",
}

// limitCalls lets pass what is in calls, threads and no processes, and sockets of
// the families in use. All else is refused with EPERM; so is everything of another
// architecture's numbering.
func limitCalls() error {
	if !seccomp.Supported() {
		return errors.New("not in this kernel")
	}
	here, err := arch.GetInfo("")
	if err != nil {
		return err
	}
	var names []string
	for _, n := range calls {
		if _, known := here.SyscallNames[n]; known {
			names = append(names, n)
		}
	}
	some := []seccomp.NameWithConditions{{Name: "clone", Conditions: seccomp.ArgumentConditions{{Operation: seccomp.BitsSet, Value: unix.CLONE_THREAD}}}}
	if runtime.GOARCH == "386" { // all of sockets by one call, the family behind a pointer that a filter cannot follow
		names = append(names, "socketcall")
	}
	for _, family := range []uint64{unix.AF_INET, unix.AF_INET6, unix.AF_UNIX, unix.AF_NETLINK} {
		some = append(some, seccomp.NameWithConditions{Name: "socket", Conditions: seccomp.ArgumentConditions{{Operation: seccomp.Equal, Value: family}}})
	}
	groups := []seccomp.SyscallGroup{
		{Action: seccomp.ActionAllow, Names: names},
		{Action: seccomp.ActionAllow, NamesWithCondtions: some},
	}
	if _, known := here.SyscallNames["clone3"]; known { // a C library then asks clone, whose flags can be seen
		groups = append(groups, seccomp.SyscallGroup{Action: seccomp.ActionErrno | seccomp.Action(unix.ENOSYS), Names: []string{"clone3"}})
	}
	return seccomp.LoadFilter(seccomp.Filter{
		NoNewPrivs: true,
		Flag:       seccomp.FilterFlagTSync,
		Policy:     seccomp.Policy{DefaultAction: seccomp.ActionErrno, Syscalls: groups},
	})
}
