package gateway

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/netip"
	"time"

	"github.com/tproxyd/tproxyd/pkg/fakedns"
	"github.com/tproxyd/tproxyd/pkg/flow"
	"github.com/tproxyd/tproxyd/pkg/relay"
	"github.com/tproxyd/tproxyd/pkg/socks"
	"github.com/tproxyd/tproxyd/pkg/upstream"
)

const (
	dnsAtOnce = 16               // questions of one client socket that are under way
	dnsLimit  = 10 * time.Second // for an answer
)

// dnsOutlet carries DNS questions through servers without UDP: each as DNS over
// TCP (RFC 7766) to the resolver that its header names. What it reads and
// writes has the headers of an association, so the relay sees no difference.
func (g *Gateway) dnsOutlet(group *upstream.Group, client netip.Addr) (relay.Outlet, error) {
	socket, f, err := relay.PacketPair()
	if err != nil {
		return relay.Outlet{}, err
	}
	go func() {
		// It ends when the relay closes its socket of the pair.
		ctx, cancel := context.WithCancel(context.Background())
		defer f.Close()
		defer cancel()
		slots := make(chan struct{}, dnsAtOnce)
		for {
			b := make([]byte, 64<<10)
			n, err := f.Read(b)
			if err != nil {
				return
			}
			select {
			case slots <- struct{}{}:
			default:
				fail(f, b[:n])
				continue
			}
			go func() {
				defer func() { <-slots }()
				answer, err := g.askOverTCP(ctx, group, client, b[:n])
				if err != nil {
					fail(f, b[:n])
					return
				}
				f.Write(answer)
			}()
		}
	}()
	return relay.Outlet{Socket: socket}, nil
}

// fail says to who asked a question, which is behind its header, that there will
// be no answer. What is no question is dropped.
func fail(to io.Writer, d []byte) {
	if _, _, n, err := socks.ParseUDPHeader(d); err == nil {
		if answer := fakedns.Failed(d[n:]); answer != nil {
			to.Write(append(d[:n:n], answer...))
		}
	}
}

// askOverTCP carries one question, behind its header, and returns the answer
// behind the same header.
func (g *Gateway) askOverTCP(ctx context.Context, group *upstream.Group, client netip.Addr, d []byte) ([]byte, error) {
	addr, name, n, err := socks.ParseUDPHeader(d)
	if err != nil {
		return nil, err
	}
	question := d[n:]
	if len(question) == 0 {
		return nil, errors.New("gateway: no DNS question")
	}
	ctx, cancel := context.WithTimeout(ctx, dnsLimit)
	defer cancel()
	to := flow.Target{Name: string(name), Addr: addr.Addr(), Port: addr.Port()}
	conn, err := g.dialThrough(ctx, group, upstream.Request{To: to, Src: client})
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })()
	answer, err := exchange(conn, question)
	if err != nil {
		return nil, err
	}
	return append(d[:n:n], fakedns.Fit(question, answer)...), nil
}

// exchange asks and reads the answer (RFC 1035 section 4.2.2).
func exchange(conn net.Conn, question []byte) ([]byte, error) {
	msg := binary.BigEndian.AppendUint16(nil, uint16(len(question)))
	if _, err := conn.Write(append(msg, question...)); err != nil {
		return nil, err
	}
	var length [2]byte
	if _, err := io.ReadFull(conn, length[:]); err != nil {
		return nil, err
	}
	answer := make([]byte, binary.BigEndian.Uint16(length[:]))
	_, err := io.ReadFull(conn, answer)
	return answer, err
}
