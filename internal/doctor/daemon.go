package doctor

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/tproxyd/tproxyd/internal/control"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// running is what a daemon tells of itself, and the kernel of it. Nil: there is
// none.
type running struct {
	pid    int
	status struct {
		DNS struct {
			Pool struct {
				StoreErrors uint64 `json:"store_errors"`
				Full        uint64 `json:"full"`
			} `json:"pool"`
		} `json:"dns"`
		Relay struct {
			Refused uint64 `json:"refused"`
		} `json:"relay"`
		Kernel struct {
			Healed map[string]uint64 `json:"healed"`
		} `json:"kernel"`
	}
	flows []struct {
		Client netip.AddrPort `json:"client"`
		Name   string         `json:"name"`
	}
}

// daemonAt asks the daemon behind a control socket.
func daemonAt(ctx context.Context, socket string) *running {
	if socket == "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	c := control.NewClient(socket)
	b, err := c.Status(ctx)
	if err != nil {
		return nil
	}
	d := &running{pid: peer(socket)}
	json.Unmarshal(b, &d.status) // of a later version perhaps: what is missing is zero
	if b, err := c.Flows(ctx); err == nil {
		json.Unmarshal(b, &d.flows)
	}
	return d
}

// peer returns the process behind a socket; 0: it is not known.
func peer(socket string) (pid int) {
	c, err := net.DialTimeout("unix", socket, time.Second)
	if err != nil {
		return 0
	}
	defer c.Close()
	raw, err := c.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0
	}
	raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			pid = int(cred.Pid)
		}
	})
	return pid
}

// oftenHealed is how many changes by others are no accident any more.
const oftenHealed = 10

// findings are what the daemon has met with since its start.
func (d *running) findings() (list []Finding) {
	if d == nil {
		return nil
	}
	healed := uint64(0)
	for _, n := range d.status.Kernel.Healed {
		healed += n
	}
	if healed > oftenHealed {
		list = append(list, Finding{"healed", fmt.Sprintf("somebody else has changed our table, routing rules or routes %d times since the start", healed), "each time flows are refused for a moment", "find who flushes them: firewall reloads, network managers; nft monitor and ip monitor show it"})
	}
	if n := d.status.DNS.Pool.StoreErrors; n > 0 {
		list = append(list, Finding{"state", fmt.Sprintf("%d writes to the state directory have failed", n), "synthetic addresses given meanwhile do not outlive a restart", "make room on the disk, or see the daemon's log for the reason"})
	}
	if n := d.status.Relay.Refused; n > 0 {
		list = append(list, Finding{"descriptors", fmt.Sprintf("%d connections were refused for want of descriptors", n), "clients saw resets", "raise LimitNOFILE of the unit"})
	}
	return list
}

// enough descriptors for some thousand flows, two of TCP each.
const enoughFiles = 16384

// limits finds what a process may have too little of: descriptors, and pipes
// for the kernel to move bytes by.
func limits(d *running) (list []Finding) {
	pid := "self"
	whose := "this host's default limit"
	if d != nil && d.pid != 0 {
		pid, whose = strconv.Itoa(d.pid), "the daemon's limit"
	}
	b, err := os.ReadFile("/proc/" + pid + "/limits")
	if err == nil {
		if n, ok := hardLimit(string(b), "Max open files"); ok && n < enoughFiles {
			list = append(list, Finding{"descriptors", fmt.Sprintf("%s of descriptors is %d", whose, n), "a flow needs two, and beyond the limit flows are refused", "set LimitNOFILE=262144 in the unit (systemctl edit tproxyd), or ulimit -n before the start"})
		}
	}
	const capSysResource = 1 << unix.CAP_SYS_RESOURCE
	status, err := os.ReadFile("/proc/" + pid + "/status")
	pages, perr := strconv.Atoi(pipePages())
	if err == nil && perr == nil && pages > 0 && pages < 16384 && capEffective(string(status))&capSysResource == 0 {
		list = append(list, Finding{"pipes", fmt.Sprintf("fs.pipe-user-pages-soft is %d, and CAP_SYS_RESOURCE is missing", pages), "bytes are copied by the daemon where pipes are short, at three times the cost", "sysctl -w fs.pipe-user-pages-soft=65536, or give the unit CAP_SYS_RESOURCE"})
	}
	return list
}

// nearlyFull is how much of the tracked flows there may be is trouble.
const nearlyFull = 0.9

// conntrack finds a host that will soon track no more flows.
func conntrack(root string) []Finding {
	read := func(name string) float64 {
		b, _ := os.ReadFile(filepath.Join(root, "proc/sys/net/netfilter/nf_conntrack_"+name))
		n, _ := strconv.ParseFloat(strings.TrimSpace(string(b)), 64)
		return n
	}
	n, most := read("count"), read("max")
	if most == 0 || n < nearlyFull*most {
		return nil
	}
	return []Finding{{"conntrack", fmt.Sprintf("the kernel tracks %.0f flows of %.0f", n, most), "then packets of new flows are dropped, and who sent them waits in vain; a proxied flow is two of them", fmt.Sprintf("sysctl -w net.netfilter.nf_conntrack_max=%.0f, each of them takes some 300 bytes", 4*most)}}
}

func pipePages() string {
	b, err := os.ReadFile("/proc/sys/fs/pipe-user-pages-soft")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// hardLimit reads a line of /proc/PID/limits.
func hardLimit(text, name string) (uint64, bool) {
	for line := range strings.Lines(text) {
		rest, ok := strings.CutPrefix(line, name)
		if !ok {
			continue
		}
		fields := strings.Fields(rest)
		if len(fields) < 2 || fields[1] == "unlimited" {
			return 0, false
		}
		n, err := strconv.ParseUint(fields[1], 10, 64)
		return n, err == nil
	}
	return 0, false
}

// capEffective reads the effective capabilities of /proc/PID/status.
func capEffective(text string) uint64 {
	for line := range strings.Lines(text) {
		if rest, ok := strings.CutPrefix(line, "CapEff:"); ok {
			n, _ := strconv.ParseUint(strings.TrimSpace(rest), 16, 64)
			return n
		}
	}
	return 0
}

// enoughRoom is what the state directory's file system should have free: a
// million names take less.
const enoughRoom = 128 << 20

// state finds a state directory that is missing or has no room.
func state(dir string) []Finding {
	if dir == "" {
		return nil
	}
	var s unix.Statfs_t
	if err := unix.Statfs(dir, &s); err != nil {
		return []Finding{{"state", dir + ": " + err.Error(), "synthetic addresses do not outlive a restart", "mkdir -p " + dir}}
	}
	if free := s.Bavail * uint64(s.Bsize); free < enoughRoom {
		return []Finding{{"state", fmt.Sprintf("%s has %d MiB free", dir, free>>20), "when it is full, synthetic addresses do not outlive a restart", "make room, or set [state] directory to another place"}}
	}
	return nil
}

// resolversElsewhere finds clients that seem to ask for names past us, by DNS
// over HTTPS or TLS: in what the kernel tracks, and in what the daemon carries.
func resolversElsewhere(interfaces []string, d *running) []Finding {
	clients := map[string]string{} // who asks whom
	if d != nil {
		for _, f := range d.flows {
			if slices.ContainsFunc(knownNames, func(n string) bool { return f.Name == n || strings.HasSuffix(f.Name, "."+n) }) {
				clients[f.Client.Addr().String()] = f.Name
			}
		}
	}
	own := ownAddrs()
	for _, family := range []netlink.InetFamily{unix.AF_INET, unix.AF_INET6} {
		flows, err := netlink.ConntrackTableList(netlink.ConntrackTable, family)
		if err != nil || len(interfaces) == 0 {
			continue
		}
		for _, f := range flows {
			to, ok1 := netip.AddrFromSlice(f.Forward.DstIP)
			from, ok2 := netip.AddrFromSlice(f.Forward.SrcIP)
			whose, isKnown := known[to.Unmap()]
			if ok1 && ok2 && isKnown && (f.Forward.DstPort == 443 || f.Forward.DstPort == 853) && !own[from.Unmap()] {
				clients[from.Unmap().String()] = whose
			}
		}
	}
	if len(clients) == 0 {
		return nil
	}
	var list []string
	for c, r := range clients {
		list = append(list, c+" asks "+r)
	}
	slices.Sort(list)
	more := ""
	if len(list) > 5 {
		list, more = list[:5], " and others"
	}
	return []Finding{{
		"doh", "clients seem to use DNS over HTTPS or TLS: " + strings.Join(list, ", ") + more,
		"their flows have addresses and no names, so rules for names do not match them",
		"switch it off there, or deny these resolvers: DENY * 853, and a LIST of their addresses and names",
	}}
}
