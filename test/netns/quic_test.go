package netns_test

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/miekg/dns"
	"github.com/quic-go/quic-go"
	"github.com/quic-go/quic-go/http3"
)

// Topology: world, and at the outside a web server that speaks HTTP/3 over UDP
// and HTTP/2 over TCP on port 443, as those of the Internet do:
//
//	client ==QUIC==> gateway ==UDP ASSOCIATE==> danted ----> outside:443/udp
//	client --TLS---> gateway --CONNECT-------> microsocks -> outside:443/tcp

// secureWeb is such a server, known as *.example.org.
type secureWeb struct {
	authority *x509.CertPool
	certFile  string // for the client's curl
	big       []byte // the page /big
}

// startSecureWeb serves both on each address of the outside.
func (w *world) startSecureWeb(t testing.TB, addrs ...string) *secureWeb {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "outside"}, DNSNames: []string{"*.example.org"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	s := &secureWeb{authority: x509.NewCertPool(), big: make([]byte, 2<<20)}
	rand.Read(s.big)
	s.authority.AddCert(leaf)
	s.certFile = w.client.file(t, "authority.pem", string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})), 0o644)
	config := &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{der}, PrivateKey: key}}}
	page := http.HandlerFunc(func(rw http.ResponseWriter, r *http.Request) {
		if r.URL.Path == "/big" {
			rw.Write(s.big)
			return
		}
		body, _ := io.ReadAll(r.Body)
		fmt.Fprintf(rw, "%s %d from=%s\n", r.Proto, len(body), netip.MustParseAddrPort(r.RemoteAddr).Addr())
	})
	for _, a := range addrs {
		at := net.JoinHostPort(a, "443")
		h3 := &http3.Server{TLSConfig: http3.ConfigureTLSConfig(config), Handler: page}
		go h3.Serve(w.outside.listenPacket(t, "udp", at))
		h2 := &http.Server{TLSConfig: config, Handler: page}
		go h2.ServeTLS(w.outside.listen(t, "tcp", at), "", "")
		t.Cleanup(func() { h3.Close(); h2.Close() })
	}
	return s
}

// overQUIC returns a client on the host that speaks HTTP/3 alone, from a socket
// of its own to the address that name has for it.
func (s *secureWeb) overQUIC(t testing.TB, h *host, qtype uint16) *http.Client {
	t.Helper()
	transport := &http3.Transport{
		TLSClientConfig: &tls.Config{RootCAs: s.authority},
		Dial: func(ctx context.Context, addr string, tc *tls.Config, qc *quic.Config) (*quic.Conn, error) {
			name, port, _ := strings.Cut(addr, ":")
			a, err := h.lookup(insideNS, name, qtype)
			if err != nil {
				return nil, err
			}
			to, err := net.ResolveUDPAddr("udp", net.JoinHostPort(a.String(), port))
			if err != nil {
				return nil, err
			}
			return quic.Dial(ctx, h.socket(t, a.String()), to, tc, qc)
		},
	}
	t.Cleanup(func() { transport.Close() })
	return &http.Client{Transport: transport, Timeout: 10 * time.Second}
}

func TestQUIC(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	w.dante(t)
	web := w.startSecureWeb(t, outsideAt, outsideAt6)
	serve(t, w.gateway, settings{local: true, routes: "SERVER one 198.51.100.11\nSOCKD5 @=one *\n"})
	w.observe(t)
	for _, h := range []*host{w.client, w.gateway} {
		for _, qtype := range []uint16{dns.TypeA, dns.TypeAAAA} {
			client := web.overQUIC(t, h, qtype)
			for range 2 { // the second one over the same connection
				r, err := client.Post("https://www.example.org/", "text/plain", bytes.NewReader(web.big[:200<<10]))
				if err != nil {
					t.Fatalf("%s, %s: %v", h.name, dns.TypeToString[qtype], err)
				}
				b, err := io.ReadAll(r.Body)
				r.Body.Close()
				got := strings.TrimSpace(string(b))
				if want := "HTTP/3.0 204800 from="; got != want+socks1Out && got != want+socks1Out6 {
					t.Errorf("%s, %s: %q %v", h.name, dns.TypeToString[qtype], got, err)
				}
			}
			r, err := client.Get("https://www.example.org/big")
			if err != nil {
				t.Fatalf("%s, %s: %v", h.name, dns.TypeToString[qtype], err)
			}
			b, err := io.ReadAll(r.Body)
			r.Body.Close()
			if !bytes.Equal(b, web.big) {
				t.Errorf("%s, %s: %d of %d bytes, or others: %v", h.name, dns.TypeToString[qtype], len(b), len(web.big), err)
			}
		}
	}
	if n, who := w.leaked(t); n != 0 {
		t.Errorf("%d packets leaked:\n%s", n, who)
	}
}

// TestQUICRefused: where UDP has no way through, or is denied, a client learns
// of it at once, and gets the page over TCP.
func TestQUICRefused(t *testing.T) {
	t.Parallel()
	for _, test := range []struct {
		name  string
		start func(t *testing.T, w *world)
		rules string
		other bool // UDP to other ports is carried
	}{
		{"microsocks", func(t *testing.T, w *world) { startMicrosocks(t, w.socks1, socks1At+":1080") }, "SOCKD5 @=one *\n", false},
		{"DENY", func(t *testing.T, w *world) { w.dante(t) }, "DENY * 443 proto=udp reject=icmp\nSOCKD5 @=one *\n", true},
		{"udp=deny", func(t *testing.T, w *world) { w.dante(t) }, "SOCKD5 @=one * 443 udp=deny\nSOCKD5 @=one *\n", true},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			w := newWorld(t)
			test.start(t, w)
			web := w.startSecureWeb(t, outsideAt, outsideAt6)
			w.outside.udpServices(t, outsideAt, outsideAt6)
			serve(t, w.gateway, settings{local: true, routes: "SERVER one 198.51.100.11\n" + test.rules})
			w.observe(t)
			for _, h := range []*host{w.client, w.gateway} {
				for _, to := range []string{
					outsideAt, outsideAt6,
					h.mustLookup(t, insideNS, "www.example.org", dns.TypeA).String(),
					h.mustLookup(t, insideNS, "www.example.org", dns.TypeAAAA).String(),
				} {
					for _, port := range []string{"443", "7"} {
						c := h.connected(t, net.JoinHostPort(to, port))
						if port == "7" && test.other {
							echoed(t, c, 1000)
							continue
						}
						refusedAtOnce(t, h.name+": UDP to "+c.RemoteAddr().String(), c)
					}
				}
				for _, family := range []string{"-4", "-6"} {
					p := h.curl(t, "https://www.example.org/", family, "--cacert", web.certFile).fetched(t, socks1Out, socks1Out6)
					if !strings.HasPrefix(p.body, "HTTP/2.0 ") {
						t.Errorf("over TCP: %q", p.body)
					}
				}
			}
			if n, who := w.leaked(t); n != 0 {
				t.Errorf("%d packets leaked:\n%s", n, who)
			}
		})
	}
}
