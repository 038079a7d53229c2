package redirect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/mdlayher/netlink"
	"github.com/tproxyd/tproxyd/pkg/flow"
	"golang.org/x/sys/unix"
)

// Which program a packet is from the kernel cannot tell. So user space looks, for
// each flow of this host: sock_diag(7) knows the socket by its addresses, and /proc
// who has that open.

// programs finds them. It has a socket of its own, as notebook has.
type programs struct {
	search func(named []string) (map[uint64]string, error)

	diagMu sync.Mutex
	diag   *nfnl // nil: see err
	err    error

	mu    sync.Mutex
	last  search
	known map[uint64]known // by a socket's inode
}

// search is a look at all processes.
type search struct {
	at    time.Time // when it began
	names string    // that were looked for
	found map[uint64]string
}

// known is what was found of a socket.
type known struct {
	program string // as it was named; empty: none of those
	names   string
	at      time.Time
}

// Bounds of what is remembered of sockets. The kernel numbers them on and on, so it is
// wrong only of one that another program was given in this time.
const (
	knownSockets = 4096
	knownTime    = 5 * time.Second
)

func dialPrograms(search func(named []string) (map[uint64]string, error)) *programs {
	if search == nil {
		search = SearchPrograms
	}
	c, err := dialNetlink(unix.NETLINK_SOCK_DIAG)
	return &programs{search: search, diag: c, err: err, known: map[uint64]known{}}
}

func (p *programs) close() {
	if p == nil {
		return
	}
	p.diagMu.Lock()
	defer p.diagMu.Unlock()
	if p.diag != nil {
		p.diag.close()
		p.diag, p.err = nil, net.ErrClosed
	}
}

// MayFindPrograms tells whether this process can look at those of everybody: it takes
// CAP_SYS_PTRACE. (And no landlock domain, which a process cannot ask for.)
func MayFindPrograms() bool {
	var have [2]unix.CapUserData
	err := unix.Capget(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &have[0])
	return err == nil && have[0].Effective&(1<<unix.CAP_SYS_PTRACE) != 0
}

// Program completes a flow of this host that was diverted by its Program: the first
// of those named, each by its path or the last part of it, that has the flow's socket
// open. It stays empty if none of them has it, or nobody has it any longer. Of
// processes that this one may not look at nothing is known.
//
// It costs a look at each process, and at the descriptors of those that execute what
// is named. Calls at the same time share one search.
func (r *Redirect) Program(f *flow.Flow, named []string) error {
	asked := time.Now()
	p, names := r.programs, strings.Join(named, " ")
	inode, err := p.socket(f)
	if err != nil || inode == 0 {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if k, ok := p.known[inode]; ok && k.names == names && asked.Sub(k.at) < knownTime {
		f.Program = k.program
		return nil
	}
	if p.last.names != names || p.last.at.Before(asked) {
		at := time.Now()
		found, err := p.search(named)
		if err != nil {
			return fmt.Errorf("redirect: which program a flow is from: %w", err)
		}
		p.last = search{at, names, found}
	}
	if len(p.known) >= knownSockets {
		clear(p.known)
	}
	f.Program = p.last.found[inode]
	p.known[inode] = known{f.Program, names, p.last.at}
	return nil
}

// Structures of sock_diag(7): struct inet_diag_req_v2, struct inet_diag_msg.
const (
	diagByFamily  = 20
	diagReqSize   = 56
	diagMsgSize   = 72
	diagInode     = 68 // in the answer
	diagIDOffset  = 8  // in the question: sport, dport, src, dst, interface, cookie
	diagNoCookie  = 1<<32 - 1
	diagAllStates = 1<<32 - 1
)

// socket returns the inode of a flow's socket; 0: there is none any longer, or no
// process has it.
func (p *programs) socket(f *flow.Flow) (inode uint64, err error) {
	local, remote := f.Src, f.Dst
	proto := byte(unix.IPPROTO_TCP)
	if f.Network == flow.UDP {
		proto = unix.IPPROTO_UDP
		local, remote = remote, local // "swapped for historical reasons", says the kernel
	}
	family := byte(unix.AF_INET)
	if !f.Dst.Addr().Unmap().Is4() {
		family = unix.AF_INET6
	}
	b := make([]byte, diagReqSize)
	b[0], b[1] = family, proto
	binary.NativeEndian.PutUint32(b[4:], diagAllStates)
	id := b[diagIDOffset:]
	binary.BigEndian.PutUint16(id, local.Port())
	binary.BigEndian.PutUint16(id[2:], remote.Port())
	copy(id[4:20], local.Addr().Unmap().AsSlice())
	copy(id[20:36], remote.Addr().Unmap().AsSlice())
	binary.NativeEndian.PutUint32(id[40:], diagNoCookie)
	binary.NativeEndian.PutUint32(id[44:], diagNoCookie)
	p.diagMu.Lock()
	defer p.diagMu.Unlock()
	if p.diag == nil {
		return 0, p.err
	}
	err = p.diag.exchange(netlink.Message{Header: netlink.Header{Type: diagByFamily}, Data: b}, false, func(data []byte) error {
		if len(data) >= diagMsgSize {
			inode = uint64(binary.NativeEndian.Uint32(data[diagInode:]))
		}
		return nil
	})
	if errors.Is(err, unix.ENOENT) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("redirect: whose socket a flow is of: %w", err)
	}
	return inode, nil
}

// SearchPrograms returns the sockets that processes have open which execute one of the
// programs, by their inodes, with the program as it was named. Of processes that this
// one may not look at there are none.
func SearchPrograms(named []string) (map[uint64]string, error) {
	proc, err := os.Open("/proc")
	if err != nil {
		return nil, err
	}
	defer proc.Close()
	pids, err := proc.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	paths := make([]string, len(named)) // what a process that executes it is shown with
	for i, n := range named {
		paths[i] = n
		if real, err := filepath.EvalSymlinks(n); err == nil && path.IsAbs(n) {
			paths[i] = real
		}
	}
	found := map[uint64]string{}
	for _, pid := range pids {
		if pid[0] < '0' || pid[0] > '9' {
			continue
		}
		exe, err := os.Readlink("/proc/" + pid + "/exe")
		if err != nil {
			continue // gone, of the kernel, or not for us
		}
		exe = strings.TrimSuffix(exe, " (deleted)") // by an upgrade
		i := slices.IndexFunc(paths, func(p string) bool { return p == exe || p == path.Base(exe) })
		if i < 0 {
			continue
		}
		dir := "/proc/" + pid + "/fd"
		fds, err := os.Open(dir)
		if err != nil {
			continue
		}
		names, _ := fds.Readdirnames(-1)
		fds.Close()
		for _, fd := range names {
			link, err := os.Readlink(dir + "/" + fd)
			number, isSocket := strings.CutPrefix(link, "socket:[")
			if n, e := strconv.ParseUint(strings.TrimSuffix(number, "]"), 10, 64); err == nil && isSocket && e == nil {
				found[n] = named[i]
			}
		}
	}
	return found, nil
}
