package socks

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

// startServer starts a server of somebody else: argv in namespaces of its own for
// processes and mounts, where the files of etc lie over those of /etc. It
// returns when the server listens at each address.
func startServer(t *testing.T, etc map[string]string, listen []netip.AddrPort, argv ...string) {
	t.Helper()
	path, err := exec.LookPath(argv[0])
	if err != nil {
		t.Fatalf("%v (Debian: apt install dante-server hpsockd microsocks)", err)
	}
	script := "set -e\n"
	for name, text := range etc {
		file := filepath.Join(t.TempDir(), name)
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
		script += fmt.Sprintf("mount --bind %s /etc/%s\n", file, name)
	}
	var out strings.Builder
	cmd := exec.Command("/bin/sh", append([]string{"-c", script + `exec "$0" "$@"`, path}, argv[1:]...)...)
	cmd.Stdout, cmd.Stderr = &out, &out
	// The first process of a process namespace takes the others with it.
	// Unshareflags makes the mounts private, Cloneflags alone does not.
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWPID, Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL,
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		cmd.Wait()
	}()
	t.Cleanup(func() {
		cmd.Process.Kill()
		<-ended
	})
	deadline := time.After(10 * time.Second)
	for _, a := range listen {
		for {
			c, err := net.Dial("tcp", a.String())
			if err == nil {
				c.Close()
				break
			}
			select {
			case <-ended:
				t.Fatalf("%s ended: %s", argv[0], &out)
			case <-deadline:
				t.Fatalf("%s does not listen: %v", argv[0], err)
			case <-time.After(10 * time.Millisecond):
			}
		}
	}
}

// freePort returns an address at which nobody listens.
func freePort(t *testing.T, addr string) netip.AddrPort {
	t.Helper()
	ln, err := net.Listen("tcp", netip.AddrPortFrom(netip.MustParseAddr(addr), 0).String())
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	return ln.Addr().(*net.TCPAddr).AddrPort()
}

// greeter says a line at once and then echoes; it returns its address.
func greeter(t *testing.T, addr string) netip.AddrPort {
	t.Helper()
	ln, err := net.Listen("tcp", netip.AddrPortFrom(netip.MustParseAddr(addr), 0).String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				io.WriteString(c, "220 ready\n")
				io.Copy(c, c)
			}()
		}
	}()
	return ln.Addr().(*net.TCPAddr).AddrPort()
}

// files keeps a server from asking the network for names.
var files = map[string]string{"nsswitch.conf": "passwd: files\nshadow: files\nhosts: files\n"}

// danted starts Dante, which knows alice by the system's password file if auth
// is set, and refuses the port by rule. It listens on IPv4 and IPv6.
func danted(t *testing.T, auth bool, refused uint16) []netip.AddrPort {
	t.Helper()
	dir := t.TempDir()
	listen := []netip.AddrPort{freePort(t, "127.0.0.2"), freePort(t, "::1")}
	method, etc := "none", files
	if auth {
		method = "username"
		etc = map[string]string{
			"nsswitch.conf": files["nsswitch.conf"],
			"passwd":        "root:x:0:0::/:/bin/sh\nnobody:x:65534:65534::/:/bin/false\nalice:x:65533:65534::/:/bin/false\n",
			// openssl passwd -6 -salt tproxyd hunter2
			"shadow": "alice:$6$tproxyd$RXgjRhVbBjuGKlJOFOcIw2lO1zRKjZ1m7qEBI/UcwCYy3.18VUMNaRCT2LCvBAnE2D.rqH7GRlNmLB0OIjKE1.:20000::::::\n",
		}
	}
	conf := filepath.Join(dir, "danted.conf")
	text := fmt.Sprintf(`logoutput: %s/log
internal: 127.0.0.2 port = %d
internal: ::1 port = %d
external: 127.0.0.1
external: ::1
clientmethod: none
socksmethod: %s
user.privileged: root
user.unprivileged: nobody
client pass { from: 0/0 to: 0/0 }
socks block { from: 0/0 to: 0/0 port = %d }
socks pass { from: 0/0 to: 0/0 }
`, dir, listen[0].Port(), listen[1].Port(), method, refused)
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			log, _ := os.ReadFile(dir + "/log")
			t.Logf("danted's log:\n%s", log)
		}
	})
	startServer(t, etc, listen, "danted", "-f", conf, "-p", dir+"/pid")
	return listen
}

// microsocks starts one microsocks for each family.
func microsocks(t *testing.T, auth bool) (listen []netip.AddrPort) {
	t.Helper()
	for _, addr := range []string{"127.0.0.3", "::1"} {
		at := freePort(t, addr)
		argv := []string{"microsocks", "-i", addr, "-p", fmt.Sprint(at.Port())}
		if auth {
			argv = append(argv, "-u", alice.Username, "-P", alice.Password)
		}
		startServer(t, files, []netip.AddrPort{at}, argv...)
		listen = append(listen, at)
	}
	return listen
}

// TestInterop asks Dante and microsocks for destinations that answer, that
// refuse and that do not exist.
func TestInterop(t *testing.T) {
	greeter4, greeter6 := greeter(t, "127.0.0.1"), greeter(t, "::1")
	closed, byRule := freePort(t, "127.0.0.1"), freePort(t, "127.0.0.1")
	type destination struct {
		name   string
		target flow.Target
		want   error
	}
	address := func(a netip.AddrPort) flow.Target { return flow.Target{Addr: a.Addr(), Port: a.Port()} }
	destinations := []destination{
		{"name", flow.Target{Name: "localhost", Port: greeter4.Port()}, nil},
		{"IPv4", address(greeter4), nil},
		{"IPv6", address(greeter6), nil},
		{"closed port", address(closed), ConnectionRefused},
		{"closed port by name", flow.Target{Name: "localhost", Port: closed.Port()}, ConnectionRefused},
	}
	unknown := flow.Target{Name: "nowhere.test", Port: 80}
	wrong := &Auth{Username: alice.Username, Password: "wrong"}
	tests := []struct {
		name     string
		start    func(t *testing.T) []netip.AddrPort
		auth     *Auth
		pipeline bool
		bound    bool // it tells the address that it uses
		more     []destination
		others   map[*Auth]error // what other credentials come to
	}{
		{
			"danted", func(t *testing.T) []netip.AddrPort { return danted(t, false, byRule.Port()) }, nil, true, true,
			[]destination{{"rule", address(byRule), NotAllowed}, {"no such name", unknown, HostUnreachable}},
			map[*Auth]error{alice: ErrNoAcceptableMethod},
		},
		{
			"danted with password", func(t *testing.T) []netip.AddrPort { return danted(t, true, byRule.Port()) }, alice, true, true,
			[]destination{{"rule", address(byRule), NotAllowed}},
			map[*Auth]error{nil: ErrNoAcceptableMethod, wrong: ErrAuth},
		},
		{
			"microsocks", func(t *testing.T) []netip.AddrPort { return microsocks(t, false) }, nil, false, false,
			[]destination{{"no such name", unknown, GeneralFailure}},
			map[*Auth]error{alice: ErrNoAcceptableMethod},
		},
		{
			"microsocks with password", func(t *testing.T) []netip.AddrPort { return microsocks(t, true) }, alice, false, false,
			nil,
			map[*Auth]error{nil: ErrNoAcceptableMethod, wrong: ErrAuth},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for _, server := range tt.start(t) {
				connect := func(target flow.Target, o Options) (net.Conn, netip.AddrPort, error) {
					conn, err := net.Dial("tcp", server.String())
					if err != nil {
						t.Fatal(err)
					}
					t.Cleanup(func() { conn.Close() })
					conn.SetDeadline(time.Now().Add(10 * time.Second))
					bound, err := Connect(conn, target, o)
					return conn, bound, err
				}
				for _, pipeline := range []bool{false, true} {
					if pipeline && !tt.pipeline {
						continue
					}
					for _, d := range append(tt.more, destinations...) {
						conn, bound, err := connect(d.target, Options{Auth: tt.auth, Pipeline: pipeline})
						if err != d.want {
							t.Errorf("%s through %v, pipeline %v: %v, want %v", d.name, server, pipeline, err, d.want)
						}
						if err != nil || d.want != nil {
							continue
						}
						if tt.bound && (!bound.Addr().IsLoopback() || bound.Port() == 0) {
							t.Errorf("%s through %v: bound to %v", d.name, server, bound)
						}
						io.WriteString(conn, "hello\n")
						r := bufio.NewReader(conn)
						first, _ := r.ReadString('\n')
						second, err := r.ReadString('\n')
						if first+second != "220 ready\nhello\n" {
							t.Errorf("%s through %v: heard %q, %q: %v", d.name, server, first, second, err)
						}
					}
				}
				for auth, want := range tt.others {
					if _, _, err := connect(address(greeter4), Options{Auth: auth}); err != want {
						t.Errorf("through %v with another credential: %v, want %v", server, err, want)
					}
				}
			}
		})
	}
}

// hpsockd starts HP's server, which speaks IPv4 alone.
func hpsockd(t *testing.T) []netip.AddrPort {
	t.Helper()
	if _, err := exec.LookPath("hpsockd"); err != nil {
		t.Fatalf("%v (Debian: apt install hpsockd)", err)
	}
	dir := t.TempDir()
	at := freePort(t, "127.0.0.4")
	// It gives up root before it writes there, and could not enter t.TempDir.
	state, err := os.MkdirTemp("", "hpsockd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(state) })
	if err := os.Chmod(state, 0o777); err != nil {
		t.Fatal(err)
	}
	conf := filepath.Join(dir, "hpsockd.conf")
	text := fmt.Sprintf(`daemon {
	directory "%s";
	negotiate-file "negotiate";
	listen-address { %s; };
	port %d;
	user "nobody";
};
route { { default 127.0.0.1; }; };
method-list { { number 0; name "noAuth"; internal; flags 0; }; };
client-method { { src { 127.0.0.0/8; }; method { "noAuth"; }; }; };
client { permit { src { 127.0.0.0/8; }; }; };
`, state, at.Addr(), at.Port())
	if err := os.WriteFile(conf, []byte(text), 0o644); err != nil {
		t.Fatal(err)
	}
	// Without somebody behind /dev/log it does not take its configuration.
	log, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: state + "/log", Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { log.Close() })
	if err := os.Chmod(state+"/log", 0o777); err != nil {
		t.Fatal(err)
	}
	said := make(chan string, 1)
	go func() {
		all, b := "", make([]byte, 4096)
		for {
			n, err := log.Read(b)
			if err != nil {
				said <- all
				return
			}
			all += string(b[:n]) + "\n"
		}
	}()
	t.Cleanup(func() {
		log.Close()
		if all := <-said; t.Failed() {
			t.Logf("hpsockd's log:\n%s", all)
		}
	})
	// It goes into the background; the first process of the namespace has to
	// stay. Its own host's name must have an address.
	startServer(t, map[string]string{"hosts": "127.0.0.1 localhost " + hostname(t) + "\n", "nsswitch.conf": files["nsswitch.conf"]},
		[]netip.AddrPort{at}, "sh", "-c", `
mount -t tmpfs none /dev
mknod -m 666 /dev/null c 1 3
ln -s "$1" /dev/log
hpsockd -c "$2"
exec sleep infinity`, "sh", state+"/log", conf)
	return []netip.AddrPort{at}
}

func hostname(t *testing.T) string {
	t.Helper()
	name, err := os.Hostname()
	if err != nil {
		t.Fatal(err)
	}
	return name
}
