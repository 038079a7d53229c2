package redirect

import (
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

// TestProgram: a socket's program is found by its path, by a link to it and by its
// last part, in both families and protocols, and not once it is closed.
func TestProgram(t *testing.T) {
	t.Parallel()
	if !MayFindPrograms() {
		t.Fatal("not root")
	}
	n := newNetns(t)
	r := n.open(Options{})
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(exe, link); err != nil {
		t.Fatal(err)
	}
	find := func(f flow.Flow, named ...string) string {
		t.Helper()
		if err := r.Program(&f, named); err != nil {
			t.Fatal(err)
		}
		return f.Program
	}
	for _, host := range []string{"127.0.0.1", "::1"} {
		n.do(func() {
			ln, err := net.Listen("tcp", net.JoinHostPort(host, "0"))
			if err != nil {
				t.Error(err)
				return
			}
			defer ln.Close()
			c, err := net.Dial("tcp", ln.Addr().String())
			if err != nil {
				t.Error(err)
				return
			}
			f := flow.Flow{Src: c.LocalAddr().(*net.TCPAddr).AddrPort(), Dst: ln.Addr().(*net.TCPAddr).AddrPort()}
			for _, named := range []string{exe, link, filepath.Base(exe)} {
				if got := find(f, "bash", named); got != named {
					t.Errorf("%s, named %s: %q", host, named, got)
				}
			}
			if got := find(f, "bash", "/usr/bin/"+filepath.Base(exe), filepath.Base(exe)+"x"); got != "" {
				t.Errorf("%s, not named: %q", host, got)
			}
			c.Close()
			f.Src = netip.AddrPortFrom(f.Src.Addr(), 1)
			if got := find(f, exe); got != "" {
				t.Errorf("%s, a socket that is not there: %q", host, got)
			}

			to := &net.UDPAddr{IP: net.ParseIP(host), Port: 9}
			for _, bound := range []bool{true, false} {
				var u *net.UDPConn
				if bound {
					u, err = net.DialUDP("udp", nil, to)
				} else {
					u, err = net.ListenUDP("udp", nil) // of both families, and to nobody
				}
				if err != nil {
					t.Error(err)
					return
				}
				from := u.LocalAddr().(*net.UDPAddr).AddrPort()
				f := flow.Flow{Network: flow.UDP, Src: netip.AddrPortFrom(to.AddrPort().Addr().Unmap(), from.Port()), Dst: netip.AddrPortFrom(to.AddrPort().Addr().Unmap(), 9)}
				if got := find(f, exe); got != exe {
					t.Errorf("UDP of %s, connected %v: %q", host, bound, got)
				}
				u.Close()
			}
		})
	}
}

func BenchmarkSearchProc(b *testing.B) {
	for b.Loop() {
		if _, err := SearchPrograms([]string{"/usr/bin/ssh", "nobody"}); err != nil {
			b.Fatal(err)
		}
	}
}
