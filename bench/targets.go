package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
)

// The ports of the server.
const (
	discardPort  = 9    // datagrams that nobody reads
	echoPort     = 7    // sends back what it gets, by TCP and UDP
	idleEchoPort = 8    // the same; routed through the SOCKS server that copies
	sourcePort   = 9000 // sends until it cannot
	sinkPort     = 9001 // reads to the end, then tells the number of bytes
	dnsPort      = 53   // one answer for every question
)

// targetsRole is the server that everything is measured against. It ends with
// its standard input.
func targetsRole(_ []string, out io.Writer) error {
	for port, serve := range map[int]func(net.Conn){echoPort: echo, idleEchoPort: echo, sourcePort: source, sinkPort: sink} {
		ln, err := net.Listen("tcp4", fmt.Sprintf(":%d", port))
		if err != nil {
			return err
		}
		go accept(ln, serve)
	}
	if _, err := bindUDP(netip.AddrPortFrom(netip.IPv4Unspecified(), discardPort), 0); err != nil {
		return err
	}
	// Two sockets for each address, so that answers leave from where they were
	// asked for.
	for w := range ways {
		fd, err := bindUDP(w.target(echoPort), 0)
		if err != nil {
			return err
		}
		go echoDatagrams(fd)
		pc, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(w.target(dnsPort)))
		if err != nil {
			return err
		}
		go answer(pc)
	}
	return untilEOF(out)
}

// untilEOF says that a role is ready and waits for the end of its standard
// input, which is the end of whoever started it.
func untilEOF(out io.Writer) error {
	fmt.Fprintln(out, "ready")
	_, err := io.Copy(io.Discard, stdin())
	return err
}

// accept hands every connection of a listener to a goroutine, until the
// listener is closed.
func accept(ln net.Listener, serve func(net.Conn)) {
	for {
		c, err := ln.Accept()
		switch {
		case errors.Is(err, net.ErrClosed):
			return
		case err == nil:
			go serve(c)
		default:
			breathe() // out of descriptors: others will go
		}
	}
}

func echo(c net.Conn) {
	defer c.Close()
	var b [256]byte // small: nine thousand of them are idle
	for {
		n, err := c.Read(b[:])
		if n > 0 {
			if _, err := c.Write(b[:n]); err != nil {
				return
			}
		}
		if err != nil {
			return
		}
	}
}

// chunk is how much a stream reads and writes at a time.
const chunk = 256 << 10

func source(c net.Conn) {
	defer c.Close()
	for b := make([]byte, chunk); ; {
		if _, err := c.Write(b); err != nil {
			return
		}
	}
}

func sink(c net.Conn) {
	defer c.Close()
	var total uint64
	for b := make([]byte, chunk); ; {
		n, err := c.Read(b)
		total += uint64(n)
		if err != nil {
			break
		}
	}
	c.Write(binary.BigEndian.AppendUint64(nil, total))
}

// answer gives the same address for every name: what a resolver costs that
// decides nothing.
func answer(pc *net.UDPConn) {
	b := make([]byte, 2048)
	for {
		n, from, err := pc.ReadFromUDPAddrPort(b)
		if err != nil {
			return
		}
		if n < 12 {
			continue
		}
		pc.WriteToUDPAddrPort(appendAnswer(b[:n]), from)
	}
}

// appendAnswer turns a question into its answer in place (RFC 1035 section 4):
// 192.0.2.1 for a minute. Anything behind the question is taken for part of it
// only if there is nothing: the questions of this program have no options.
func appendAnswer(q []byte) []byte {
	q[2] |= 0x80                // QR
	q[3] = 0x80                 // RA
	copy(q[6:12], []byte{0, 1}) // ANCOUNT; NSCOUNT and ARCOUNT are 0 already
	return append(q, 0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 192, 0, 2, 1)
}
