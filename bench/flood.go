package main

import (
	"context"
	"fmt"
	"net/netip"
	"runtime"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// flood sends n datagrams of one flow to who does not read them, and takes the
// processor time that it spent. All that becomes of a datagram as far as the
// queue where it ends happens inside the sender's call (veth queues nothing), so
// that is what the whole way costs, whatever else the machine does.
func flood(to string, n int) (r result, err error) {
	addr, err := netip.ParseAddrPort(to)
	if err != nil {
		return r, err
	}
	fd, err := openUDP(0)
	if err != nil {
		return r, err
	}
	defer unix.Close(fd)
	if err := unix.Connect(fd, &unix.SockaddrInet4{Port: int(addr.Port()), Addr: addr.Addr().As4()}); err != nil {
		return r, fmt.Errorf("connect: %w", err)
	}
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	b, data := newBatch(false), make([]byte, udpSmall)
	for i := range batchSize {
		b.put(i, data)
	}
	b.send(fd, 1) // finds the neighbours
	began := time.Now()
	before, err := spent()
	if err != nil {
		return r, err
	}
	for ; r.Sent < n; r.Sent += batchSize {
		b.send(fd, batchSize)
	}
	after, err := spent()
	r.Elapsed, r.Spent = time.Since(began), after-before
	return r, err
}

// spent is the processor time of the calling thread.
func spent() (time.Duration, error) {
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_THREAD, &u); err != nil {
		return 0, fmt.Errorf("getrusage: %w", err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano()), nil
}

// track has connections tracked in the namespace of the calling thread: one rule
// that asks for the state of a packet is enough.
func track() error {
	nft, err := nftables.New()
	if err != nil {
		return err
	}
	table := nft.AddTable(&nftables.Table{Family: nftables.TableFamilyIPv4, Name: "track"})
	chain := nft.AddChain(&nftables.Chain{
		Name: "forward", Table: table, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter,
	})
	nft.AddRule(&nftables.Rule{Table: table, Chain: chain, Exprs: []expr.Any{
		&expr.Ct{Key: expr.CtKeySTATE, Register: 1},
		&expr.Verdict{Kind: expr.VerdictAccept},
	}})
	if err := nft.Flush(); err != nil {
		return fmt.Errorf("nftables: %w", err)
	}
	return nil
}

// forwarded compares what the kernel spends on a datagram that it forwards.
func (b *bench) forwarded(ctx context.Context, t *table, rounds int) error {
	all, err := b.interleaved(ctx, []way{plain, tracked, direct}, rounds, discardPort,
		"load", "-kind", "flood", "-n", fmt.Sprint(b.size.flood))
	if err != nil {
		return err
	}
	// The least of the runs: others can only add to it.
	us := func(w way) float64 {
		return over(all[w], func(s sample) float64 { return s.Spent.Seconds() * 1e6 / float64(s.Sent) }).low
	}
	x, y := us(plain), us(direct)
	t.row("a datagram of 64 bytes, CPU us, least", x, us(tracked), y, x/y, 0.)
	return nil
}
