package daemon

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/tproxyd/tproxyd/internal/gateway"
	"github.com/tproxyd/tproxyd/pkg/fakedns"
	"github.com/tproxyd/tproxyd/pkg/flow"
	"github.com/tproxyd/tproxyd/pkg/redirect"
	"github.com/tproxyd/tproxyd/pkg/relay"
	"github.com/tproxyd/tproxyd/pkg/routes"
	"github.com/tproxyd/tproxyd/pkg/socks"
	"github.com/tproxyd/tproxyd/pkg/upstream"
	"golang.org/x/sys/unix"
)

// This file joins the rooms, which do not know one another: what one of them
// calls its own is said here in the words of the other.

// kernelPlan is what the kernel shall do for setup; with zero ports it refuses
// what it would divert.
func kernelPlan(s *Setup, ports redirect.Ports) redirect.Plan {
	c := s.Config
	p := redirect.Plan{
		Interfaces: c.Intercept.Interfaces,
		Local:      c.Intercept.Local,
		DNS:        c.Intercept.DNS,
		Ports:      ports,
		Marks:      c.Intercept.Mark,
		Table:      c.Intercept.Table,
		Synthetic:  []netip.Prefix{c.DNS.Pool4, c.DNS.Pool6},
	}
	p.DivertDenied = s.Table != nil && len(s.Table.Programs()) > 0 && p.Local && ports != (redirect.Ports{})
	if s.Table != nil && s.Table.UsesWho() && ports != (redirect.Ports{}) {
		p.Who = &redirect.Who{Cgroups: s.Table.Cgroups()}
	}
	if s.Table == nil || s.enclosure != nil {
		return p // no block: everything is denied
	}
	for _, srv := range s.Table.FirstHops() {
		if srv.Addr.IsValid() {
			p.Servers = append(p.Servers, srv.AddrPort())
		}
	}
	p.Log = logTags(s.Table)
	for _, b := range s.Table.Kernel() {
		p.Blocks = append(p.Blocks, kernelBlock(b))
	}
	return p
}

func kernelBlock(b routes.Block) redirect.Block {
	kb := redirect.Block{
		Src:    b.Src,
		Ifs:    b.Ifs,
		Client: redirect.Client{MACs: b.MACs, UIDs: b.UIDs, GIDs: b.GIDs, Cgroups: b.Cgroups},
		Final:  b.Final,
		Direct: kernelRanges(b.Direct),
		Deny:   kernelRanges(b.Deny),
		ICMP:   kernelRanges(b.ICMP),
		Drop:   kernelRanges(b.Drop),
		Proxy:  kernelRanges(b.Proxy),
	}
	switch b.Network {
	case routes.OnlyTCP:
		kb.Networks = redirect.TCP
	case routes.OnlyUDP:
		kb.Networks = redirect.UDP
	}
	for _, m := range b.Marks {
		kb.Marks = append(kb.Marks, redirect.PacketMark(m))
	}
	for _, p := range b.Ports {
		kb.Ports = append(kb.Ports, redirect.PortRange(p))
	}
	return kb
}

func kernelRanges(list []routes.Range) []redirect.Range {
	out := make([]redirect.Range, len(list))
	for i, r := range list {
		out[i] = redirect.Range{From: r.From, To: r.To}
		if r.Rule != nil && decidesAlone(r.Rule) {
			out[i].Tag = tagOf(r.Rule)
		}
	}
	return out
}

// decidesAlone tells whether some of what a rule decides is decided by the kernel.
func decidesAlone(r *routes.Rule) bool {
	alone := func(a routes.Action) bool { return a == routes.Direct || a == routes.Deny }
	return alone(r.Action) || alone(r.ActionFor(flow.UDP))
}

// logTags returns the tags of what rules want in the log and the kernel decides.
func logTags(t *routes.Table) (tags []string) {
	byName := false
	for _, r := range t.Rules() {
		if r.Log && decidesAlone(r) {
			tags = append(tags, tagOf(r))
			byName = byName || r.NeedsAdmission()
		}
	}
	if byName {
		tags = append(tags, "")
	}
	slices.Sort(tags)
	return slices.Compact(tags)
}

// logged writes the line of a flow that the kernel has decided.
func (d *Daemon) logged(l redirect.Logged) {
	k := gateway.KernelFlow{Src: l.Src, Dst: l.Dst, Protocol: protocolName(l.Protocol), InIf: d.kernel.InterfaceName(l.IfIndex)}
	if l.Tag == "" {
		d.gateway.ReportAdmitted(k)
		return
	}
	rules := d.gateway.Plan().Table().Rules()
	if i := slices.IndexFunc(rules, func(r *routes.Rule) bool { return r.Log && tagOf(r) == l.Tag }); i >= 0 {
		d.gateway.ReportKernel(k, rules[i])
	}
}

// protocolName writes a protocol as the log does.
func protocolName(p byte) string {
	switch p {
	case unix.IPPROTO_TCP:
		return "tcp"
	case unix.IPPROTO_UDP:
		return "udp"
	case unix.IPPROTO_ICMP, unix.IPPROTO_ICMPV6:
		return "icmp"
	}
	return strconv.Itoa(int(p))
}

// tagOf is by what a rule's packets are counted: its file and its words, by which
// it is the same one in other versions of the file.
func tagOf(r *routes.Rule) string { return r.File + ": " + r.Text }

// toKernel says in the kernel's words what the gateway lets pass by name.
func toKernel(list []gateway.Admission) []redirect.Admission {
	out := make([]redirect.Admission, len(list))
	for i, a := range list {
		out[i] = redirect.Admission{Addr: a.Addr, Timeout: a.Timeout}
		for _, s := range a.Scopes {
			ports := redirect.PortRange(s.Ports)
			if ports == (redirect.PortRange{From: 0, To: 65535}) {
				ports = redirect.PortRange{} // every port
			}
			out[i].Scopes = append(out[i].Scopes, redirect.Scope{Network: s.Network, Ports: ports})
		}
	}
	return out
}

// inForce returns what the kernel lets pass by name at this moment, in the
// gateway's words; which ports is not asked, since the rules say it anew.
func (d *Daemon) inForce() ([]gateway.Admission, error) {
	list, err := d.kernel.Admitted()
	out := make([]gateway.Admission, len(list))
	for i, a := range list {
		out[i] = gateway.Admission{Addr: a.Addr, Timeout: a.Timeout}
	}
	return out, err
}

// admitName lets the addresses of a DIRECT name pass.
func (d *Daemon) admitName(name string, a fakedns.Asker, addrs []netip.Addr, ttl time.Duration) error {
	d.admitting.RLock()
	defer d.admitting.RUnlock()
	return d.gateway.Admit(name, a, addrs, ttl)
}

func (d *Daemon) upstreamOptions(s *Setup) upstream.Options {
	limits, health := s.Table.Limits(), s.Table.Health()
	return upstream.Options{
		Dial:             d.dialServer,
		Packet:           d.packet,
		Resolve:          func(ctx context.Context, host string) ([]netip.Addr, error) { return d.names.Resolve(ctx, host) },
		ConnectTimeout:   limits.Connect,
		HandshakeTimeout: limits.Handshake,
		MaxFail:          health.MaxFail,
		BadExpire:        health.BadExpire,
		Interval:         health.Interval,
		Probe:            health.Probe,
		Log:              d.log.With("part", "upstream"),
	}
}

// dial connects to a DIRECT destination: from this host, marked as our own, by
// a socket that the relay can splice.
func (d *Daemon) dial(ctx context.Context, to netip.AddrPort) (net.Conn, error) {
	return d.dialFrom(ctx, relay.DialOptions{Control: d.markOwn}, to)
}

// dialServer connects to a SOCKS server from an address or an interface of this
// host. In all of its protocols we are the first to say something.
func (d *Daemon) dialServer(ctx context.Context, from upstream.Local, to netip.AddrPort) (net.Conn, error) {
	return d.dialFrom(ctx, relay.DialOptions{Control: d.control(from), Local: from.Addr, SpeaksFirst: true}, to)
}

func (d *Daemon) dialFrom(ctx context.Context, o relay.DialOptions, to netip.AddrPort) (net.Conn, error) {
	c, err := d.engine.Dial(ctx, o, to)
	if err != nil {
		return nil, err // not a nil *relay.Conn in an interface
	}
	return c, nil
}

// markOwn marks a socket as our own. What is dialled for an enclosed namespace is
// not: for this host it is a program's like any other, and may need no privilege.
func (d *Daemon) markOwn(fd int) error {
	if d.enclosure != nil {
		return nil
	}
	return d.mark.MarkOwn(fd)
}

// admit lets addresses pass in the kernel; nil in an enclosed namespace, where
// nothing passes there.
func (d *Daemon) admit() func([]gateway.Admission) error {
	if d.enclosure != nil {
		return nil
	}
	return func(list []gateway.Admission) error { return d.kernel.Admit(toKernel(list)) }
}

// ownAddr tells whether an address is of the host whose flows are taken. Of an
// enclosed namespace none has to be known: its resolvers are not inside.
func (d *Daemon) ownAddr(a netip.Addr) bool { return d.enclosure == nil && d.own.has(a) }

// control marks a socket as our own, and ties it to the interface that it
// leaves by, if that is stated.
func (d *Daemon) control(from upstream.Local) func(fd int) error {
	own := d.markOwn
	if from.If == "" {
		return own
	}
	return func(fd int) error {
		if err := own(fd); err != nil {
			return err
		}
		return os.NewSyscallError("setsockopt SO_BINDTODEVICE "+from.If, unix.BindToDevice(fd, from.If))
	}
}

// packet makes a socket for the datagrams of an association.
func (d *Daemon) packet(from upstream.Local) (upstream.PacketSocket, error) {
	p, err := relay.NewPacket(from.Addr, d.control(from))
	if err != nil {
		return nil, err // not a nil *relay.Packet in an interface
	}
	return p, nil
}

// dialUDP makes a socket for datagrams to a DIRECT destination.
func (d *Daemon) dialUDP(to netip.AddrPort) (*relay.Packet, error) {
	local := netip.IPv4Unspecified()
	if to.Addr().Is6() {
		local = netip.IPv6Unspecified()
	}
	p, err := relay.NewPacket(local, d.markOwn)
	if err != nil {
		return nil, err
	}
	if err := p.Connect(to); err != nil {
		p.Close()
		return nil, err
	}
	return p, nil
}

// keptPipes is enough for flows that fill a processor each; a pipe at rest takes
// two descriptors and 10 KiB of the kernel.
const keptPipes = 32

// relayOptions has pipes made while all rights are there. Later others of the same
// user may have used up what fs.pipe-user-pages-soft grants, and bytes would be
// copied. A command or a container takes nothing of its user's share beforehand.
func (d *Daemon) relayOptions(log *slog.Logger) relay.Options {
	o := relay.Options{Log: log}
	if d.setup.enclosure == nil {
		o.KeptPipes = keptPipes
	}
	return o
}

// udpOptions wires the sessions of UDP to the kernel and to the rules.
func (d *Daemon) udpOptions() relay.UDPOptions {
	return relay.UDPOptions{
		Sources:    d.udp.Shards(),
		Paused:     true, // until Run
		Decide:     d.gateway.DecideUDP,
		Header:     socks.ParseUDPHeader,
		FlowSocket: d.flowSocket,
		Refuse:     func(g flow.Datagram, r relay.Refusal) { d.refuser.Refuse(g, refusals[r]) },
		TooBig:     func(g flow.Datagram, mtu int) { d.refuser.TooBig(g, mtu) },
		Done:       d.gateway.SessionDone,
		ID:         d.gateway.NextID,
		Beside:     d.engine,
		Log:        d.log.With("part", "relay"),
	}
}

// flowSocket makes the socket of one flow of UDP, where flows are taken.
func (d *Daemon) flowSocket(client, dst netip.AddrPort) (fd int, err error) {
	err = d.inside(func() (err error) {
		fd, err = d.mark.ConnectUDP(client, dst)
		return err
	})
	return fd, err
}

// refusals says in the kernel's words how the relay refuses.
var refusals = map[relay.Refusal]redirect.Refusal{
	relay.RefusePort:       redirect.PortUnreachable,
	relay.RefuseHost:       redirect.HostUnreachable,
	relay.RefuseNet:        redirect.NetUnreachable,
	relay.RefuseProhibited: redirect.Prohibited,
}

// udpLimits are the limits of inactivity of UDP: of all of it, and of what ends
// with its answer.
func (s *Setup) udpLimits() (idle, short time.Duration) {
	l := s.Table.Limits()
	return l.UDP, l.DNS
}

// dialMarked is dial for sockets that the relay has nothing to do with.
func (d *Daemon) dialMarked(ctx context.Context, network, addr string) (net.Conn, error) {
	dialer := net.Dialer{}
	if d.enclosure == nil {
		dialer.Control = d.mark.Control
	}
	return dialer.DialContext(ctx, network, addr)
}

// inboundInterface returns the name of the interface that a flow entered by;
// empty: it is this host's own, or it is not wanted.
func (d *Daemon) inboundInterface(c *relay.Conn, wanted bool) (name string, err error) {
	local, remote := c.LocalAddrPort().Addr().Unmap(), c.RemoteAddrPort().Addr().Unmap()
	if local.Is4() && !wanted {
		return "", nil // an IPv6 socket must be asked, it keeps packets until then
	}
	index := 0
	err = c.Control(func(fd int) (err error) {
		index, err = redirect.InboundInterface(fd, local, remote)
		return err
	})
	if !wanted {
		return "", nil
	}
	if err == nil {
		name, err = d.interfaceName(index)
	}
	return name, err
}

// askerInterface returns the index of the interface that a question over TCP
// came in by.
func askerInterface(c *net.TCPConn) (index int, err error) {
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, err
	}
	local, remote := c.LocalAddr().(*net.TCPAddr).AddrPort().Addr(), c.RemoteAddr().(*net.TCPAddr).AddrPort().Addr()
	if e := raw.Control(func(fd uintptr) { index, err = redirect.InboundInterface(int(fd), local.Unmap(), remote.Unmap()) }); e != nil {
		err = e
	}
	return index, err
}

// interfaceName returns the name of an interface by its index; empty: lo, by
// which this host's own flows come in. One that is gone is an error.
func (d *Daemon) interfaceName(index int) (string, error) {
	const lo = 1 // in every network namespace
	name := d.kernel.InterfaceName(index)
	if name == "" && index != lo {
		return "", fmt.Errorf("daemon: no interface has the index %d any longer", index)
	}
	return name, nil
}

// gone tells whether a connection was reset by its peer, or closed here.
func gone(c *relay.Conn) bool {
	closed := false
	err := c.Control(func(fd int) error {
		info, err := unix.GetsockoptTCPInfo(fd, unix.SOL_TCP, unix.TCP_INFO)
		closed = err == nil && info.State == unix.BPF_TCP_CLOSE
		return err
	})
	return closed || err != nil
}

// ports are where the kernel diverts to.
func (d *Daemon) ports() redirect.Ports { return redirect.PortsOf(d.flows, d.udp, d.dns) }

// ownListener tells whether a flow's destination is where flows are accepted:
// carrying it would never end.
func (d *Daemon) ownListener(to netip.AddrPort) bool {
	p := d.ports()
	return to.Addr().IsLoopback() && to.Port() != 0 && slices.Contains([]uint16{p.TCP, p.UDP, p.DNSTCP, p.DNSUDP}, to.Port())
}

// hostAddrs knows the addresses of this host. They are read again when they
// are older than hostAddrsAge.
type hostAddrs struct {
	mu   sync.Mutex
	read time.Time
	set  map[netip.Addr]bool
}

const hostAddrsAge = 5 * time.Second

func (h *hostAddrs) has(a netip.Addr) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if now := time.Now(); now.Sub(h.read) > hostAddrsAge {
		h.read, h.set = now, map[netip.Addr]bool{}
		addrs, _ := net.InterfaceAddrs() // without it nothing counts as this host's
		for _, addr := range addrs {
			if n, ok := addr.(*net.IPNet); ok {
				if ip, ok := netip.AddrFromSlice(n.IP); ok {
					h.set[ip.Unmap()] = true
				}
			}
		}
	}
	return a.IsLoopback() || h.set[a.Unmap().WithZone("")]
}
