package main

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os/user"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"github.com/tproxyd/tproxyd/pkg/flow"
)

// clientFlags say who a flow is from.
type clientFlags struct {
	src, inIf, mark, mac string
	uid, gid, cgroup     string
	program              string
}

func (w *clientFlags) flags(c *cobra.Command) {
	c.Flags().StringVar(&w.src, "src", "", "`ADDR` of the client")
	c.Flags().StringVar(&w.inIf, "if", "", "interface `IF` that the flow enters by")
	c.Flags().StringVar(&w.mac, "mac", "", "link-layer address `MAC` of the neighbour that it comes from")
	c.Flags().StringVar(&w.mark, "mark", "", "`MARK` of its packets, a hexadecimal number")
	c.Flags().StringVar(&w.uid, "uid", "", "`USER` of the process, a name or a number")
	c.Flags().StringVar(&w.gid, "gid", "", "`GROUP` of the process, a name or a number")
	c.Flags().StringVar(&w.cgroup, "cgroup", "", "`PATH` of the process's cgroup, as /system.slice/web.service")
	c.Flags().StringVar(&w.program, "program", "", "`FILE` that the process executes, as /usr/bin/ssh")
}

// unknownID is the number that no user and no group has.
const unknownID = 1<<32 - 1

// apply enters into a flow what was said of its client.
func (w *clientFlags) apply(f *flow.Flow) (err error) {
	f.InIf = w.inIf
	if w.src != "" {
		a, err := netip.ParseAddr(w.src)
		if err != nil {
			return fmt.Errorf("--src: %q is not an address", w.src)
		}
		f.Src = netip.AddrPortFrom(a.Unmap().WithZone(""), 0)
	}
	if w.mac != "" {
		mac, err := net.ParseMAC(w.mac)
		if err != nil || len(mac) != len(f.MAC) {
			return fmt.Errorf("--mac: %q is not an address as 00:00:5e:00:53:01", w.mac)
		}
		f.MAC = flow.MAC(mac)
	}
	if w.mark != "" {
		n, err := strconv.ParseUint(strings.TrimPrefix(strings.ToLower(w.mark), "0x"), 16, 32)
		if err != nil {
			return fmt.Errorf("--mark: %q is not a hexadecimal number, as 0x10", w.mark)
		}
		f.Mark = uint32(n)
	}
	f.Program = w.program
	if w.uid+w.gid+w.cgroup+w.program == "" {
		return nil
	}
	if w.inIf+w.mac != "" {
		return errors.New("a flow of a process of this host enters by no interface: --if and --mac do not go with --uid, --gid, --cgroup and --program")
	}
	if w.uid+w.gid+w.cgroup == "" {
		return nil
	}
	return w.process(&f.Owner)
}

// process enters what was said of the process.
func (w *clientFlags) process(o *flow.Owner) (err error) {
	*o = flow.Owner{Known: true, Cgroup: w.cgroup}
	if w.cgroup != "" && w.cgroup[0] != '/' {
		return fmt.Errorf("--cgroup: %q is not a path below /sys/fs/cgroup, as /system.slice/web.service", w.cgroup)
	}
	if o.UID, err = numberOf("--uid", w.uid, func() (string, error) {
		u, err := user.Lookup(w.uid)
		if err != nil {
			return "", err
		}
		return u.Uid, nil
	}); err != nil {
		return err
	}
	o.GID, err = numberOf("--gid", w.gid, func() (string, error) {
		g, err := user.LookupGroup(w.gid)
		if err != nil {
			return "", err
		}
		return g.Gid, nil
	})
	return err
}

// numberOf returns the number that a word is, or that look finds for it.
func numberOf(flag, word string, look func() (string, error)) (uint32, error) {
	if word == "" {
		return unknownID, nil
	}
	if n, err := strconv.ParseUint(word, 10, 32); err == nil {
		return uint32(n), nil
	}
	s, err := look()
	if err != nil {
		return 0, fmt.Errorf("%s: this host has no %q", flag, word)
	}
	n, err := strconv.ParseUint(s, 10, 32)
	return uint32(n), err
}
