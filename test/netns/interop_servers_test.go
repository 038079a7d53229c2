package netns_test

import (
	"bytes"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The servers of the interop table: how Debian's programs are told to listen at
// port 1080 of a site, to leave from its other addresses, and to deny
// 203.0.113.81 or its port 7666 if they can deny anything.

// site is a machine for a server.
type site struct {
	*host
	at  string   // where the server listens
	out []string // what the outside sees of it, IPv4 first
}

// sites returns the machines that the world has for servers.
func (w *world) sites() (one, two *site) {
	return &site{w.socks1, socks1At, []string{socks1Out, socks1Out6}}, &site{w.socks2, socks2At, []string{socks2Out, socks2Out6}}
}

// asUser is a command line that needs no privilege, for the user that host.user
// adds. It is to be run alone.
func asUser(t testing.TB, args ...string) []string {
	return append([]string{tool(t, "setpriv"), "--reuid=65001", "--regid=65534", "--clear-groups", "--"}, args...)
}

// interopPassword is of the user int. It has no blank, which tinyproxy cannot
// read. interopPasswordHash is what the system keeps of it.
const (
	interopPassword     = "correct-horse"
	interopPasswordHash = "$6$tproxydlab$nLra0rCC3szXicKqQ9u/lDndxbbkfsgZtu67bAzlGIQ93v2XGDK.HmZs/29r6BDV6jviYFvZRun51L.nx5NgR0"
)

// interopDante starts danted with a method for all.
func interopDante(method string) func(testing.TB, *site) *process {
	return func(t testing.TB, s *site) *process {
		if method == "username" {
			s.user(t, "int", interopPasswordHash)
		}
		return startDanted(t, s.host, s.at+":1080",
			danteConf([]string{s.at}, s.out, method, `
client pass { from: 0/0 to: 0/0 }
socks block { from: 0/0 to: 0/0 port = 7666 }
socks pass { from: 0/0 to: 0/0 }`)).process
	}
}

// interopMicrosocks starts microsocks, open or for the user of the tests.
func interopMicrosocks(args ...string) func(testing.TB, *site) *process {
	return func(t testing.TB, s *site) *process {
		p := s.start(t, command{args: append([]string{tool(t, "microsocks"), "-i", s.at, "-p", "1080"}, args...)})
		waitPort(t, s.host, s.at+":1080", p.output)
		return p
	}
}

// interopHpsockd starts hpsockd, which is for the gateway alone.
func interopHpsockd(flags string) func(testing.TB, *site) *process {
	return func(t testing.TB, s *site) *process {
		return startHpsockd(t, s.host, s.at, s.out[0], flags, "deny connect { src { "+wanAt+"/32; }; port { 7666; }; };")
	}
}

// interopSSH starts an sshd on the loopback of a site and an ssh -D there that
// is logged in with keys made for the test. The process is the client's.
func interopSSH(t testing.TB, s *site) *process {
	t.Helper()
	s.user(t, "tunnel", passwordHash)
	for _, key := range []string{"host", "user"} {
		s.run(t, command{args: []string{tool(t, "ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", key}}).ok(t)
		s.must(t, os.Chown(s.dir+"/"+key, 65001, 65534))
	}
	public := func(key string) string {
		b, err := os.ReadFile(s.dir + "/" + key + ".pub")
		s.must(t, err)
		return string(b)
	}
	s.file(t, "authorized", public("user"), 0o644)
	s.file(t, "known", "[127.0.0.1]:2222 "+public("host"), 0o644)
	conf := s.file(t, "sshd_config", fmt.Sprintf(`ListenAddress 127.0.0.1:2222
HostKey %[1]s/host
AuthorizedKeysFile %[1]s/authorized
PidFile none
StrictModes no
UsePAM no
AuthenticationMethods publickey
PermitOpen *:7 *:9 *:53 *:80 *:81 *:1080 *:7000 *:7001
`, s.dir), 0o644)
	d := s.start(t, command{args: asUser(t, tool(t, "sshd"), "-D", "-e", "-f", conf), alone: true})
	waitPort(t, s.host, "127.0.0.1:2222", d.output)
	c := s.start(t, command{args: asUser(t, tool(t, "ssh"), "-N", "-F", "none", "-D", s.at+":1080", "-p", "2222",
		"-i", s.dir+"/user", "-o", "UserKnownHostsFile="+s.dir+"/known", "-o", "BatchMode=yes",
		"-o", "ExitOnForwardFailure=yes", "tunnel@127.0.0.1"), alone: true})
	waitPort(t, s.host, s.at+":1080", func() string { return c.output() + d.output() })
	return c
}

// interopShadowsocks starts an ss-server on the loopback of a site and before
// it an ss-local, whose process it returns.
func interopShadowsocks(t testing.TB, s *site) *process {
	t.Helper()
	acl := s.file(t, "acl", "[outbound_block_list]\n203.0.113.81/32\n", 0o644)
	common := []string{"-s", "127.0.0.1", "-p", "8388", "-k", password, "-m", "chacha20-ietf-poly1305", "-u"}
	server := s.start(t, command{args: append(asUser(t, tool(t, "ss-server"), "--acl", acl), common...), alone: true})
	waitPort(t, s.host, "127.0.0.1:8388", server.output)
	c := s.start(t, command{args: append(asUser(t, tool(t, "ss-local"), "-b", s.at, "-l", "1080"), common...), alone: true})
	waitPort(t, s.host, s.at+":1080", func() string { return c.output() + server.output() })
	return c
}

// interopAccounts is the user of the tests for v2ray.
const interopAccounts = `"accounts": [{ "user": "int", "pass": "` + interopPassword + `" }]`

// interopV2ray starts v2ray with an inbound of this protocol and settings.
func interopV2ray(protocol, settings string) func(testing.TB, *site) *process {
	return func(t testing.TB, s *site) *process { return startV2ray(t, s, protocol, settings, "{}") }
}

// interopV2rayTLS is interopV2ray behind TLS, with a certificate for
// proxy.example in tls.crt of the site that is its own authority.
func interopV2rayTLS(protocol, settings string) func(testing.TB, *site) *process {
	return func(t testing.TB, s *site) *process {
		cert, crt := certificate(t, "proxy.example")
		key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
		s.must(t, err)
		private := string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: key}))
		return startV2ray(t, s, protocol, settings, fmt.Sprintf(
			`{ "security": "tls", "tlsSettings": { "certificates": [{ "certificateFile": %q, "keyFile": %q }] } }`,
			s.file(t, "tls.crt", crt, 0o644), s.file(t, "tls.key", private, 0o644)))
	}
}

func startV2ray(t testing.TB, s *site, protocol, settings, stream string) *process {
	t.Helper()
	conf := s.file(t, "v2ray.json", fmt.Sprintf(`{
	"log": { "loglevel": "warning" },
	"inbounds": [{ "listen": %q, "port": 1080, "protocol": %q, "settings": { %s }, "streamSettings": %s }],
	"outbounds": [
		{ "protocol": "freedom" },
		{ "protocol": "blackhole", "tag": "denied" }
	],
	"routing": { "rules": [{ "type": "field", "port": "7666", "outboundTag": "denied" }] }
}`, s.at, protocol, settings, stream), 0o644)
	p := s.start(t, command{args: asUser(t, tool(t, "v2ray"), "-config", conf), alone: true})
	waitPort(t, s.host, s.at+":1080", p.output)
	return p
}

// interopTinyproxy starts tinyproxy with more lines of configuration.
func interopTinyproxy(lines string) func(testing.TB, *site) *process {
	return func(t testing.TB, s *site) *process {
		filter := s.file(t, "filter", "^203\\.0\\.113\\.81$\n", 0o644)
		conf := s.file(t, "tinyproxy.conf", fmt.Sprintf("Listen %s\nPort 1080\nFilter %q\n%s\n", s.at, filter, lines), 0o644)
		p := s.start(t, command{args: asUser(t, tool(t, "tinyproxy"), "-d", "-c", conf), alone: true})
		waitPort(t, s.host, s.at+":1080", p.output)
		return p
	}
}

// distance is how long a packet to a server that is far, or from it, takes.
const distance = 10 * time.Millisecond

// away puts the site at a distance from the rest of the world: in the place of
// its cable come two devices, between which the frames wait.
func (w *world) away(t testing.TB, s *site, name string, addrs ...string) {
	t.Helper()
	w.net.ip(t, "link delete "+name)
	near, far := w.net.tap(t, name), s.tap(t, "wan0")
	go carryFrames(near, far)
	go carryFrames(far, near)
	w.address(t, s.host, name, addrs...)
}

// tap makes a network device of the machine of which the test is the cable.
func (h *host) tap(t testing.TB, name string) *os.File {
	t.Helper()
	var fd int
	h.must(t, h.in(func() (err error) {
		if fd, err = unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0); err != nil {
			return fmt.Errorf("/dev/net/tun: %w", err)
		}
		r, err := unix.NewIfreq(name)
		if err != nil {
			return err
		}
		r.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI)
		if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, r); err != nil {
			return fmt.Errorf("TUNSETIFF: %w", err)
		}
		return nil
	}))
	f := os.NewFile(uintptr(fd), name)
	t.Cleanup(func() { f.Close() })
	h.ip(t, "link set "+name+" up")
	return f
}

// carryFrames carries what comes from one device to another one, in order and
// late, until one of them is closed.
func carryFrames(from, to *os.File) {
	type frame struct {
		b   []byte
		due time.Time
	}
	queue := make(chan frame, 4096)
	defer close(queue)
	go func() {
		for f := range queue {
			time.Sleep(time.Until(f.due))
			to.Write(f.b)
		}
	}()
	b := make([]byte, 1<<16)
	for {
		n, err := from.Read(b)
		if err != nil {
			return
		}
		queue <- frame{bytes.Clone(b[:n]), time.Now().Add(distance)}
	}
}
