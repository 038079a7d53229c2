package netns_test

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestRunTerminal: a shell on a terminal has job control, and Ctrl-C and Ctrl-Z
// are for what is in its foreground.
func TestRunTerminal(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	startMicrosocks(t, w.socks1, socks1At+":1080")
	term := w.gateway.terminal(t, runLine(t, "--socks", socks1At, "--", "bash", "--norc", "-i"))
	term.say(t, "PS1='$((7*6))> '\n", "42> ")
	term.say(t, "tty -s; echo tty=$?\n", "tty=0")
	term.say(t, "sleep 100\n", "sleep 100")
	time.Sleep(200 * time.Millisecond)
	term.say(t, "\x03", "42> ")
	term.say(t, "echo status=$?\n", "status=130")
	term.say(t, "sleep 101\n", "sleep 101")
	time.Sleep(200 * time.Millisecond)
	term.say(t, "\x1a", "Stopped")
	term.say(t, "jobs; kill %1; echo job=$?\n", "job=0")
	term.say(t, "curl -sS --max-time 10 http://www.example.org/\n", "from=")
	term.say(t, "exit 9\n", "exit")
	if code, ended := term.wait(5 * time.Second); !ended || code != 9 {
		t.Errorf("exit %d, %v\n%s", code, ended, term.seen.String())
	}

	// A command that does not catch it ends by Ctrl-C; the run with it.
	term = w.gateway.terminal(t, runLine(t, "--socks", socks1At, "--", "sh", "-c", "echo ready; exec sleep 100"))
	term.say(t, "", "ready")
	term.say(t, "\x03", "")
	if code, ended := term.wait(5 * time.Second); !ended || code != 130 {
		t.Errorf("Ctrl-C: exit %d, %v\n%s", code, ended, term.seen.String())
	}
}

// terminal is a process on a pseudo-terminal of its own.
type terminal struct {
	*process
	master *os.File
	seen   buffer
	from   int // what was seen before is not looked at again
}

func (h *host) terminal(t *testing.T, args []string) *terminal {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprintf("/dev/pts/%d", n)
	if err := os.Chown(name, 65534, -1); err != nil {
		t.Fatal(err)
	}
	slave, err := os.OpenFile(name, os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer slave.Close()
	term := &terminal{master: master, process: &process{began: time.Now(), ended: make(chan struct{})}}
	c := exec.Command(args[0], args[1:]...)
	c.Env, c.Dir = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "HOME=" + h.dir, "LC_ALL=C", "TERM=dumb"}, h.dir
	c.Stdin, c.Stdout, c.Stderr = slave, slave, slave
	c.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true, Pdeathsig: syscall.SIGKILL}
	term.cmd = c
	h.must(t, h.ns.Do(c.Start))
	go term.reap()
	go func() {
		b := make([]byte, 4096)
		for {
			n, err := master.Read(b)
			term.seen.Write(b[:n])
			if err != nil {
				return
			}
		}
	}()
	t.Cleanup(func() { term.kill(); master.Close() })
	return term
}

// say types text and waits for what is to be seen.
func (term *terminal) say(t *testing.T, text, want string) {
	t.Helper()
	if _, err := term.master.WriteString(text); err != nil {
		t.Fatal(err)
	}
	for end := time.Now().Add(15 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		all := term.seen.String()
		if i := strings.Index(all[term.from:], want); i >= 0 {
			term.from += i + len(want)
			return
		}
		if time.Now().After(end) {
			t.Fatalf("after %q there is no %q:\n%s", text, want, all)
		}
	}
}
