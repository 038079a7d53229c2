package relay

import (
	"context"
	"os"
	"slices"
	"sync"

	"github.com/tproxyd/tproxyd/pkg/flow"
	"golang.org/x/sys/unix"
)

// detachBatches bounds what Detach reads of one source: what came before the
// flows had their sockets, and not what keeps coming.
const detachBatches = 1024

// Detach has the UDP stop reading its sources, which somebody else goes on
// reading, while the flows that there are go on: each gets a socket of its own, so
// that the client's next datagram comes to it still. What was sent before and
// belongs to none is returned, for [UDP.Inject] of whoever reads the sources now,
// one list for each of UDPOptions.Sources. A flow for which there is no socket
// ends for its client, who begins anew with the other one; what its outlet still
// receives is delivered.
func (u *UDP) Detach() [][]flow.Datagram {
	rest := make([][]flow.Datagram, len(u.shards))
	u.each(func(i int, sh *shard) { rest[i] = sh.letGo() })
	return rest
}

// Attach ends Detach, or UDPOptions.Paused: the sources are read.
func (u *UDP) Attach() {
	u.each(func(_ int, sh *shard) {
		for _, src := range sh.sources {
			src.Control(func(fd int) error {
				if e := sh.register(fd, ref{source: src}); e != 0 {
					u.lost(os.NewSyscallError("epoll_ctl", e))
				}
				return nil
			})
		}
	})
}

// Watch returns an error as soon as one of the sources is not read any more, since
// that has failed, and nil when ctx ends. One caller is told.
func (u *UDP) Watch(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return nil
	case err := <-u.losses:
		return err
	}
}

// lost has Watch tell of a source that is not read.
func (u *UDP) lost(err error) {
	u.log.Error("datagrams are not received", "err", err)
	select {
	case u.losses <- err:
	default: // there is an earlier one
	}
}

// Inject carries datagrams as if they had come from the sources.
func (u *UDP) Inject(lists [][]flow.Datagram) {
	u.each(func(i int, sh *shard) {
		if i >= len(lists) {
			return
		}
		for k := range lists[i] {
			d := &lists[i][k]
			src := sh.sources[0]
			if !d.Src.Addr().Unmap().Is4() {
				src = sh.sources[len(sh.sources)-1]
			}
			sh.up(sh.find(src, d), [][]byte{d.Data})
		}
	})
}

// each has every loop call f, and waits for it. A loop that has ended does not.
func (u *UDP) each(f func(i int, sh *shard)) {
	var done sync.WaitGroup
	for i, sh := range u.shards {
		done.Add(1)
		if !sh.post(func() { defer done.Done(); f(i, sh) }) {
			done.Done()
		}
	}
	done.Wait()
}

func (sh *shard) letGo() (rest []flow.Datagram) {
	for l := range sh.lists {
		if l == &sh.brief {
			continue
		}
		var before *udpFlow
		for f := l.last; f != nil; f = before { // those first that are used
			before = f.links[l.which].prev
			switch {
			case f.out == nil:
				sh.closeFlow(f) // it leads nowhere, and is decided anew
			case f.fd < 0 && !f.noSocket:
				sh.openSocket(f)
			}
		}
	}
	for _, src := range sh.sources {
		src.Control(func(fd int) error {
			sh.forget(fd)
			sh.control(unix.EPOLL_CTL_DEL, int32(fd), 0, 0)
			return nil
		})
		for range detachBatches {
			n, err := src.TryReadBatch(sh.batch[:])
			if n == 0 || err != nil {
				break
			}
			for i := range sh.batch[:n] {
				d := &sh.batch[i]
				if f := sh.flows[flowKey{d.Src, d.Dst}]; f != nil {
					sh.up(f, [][]byte{d.Data})
				} else {
					rest = append(rest, flow.Datagram{Data: slices.Clone(d.Data), Src: d.Src, Dst: d.Dst, IfIndex: d.IfIndex})
				}
			}
		}
	}
	return rest
}
