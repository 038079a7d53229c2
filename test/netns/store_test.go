package netns_test

import (
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sys/unix"
)

// fdStore is what systemd does for a service with FileDescriptorStoreMax=: it keeps
// open files by name, and starts the service with them.
type fdStore struct {
	conn *net.UnixConn
	path string

	mu    sync.Mutex
	names []string
	files []*os.File
	ready int // how often it heard READY=1
}

func startStore(t testing.TB, h *host) *fdStore {
	t.Helper()
	k := &fdStore{path: filepath.Join(h.dir, "store")}
	var err error
	k.conn, err = net.ListenUnixgram("unixgram", &net.UnixAddr{Name: k.path, Net: "unixgram"})
	h.must(t, err)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		b, oob := make([]byte, 4096), make([]byte, 4096)
		for {
			n, oobn, _, _, err := k.conn.ReadMsgUnix(b, oob)
			if err != nil {
				return
			}
			k.hear(string(b[:n]), oob[:oobn])
		}
	}()
	t.Cleanup(func() { k.conn.Close(); <-ended; k.drop("") })
	return k
}

func (k *fdStore) hear(text string, oob []byte) {
	var name string
	for line := range strings.Lines(text) {
		if v, ok := strings.CutPrefix(strings.TrimSpace(line), "FDNAME="); ok {
			name = v
		}
	}
	if strings.HasPrefix(text, "FDSTOREREMOVE=1\n") {
		k.drop(name)
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if strings.HasPrefix(text, "READY=1") {
		k.ready++
	}
	msgs, _ := unix.ParseSocketControlMessage(oob)
	for i := range msgs {
		fds, _ := unix.ParseUnixRights(&msgs[i])
		for _, fd := range fds { // the newest first, as systemd has them
			k.names, k.files = slices.Insert(k.names, 0, name), slices.Insert(k.files, 0, os.NewFile(uintptr(fd), name))
		}
	}
}

// drop closes what has a name; empty: everything.
func (k *fdStore) drop(name string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	for i := len(k.files) - 1; i >= 0; i-- {
		if name == "" || k.names[i] == name {
			k.files[i].Close()
			k.names, k.files = slices.Delete(k.names, i, i+1), slices.Delete(k.files, i, i+1)
		}
	}
}

// start starts the daemon as systemd does, and returns when it is ready.
func (k *fdStore) start(t testing.TB, d *daemon) {
	t.Helper()
	k.mu.Lock()
	ready, names, files := k.ready, strings.Join(k.names, ":"), slices.Clone(k.files)
	k.mu.Unlock()
	c := command{
		args:  []string{"/bin/sh", "-c", `export LISTEN_PID=$$; exec "$@"`, "sh", d.bin, "serve", "-c", d.config},
		env:   []string{"NOTIFY_SOCKET=" + k.path, "FDSTORE=128"},
		files: files,
	}
	if len(files) > 0 {
		c.env = append(c.env, "LISTEN_FDNAMES="+names, "LISTEN_FDS="+strconv.Itoa(len(files)))
	}
	d.process = d.host.start(t, c)
	eventually(t, 15*time.Second, "it is ready", func() bool {
		k.mu.Lock()
		defer k.mu.Unlock()
		return k.ready > ready
	})
}

// TestStoredSockets: between two processes flows and questions wait, and the
// second one serves them. Once systemd lets go of the sockets all is refused.
func TestStoredSockets(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	startMicrosocks(t, w.socks1, socks1At+":1080")
	d := newDaemon(t, w.gateway, settings{routes: "SOCKD5 @=198.51.100.11 *\n"})
	k := startStore(t, w.gateway)
	w.observe(t)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("tproxyd printed:\n%s", d.output())
		}
	})
	k.start(t, d)
	for range 3 {
		eventually(t, 5*time.Second, "the sockets are kept", func() bool {
			k.mu.Lock()
			defer k.mu.Unlock()
			return len(k.files) >= 8
		})
		d.stop(t)
		results := make(chan error, 3)
		for _, at := range []string{outsideAt, outsideAt6} {
			go func() { results <- w.get(netip.MustParseAddr(at)) }()
		}
		go func() {
			_, err := w.client.ask("udp", outsideNS, "waits.example.org", dns.TypeA)
			results <- err
		}()
		time.Sleep(200 * time.Millisecond)
		k.start(t, d)
		for range 3 {
			if err := <-results; err != nil {
				t.Errorf("what came between two processes: %v", err)
			}
		}
	}
	// After a crash the unit closes the table, which refuses although somebody
	// listens.
	d.process.kill()
	d.cli(t, "close", "-c", d.config).ok(t)
	for _, at := range []string{outsideAt, outsideAt6} {
		began := time.Now()
		atOnce(t, "crashed", began, w.get(netip.MustParseAddr(at)))
	}
	k.start(t, d)
	if err := w.get(netip.MustParseAddr(outsideAt)); err != nil {
		t.Errorf("after a crash: %v", err)
	}
	d.cmd.Process.Signal(syscall.SIGTERM)
	if code, ended := d.wait(5 * time.Second); !ended || code != 0 {
		t.Errorf("SIGTERM: ended %v, exit %d", ended, code)
	}
	k.drop("")
	for _, at := range []string{outsideAt, outsideAt6} {
		began := time.Now()
		atOnce(t, "stopped for good", began, w.get(netip.MustParseAddr(at)))
	}
	if n, who := w.leaked(t); n != 0 {
		t.Errorf("%d packets leaked:\n%s", n, who)
	}
}
