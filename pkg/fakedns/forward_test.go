package fakedns

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/miekg/dns"
)

func TestForwardFailover(t *testing.T) {
	const real, first, syn = "NOERROR | a.real. 300 IN A 192.0.2.80", "NOERROR | a.first. 300 IN A 192.0.2.80", "NOERROR | a.first. 60 IN A 198.18.0.1"
	type handler = func(string, *dns.Msg) *dns.Msg
	tests := []struct {
		name     string
		question string
		h        []handler // of the resolvers; nil refuses connections
		want     string
		took     time.Duration
	}{
		{"good", "a.real.", []handler{byZone, silence}, real, 0},
		{"silent, good", "a.real.", []handler{silence, byZone}, real, tryTimeout},
		{"closed, good", "a.real.", []handler{nil, byZone}, real, 0},
		{"failing, good", "a.real.", []handler{failing, byZone}, real, 0},
		{"failing, silent", "a.real.", []handler{failing, silence}, "SERVFAIL", tryTimeout},
		{"all closed", "a.real.", []handler{nil, nil}, "SERVFAIL", 0},
		{"all silent", "a.real.", []handler{silence, silence}, "SERVFAIL", 5 * time.Second},
		{"one, silent", "a.real.", []handler{silence}, "SERVFAIL", 2 * tryTimeout},
		{"none", "a.real.", []handler{}, "SERVFAIL", 0},
		{"answers to other questions", "a.real.", []handler{func(_ string, req *dns.Msg) *dns.Msg {
			r := zone(req)
			r.Id++
			return r
		}, func(_ string, req *dns.Msg) *dns.Msg {
			r := zone(req)
			r.Question[0].Name = "b.real."
			return r
		}, byZone}, real, 2 * tryTimeout},
		{"cut by UDP, good by TCP", "a.real.", []handler{func(network string, req *dns.Msg) *dns.Msg {
			r := zone(req)
			if network == "udp" {
				r.Truncated, r.Answer = true, nil
			}
			return r
		}}, real, 0},
		{"cut by UDP, silent by TCP", "a.real.", []handler{func(network string, req *dns.Msg) *dns.Msg {
			if network == "tcp" {
				return nil
			}
			r := zone(req)
			r.Truncated = true
			return r
		}}, "SERVFAIL", 5 * time.Second},
		{"local first, good", "a.first.", []handler{byZone}, first, 0},
		{"local first, silent", "a.first.", []handler{silence}, syn, 2 * tryTimeout},
		{"local first, all silent", "a.first.", []handler{silence, silence}, syn, 5 * time.Second},
		{"local first, failing", "a.first.", []handler{failing}, syn, 0},
		{"local first, none", "a.first.", []handler{}, syn, 0},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := &fakeNet{at: map[string]func(string, *dns.Msg) *dns.Msg{}}
				list := []netip.AddrPort{}
				for i, h := range tt.h {
					list = append(list, []netip.AddrPort{resolver1, resolver2, resolver3}[i])
					f.at[list[i].String()] = h
				}
				s := newServer(t, Options{Dial: f.Dial, Resolvers: list})
				began := time.Now()
				if got := text(query(t, s, client, new(dns.Msg).SetQuestion(tt.question, dns.TypeA))); got != tt.want {
					t.Errorf("got %s, want %s; asked %q", got, tt.want, f.take())
				}
				if took := time.Since(began); took != tt.took {
					t.Errorf("took %v, want %v", took, tt.took)
				}
			})
		})
	}
}

func TestForwardCache(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeNet{at: map[string]func(string, *dns.Msg) *dns.Msg{resolver1.String(): byZone}}
		s := newServer(t, Options{Dial: f.Dial})
		do := new(dns.Msg).SetQuestion("a.real.", dns.TypeA).SetEdns0(1232, true)
		steps := []struct {
			after time.Duration
			req   *dns.Msg
			want  string
			asked int
		}{
			{0, new(dns.Msg).SetQuestion("a.real.", dns.TypeA), "NOERROR | a.real. 300 IN A 192.0.2.80", 1},
			{100 * time.Second, new(dns.Msg).SetQuestion("a.real.", dns.TypeA), "NOERROR | a.real. 200 IN A 192.0.2.80", 0},
			{0, new(dns.Msg).SetQuestion("A.Real.", dns.TypeA), "NOERROR | a.real. 200 IN A 192.0.2.80", 0},
			{0, do, "NOERROR | a.real. 300 IN A 192.0.2.80", 1}, // may be another answer
			{199 * time.Second, new(dns.Msg).SetQuestion("a.real.", dns.TypeA), "NOERROR | a.real. 1 IN A 192.0.2.80", 0},
			{time.Second, new(dns.Msg).SetQuestion("a.real.", dns.TypeA), "NOERROR | a.real. 300 IN A 192.0.2.80", 1},
			// "No" for the time of the SOA's minimum, failures not at all.
			{0, new(dns.Msg).SetQuestion("missing.real.", dns.TypeA), "NXDOMAIN / SOA 300", 1},
			{119 * time.Second, new(dns.Msg).SetQuestion("missing.real.", dns.TypeA), "NXDOMAIN / SOA 181", 0},
			{time.Second, new(dns.Msg).SetQuestion("missing.real.", dns.TypeA), "NXDOMAIN / SOA 300", 1},
			{0, new(dns.Msg).SetQuestion("broken.real.", dns.TypeA), "SERVFAIL", 1},
			{0, new(dns.Msg).SetQuestion("broken.real.", dns.TypeA), "SERVFAIL", 1},
			{0, new(dns.Msg).SetQuestion("a.real.", dns.TypeAXFR), "NOERROR | a.real. 300 IN SOA ns. host. 1 2 3 4 120 | a.real. 300 IN A 192.0.2.80 | a.real. 300 IN SOA ns. host. 1 2 3 4 120", 1},
			{0, new(dns.Msg).SetQuestion("a.real.", dns.TypeAXFR), "NOERROR | a.real. 300 IN SOA ns. host. 1 2 3 4 120 | a.real. 300 IN A 192.0.2.80 | a.real. 300 IN SOA ns. host. 1 2 3 4 120", 1},
		}
		for i, st := range steps {
			time.Sleep(st.after)
			if got := text(query(t, s, client, st.req)); got != st.want {
				t.Errorf("step %d: got %s, want %s", i, got, st.want)
			}
			if got := f.take(); len(got) != st.asked {
				t.Errorf("step %d: asked %q, want %d", i, got, st.asked)
			}
		}
	})
}

func TestForwardCoalesces(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeNet{at: map[string]func(string, *dns.Msg) *dns.Msg{resolver1.String(): func(_ string, req *dns.Msg) *dns.Msg {
			time.Sleep(time.Second)
			return zone(req)
		}}}
		s := newServer(t, Options{Dial: f.Dial})
		var wg sync.WaitGroup
		for i := range 100 {
			wg.Go(func() {
				time.Sleep(time.Duration(i) * time.Millisecond)
				name := []string{"a.real.", "A.REAL."}[i%2]
				resp := query(t, s, client, new(dns.Msg).SetQuestion(name, dns.TypeA))
				if len(resp.Answer) != 1 || resp.Question[0].Name != name {
					t.Errorf("question %d: %v", i, resp)
				}
			})
		}
		wg.Wait()
		if got := f.take(); len(got) != 1 {
			t.Errorf("%d questions to the resolver, want 1", len(got))
		}
	})
}

// A stub on this host whom we asked asks in turn, and we take its question: it
// must reach the server that the stub meant, not the stub again (R12).
func TestForwardComesBack(t *testing.T) {
	own := netip.MustParseAddr("192.0.2.1")
	stub, behind := netip.MustParseAddrPort("127.0.0.53:53"), netip.MustParseAddrPort("198.51.100.53:53")
	for _, tt := range []struct {
		name      string
		resolvers []netip.AddrPort
		do        bool // the stub asks for more than it was asked
		want      []string
	}{
		{"stub", []netip.AddrPort{stub}, false, []string{"udp 127.0.0.53:53 a.real.", "udp 198.51.100.53:53 a.real."}},
		{"stub, and its own server", []netip.AddrPort{stub, behind}, false, []string{"udp 127.0.0.53:53 a.real.", "udp 198.51.100.53:53 a.real."}},
		// The changed question is another one; it makes one round more.
		{"stub that changes the question", []netip.AddrPort{stub}, true, []string{"udp 127.0.0.53:53 a.real.", "udp 127.0.0.53:53 a.real.", "udp 198.51.100.53:53 a.real."}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				var s *Server
				f := &fakeNet{at: map[string]func(string, *dns.Msg) *dns.Msg{
					stub.String(): func(_ string, req *dns.Msg) *dns.Msg {
						again := new(dns.Msg).SetQuestion(req.Question[0].Name, req.Question[0].Qtype)
						if tt.do {
							again.SetEdns0(1232, true)
						}
						resp := query(t, s, Asker{Addr: own, Server: behind}, again)
						resp.Id = req.Id
						return resp
					},
					behind.String(): byZone,
				}}
				s = newServer(t, Options{Dial: f.Dial, Resolvers: tt.resolvers, Own: func(a netip.Addr) bool { return a == own }})
				began := time.Now()
				if got := text(query(t, s, client, new(dns.Msg).SetQuestion("a.real.", dns.TypeA))); got != "NOERROR | a.real. 300 IN A 192.0.2.80" {
					t.Error(got)
				}
				if got := f.take(); !cmp.Equal(got, tt.want) || time.Since(began) != 0 {
					t.Errorf("asked %q in %v, want %q at once", got, time.Since(began), tt.want)
				}
			})
		})
	}
}

func TestSetResolvers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		slow := func(_ string, req *dns.Msg) *dns.Msg {
			time.Sleep(time.Second)
			return zone(req)
		}
		f := &fakeNet{at: map[string]func(string, *dns.Msg) *dns.Msg{resolver1.String(): slow, resolver2.String(): byZone}}
		remote := make(chan netip.AddrPort, 1)
		s := newServer(t, Options{Dial: f.Dial, DialRemote: func(ctx context.Context, _ string, _ Asker, r netip.AddrPort) (net.Conn, error) {
			remote <- r
			return f.Dial(ctx, "tcp", r.String())
		}})
		asks := func(name string, want ...string) {
			t.Helper()
			query(t, s, client, new(dns.Msg).SetQuestion(name, dns.TypeA))
			if got := f.take(); !slices.Equal(got, want) {
				t.Errorf("%s: asked %q, want %q", name, got, want)
			}
		}
		asks("a.real.", "udp 192.0.2.53:53 a.real.")
		asks("a.real.")
		var wg sync.WaitGroup
		wg.Go(func() { asks("b.real.", "udp 192.0.2.53:53 b.real.") })
		synctest.Wait() // the question is under way
		list := []netip.AddrPort{resolver2}
		s.SetResolvers(list)
		list[0] = resolver3 // the list is the caller's
		wg.Wait()
		asks("a.real.", "udp 192.0.2.54:53 a.real.")
		asks("b.real.", "udp 192.0.2.54:53 b.real.") // what the old one said afterwards is not kept either
		query(t, s, client, new(dns.Msg).SetQuestion("a.syn.", dns.TypeTXT))
		if r := <-remote; r != resolver2 {
			t.Errorf("remote resolver %v", r)
		}
		s.SetResolvers(nil)
		if got := text(query(t, s, client, new(dns.Msg).SetQuestion("c.real.", dns.TypeA))); got != "SERVFAIL" {
			t.Error(got)
		}
	})
}

// TestResolversOf: names that have resolvers of their own are asked of those
// alone, here and through a server.
func TestResolversOf(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeNet{at: map[string]func(string, *dns.Msg) *dns.Msg{resolver1.String(): byZone, resolver2.String(): byZone, resolver3.String(): failing}}
		remote := make(chan netip.AddrPort, 1)
		s := newServer(t, Options{
			Dial: f.Dial,
			ResolversOf: func(name string) []netip.AddrPort {
				if strings.HasPrefix(name, "own") {
					return []netip.AddrPort{resolver3, resolver2}
				}
				return nil
			},
			DialRemote: func(ctx context.Context, _ string, _ Asker, r netip.AddrPort) (net.Conn, error) {
				remote <- r
				return f.Dial(ctx, "tcp", resolver2.String())
			},
		})
		query(t, s, client, new(dns.Msg).SetQuestion("a.real.", dns.TypeA))
		query(t, s, client, new(dns.Msg).SetQuestion("OWN.real.", dns.TypeA))
		if got, want := f.take(), []string{"udp 192.0.2.53:53 a.real.", "udp 192.0.2.55:53 own.real.", "udp 192.0.2.54:53 own.real."}; !slices.Equal(got, want) {
			t.Errorf("asked %q, want %q", got, want)
		}
		if _, err := s.Resolve(t.Context(), "own2.real"); err != nil {
			t.Error(err)
		}
		if got := f.take(); slices.ContainsFunc(got, func(a string) bool { return strings.Contains(a, "192.0.2.53:") }) {
			t.Errorf("the host itself asked %q", got)
		}
		query(t, s, client, new(dns.Msg).SetQuestion("own.syn.", dns.TypeTXT))
		if r := <-remote; r != resolver3 {
			t.Errorf("remote resolver %v", r)
		}
	})
}

func TestRemoteResolvers(t *testing.T) {
	own := netip.MustParseAddr("192.0.2.54")
	tests := []struct {
		list []string
		a    string // whom the client asked
		want string
	}{
		{[]string{"192.0.2.53:53"}, "192.0.2.55:53", "[192.0.2.53:53]"},
		{[]string{"127.0.0.53:53", "192.0.2.54:53", "[::1]:53", "192.0.2.53:53"}, "192.0.2.55:53", "[192.0.2.53:53]"},
		{[]string{"127.0.0.53:53"}, "192.0.2.55:53", "[192.0.2.55:53]"},
		{nil, "192.0.2.54:53", "[]"},
		{nil, "127.0.0.1:53", "[]"},
		{nil, "", "[]"},
	}
	for _, tt := range tests {
		var list []netip.AddrPort
		for _, r := range tt.list {
			list = append(list, netip.MustParseAddrPort(r))
		}
		s := newServer(t, Options{Own: func(a netip.Addr) bool { return a == own }})
		s.SetResolvers(list)
		server, _ := netip.ParseAddrPort(tt.a)
		if got := fmt.Sprint(s.remoteResolvers("www.example.org", Asker{Server: server})); got != tt.want {
			t.Errorf("%v, asked %s: %s, want %s", tt.list, tt.a, got, tt.want)
		}
	}
}

func TestResolve(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := &fakeNet{at: map[string]func(string, *dns.Msg) *dns.Msg{resolver1.String(): byZone}}
		s := newServer(t, Options{Dial: f.Dial})
		got, err := s.Resolve(t.Context(), "a.syn")
		if fmt.Sprint(got) != "[192.0.2.80 2001:db8::80]" || err != nil {
			t.Errorf("%v, %v", got, err)
		}
		var e *net.DNSError
		if got, err := s.Resolve(t.Context(), "missing.syn"); !errors.As(err, &e) || !e.IsNotFound || len(got) != 0 {
			t.Errorf("%v, %v", got, err)
		}
		if _, err := s.Resolve(t.Context(), "silent.syn"); err == nil {
			t.Error("no error")
		}
		if s.Stats().Pool.Names != 0 {
			t.Error("made a name synthetic")
		}
	})
}
