package daemon

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
)

// inNamespace is set in the process that the tests run in.
const inNamespace = "TPROXYD_TEST_IN_NAMESPACE"

// TestMain runs the tests in a process that was born in a network namespace of
// its own, so that whichever thread the daemon does its work on, it is there:
//
//	this host (the daemon and its clients)
//	  lo    127.0.0.1 the SOCKS server and what is behind it
//	  wan0  192.0.2.1/24, the way to everywhere, where nobody is
func TestMain(m *testing.M) {
	code, err := 0, error(nil)
	if os.Getenv(inNamespace) == "" {
		code, err = reborn()
	} else if err = network(); err == nil {
		code = m.Run()
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "a network namespace for the tests, which need root:", err)
		code = 1
	}
	os.Exit(code)
}

// reborn runs this program again in a new namespace.
func reborn() (int, error) {
	c := exec.Command("/proc/self/exe", os.Args[1:]...)
	c.Env = append(os.Environ(), inNamespace+"=1")
	c.Stdout, c.Stderr = os.Stdout, os.Stderr
	c.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	var exit *exec.ExitError
	if err := c.Run(); !errors.As(err, &exit) {
		return 0, err
	}
	return exit.ExitCode(), nil
}

func network() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	// No link-local address shall turn up in the middle of a test.
	if err := os.WriteFile("/proc/sys/net/ipv6/conf/default/disable_ipv6", []byte("1"), 0); err != nil {
		return err
	}
	wan := &netlink.Veth{LinkAttrs: netlink.LinkAttrs{Name: "wan0"}, PeerName: "nobody"}
	if err := errors.Join(netlink.LinkSetUp(lo), netlink.LinkAdd(wan)); err != nil {
		return err
	}
	peer, err := netlink.LinkByName("nobody")
	if err != nil {
		return err
	}
	addr, err := netlink.ParseAddr("192.0.2.1/24")
	if err != nil {
		return err
	}
	return errors.Join(
		netlink.AddrAdd(wan, addr), netlink.LinkSetUp(wan), netlink.LinkSetUp(peer),
		netlink.RouteAdd(&netlink.Route{Gw: net.IPv4(192, 0, 2, 254)}),
	)
}
