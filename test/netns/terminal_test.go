package netns_test

import (
	"fmt"
	"io"
	"net"
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

// TestWatchTerminal: on a terminal flows --watch stays in its place, goes by the
// terminal's size, also when that changes, and ends with Ctrl-C.
func TestWatchTerminal(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	startMicrosocks(t, w.socks1, socks1At+":1080")
	d := serve(t, w.gateway, settings{routes: "SOCKD5 @=198.51.100.11 *\n"})
	w.outside.answerTCP(t, outsideAt+":7", func(c *net.TCPConn) { io.Copy(c, c) })
	term := w.gateway.terminal(t, []string{d.bin, "flows", "--watch", "-c", d.config})
	size := func(columns, rows uint16) {
		t.Helper()
		w.gateway.must(t, unix.IoctlSetWinsize(int(term.master.Fd()), unix.TIOCSWINSZ, &unix.Winsize{Col: columns, Row: rows}))
	}
	const home, toEnd, below = "\x1b[H", "\x1b[K", "\x1b[J"
	// screen waits for one that shows a text, and returns its lines.
	screen := func(want string) []string {
		t.Helper()
		term.say(t, "", home)
		for range 20 {
			begin := term.from
			term.say(t, "", below)
			shown := strings.TrimSuffix(term.seen.String()[begin:term.from], below)
			if strings.Contains(shown, want) {
				if strings.Count(shown, "\n") != strings.Count(shown, toEnd+"\r\n") {
					t.Errorf("a line does not clear what was there: %q", shown)
				}
				return strings.Split(strings.TrimSuffix(strings.ReplaceAll(shown, toEnd, ""), "\r\n"), "\r\n")
			}
			term.say(t, "", home)
		}
		t.Fatalf("no screen shows %q:\n%q", want, term.seen.String())
		return nil
	}
	size(120, 24)
	if lines := screen("0 flows; Ctrl-C ends"); len(lines) != 2 || !strings.HasPrefix(lines[1], "ID ") {
		t.Errorf("without a flow: %q", lines)
	}
	var first net.Conn
	for range 5 {
		c, err := w.client.dial("tcp", outsideAt+":7", 5*time.Second)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		talk(t, c)
		if first == nil {
			first = c
		}
	}
	if lines := screen("5 flows"); len(lines) != 7 || !strings.Contains(lines[1], "UP/S") || !strings.Contains(lines[2], first.LocalAddr().String()) {
		t.Errorf("with five flows: %q", lines)
	}
	size(40, 6)
	lines := screen("… and 3 more")
	for _, l := range lines {
		if len([]rune(l)) > 40 {
			t.Errorf("%q is wider than the terminal", l)
		}
	}
	if len(lines) != 5 {
		t.Errorf("of six rows the last one is the cursor's: %q", lines)
	}
	first.Close()
	screen("4 flows")
	term.say(t, "\x03", "")
	if code, ended := term.wait(5 * time.Second); !ended || code != 128+int(syscall.SIGINT) {
		t.Errorf("Ctrl-C: exit %d, %v", code, ended)
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
