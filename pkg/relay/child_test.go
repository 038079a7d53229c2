package relay

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Some things can only be seen from outside of the process: the relay's own
// processor time and memory, its behaviour under another user id or descriptor
// limit. For those the test binary starts itself as a child that is nothing
// but a relay, and is asked through a pipe.

const childEnv = "RELAY_TEST_CHILD"

func TestMain(m *testing.M) {
	if spec := os.Getenv(childEnv); spec != "" {
		if err := runChild(spec); err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// runChild relays from a listener of its own to the address in spec,
// "KIND TARGET [OPTION=N…]", and answers questions from stdin on stdout.
func runChild(spec string) error {
	f := strings.Fields(spec)
	to, err := netip.ParseAddrPort(f[1])
	if err != nil {
		return err
	}
	var o Options
	for _, opt := range f[2:] {
		k, v, _ := strings.Cut(opt, "=")
		n, err := strconv.Atoi(v)
		if err != nil {
			return err
		}
		switch k {
		case "nofile":
			r := unix.Rlimit{Cur: uint64(n), Max: uint64(n)}
			if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &r); err != nil {
				return err
			}
		case "uid":
			if err := syscall.Setuid(n); err != nil {
				return err
			}
		case "conns":
			o.MaxConns = n
		case "pipes":
			o.MaxPipes = n
		case "pipesize":
			o.PipeSize = n
		case "loops":
			o.Loops = n
		default:
			return fmt.Errorf("unknown option %s", k)
		}
	}
	ln, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return err
	}
	stats := func() Stats { return Stats{} }
	switch f[0] {
	case "engine", "copying":
		e, err := New(o)
		if err != nil {
			return err
		}
		if f[0] == "copying" {
			noPipes(e)
		}
		stats = e.Stats
		go e.Serve(context.Background(), ln, func(c *Conn) {
			s, err := e.Dial(context.Background(), DialOptions{}, to)
			if err != nil {
				c.Reset()
				return
			}
			e.Join(c, s, JoinOptions{})
		})
	case "iocopy":
		go serveIOCopy(ln, to.String())
	default:
		return fmt.Errorf("unknown kind %s", f[0])
	}
	fmt.Println(ln.Addr())
	in := bufio.NewScanner(os.Stdin)
	for in.Scan() {
		switch in.Text() {
		case "cpu":
			var r unix.Rusage
			unix.Getrusage(unix.RUSAGE_SELF, &r)
			fmt.Println(r.Utime.Nano()/1000 + r.Stime.Nano()/1000)
		case "rss":
			b, err := os.ReadFile("/proc/self/statm")
			if err != nil {
				return err
			}
			pages, _ := strconv.Atoi(strings.Fields(string(b))[1])
			fmt.Println(pages * os.Getpagesize())
		case "fds":
			d, err := os.ReadDir("/proc/self/fd")
			if err != nil {
				return err
			}
			fmt.Println(len(d) - 1)
		case "stats":
			fmt.Printf("%+v\n", stats())
		case "refused":
			fmt.Println(stats().Refused)
		case "shortages":
			fmt.Println(stats().Shortages)
		}
	}
	return in.Err()
}

// serveIOCopy is the relay that a Go program gets for nothing: two goroutines
// and io.Copy, which splices.
func serveIOCopy(ln *net.TCPListener, to string) {
	for {
		c, err := ln.AcceptTCP()
		if err != nil {
			return
		}
		go func() {
			s, err := net.Dial("tcp", to)
			if err != nil {
				c.Close()
				return
			}
			st := s.(*net.TCPConn)
			var wg sync.WaitGroup
			wg.Go(func() { io.Copy(c, st); c.CloseWrite() })
			io.Copy(st, c)
			st.CloseWrite()
			wg.Wait()
			c.Close()
			st.Close()
		}()
	}
}

// child is a relay in a process of its own.
type child struct {
	t    testing.TB
	addr string
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  *bufio.Scanner
}

func startChild(t testing.TB, spec ...string) *child {
	t.Helper()
	c := &child{t: t, cmd: exec.Command(os.Args[0])}
	c.cmd.Env = append(os.Environ(), childEnv+"="+strings.Join(spec, " "))
	c.cmd.Stderr = os.Stderr
	c.cmd.Dir = "/"
	var err error
	if c.in, err = c.cmd.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.in.Close()
		if err := c.cmd.Wait(); err != nil {
			t.Errorf("child: %v", err)
		}
	})
	c.out = bufio.NewScanner(out)
	c.addr = c.line()
	if strings.HasPrefix(c.addr, "error:") {
		t.Fatal(c.addr)
	}
	return c
}

func (c *child) line() string {
	c.t.Helper()
	if !c.out.Scan() {
		c.t.Fatalf("child ended: %v", c.out.Err())
	}
	return c.out.Text()
}

func (c *child) ask(what string) string {
	c.t.Helper()
	fmt.Fprintln(c.in, what)
	return c.line()
}

func (c *child) number(what string) int {
	c.t.Helper()
	n, err := strconv.Atoi(c.ask(what))
	if err != nil {
		c.t.Fatal(err)
	}
	return n
}

// cpu returns the processor time that the child has used.
func (c *child) cpu() time.Duration {
	c.t.Helper()
	return time.Duration(c.number("cpu")) * time.Microsecond
}

// childError starts a child that must not come up, and returns what it says.
func childError(t testing.TB, spec ...string) string {
	t.Helper()
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), childEnv+"="+strings.Join(spec, " "))
	out, err := cmd.Output()
	if err == nil {
		t.Errorf("child %v: no error", spec)
	}
	return string(out)
}
