package netns_test

import (
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"
)

// password is what the SOCKS users of the tests have, and passwordHash what
// the system keeps of it.
const (
	password     = "correct horse"
	passwordHash = "$6$rounds=1000$tproxydlab$DwUUaDpAY2FSYVsVxQ9rzdsA1YPETT6Q5A5.13tf821ysGK6LMKUmlkchR/WT6W4AnBuW/xBQrFgyuKmAXcA2."
)

// danted is Debian's Dante server on a host.
type danted struct {
	*process
	logFile string
}

// openDante is a danted.conf that lets everybody do everything: listening on
// the addresses of internal, leaving from those of external. Whoever is told of
// a UDP socket of it may send to it.
func openDante(internal, external []string) string {
	return danteConf(internal, external, "none", `
udp.connectdst: no
client pass { from: 0/0 to: 0/0 log: connect error }
socks pass { from: 0/0 to: 0/0 log: connect error }`)
}

// danteConf puts the head in front of the rules.
func danteConf(internal, external []string, method, rules string) string {
	var b strings.Builder
	for _, a := range internal {
		fmt.Fprintf(&b, "internal: %s port = 1080\n", a)
	}
	for _, a := range external {
		fmt.Fprintf(&b, "external: %s\n", a)
	}
	fmt.Fprintf(&b, "clientmethod: none\nsocksmethod: %s\nuser.privileged: root\nuser.unprivileged: nobody\n", method)
	return b.String() + rules + "\n"
}

// startDanted starts danted on the host and waits until it answers at addr.
func startDanted(t testing.TB, h *host, addr, conf string) *danted {
	t.Helper()
	log := h.dir + "/danted.log"
	path := h.file(t, "danted.conf", "logoutput: "+log+"\n"+conf, 0o644)
	p := h.start(t, command{args: []string{tool(t, "danted"), "-f", path}, alone: true})
	d := &danted{process: p, logFile: log}
	waitPort(t, h, addr, func() string { return p.output() + d.log() })
	return d
}

// log is what danted has logged so far.
func (d *danted) log() string {
	b, _ := os.ReadFile(d.logFile)
	return string(b)
}

// startMicrosocks starts microsocks on the host, for both families.
func startMicrosocks(t testing.TB, h *host, addr string) *process {
	t.Helper()
	p := h.start(t, command{args: []string{tool(t, "microsocks"), "-i", "::", "-p", "1080"}})
	waitPort(t, h, addr, p.output)
	return p
}

// waitPort waits until something accepts on the host's own address.
func waitPort(t testing.TB, h *host, addr string, why func() string) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		c, err := h.dial("tcp", addr, time.Second)
		if err == nil {
			c.Close()
			return
		}
		if time.Now().After(end) {
			t.Fatalf("%s: nothing listens on %s: %v\n%s", h.name, addr, err, why())
		}
	}
}

// startHpsockd starts HP's server for the gateway, in IPv4 alone: listening on one
// address, leaving from another, without authentication, with flags of its daemon
// and with rules before that which permits all. It carries datagrams only of
// clients that name their own address and port.
func startHpsockd(t testing.TB, h *host, internal, external, flags, rules string) *process {
	t.Helper()
	name, err := os.Hostname()
	h.must(t, err)
	h.replace(t, "/etc/hosts", "127.0.0.1 localhost "+name+"\n", 0o644) // it wants its own name's address
	state := h.dir + "/hpsockd"
	h.must(t, os.Mkdir(state, 0o777))
	h.must(t, os.Chmod(state, 0o777)) // it gives up root before it writes there
	conf := h.file(t, "hpsockd.conf", fmt.Sprintf(`daemon {
	directory "%s";
	negotiate-file "negotiate";
	listen-address { %s; };
	port 1080;
	user "nobody";
	flags { %s };
};
route { { default %s; }; };
method-list {
	{ number 0; name "noAuth"; internal; flags 0; };
	{ number 254; name "v4"; internal; flags 0; };
};
client-method { { src { %s/32; }; method { "noAuth"; "v4"; }; }; };
client { %s permit { src { %s/32; }; }; };
`, state, internal, flags, external, wanAt, rules, wanAt), 0o644)
	// Without somebody behind /dev/log it does not take its configuration.
	log, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: state + "/log", Net: "unixgram"})
	h.must(t, err)
	t.Cleanup(func() { log.Close() })
	h.must(t, os.Chmod(state+"/log", 0o777))
	var said buffer
	go func() {
		b := make([]byte, 4096)
		for {
			n, err := log.Read(b)
			if err != nil {
				return
			}
			said.Write(append(b[:n], '\n'))
		}
	}()
	// It goes into the background, and ends with the namespace.
	p := h.start(t, command{alone: true, args: []string{tool(t, "unshare"), "-m", "/bin/sh", "-c", `
mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && ln -s "$1" /dev/log && "$2" -c "$3" && exec sleep infinity`,
		"sh", state + "/log", tool(t, "hpsockd"), conf}})
	waitPort(t, h, internal+":1080", func() string { return p.output() + said.String() })
	return p
}
