package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"syscall"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// What the bare relay needs of the kernel.
const (
	splicePort  = 12345
	spliceMark  = 0x77
	spliceTable = 177
)

// spliceRole is the yardstick: it takes every TCP flow that enters by lan0,
// dials where it wanted to go, and lets the kernel move the bytes. No SOCKS, no
// names, no rules, no limits. It ends with its standard input.
func spliceRole(_ []string, out io.Writer) error {
	lc := net.ListenConfig{Control: func(_, _ string, c syscall.RawConn) (err error) {
		cerr := c.Control(func(fd uintptr) {
			err = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_TRANSPARENT, 1)
		})
		if cerr != nil {
			return cerr
		}
		return err
	}}
	ln, err := lc.Listen(context.Background(), "tcp4", fmt.Sprintf("127.0.0.1:%d", splicePort))
	if err != nil {
		return err
	}
	go accept(ln, func(c net.Conn) {
		server, err := net.Dial("tcp4", c.LocalAddr().String())
		if err != nil {
			c.Close()
			return
		}
		relaySplicing(c.(*net.TCPConn), server.(*net.TCPConn))
	})
	return untilEOF(out)
}

// divert sets the bare relay's rules in the namespace of the calling thread:
//
//	chain prerouting { type filter hook prerouting priority mangle
//	  iifname lan0 tcp socket transparent 1 mark set 0x77 accept
//	  iifname lan0 tcp mark set 0x77 tproxy ip to 127.0.0.1:12345 accept }
//	ip rule fwmark 0x77 lookup 177; ip route local default dev lo table 177
func divert() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	rule := netlink.NewRule()
	rule.Family, rule.Priority, rule.Table, rule.Mark = unix.AF_INET, spliceTable, spliceTable, spliceMark
	if err := netlink.RuleAdd(rule); err != nil {
		return fmt.Errorf("ip rule: %w", err)
	}
	_, all, err := net.ParseCIDR("0.0.0.0/0")
	if err != nil {
		return err
	}
	if err := netlink.RouteAdd(&netlink.Route{
		Dst: all, LinkIndex: lo.Attrs().Index, Table: spliceTable, Type: unix.RTN_LOCAL, Scope: netlink.SCOPE_HOST,
	}); err != nil {
		return fmt.Errorf("ip route: %w", err)
	}

	nft, err := nftables.New()
	if err != nil {
		return err
	}
	table := nft.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "splice"})
	chain := nft.AddChain(&nftables.Chain{
		Name: "prerouting", Table: table, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookPrerouting, Priority: nftables.ChainPriorityMangle,
	})
	var mark, port, name = make([]byte, 4), make([]byte, 2), make([]byte, 16)
	binary.NativeEndian.PutUint32(mark, spliceMark)
	binary.BigEndian.PutUint16(port, splicePort)
	copy(name, "lan0")
	entered := []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: name},
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.IPPROTO_TCP}},
	}
	marked := []expr.Any{
		&expr.Immediate{Register: 1, Data: mark},
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: 1},
	}
	accepted := []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}}
	add := func(parts ...[]expr.Any) {
		var all []expr.Any
		for _, p := range parts {
			all = append(all, p...)
		}
		nft.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: all})
	}
	add(entered, []expr.Any{
		&expr.Socket{Key: expr.SocketKeyTransparent, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{1}},
	}, marked, accepted)
	add(entered, marked, []expr.Any{
		&expr.Immediate{Register: 1, Data: []byte{127, 0, 0, 1}},
		&expr.Immediate{Register: 2, Data: port},
		&expr.TProxy{Family: unix.NFPROTO_IPV4, TableFamily: unix.NFPROTO_IPV4, RegAddr: 1, RegPort: 2},
	}, accepted)
	if err := nft.Flush(); err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	return nil
}
