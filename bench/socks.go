package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
)

// The ports of the SOCKS servers.
const (
	socksPort     = 1080 // splices
	socksCopyPort = 1081 // copies: holds no pipes, so that thousands of idle flows fit
)

// socksRole is all SOCKS servers. It ends with its standard input.
func socksRole(_ []string, out io.Writer) error {
	for port, relay := range map[int]func(a, b *net.TCPConn){socksPort: relaySplicing, socksCopyPort: relayCopying} {
		ln, err := net.Listen("tcp4", fmt.Sprintf(":%d", port))
		if err != nil {
			return err
		}
		go accept(ln, func(c net.Conn) {
			client := c.(*net.TCPConn)
			server, err := handshake(client)
			if err != nil {
				client.Close()
				return
			}
			relay(client, server)
		})
	}
	s, err := newAssociations(netip.AddrPortFrom(netip.IPv4Unspecified(), socksUDPPort))
	if err != nil {
		return err
	}
	go s.run()
	return untilEOF(out)
}

// handshake is the server's side of RFC 1928 without authentication, CONNECT
// only. It reads not a byte too many: the next one belongs to the flow.
func handshake(c *net.TCPConn) (*net.TCPConn, error) {
	var b [262]byte
	if _, err := io.ReadFull(c, b[:2]); err != nil {
		return nil, err
	}
	if _, err := io.ReadFull(c, b[2:2+int(b[1])]); err != nil {
		return nil, err
	}
	if _, err := c.Write([]byte{5, 0}); err != nil {
		return nil, err
	}
	if _, err := io.ReadFull(c, b[:5]); err != nil {
		return nil, err
	}
	if b[0] != 5 || b[1] != 1 || b[3] != 1 {
		return nil, errors.New("socks: not a CONNECT to an IPv4 address, which is all that is measured")
	}
	if _, err := io.ReadFull(c, b[5:10]); err != nil {
		return nil, err
	}
	to := netip.AddrPortFrom(netip.AddrFrom4([4]byte(b[4:8])), uint16(b[8])<<8|uint16(b[9]))
	server, err := net.Dial("tcp4", to.String())
	reply := []byte{5, 0, 0, 1, 0, 0, 0, 0, 0, 0}
	if err != nil {
		reply[1] = 5
		c.Write(reply)
		return nil, err
	}
	if _, err := c.Write(reply); err != nil {
		server.Close()
		return nil, err
	}
	return server.(*net.TCPConn), nil
}

// relaySplicing joins two connections; io.Copy between them is splice(2).
func relaySplicing(a, b *net.TCPConn) {
	defer a.Close()
	defer b.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		io.Copy(a, b)
		a.CloseWrite()
	}()
	io.Copy(b, a)
	b.CloseWrite()
	<-done
}

// relayCopying does the same with small buffers of our own.
func relayCopying(a, b *net.TCPConn) {
	defer a.Close()
	defer b.Close()
	done := make(chan struct{})
	pump := func(dst, src *net.TCPConn) {
		var buf [512]byte
		for {
			n, err := src.Read(buf[:])
			if n > 0 {
				if _, err := dst.Write(buf[:n]); err != nil {
					break
				}
			}
			if err != nil {
				break
			}
		}
		dst.CloseWrite()
	}
	go func() {
		defer close(done)
		pump(a, b)
	}()
	pump(b, a)
	<-done
}
