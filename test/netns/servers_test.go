package netns_test

import (
	"fmt"
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
