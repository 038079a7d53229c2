package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/tproxyd/tproxyd/internal/netns"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

const (
	farAt   = "203.0.113.100" // the server, as it is reached by the long way
	farTrip = 40 * time.Millisecond
	farMTU  = 1400
	tunName = "far0"
)

// farServer is a SOCKS server of the system that is measured from afar.
type farServer struct {
	name, program string
	port          int
	args          func(dir string) ([]string, error)
}

func farServers() []farServer {
	return []farServer{
		{"danted", "danted", 1180, func(dir string) ([]string, error) {
			conf := filepath.Join(dir, "danted.conf")
			text := "logoutput: /dev/null\ninternal: " + farAt + " port = 1180\nexternal: lo\nclientmethod: none\nsocksmethod: none\n" +
				"user.privileged: root\nuser.unprivileged: nobody\nclient pass { from: 0/0 to: 0/0 }\nsocks pass { from: 0/0 to: 0/0 }\n"
			return []string{"-f", conf}, os.WriteFile(conf, []byte(text), 0o600)
		}},
		{"microsocks", "microsocks", 1181, func(string) ([]string, error) { return []string{"-i", farAt, "-p", "1181"}, nil }},
	}
}

// far measures the time to the first byte with SOCKS servers that are 40 ms away.
func (b *bench) far(ctx context.Context) error {
	stop, err := b.lab.lengthen(udp)
	if err != nil {
		return err
	}
	defer stop()
	t := b.report.table(fmt.Sprintf("Time to the first byte in ms, one at a time, the SOCKS server %v away; without any proxy it is two round trips", farTrip),
		"", "p50", "round trips", "p99", "failed")
	for _, s := range farServers() {
		program, err := exec.LookPath(s.program)
		if err != nil {
			b.report.note("%s is not installed: no time to its first byte", s.name)
			continue
		}
		dir, err := os.MkdirTemp(b.dir, s.name)
		if err != nil {
			return err
		}
		args, err := s.args(dir)
		if err != nil {
			return err
		}
		server := exec.CommandContext(ctx, program, args...)
		server.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := b.lab.server.Do(server.Start); err != nil {
			return err
		}
		time.Sleep(300 * time.Millisecond) // it does not say when it is ready
		err = b.farRows(ctx, t, s)
		server.Process.Signal(syscall.SIGTERM) // danted has children
		server.Wait()
		if err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	t.end()
	return nil
}

// farRows measures one server in each way that it can be spoken to.
func (b *bench) farRows(ctx context.Context, t *table, s farServer) error {
	ways := []string{"", "pipeline=off", "pipeline=greeting", "pipeline=data"}
	if s.name == "microsocks" {
		ways = ways[:2] // it hangs on the others
	}
	for _, option := range ways {
		dir, err := os.MkdirTemp(b.dir, "far")
		if err != nil {
			return err
		}
		conf, err := configure(filepath.Join(dir, "etc"), fmt.Sprintf("SERVER s %s:%d %s\nSOCKD5 @=s *\n", farAt, s.port, option))
		if err != nil {
			return err
		}
		d, err := start(ctx, b.lab.gateways[udp], b.program, "serve", "-c", conf, "--log-level", "error")
		if err != nil {
			return err
		}
		to := udp.target(echoPort).String()
		_, err = load(ctx, b.lab.client, "load", "-kind", "connect", "-n", "1", "-to", to) // there was a flow
		time.Sleep(time.Second / 2)
		var r result
		if err == nil {
			r, err = load(ctx, b.lab.client, "load", "-kind", "connect", "-n", fmt.Sprint(b.size.rounds*7), "-to", to)
		}
		d.stop()
		if err != nil {
			return fmt.Errorf("%s: %w", option, err)
		}
		name := s.name
		if option != "" {
			name += ", " + option
		}
		t.row(name, r.P50.Seconds()*1e3, float64(r.P50)/float64(farTrip), r.P99.Seconds()*1e3, float64(r.Failed))
	}
	return nil
}

// lengthen adds a long way from a gateway to the server: what the gateway sends
// to farAt takes farTrip, what comes back nothing, so that a round trip is
// farTrip. Packets pass through this process.
func (l *lab) lengthen(w way) (stop func(), err error) {
	gateway, err := tun(l.gateways[w])
	if err != nil {
		return nil, err
	}
	server, err := tun(l.server)
	if err != nil {
		gateway.Close()
		return nil, err
	}
	stop = func() {
		gateway.Close()
		server.Close()
		l.server.Do(func() error { return forget("lo", farAt+"/32") }) // there may be another long way later
	}
	err = errors.Join(
		l.gateways[w].Do(func() error {
			link, err := netlink.LinkByName(tunName)
			if err != nil {
				return err
			}
			to, err := netlink.ParseIPNet(farAt + "/32")
			if err != nil {
				return err
			}
			local, err := netlink.ParseIPNet(w.wan(1) + "/32")
			if err != nil {
				return err
			}
			return netlink.RouteAdd(&netlink.Route{Dst: to, LinkIndex: link.Attrs().Index, Src: local.IP, Scope: netlink.SCOPE_LINK})
		}),
		l.server.Do(func() error { return address("lo", farAt+"/32") }),
	)
	if err != nil {
		stop()
		return nil, err
	}
	go delay(gateway, server, farTrip)
	return stop, nil
}

// tun makes a TUN device in a namespace and brings it up.
func tun(n *netns.Namespace) (f *os.File, err error) {
	err = n.Do(func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("/dev/net/tun: %w", err)
		}
		r, err := unix.NewIfreq(tunName)
		if err == nil {
			r.SetUint16(unix.IFF_TUN | unix.IFF_NO_PI)
			err = unix.IoctlIfreq(fd, unix.TUNSETIFF, r)
		}
		if err != nil {
			unix.Close(fd)
			return fmt.Errorf("TUNSETIFF: %w", err)
		}
		f = os.NewFile(uintptr(fd), tunName)
		link, err := netlink.LinkByName(tunName)
		if err != nil {
			return err
		}
		return errors.Join(netlink.LinkSetMTU(link, farMTU), netlink.LinkSetUp(link))
	})
	if err != nil && f != nil {
		f.Close()
	}
	return f, err
}

// delay moves packets from one device to another, each after d, until they are
// closed.
func delay(from, to *os.File, d time.Duration) {
	type packet struct {
		b   []byte
		due time.Time
	}
	queue := make(chan packet, 4096)
	go func() {
		for p := range queue {
			time.Sleep(time.Until(p.due))
			to.Write(p.b)
		}
	}()
	defer close(queue)
	for {
		b := make([]byte, farMTU)
		n, err := from.Read(b)
		if err != nil {
			return
		}
		queue <- packet{b[:n], time.Now().Add(d)}
	}
}
