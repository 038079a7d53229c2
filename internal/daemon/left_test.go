package daemon

import (
	"fmt"
	"io"
	"net"
	"net/netip"
	"testing"
	"time"
)

// TestLeft: a server that says nothing is not kept busy for a client that is
// gone.
func TestLeft(t *testing.T) {
	r := serve(t, "")
	silent := listen(t, "127.0.0.1:0")
	defer silent.Close()
	r.routes(fmt.Sprintf("SOCKD5 @=%s *\n", silent.Addr()))
	c, err := client(t, far)
	if err != nil {
		t.Fatal(err)
	}
	server, err := silent.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	server.SetDeadline(time.Now().Add(patience))
	c.(*net.TCPConn).SetLinger(0) // a reset
	c.Close()
	if _, err := io.Copy(io.Discard, server); err != nil {
		t.Errorf("the server's side: %v", err)
	}
}

// TestStopWithoutResolver: the end of the daemon does not wait for the name of
// a server that nobody resolves.
func TestStopWithoutResolver(t *testing.T) {
	r := serve(t, "")
	r.routes("TIMEOUT connect=30s\nSOCKD5 @=proxy.example.com:1080 *\n")
	silent, err := net.ListenUDP("udp4", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	r.names.SetResolvers([]netip.AddrPort{silent.LocalAddr().(*net.UDPAddr).AddrPort()})
	if _, err := client(t, far); err != nil {
		t.Fatal(err)
	}
	silent.SetDeadline(time.Now().Add(patience))
	if _, _, err := silent.ReadFrom(make([]byte, 512)); err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	r.stop()
	if took := time.Since(began); took > 3*time.Second {
		t.Errorf("it took %v", took)
	}
}
