package upstream

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"math/big"
	"net"
	"net/netip"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tproxyd/tproxyd/pkg/flow"
	"github.com/tproxyd/tproxyd/pkg/socks"
)

// heard collects what servers are told.
type heard struct {
	mu   sync.Mutex
	list []string
}

func (h *heard) add(s string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.list = append(h.list, s)
}

func (h *heard) take() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	l := h.list
	h.list = nil
	return l
}

// talks is says that keeps what it is told. Answers are to messages of any
// length, each read with one call.
func (h *heard) talks(answers ...string) behaviour {
	return func(context.Context) (net.Conn, error) {
		client, server := net.Pipe()
		go h.talk(server, answers...)
		return client, nil
	}
}

func (h *heard) talk(server net.Conn, answers ...string) {
	defer server.Close()
	b := make([]byte, 4096)
	for _, a := range answers {
		n, err := server.Read(b)
		if err != nil {
			return
		}
		h.add(string(b[:n]))
		if a == "EOF" {
			return
		}
		io.WriteString(server, a)
	}
	io.Copy(io.Discard, server)
}

const (
	greet5  = "\x05\x01\x00"
	ask5    = "\x05\x01\x00\x03\x0bexample.org\x01\xbb"
	chosen5 = "\x05\x00"
	granted = "\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00"
	grant4  = "\x00\x5a\x00\x00\x00\x00\x00\x00"
	reject4 = "\x00\x5b\x00\x00\x00\x00\x00\x00"
	http200 = "HTTP/1.1 200 OK\r\n\r\n"
)

// TestProtocols: what is said in each of them, alone and in chains.
func TestProtocols(t *testing.T) {
	v4, v4a := Socks4, Socks4A
	connectHTTP := func(to string) string { return "CONNECT " + to + " HTTP/1.1\r\nHost: " + to + "\r\n\r\n" }
	hop := func(p Protocol, via *Server) *Server {
		return &Server{Name: "s", Addr: serverA.Addr, Protocol: p, Via: via}
	}
	second := func(p Protocol, via *Server) *Server {
		return &Server{Name: "t", Addr: serverB.Addr, Protocol: p, Via: via}
	}
	named := &Server{Name: "n", Host: "p1.private", Addr: netip.AddrPortFrom(netip.Addr{}, 1080), Via: hop(Socks5, nil)}
	toB5 := "\x05\x01\x00\x01\x0a\x00\x00\x02\x00\x02"
	tests := []struct {
		name   string
		server *Server
		to     flow.Target
		does   []string
		want   []string
		err    error
	}{
		{"socks5", hop(Socks5, nil), target, []string{chosen5, granted}, []string{greet5, ask5}, nil},
		{"socks4", hop(v4, nil), flow.Target{Addr: netip.MustParseAddr("192.0.2.1"), Port: 80}, []string{grant4}, []string{"\x04\x01\x00\x50\xc0\x00\x02\x01\x00"}, nil},
		{"socks4 by name", hop(v4, nil), target, []string{grant4}, []string{"\x04\x01\x01\xbb\xc0\x00\x02\x07\x00"}, nil},
		{"socks4, IPv6", hop(v4, nil), flow.Target{Addr: netip.MustParseAddr("2001:db8::1"), Port: 80}, []string{grant4}, nil, socks.ErrNoIPv6},
		{"socks4a", hop(v4a, nil), target, []string{grant4}, []string{"\x04\x01\x01\xbb\x00\x00\x00\x01\x00example.org\x00"}, nil},
		{"socks4a refused", hop(v4a, nil), target, []string{reject4}, []string{"\x04\x01\x01\xbb\x00\x00\x00\x01\x00example.org\x00"}, socks.Rejected4},
		{"http", hop(HTTP, nil), target, []string{http200}, []string{connectHTTP("example.org:443")}, nil},
		{"http refused", hop(HTTP, nil), target, []string{"HTTP/1.1 403 No\r\n\r\n"}, []string{connectHTTP("example.org:443")}, socks.HTTPStatus(403)},
		{"socks5 > socks5", second(Socks5, hop(Socks5, nil)), target, []string{chosen5, granted, chosen5, granted}, []string{greet5, toB5, greet5, ask5}, nil},
		{"http > socks5", second(Socks5, hop(HTTP, nil)), target, []string{http200, chosen5, granted}, []string{connectHTTP("10.0.0.2:2"), greet5, ask5}, nil},
		{"socks5 > http", second(HTTP, hop(Socks5, nil)), target, []string{chosen5, granted, http200}, []string{greet5, toB5, connectHTTP("example.org:443")}, nil},
		{"socks4 > socks4a", second(v4a, hop(v4, nil)), target, []string{grant4, grant4}, []string{"\x04\x01\x00\x02\x0a\x00\x00\x02\x00", "\x04\x01\x01\xbb\x00\x00\x00\x01\x00example.org\x00"}, nil},
		{"a hop by name is the business of the hop before", named, target, []string{chosen5, granted, chosen5, granted}, []string{greet5, "\x05\x01\x00\x03\x0ap1.private\x04\x38", greet5, ask5}, nil},
		{"SOCKD: version 5", hop(SocksAny, nil), target, []string{chosen5, granted}, []string{greet5, ask5}, nil},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var h heard
				l := &lab{hosts: map[string]behaviour{addrA: h.talks(tt.does...)}}
				p := l.pool(t, Options{Resolve: func(context.Context, string) ([]netip.Addr, error) {
					return []netip.Addr{netip.MustParseAddr("2001:db8::7"), netip.MustParseAddr("192.0.2.7")}, nil
				}})
				c, err := p.Connect(t.Context(), &Group{Servers: []*Server{tt.server}}, Request{To: tt.to})
				if !errors.Is(err, tt.err) || tt.err == nil && err != nil {
					t.Fatalf("%v, want %v", err, tt.err)
				}
				if got := h.take(); strings.Join(got, "|") != strings.Join(tt.want, "|") {
					t.Errorf("said\n%q, want\n%q", got, tt.want)
				}
				if err == nil {
					c.Conn.Close()
				}
				if up(p, tt.server) == "" {
					t.Error("the server is bad")
				}
			})
		})
	}
}

// TestSocksAny: a server that knows only version 4 is asked in that, and from then
// on at once; one that was replaced is asked anew.
func TestSocksAny(t *testing.T) {
	for name, no5 := range map[string]string{"answers in version 4": reject4, "answers in version 0": "\x00\x5b", "hangs up": "EOF"} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var h heard
				l := &lab{hosts: map[string]behaviour{addrA: func(context.Context) (net.Conn, error) {
					client, server := net.Pipe()
					go func() {
						defer server.Close()
						b := make([]byte, 512)
						n, err := server.Read(b)
						if err != nil {
							return
						}
						h.add(string(b[:n]))
						if b[0] != 5 {
							io.WriteString(server, grant4)
							io.Copy(io.Discard, server)
						} else if no5 != "EOF" {
							io.WriteString(server, no5)
						}
					}()
					return client, nil
				}}}
				p := l.pool(t, Options{Resolve: func(context.Context, string) ([]netip.Addr, error) {
					return []netip.Addr{netip.MustParseAddr("192.0.2.7")}, nil
				}})
				s := &Server{Name: "s", Addr: serverA.Addr, Protocol: SocksAny}
				const ask = "\x04\x01\x01\xbb\xc0\x00\x02\x07\x00"
				for i, want := range []string{greet5 + "|" + ask, ask, ask} {
					if got := connect(t, p, s); got != "s" {
						t.Fatal(got)
					}
					if got := strings.Join(h.take(), "|"); got != want {
						t.Errorf("flow %d: said %q, want %q", i, got, want)
					}
				}
				if st := p.Status([]*Server{s})[0]; !st.Up || st.Faults != 0 || st.Protocol != "socks4" {
					t.Errorf("%+v", st)
				}
				l.set(addrA, says(chosen5, granted)) // replaced
				connect(t, p, s)
				if got := connect(t, p, s); got != "s" {
					t.Errorf("after its replacement: %s", got)
				}
			})
		})
	}
}

// TestChainFaults: what is wrong with one hop is not taken for an answer of the
// destination, nor is the next hop blamed alone.
func TestChainFaults(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		refused5 := "\x05\x05\x00\x01\x00\x00\x00\x00\x00\x00"
		l := &lab{hosts: map[string]behaviour{addrA: says(chosen5, refused5), addrC: replies(0)}}
		p := l.pool(t, Options{})
		first := &Server{Name: "a", Addr: serverA.Addr}
		chain := &Server{Name: "a>b", Addr: serverB.Addr, Via: first}
		if got := connect(t, p, chain, serverC); got != "c" {
			t.Errorf("%s: the second server refuses the first one, which is no answer for the flow", got)
		}
		if got := up(p, first, chain, serverC); got != "a c" {
			t.Errorf("up: %s", got)
		}
		l.set(addrA, refuses)
		time.Sleep(time.Hour)
		connect(t, p, chain)
		if got := up(p, first, chain, serverC); got != "c" {
			t.Errorf("up with the first one down: %s", got)
		}
		_, _, err := carry(t.Context(), p, chain)
		if want := "upstream: a>b (10.0.0.2:2): by way of a: connection refused"; err == nil || err.Error() != want {
			t.Errorf("%v, want %s", err, want)
		}
	})
}

// TestTLS has a server behind TLS, whose certificate is looked at.
func TestTLS(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	long := time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "proxy"}, DNSNames: []string{"proxy.example"}, NotAfter: long, IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	cert, _ := x509.ParseCertificate(der)
	roots := x509.NewCertPool()
	roots.AddCert(cert)
	serverConfig := &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
	synctest.Test(t, func(t *testing.T) {
		var h heard
		l := &lab{hosts: map[string]behaviour{addrA: func(context.Context) (net.Conn, error) {
			client, server := net.Pipe()
			go h.talk(tls.Server(server, serverConfig), chosen5, granted, "bye")
			return client, nil
		}, addrB: refuses}}
		p := l.pool(t, Options{})
		s := &Server{Name: "s", Addr: serverA.Addr, TLS: &tls.Config{ServerName: "proxy.example", RootCAs: roots}}
		conn, _, err := carry(t.Context(), p, s)
		if err != nil {
			t.Fatal(err)
		}
		io.WriteString(conn, "hello")
		b := make([]byte, 16)
		if n, err := conn.Read(b); string(b[:n]) != "bye" {
			t.Errorf("%q, %v", b[:n], err)
		}
		conn.Close()
		if got := strings.Join(h.take(), "|"); got != greet5+"|"+ask5+"|hello" {
			t.Errorf("said %q", got)
		}
		other := &Server{Name: "other", Addr: serverA.Addr, TLS: &tls.Config{ServerName: "other.example", RootCAs: roots}}
		_, _, err = carry(t.Context(), p, other)
		if err == nil || !strings.Contains(err.Error(), "TLS: ") || up(p, other) != "" {
			t.Errorf("another name in the certificate: %v", err)
		}
		if len(h.take()) != 0 {
			t.Error("something was said to a server that is not the one")
		}
		if _, err := p.Associate(t.Context(), &Group{Servers: []*Server{s}}, Request{To: target}, nil); !errors.Is(err, ErrNoUDP) {
			t.Errorf("UDP: %v", err)
		}
	})
}
