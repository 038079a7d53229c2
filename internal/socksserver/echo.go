package socksserver

import (
	"net"
	"net/netip"
	"sync"
)

// Echo returns an outside world, for UDP.Outside, in which each address sends
// back what it is sent. It needs no socket, and loses datagrams of which 64
// wait already.
func Echo() PacketConn {
	return &echo{waiting: make(chan parcel, 64), closed: make(chan struct{})}
}

type echo struct {
	waiting chan parcel
	closed  chan struct{}
	once    sync.Once
}

type parcel struct {
	data []byte
	from netip.AddrPort
}

func (e *echo) ReadFromUDPAddrPort(b []byte) (int, netip.AddrPort, error) {
	select {
	case p := <-e.waiting:
		return copy(b, p.data), p.from, nil
	case <-e.closed:
		return 0, netip.AddrPort{}, net.ErrClosed
	}
}

func (e *echo) WriteToUDPAddrPort(b []byte, to netip.AddrPort) (int, error) {
	select {
	case e.waiting <- parcel{append([]byte(nil), b...), to}:
	default:
	}
	return len(b), nil
}

func (e *echo) Close() error {
	e.once.Do(func() { close(e.closed) })
	return nil
}
