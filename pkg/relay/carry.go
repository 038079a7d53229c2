package relay

import (
	"net/netip"
	"slices"

	"github.com/tproxyd/tproxyd/pkg/flow"
	"golang.org/x/sys/unix"
)

// ownSocketAfter is the number of datagrams, in both directions and within one
// tick, after which a flow gets a socket of its own. A slower one is served by
// the source: many of these are cheaper so, with a descriptor less each, and
// opening a socket costs as much as ten datagrams.
const ownSocketAfter = 8

// up carries datagrams of a client. There is at least one.
func (sh *shard) up(f *udpFlow, data [][]byte) {
	sh.touch(f)
	bytes := 0
	for _, d := range data {
		bytes += len(d)
	}
	for _, t := range []*UDPTraffic{&f.s.result.UDPTraffic, &f.moved} {
		t.UpDatagrams += uint64(len(data))
		t.Up += uint64(bytes)
	}
	if n := f.verdict.Up; n != nil {
		n.Add(uint64(bytes))
	}
	sh.u.upN.Add(uint64(len(data)))
	sh.u.up.Add(uint64(bytes))
	if f.fd < 0 {
		sh.ownSocket(f, len(data))
	}
	// Twice, since the outlet can turn out to be broken.
	for range 2 {
		if f.out == nil && !sh.findOutlet(f) {
			sh.refuse(f, data)
			return
		}
		if f.out.fd < 0 {
			for _, d := range data {
				sh.enqueue(f, d)
			}
			return
		}
		if data = sh.send(f, data); len(data) == 0 {
			return
		}
	}
	sh.u.drop(DropOutlet, len(data))
}

// send sends datagrams through the flow's outlet, and returns those that were
// not sent because it broke, and is closed.
func (sh *shard) send(f *udpFlow, data [][]byte) [][]byte {
	o := f.out
	if f.fd >= 0 || f.seen >= ownSocketAfter {
		sh.prepare(o)
	}
	sh.checkMTU(f, o, data)
	header := f.verdict.Header
	if len(o.outer) > 0 {
		sh.header = append(append(sh.header[:0], o.outer...), header...)
		header = sh.header
	}
	for len(data) > 0 {
		n, e := sh.out.send(int(o.fd), header, data, &o.super)
		data = data[n:]
		switch e {
		case 0:
			return nil
		case unix.EMSGSIZE:
			sh.u.drop(DropTooLong, 1)
		case unix.EAGAIN, unix.ENOBUFS, unix.ENOMEM, unix.EPERM, unix.EINVAL:
			sh.u.drop(DropFull, 1)
		default: // what came back by ICMP: the other end is gone
			sh.brokenOutlet(o, e)
			return data
		}
		data = data[1:]
	}
	return nil
}

// large tells whether a datagram may not fit where IPv6 is allowed to be (RFC
// 8200 section 5).
func large(d []byte) bool { return len(d) > 1280-48-255 }

// checkMTU tells the client of a path that its datagrams no longer fit into
// once they have their header. They are sent all the same, in fragments, since
// not every client asked not to.
func (sh *shard) checkMTU(f *udpFlow, o *outlet, data [][]byte) {
	if sh.u.o.TooBig == nil || f.told == sh.now+1 || f.verdict.Header == nil || !slices.ContainsFunc(data, large) {
		return
	}
	if o.mtuAge != sh.now || o.mtu == 0 {
		o.mtu, o.mtuAge = o.socket.mtu(), sh.now
	}
	if o.mtu == 0 {
		return
	}
	client := headers(!f.s.client.Addr().Is4())
	fits := o.mtu - headers(o.socket.v6) - len(o.outer) - len(f.verdict.Header)
	for _, d := range data {
		if len(d) > fits && len(d)+client <= o.mtu {
			f.told = sh.now + 1
			sh.u.o.TooBig(flow.Datagram{Data: d, Src: f.s.client, Dst: f.dst, IfIndex: f.s.ifIndex}, fits+client)
			return
		}
	}
}

// refuse answers datagrams that are not carried.
func (sh *shard) refuse(f *udpFlow, data [][]byte) {
	why := f.verdict.Refusal
	if f.failed {
		why = f.failure
	}
	for _, d := range data {
		sh.refuseOne(f, d, why)
	}
}

func (sh *shard) refuseOne(f *udpFlow, d []byte, why Refusal) {
	sh.u.refused.Add(1)
	if why != RefuseSilently {
		sh.u.o.Refuse(flow.Datagram{Data: d, Src: f.s.client, Dst: f.dst, IfIndex: f.s.ifIndex}, why)
	}
}

// down delivers what came back for a flow; nothing if f is nil.
func (sh *shard) down(f *udpFlow, data [][]byte) {
	if f == nil || len(data) == 0 || f.closed {
		return
	}
	if o := f.out; true {
		if sh.touch(f); f.out != o {
			sh.u.drop(DropStranger, len(data)) // decided anew, and otherwise
			return
		}
	}
	bytes := 0
	for _, d := range data {
		bytes += len(d)
	}
	for _, t := range []*UDPTraffic{&f.s.result.UDPTraffic, &f.moved} {
		t.DownDatagrams += uint64(len(data))
		t.Down += uint64(bytes)
	}
	if n := f.verdict.Down; n != nil {
		n.Add(uint64(bytes))
	}
	sh.u.downN.Add(uint64(len(data)))
	sh.u.down.Add(uint64(bytes))
	if f.fd < 0 && !sh.ownSocket(f, len(data)) {
		sh.reply(f, data)
		return
	}
	for len(data) > 0 {
		n, e := sh.out.send(int(f.fd), nil, data, &f.super)
		data = data[n:]
		switch e {
		case 0:
			return
		case unix.ECONNREFUSED: // the client's socket is gone
			sh.closeFlow(f)
			return
		case unix.EMSGSIZE:
			sh.u.drop(DropTooLong, 1)
		default:
			sh.u.drop(DropFull, 1)
		}
		data = data[1:]
	}
}

// reply delivers by the source's raw sender.
func (sh *shard) reply(f *udpFlow, data [][]byte) {
	sh.replies = sh.replies[:0]
	for _, d := range data {
		sh.replies = append(sh.replies, flow.Datagram{Data: d, Src: f.dst, Dst: f.s.client})
	}
	n, _ := f.src.WriteBatch(sh.replies)
	if n < len(data) {
		sh.u.drop(DropFull, len(data)-n)
	}
}

// ownSocket counts n datagrams and gives the flow a socket of its own once it
// is worth one; false if it has none.
func (sh *shard) ownSocket(f *udpFlow, n int) bool {
	if f.seen = min(f.seen+n, ownSocketAfter); f.seen < ownSocketAfter || f.out == nil || f.noSocket {
		return false
	}
	return sh.openSocket(f)
}

// openSocket gives the flow a socket of its own; false if it has none.
func (sh *shard) openSocket(f *udpFlow) bool {
	if !sh.takeSocket() {
		return false
	}
	fd, err := sh.u.o.FlowSocket(f.s.client, f.dst)
	if err != nil {
		sh.giveSocket()
		f.noSocket = true // the raw sender does it too
		return false
	}
	preparePacket(fd)
	if e := sh.register(fd, ref{flow: f}); e != 0 {
		rawClose(fd)
		sh.giveSocket()
		return false
	}
	f.fd = int32(fd)
	return true
}

// takeSocket counts a socket more; false if that is one too many for this loop.
// What others have is of no matter, since none of it can be evicted here.
func (sh *shard) takeSocket() bool {
	if sh.sockets >= share(sh.u.o.MaxSockets, len(sh.u.shards)) {
		return false
	}
	if e := sh.u.o.Beside; e != nil && !e.lend() {
		return false
	}
	sh.sockets++
	sh.u.sockets.Add(1)
	return true
}

func (sh *shard) giveSocket() {
	sh.sockets--
	sh.u.sockets.Add(-1)
	if e := sh.u.o.Beside; e != nil {
		e.beside.Add(-1)
	}
}

// stranger makes a flow of a datagram that came back from an address that the
// client has not sent to, if the rules lead there by the same outlet: a third
// party may answer if the client could have asked it, and the server lets it.
func (sh *shard) stranger(o *outlet, from netip.AddrPort) *udpFlow {
	client := o.s.client
	if from.Addr().Is4() != client.Addr().Is4() || from.Port() == 0 {
		return nil
	}
	if f := sh.flows[flowKey{client, from}]; f != nil {
		return nil // it goes by another way
	}
	var src flow.PacketSource
	for f := range o.each() {
		src = f.src
		break
	}
	if src == nil || o.s.flows >= maxSessionFlows || len(sh.flows) >= share(sh.u.o.MaxFlows, len(sh.u.shards)) {
		return nil
	}
	epoch := sh.u.epoch.Load()
	v := sh.u.o.Decide(client, from, o.s.ifIndex)
	if v.Way == nil || !o.takes(&v, from) {
		if v.Release != nil {
			v.Release()
		}
		return nil
	}
	f := sh.newFlow(src, client, from, o.s.ifIndex)
	sh.follow(f, v, epoch)
	sh.attach(f, o)
	return f
}
