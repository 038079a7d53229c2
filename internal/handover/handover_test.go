package handover

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// pair returns both ends of a connection.
func pair(t *testing.T) (a, b *Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends []*Conn
	for _, fd := range fds {
		f := os.NewFile(uintptr(fd), "end")
		c, err := net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
		end := New(c.(*net.UnixConn))
		end.SetDeadline(time.Now().Add(10 * time.Second))
		t.Cleanup(func() { end.Close() })
		ends = append(ends, end)
	}
	return ends[0], ends[1]
}

// files makes files that hold their number.
func files(t *testing.T, n int) (list []*os.File) {
	t.Helper()
	for i := range n {
		fd, err := unix.MemfdCreate("n", unix.MFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		f := os.NewFile(uintptr(fd), "n")
		t.Cleanup(func() { f.Close() })
		fmt.Fprint(f, i)
		list = append(list, f)
	}
	return list
}

func TestMessages(t *testing.T) {
	a, b := pair(t)
	type body struct{ Text string }
	blob := bytes.Repeat([]byte("blob"), 1<<20)
	for _, n := range []int{0, 1, AtOnce, AtOnce + 1, 3*AtOnce - 1} {
		sent := make(chan error, 1)
		go func() {
			err := a.Send(Message{Body: body{fmt.Sprint(n)}, Blob: blob, Files: files(t, n)})
			if err == nil {
				err = a.Send(Message{Body: body{"next"}})
			}
			sent <- err
		}()
		var got body
		m, err := b.Receive(&got)
		if err != nil || got.Text != fmt.Sprint(n) || !bytes.Equal(m.Blob, blob) || len(m.Files) != n {
			t.Fatalf("%d: %v %+v, %d bytes, %d files", n, err, got, len(m.Blob), len(m.Files))
		}
		for i, f := range m.Files {
			text, err := os.ReadFile(fmt.Sprintf("/proc/self/fd/%d", f.Fd()))
			if err != nil || string(text) != fmt.Sprint(i) {
				t.Fatalf("file %d holds %q: %v", i, text, err)
			}
			if flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFD, 0); err != nil || flags&unix.FD_CLOEXEC == 0 {
				t.Fatalf("file %d is not closed on exec", i)
			}
		}
		closeAll(m.Files)
		if m, err = b.Receive(&got); err != nil || got.Text != "next" || len(m.Files) != 0 {
			t.Fatalf("next: %v %+v", err, got)
		}
		if err := <-sent; err != nil {
			t.Fatal(err)
		}
	}
	if pid, uid, err := b.Peer(); err != nil || pid != os.Getpid() || uid != uint32(os.Geteuid()) {
		t.Errorf("peer: %d %d %v", pid, uid, err)
	}
	a.Close()
	if _, err := b.Receive(nil); !errors.Is(err, io.EOF) {
		t.Errorf("the end: %v", err)
	}
}

// What is no message is an error, and nothing is taken up for it.
func TestNoMessage(t *testing.T) {
	for name, b := range map[string][]byte{
		"cut head":      {1, 0, 0},
		"cut body":      {9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, '{'},
		"no JSON":       {1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 'x'},
		"long text":     {0, 0, 0, 0xff, 0, 0, 0, 0, 0, 0, 0, 0},
		"long blob":     {1, 0, 0, 0, 0, 0, 0, 0xff, 0, 0, 0, 0, '0'},
		"many files":    {1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, '0'},
		"files promise": {1, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 'f', 'f', '0'},
	} {
		a, c := pair(t)
		if _, err := a.c.Write(b); err != nil {
			t.Fatal(err)
		}
		a.Close()
		var body int
		if m, err := c.Receive(&body); err == nil || errors.Is(err, io.EOF) && !strings.Contains(name, "cut") || m.Files != nil {
			t.Errorf("%s: %v, %v", name, err, m.Files)
		}
	}
	a, _ := pair(t)
	if err := a.Send(Message{Files: make([]*os.File, MaxFiles+1)}); err == nil {
		t.Error("too many files are sent")
	}
}
