package sandbox_test

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/tproxyd/tproxyd/internal/sandbox"
	"golang.org/x/sys/unix"
)

// child names the folder of a process of the test's own that enters the sandbox.
const child = "TPROXYD_SANDBOX_CHILD"

func TestMain(m *testing.M) {
	if dir := os.Getenv(child); dir != "" {
		inside(dir)
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// TestSandbox: a process that has entered does what a daemon does, and nothing of
// what somebody would do who has broken into it.
func TestSandbox(t *testing.T) {
	dir := t.TempDir()
	for _, d := range []string{"read", "state", "other"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, d, "file"), []byte("text"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("../other/file", filepath.Join(dir, "read", "link")); err != nil {
		t.Fatal(err)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	c := exec.Command(exe)
	c.Env = append(os.Environ(), child+"="+dir)
	out, err := c.CombinedOutput()
	if err != nil || len(out) > 0 {
		t.Errorf("%v\n%s", err, out)
	}
}

// inside enters and says what should not be.
func inside(dir string) {
	in := func(names ...string) string { return filepath.Join(append([]string{dir}, names...)...) }
	// A thread that is there before, and stays: it must not be forgotten.
	old, tried := make(chan func() error), make(chan error)
	go func() {
		for f := range old {
			tried <- f()
		}
	}()
	before, err := os.Open(in("other", "file"))
	report(err)
	for _, m := range sandbox.Enter(sandbox.Files{Read: []string{in("read"), in("missing")}, Write: []string{in("state")}}) {
		fmt.Println("missing:", m)
	}

	may := map[string]func() error{
		"read a file":        func() error { return drop(os.ReadFile(in("read", "file"))) },
		"read /etc":          func() error { return drop(os.ReadFile("/etc/resolv.conf")) },
		"read a sysctl":      func() error { return drop(os.ReadFile("/proc/sys/net/ipv4/ip_forward")) },
		"read what was open": func() error { return drop(before.Read(make([]byte, 4))) },
		"write, rename, list and remove": func() error {
			return errors.Join(os.WriteFile(in("state", "new"), nil, 0o600), os.Rename(in("state", "new"), in("state", "file")),
				drop(os.ReadDir(in("state"))), os.Remove(in("state", "file")))
		},
		"open /dev/null": func() error { return drop(os.OpenFile(os.DevNull, os.O_RDWR, 0)) },
		"connect":        connect,
		"listen at a UNIX socket": func() error {
			ln, err := net.Listen("unix", in("state", "sock"))
			if err == nil {
				err = ln.Close()
			}
			return err
		},
		"ask the kernel": func() error { return drop(unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW, unix.NETLINK_ROUTE)) },
		"make a pipe":    func() error { return drop(unix.FcntlInt(pipe(), unix.F_SETPIPE_SZ, 1<<17)) },
	}
	for what, try := range may {
		if err := try(); err != nil {
			fmt.Printf("it cannot %s: %v\n", what, err)
		}
	}

	mayNot := map[string]func() error{
		"read elsewhere":           func() error { return drop(os.ReadFile(in("other", "file"))) },
		"read by a link":           func() error { return drop(os.ReadFile(in("read", "link"))) },
		"write what it reads":      func() error { return os.WriteFile(in("read", "file"), nil, 0o600) },
		"write to /etc":            func() error { return os.WriteFile("/etc/tproxyd-sandbox-test", nil, 0o600) },
		"change a sysctl":          func() error { return drop(os.OpenFile("/proc/sys/net/ipv4/ip_forward", os.O_WRONLY, 0)) },
		"make a device":            func() error { return unix.Mknod(in("state", "device"), unix.S_IFCHR|0o600, 1<<8|3) },
		"execute":                  func() error { return exec.Command("/bin/true").Run() },
		"execute in its own place": func() error { return syscall.Exec("/bin/true", []string{"true"}, nil) },
		"fork":                     func() error { return errno(unix.RawSyscall(unix.SYS_CLONE, uintptr(unix.SIGCHLD), 0, 0)) },
		"trace":                    func() error { return unix.PtraceAttach(os.Getppid()) },
		"read another's memory":    func() error { return drop(os.Open(fmt.Sprintf("/proc/%d/mem", os.Getppid()))) },
		"mount":                    func() error { return unix.Mount("none", in("state"), "tmpfs", 0, "") },
		"leave the namespace":      func() error { return unix.Unshare(unix.CLONE_NEWNS) },
		"make a user namespace":    func() error { return unix.Unshare(unix.CLONE_NEWUSER) },
		"change the root":          func() error { return unix.Chroot(in("read")) },
		"become somebody else":     func() error { return errno(unix.RawSyscall(unix.SYS_SETUID, 65534, 0, 0)) },
		"give a file away":         func() error { return os.Chown(in("state", "sock2"), 1, 1) },
		"load a module":            func() error { return unix.InitModule(nil, "") },
		"sniff":                    func() error { return drop(unix.Socket(unix.AF_PACKET, unix.SOCK_RAW, 0)) },
		"take rights back": func() error {
			head, data := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, [2]unix.CapUserData{}
			data[0].Permitted = 1 << unix.CAP_SYS_ADMIN
			return unix.Capset(&head, &data[0])
		},
	}
	for what, try := range mayNot {
		old <- try
		for who, err := range map[string]error{"it": try(), "an old thread of it": <-tried} {
			if !errors.Is(err, unix.EPERM) && !errors.Is(err, unix.EACCES) {
				fmt.Printf("%s can %s: %v\n", who, what, err)
			}
		}
	}

	tasks, err := filepath.Glob("/proc/self/task/*/status")
	report(err)
	for _, task := range tasks {
		b, err := os.ReadFile(task)
		report(err)
		for _, want := range []string{"NoNewPrivs:\t1", "Seccomp:\t2", "CapAmb:\t0000000000000000", "CapInh:\t0000000000000000"} {
			if !strings.Contains(string(b), want) {
				fmt.Printf("%s does not say %q:\n%s", task, want, b)
			}
		}
		var effective uint64
		_, after, _ := strings.Cut(string(b), "CapEff:\t")
		fmt.Sscanf(after, "%x", &effective)
		const most = 1<<unix.CAP_NET_ADMIN | 1<<unix.CAP_NET_RAW | 1<<unix.CAP_NET_BIND_SERVICE | 1<<unix.CAP_BPF | 1<<unix.CAP_SYS_RESOURCE | 1<<unix.CAP_DAC_OVERRIDE
		if effective&^most != 0 || effective&(1<<unix.CAP_NET_ADMIN) == 0 {
			fmt.Printf("%s: capabilities %x\n", task, effective)
		}
	}
}

func report(err error) {
	if err != nil {
		fmt.Println(err)
	}
}

func drop[T any](_ T, err error) error { return err }

func errno(_, _ uintptr, e syscall.Errno) error {
	if e == 0 {
		return nil
	}
	return e
}

func pipe() uintptr {
	var p [2]int
	report(unix.Pipe2(p[:], unix.O_CLOEXEC))
	return uintptr(p[0])
}

// connect makes a connection on loopback, with threads and timers as they come.
func connect() error {
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return err
	}
	defer ln.Close()
	c, err := net.Dial("tcp", ln.Addr().String())
	if err != nil {
		return err
	}
	return c.Close()
}
