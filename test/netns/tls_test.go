package netns_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tproxyd/tproxyd/internal/socksserver"
)

// certificate returns a key pair that is good for a name, and the certificate as
// a file has it.
func certificate(t testing.TB, name string) (tls.Certificate, string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}))
}

// TestServerTLS: a SOCKS server behind TLS carries flows of any length, in both
// directions and to their ends; the name in its certificate counts; its UDP is
// refused; what it carries survives a reload and ends with the daemon.
func TestServerTLS(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	cert, file := certificate(t, "proxy.example")
	var asked atomic.Int64
	s := &socksserver.Server{
		OnRequest: func(socksserver.Request) { asked.Add(1) },
		Resolve:   func(string) (netip.Addr, error) { return netip.MustParseAddr(outsideAt), nil },
	}
	s.Dial = func(_ context.Context, network, addr string) (net.Conn, error) {
		return w.socks1.dial(network, addr, 5*time.Second)
	}
	ln := tls.NewListener(w.socks1.listen(t, "tcp", socks1At+":1080"), &tls.Config{Certificates: []tls.Certificate{cert}})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go s.Serve(ctx, ln)

	const rules = "SERVER good 198.51.100.11:1080 tls sni=proxy.example\nSERVER other 198.51.100.11:1080 tls sni=other.example\n" +
		"SOCKD5 @=other * eq 8080\nSOCKD5 @=good *\n"
	d := newDaemon(t, w.gateway, settings{routes: rules, trust: w.gateway.file(t, "roots.pem", file, 0o644)})
	d.start(t)
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("tproxyd printed:\n%s", d.output())
		}
	})
	w.observe(t)
	w.client.curl(t, "http://www.example.org/tls").fetched(t, socks1Out, socks1Out6)
	before := asked.Load()
	w.client.curl(t, "http://www.example.org:8080/tls").refused(t)
	if asked.Load() != before {
		t.Error("a server whose certificate is for another name was asked")
	}

	// Much in both directions at once, then half-closed, over a reload.
	echo := w.outside.listen(t, "tcp", outsideAt+":7")
	go func() {
		for {
			c, err := echo.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); io.Copy(c, c); c.(*net.TCPConn).CloseWrite() }()
		}
	}()
	c, err := w.client.dial("tcp", outsideAt+":7", 5*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(30 * time.Second))
	sent := strings.Repeat("all that is said comes back. ", 100_000)
	go func() {
		io.WriteString(c, sent[:1000])
		d.reload(t)
		io.WriteString(c, sent[1000:])
		c.(*net.TCPConn).CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil || string(got) != sent {
		t.Errorf("%d of %d bytes came back: %v", len(got), len(sent), err)
	}

	u, err := w.client.dial("udp", outsideAt+":9000", time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	u.SetDeadline(time.Now().Add(5 * time.Second))
	u.Write([]byte("hello"))
	if _, err := u.Read(make([]byte, 16)); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("UDP: %v, want a refusal", err)
	}

	if c, err = w.client.dial("tcp", outsideAt+":7", 5*time.Second); err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(10 * time.Second))
	io.WriteString(c, "x")
	io.ReadFull(c, make([]byte, 1))
	d.stop(t)
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("a flow outlives its daemon")
	}
	if n, who := w.leaked(t); n != 0 {
		t.Errorf("%d packets leaked:\n%s", n, who)
	}
}
