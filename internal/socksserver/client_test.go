package socksserver

import (
	"net"
	"net/netip"
	"testing"

	"github.com/tproxyd/tproxyd/pkg/flow"
	"github.com/tproxyd/tproxyd/pkg/socks"
)

// TestClient has the project's own client, whose code of the header is another,
// ask and be answered.
func TestClient(t *testing.T) {
	at := netip.MustParseAddr("192.0.2.1")
	for _, addr := range []string{"127.0.0.1", "::1"} {
		s := &Server{Resolve: func(string) (netip.Addr, error) { return at, nil }}
		s.UDP = UDP{Names: true, Outside: func() (PacketConn, error) { return Echo(), nil }}
		server := serveUDP(t, s, addr)
		for _, own := range []bool{true, false} {
			control, err := net.Dial("tcp", server.String())
			if err != nil {
				t.Fatal(err)
			}
			defer control.Close()
			socket := listenAt(t, addr)
			from := netip.AddrPort{}
			if own {
				from = addrOf(socket)
			}
			relay, err := socks.Associate(control, from, socks.Options{})
			if err != nil || relay.Addr() != server.Addr() {
				t.Fatalf("%v, own %v: relay %v, %v", server, own, relay, err)
			}
			for _, want := range []flow.Target{
				{Addr: at, Port: 53}, {Addr: netip.MustParseAddr("2001:db8::1"), Port: 65535}, {Name: "www.example.org", Port: 443},
			} {
				b, err := socks.AppendUDPHeader(nil, want)
				if err != nil {
					t.Fatal(err)
				}
				socket.WriteToUDPAddrPort(append(b, "payload"...), relay)
				answer, _ := receive(t, socket)
				by, name, n, err := socks.ParseUDPHeader([]byte(answer))
				if got := (flow.Target{Name: string(name), Addr: by.Addr(), Port: by.Port()}); got != want || err != nil {
					t.Errorf("%v, own %v: answered by %v (%v), not %v", server, own, got, err, want)
				}
				if answer[n:] != "payload" {
					t.Errorf("%q", answer[n:])
				}
			}
		}
	}
}
