package upstream

import (
	"context"
	"fmt"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/tproxyd/tproxyd/pkg/flow"
	"github.com/tproxyd/tproxyd/pkg/socks"
)

// TestProbeAuth: what a server is said to want, whether or not it lets this host
// in.
func TestProbeAuth(t *testing.T) {
	alice := &socks.Auth{Username: "alice", Password: "hunter2"}
	for _, test := range []struct {
		name     string
		protocol Protocol
		auth     *socks.Auth
		answers  []behaviour // by connection
		want     string
	}{
		{"none", Socks5, nil, []behaviour{says(chosen5), says("\x05\x00")}, "greeting yes, authentication yes none"},
		{"a password", Socks5, alice, []behaviour{says("\x05\x02", "\x01\x00"), says("\x05\x02")}, "greeting yes, authentication yes user name and password"},
		{"a password in vain", Socks5, alice, []behaviour{says("\x05\x02", "\x01\x00"), says("\x05\x00")}, "greeting yes, authentication yes user name and password; if all are offered it picks none"},
		{"a wrong one", Socks5, alice, []behaviour{says("\x05\x02", "\x01\x01"), says("\x05\x02")}, "greeting no, authentication no it wants user name and password, and not this one"},
		{"missing", Socks5, nil, []behaviour{says("\x05\xff"), says("\x05\x02")}, "greeting no, authentication no it wants user name and password; given is none"},
		{"GSSAPI", Socks5, alice, []behaviour{says("\x05\xff"), says("\x05\x01")}, "greeting no, authentication no it wants GSSAPI; given is user name and password"},
		{"another", Socks5, nil, []behaviour{says("\x05\xff"), says("\x05\xff")}, "greeting no, authentication no the server accepts none of the offered authentication methods"},
		{"HTTP", HTTP, nil, []behaviour{says(), says(http200)}, "greeting yes, authentication yes none"},
		{"HTTP, wrong", HTTP, alice, []behaviour{says(), says("HTTP/1.1 407 No\r\n\r\n")}, "greeting yes, authentication no the proxy answers 407 Proxy Authentication Required"},
		{"HTTP, as tinyproxy", HTTP, alice, []behaviour{says(), says("HTTP/1.0 401 No\r\n\r\n")}, "greeting yes, authentication no the proxy answers 401 Unauthorized"},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := server("s", 1)
				s.Protocol, s.Auth = test.protocol, test.auth
				n := -1
				l := &lab{hosts: map[string]behaviour{s.Addr.String(): func(ctx context.Context) (net.Conn, error) {
					if n++; n < len(test.answers) {
						return test.answers[n](ctx)
					}
					return refuses(ctx)
				}}}
				var got []string
				for _, a := range l.pool(t, Options{}).Probe(t.Context(), s) {
					text := fmt.Sprint(a.What, " ", map[bool]string{true: "yes", false: "no"}[a.Has], " ", a.Answer)
					if a.What == "greeting" {
						text = strings.Join(strings.Fields(text)[:2], " ")
					}
					got = append(got, text)
					if strings.Contains(text, alice.Username) || strings.Contains(text, alice.Password) {
						t.Errorf("it shows a secret: %s", text)
					}
				}
				if all := strings.Join(got[:min(2, len(got))], ", "); all != test.want {
					t.Errorf("%s, want %s", all, test.want)
				}
			})
		})
	}
}

// TestProbeBind: who listens says where.
func TestProbeBind(t *testing.T) {
	for reply, want := range map[string]string{
		"\x05\x00\x00\x01\x0a\x00\x00\x07\x1f\x90": "true listens at 10.0.0.7:8080",
		"\x05\x00\x00\x01\x00\x00\x00\x00\x00\x00": "false it does not say at which address it listens",
		"\x05\x00\x00\x03\x01a\x1f\x90":            "false it does not say at which address it listens",
		"\x05\x07\x00\x01\x00\x00\x00\x00\x00\x00": "false command not supported",
	} {
		synctest.Test(t, func(t *testing.T) {
			s := server("s", 1)
			l := &lab{hosts: map[string]behaviour{s.Addr.String(): says(chosen5, reply)}}
			a := l.pool(t, Options{}).probeBind(t.Context(), s, Socks5)
			if got := fmt.Sprint(a.Has, " ", a.Answer); got != want {
				t.Errorf("%q: %s, want %s", reply, got, want)
			}
		})
	}
}

// TestLacksIPv6: who does not know IPv6 addresses is asked for one after the others
// for a while, and for names and IPv4 as before.
func TestLacksIPv6(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := server("a", 1), server("b", 2)
		l := &lab{hosts: map[string]behaviour{a.Addr.String(): replies(8), b.Addr.String(): replies(0)}}
		p := l.pool(t, Options{})
		six := flow.Target{Addr: serverC.Addr.Addr(), Port: 443}
		ask := func(to flow.Target, want string, servers ...*Server) {
			t.Helper()
			c, err := p.Connect(t.Context(), &Group{Servers: servers}, Request{To: to})
			if err == nil {
				c.Done()
				c.Conn.Close()
			}
			if got := l.asked(); got != want {
				t.Errorf("%v: asked %s, want %s", to, got, want)
			}
		}
		justA, justB := a.Addr.String(), b.Addr.String()
		ask(six, justA+" "+justB, a, b)
		ask(six, justB, a, b)
		ask(target, justA+" "+justB, a, b) // whatever it says of names, they differ
		ask(target, justA+" "+justB, a, b)
		if s := p.Status([]*Server{a})[0]; s.IPv6 != "no" || !s.Up {
			t.Errorf("%+v", s)
		}
		ask(six, justA, a) // there is no other
		l.set(justB, refuses)
		ask(six, justB+" "+justA, a, b)
		l.set(justA, replies(0))
		time.Sleep(p.options.Load().BadExpire)
		l.asked() // b by probes
		ask(six, justA, a, b)
		if s := p.Status([]*Server{a})[0]; s.IPv6 != "" {
			t.Errorf("%+v", s)
		}
	})
}
