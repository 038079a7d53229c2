package fakedns

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/tproxyd/tproxyd/pkg/flow"
)

// TestHandover: a second server goes on where the first one was, with the names,
// their file, the questions that are under way and the open connections; and the
// first one can go on if it does not.
func TestHandover(t *testing.T) {
	dir := t.TempDir()
	asking := make(chan string, 2)
	silent := func(ctx context.Context, network, _ string) (net.Conn, error) { // until it is to end
		asking <- network
		<-ctx.Done()
		return nil, ctx.Err()
	}
	first := newServer(t, Options{Dir: dir, Dial: silent, Timeout: time.Minute})

	// Sockets that outlive the servers', as the daemon's do.
	pc, ln := listenBoth(t)
	var kept [2]*os.File
	for i, c := range []interface{ File() (*os.File, error) }{pc.UDPConn, ln.(*net.TCPListener)} {
		f, err := c.File()
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		kept[i] = f
	}
	again := func() (packets, net.Listener) {
		p, err := net.FilePacketConn(kept[0])
		if err != nil {
			t.Fatal(err)
		}
		l, err := net.FileListener(kept[1])
		if err != nil {
			t.Fatal(err)
		}
		return packets{p.(*net.UDPConn)}, l
	}
	begin := func(s *Server, questions []flow.Datagram, streams []Stream) (end func()) {
		p, l := again()
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 2)
		go func() { done <- s.ServeUDP(ctx, p, questions...) }()
		go func() { done <- s.ServeTCP(ctx, l, streams...) }()
		return func() {
			cancel()
			if err := errors.Join(<-done, <-done); err != nil {
				t.Error(err)
			}
		}
	}
	pc.Close()
	ln.Close()

	at := ln.Addr().String()
	end := begin(first, nil, nil)
	if got := text(ask(t, "udp", at, new(dns.Msg).SetQuestion("a.syn.", dns.TypeA))); got != "NOERROR | a.syn. 60 IN A 198.18.0.1" {
		t.Fatal(got)
	}
	first.Pin(netip.MustParseAddr("198.18.0.1"))
	// One question by each way that nobody answers, and one connection at rest.
	conns := map[string]*dns.Conn{}
	for _, c := range []struct{ what, network string }{{"udp", "udp"}, {"tcp", "tcp"}, {"rest", "tcp"}} {
		conn, err := net.Dial(c.network, at)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(10 * time.Second))
		conns[c.what] = &dns.Conn{Conn: conn}
	}
	asks := func(what, name string) {
		t.Helper()
		if err := conns[what].WriteMsg(new(dns.Msg).SetQuestion(name, dns.TypeA)); err != nil {
			t.Fatal(err)
		}
	}
	hears := func(what, want string) {
		t.Helper()
		m, err := conns[what].ReadMsg()
		if err != nil || text(m) != want {
			t.Fatalf("%s: %v %v, want %s", what, m, err, want)
		}
	}
	asks("rest", "a.syn.")
	hears("rest", "NOERROR | a.syn. 60 IN A 198.18.0.1")
	asks("udp", "a.real.")
	asks("tcp", "b.real.")
	for range 2 {
		<-asking
	}

	end()
	questions, streams := first.Left()
	if len(questions) != 1 || len(streams) != 2 || len(streams[0].Read)+len(streams[1].Read) == 0 {
		t.Fatalf("left: %v %v", questions, streams)
	}
	h, err := first.Lend()
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := first.pool.assign("new.syn"); !errors.Is(err, errLent) {
		t.Errorf("what is lent gives addresses: %v", err)
	}
	if len(h.Pinned) != 1 || !h.Whole {
		t.Errorf("%+v", h)
	}

	// It fails: the first goes on.
	h.Dir.Close()
	first.TakeBack()
	end = begin(first, questions, streams)
	for range 2 {
		<-asking
	}
	asks("rest", "c.syn.")
	hears("rest", "NOERROR | c.syn. 60 IN A 198.18.0.2")
	end()

	// It does not fail.
	questions, streams = first.Left()
	if h, err = first.Lend(); err != nil {
		t.Fatal(err)
	}
	if _, err := New(Options{Dir: dir, Pool4: pool4, Pool6: pool6, Decide: decide}); err == nil {
		t.Fatal("the directory is not locked")
	}
	var seen asked
	local := startResolver(t, "local", &seen)
	var d net.Dialer
	second := newServer(t, Options{Dir: dir, Taken: h, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return d.DialContext(ctx, network, local)
	}})
	h.Dir.Close()
	first.Release()
	end = begin(second, questions, streams)
	hears("udp", "NOERROR | a.real. 300 IN A 192.0.2.80")
	hears("tcp", "NOERROR | b.real. 300 IN A 192.0.2.80")
	asks("rest", "d.syn.")
	hears("rest", "NOERROR | d.syn. 60 IN A 198.18.0.3")
	if name, ok := first.Lookup(netip.MustParseAddr("198.18.0.1")); !ok || name != "a.syn" {
		t.Errorf("the first knows no longer what its flows need: %q", name)
	}
	first.Unpin(netip.MustParseAddr("198.18.0.1"))
	end()

	// What the second gave is in the file, behind what the first did.
	b, err := os.ReadFile(dir + "/" + logName)
	if err != nil {
		t.Fatal(err)
	}
	tab := newTable(100, 100)
	if good := tab.load(b[len(logHeader):]); good != len(b)-len(logHeader) || tab.size != 3 || string(tab.name(3)) != "d.syn" {
		t.Errorf("%d of %d bytes are good, %d names", good, len(b), tab.size)
	}
}
