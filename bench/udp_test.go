package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"net/netip"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// TestDatagrams measures the three tables of UDP in a small way, with the
// daemon of this checkout.
//
//	client --+-- plain --+-- server
//	         '-- udp ----'
func TestDatagrams(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	b := &bench{size: short(), dir: t.TempDir()}
	b.program = filepath.Join(b.dir, "tproxyd")
	build := exec.CommandContext(ctx, "go", "build", "-buildvcs=false", "-o", b.program, "../cmd/tproxyd")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", build, err, out)
	}
	var err error
	if b.lab, err = newLab(); err != nil {
		t.Fatalf("run it as root: %v", err)
	}
	defer b.lab.close()
	for _, role := range []string{"targets", "socks"} {
		p, err := startRole(ctx, b.lab.server, role)
		if err != nil {
			t.Fatal(err)
		}
		defer p.stop()
	}
	for _, test := range []struct {
		measured func(context.Context) error
		want     []string // patterns of rows, blanks as one
	}{
		{b.datagrams, []string{
			`1 flow, 64 bytes`, `1 flow, 1200 bytes`, `20 flows, 64 bytes`, `20 flows, 1200 bytes`,
		}},
		{b.newFlows, []string{`plain`, `tproxyd`}},
		{b.sessions, []string{
			`one datagram each \| 0 \| 0 `, `one datagram each \| 50.0 \| 50.0 `, `5 datagrams each \| 50.0 \| 50.0 `,
		}},
	} {
		var out bytes.Buffer
		b.report = newReport(&out)
		if err := test.measured(ctx); err != nil {
			t.Fatal(err)
		}
		text := regexp.MustCompile(` +`).ReplaceAllString(out.String(), " ")
		t.Log("\n" + text)
		for _, row := range test.want {
			if !regexp.MustCompile(`(?m)^\| ` + row + `.*\d`).MatchString(text) {
				t.Errorf("no row of %q", row)
			}
		}
		if strings.Contains(text, "NaN") {
			t.Error("a figure that is none")
		}
		for _, note := range b.report.notes {
			t.Error(note)
		}
	}
}

// TestAssociation: the SOCKS server that datagrams are measured with takes
// headers off and puts them on, and ends with the control connection.
func TestAssociation(t *testing.T) {
	s, err := newAssociations(netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		t.Fatal(err)
	}
	name, err := unix.Getsockname(s.listener)
	if err != nil {
		t.Fatal(err)
	}
	go s.run()
	listen := func() *net.UDPConn {
		t.Helper()
		c, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			t.Fatal(err)
		}
		c.SetDeadline(time.Now().Add(patience))
		t.Cleanup(func() { c.Close() })
		return c
	}
	target, client := listen(), listen()
	control, err := net.DialTCP("tcp4", nil, &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: name.(*unix.SockaddrInet4).Port})
	if err != nil {
		t.Fatal(err)
	}
	defer control.Close()
	control.SetDeadline(time.Now().Add(patience))
	port := func(c net.PacketConn) uint16 { return uint16(c.LocalAddr().(*net.UDPAddr).Port) }
	reply := make([]byte, 12)
	// In two parts, neither of which is a whole message.
	for _, b := range [][]byte{{5, 1}, binary.BigEndian.AppendUint16([]byte{0, 5, 3, 0, 1, 127, 0, 0, 1}, port(client))} {
		if _, err := control.Write(b); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := io.ReadFull(control, reply); err != nil {
		t.Fatalf("%x: %v", reply, err)
	}
	if !bytes.HasPrefix(reply, []byte{5, 0, 5, 0, 0, 1, 127, 0, 0, 1}) {
		t.Fatalf("reply %x", reply)
	}
	relay := &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1), Port: int(binary.BigEndian.Uint16(reply[10:]))}
	header := binary.BigEndian.AppendUint16([]byte{0, 0, 0, 1, 127, 0, 0, 1}, port(target))
	if _, err := client.WriteTo(append(header[:len(header):len(header)], "there"...), relay); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 64)
	n, from, err := target.ReadFrom(buf)
	if err != nil || string(buf[:n]) != "there" {
		t.Fatalf("the target got %q: %v", buf[:n], err)
	}
	if _, err := target.WriteTo([]byte("back"), from); err != nil {
		t.Fatal(err)
	}
	if n, _, err = client.ReadFrom(buf); err != nil || string(buf[:n]) != string(header)+"back" {
		t.Fatalf("the client got %q: %v", buf[:n], err)
	}
	control.CloseWrite()
	if n, err := control.Read(buf); err != io.EOF {
		t.Errorf("the control connection outlives its end: %d, %v", n, err)
	}
	again, err := net.ListenUDP("udp4", relay)
	if err != nil {
		t.Fatalf("the association outlives its control connection: %v", err)
	}
	again.Close()
}
