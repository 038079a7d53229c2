package gateway_test

import (
	"fmt"
	"log/slog"
	"net/netip"
	"testing"

	"github.com/tproxyd/tproxyd/internal/socksserver"
	"github.com/tproxyd/tproxyd/pkg/relay"
	"github.com/tproxyd/tproxyd/pkg/socks"
)

// What a server says is what the client is told (RFC 1928 section 6, RFC 792).
func TestUDPServerRefuses(t *testing.T) {
	const rules = "SERVER far $S\nSOCKD5 @=far *"
	for _, c := range []struct {
		name  string
		fault socksserver.Fault
		udp   socksserver.UDP
		rules string
		want  relay.Refusal
	}{
		{"general failure", socksserver.Fault{Reply: byte(socks.GeneralFailure)}, socksserver.UDP{}, rules, relay.RefusePort},
		{"not allowed", socksserver.Fault{Reply: byte(socks.NotAllowed)}, socksserver.UDP{}, rules, relay.RefuseProhibited},
		{"network unreachable", socksserver.Fault{Reply: byte(socks.NetworkUnreachable)}, socksserver.UDP{}, rules, relay.RefuseNet},
		{"host unreachable", socksserver.Fault{Reply: byte(socks.HostUnreachable)}, socksserver.UDP{}, rules, relay.RefuseHost},
		{"connection refused", socksserver.Fault{Reply: byte(socks.ConnectionRefused)}, socksserver.UDP{}, rules, relay.RefusePort},
		{"TTL expired", socksserver.Fault{Reply: byte(socks.TTLExpired)}, socksserver.UDP{}, rules, relay.RefuseHost},
		{"command not supported", socksserver.Fault{}, socksserver.UDP{Refuse: byte(socks.CommandNotSupported)}, rules, relay.RefusePort},
		{"closes, as ssh -D", socksserver.Fault{}, socksserver.UDP{HangUp: true}, rules, relay.RefusePort},
		{"no SOCKS at all", socksserver.Fault{Garbage: socksserver.AtGreeting}, socksserver.UDP{}, rules, relay.RefusePort},
		{"nobody there", socksserver.Fault{}, socksserver.UDP{}, "SERVER far $CLOSED\nSOCKD5 @=far *", relay.RefusePort},
		{"udp=off", socksserver.Fault{}, socksserver.UDP{}, "SERVER far $S udp=off\nSOCKD5 @=far *", relay.RefusePort},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := newUDPLab(t, slog.LevelInfo, c.fault, c.udp, c.rules)
			l.names.owner[netip.MustParseAddr(wwwAt)] = "www.example.org"
			for _, dst := range []string{l.to(realAt), l.to(wwwAt)} {
				l.put(clientAt, dst, "one", "two")
				l.refuses(dst, c.want)
				l.refuses(dst, c.want)
			}
			// The client hears of it before the outlet has ended.
			eventually(t, "four refusals, and nothing else is left", func() bool {
				s := l.packets.Stats()
				return s.Refused == 4 && s.Outlets == 0 && s.Sockets == 0 && s.Associations == 0
			})
			l.ends()
		})
	}
}

// The next server of the list carries what the first one cannot.
func TestUDPNextServer(t *testing.T) {
	l := newUDPLab(t, slog.LevelInfo, socksserver.Fault{}, socksserver.UDP{}, "DENY *")
	l.lab.udp = socksserver.UDP{Refuse: 7}
	without := l.startSocks(socksserver.Fault{})
	l.lab.udp = socksserver.UDP{}
	with := l.startSocks(socksserver.Fault{})
	l.Swap(l.plan(socksserver.Fault{}, "SERVER off "+without+" udp=off", "SERVER down $CLOSED", "SERVER without "+without, "SERVER with "+with, "SOCKD5 @=off,down,without,with *"))
	for i := range 3 {
		l.echoes(fmt.Sprintf("10.7.0.1:%d", 4000+i), l.to(realAt), "hello")
	}
	if c := l.servers[1].Counts(); c.Total != 3 {
		t.Errorf("%+v", c)
	}
	l.ends()
}

// A session keeps the server that was drawn for it as long as it lives, also
// after a reload (R13), and finds it again when its association has ended.
func TestUDPKeepsServer(t *testing.T) {
	l := newUDPLab(t, slog.LevelInfo, socksserver.Fault{}, socksserver.UDP{}, "DENY *")
	rules := []string{
		"SERVER a " + l.startSocks(socksserver.Fault{}), "SERVER b " + l.startSocks(socksserver.Fault{}),
		"SOCKD5 @=a,b 127.20.0.0/16 balance=random",
	}
	l.Swap(l.plan(socksserver.Fault{}, rules...))
	total := func() (a, b int) { return l.servers[0].Counts().Total, l.servers[1].Counts().Total }
	drawn := [2]int{}
	for i := range 12 {
		client := fmt.Sprintf("10.7.0.1:%d", 4000+i)
		before, _ := total()
		l.echoes(client, l.to(realAt), "hello")
		after, _ := total()
		server := 1 - (after - before)
		drawn[server]++
		for k := range 3 {
			if k > 0 {
				l.Swap(l.plan(socksserver.Fault{}, rules...))
				l.packets.Invalidate()
			}
			a, b := total()
			l.echoes(client, l.to(realAt), "the association lives")
			if c, d := total(); a != c || b != d {
				t.Fatal("a reload made another association")
			}
			l.servers[0].EndAssociations()
			l.servers[1].EndAssociations()
			eventually(t, "the outlet ends", func() bool { return l.packets.Stats().Outlets == 0 })
			l.echoes(client, l.to("127.20.0.2"), "again")
			c, d := total()
			if [2]int{c - a, d - b} != [2]int{1 - server, server} {
				t.Fatalf("session %d was at server %d, and then at the other", i, server)
			}
		}
	}
	if drawn[0] == 0 || drawn[1] == 0 {
		t.Errorf("drawn %d and %d times", drawn[0], drawn[1])
	}
	l.ends()
}

// A reload that takes a destination away ends it at once, with its association.
func TestUDPReload(t *testing.T) {
	l := newUDPLab(t, slog.LevelInfo, socksserver.Fault{}, socksserver.UDP{}, "SERVER far $S", "SOCKD5 @=far *")
	l.echoes(clientAt, l.to(realAt), "hello")
	l.Swap(l.plan(socksserver.Fault{}, "DENY *"))
	l.packets.Invalidate()
	eventually(t, "the association ends", func() bool { return l.servers[0].Counts().Alive == 0 })
	l.put(clientAt, l.to(realAt), "more")
	l.refuses(l.to(realAt), relay.RefuseProhibited)
	l.Swap(l.plan(socksserver.Fault{}, "DIRECT *"))
	l.packets.Invalidate()
	l.echoes(clientAt, l.to(realAt), "directly")
	if c := l.servers[0].Counts(); c.Total != 1 || c.Up != 1 {
		t.Errorf("%+v", c)
	}
	l.ends()
}

// A session has one line: at debug, or at info if a rule of it says log.
func TestUDPLog(t *testing.T) {
	rules := []string{"SERVER far $S", "DENY 127.20.0.2 log", "DENY 127.20.0.3", "SOCKD5 @=far *.example.org log", "SOCKD5 @=far *"}
	for _, level := range []slog.Level{slog.LevelDebug, slog.LevelInfo} {
		l := newUDPLab(t, level, socksserver.Fault{}, socksserver.UDP{}, rules...)
		l.names.owner[netip.MustParseAddr(wwwAt)] = "www.example.org"
		l.echoes("10.7.0.1:1", l.to(realAt), "hello")
		l.echoes("10.7.0.1:2", l.to(wwwAt), "hello")
		for i, dst := range []string{"127.20.0.2", "127.20.0.3"} {
			l.put(fmt.Sprintf("10.7.0.1:%d", 3+i), l.to(dst), "hello")
			l.refuses(l.to(dst), relay.RefuseProhibited)
		}
		l.ends()
		got := map[string]map[string]any{}
		for len(l.log.flows) > 0 {
			line := <-l.log.flows
			got[fmt.Sprint(line["src"])] = line
		}
		for src, want := range map[string]string{
			"10.7.0.1:1": "DEBUG session 127.20.0.1 host <nil> rules socks.cnf:5 upstream far up 5 down 5",
			"10.7.0.1:2": "INFO session 127.198.0.7 host www.example.org rules socks.cnf:4 upstream far up 5 down 5",
			"10.7.0.1:3": "INFO session 127.20.0.2 host <nil> rules socks.cnf:2 upstream <nil> up 5 down 0",
			"10.7.0.1:4": "DEBUG session 127.20.0.3 host <nil> rules socks.cnf:3 upstream <nil> up 5 down 0",
		} {
			x := got[src]
			delete(got, src)
			if level == slog.LevelInfo && want[:4] != "INFO" {
				if x != nil {
					t.Errorf("%v at info", x)
				}
				continue
			}
			if x == nil || x["dur"] == nil {
				t.Errorf("no line of %s: %v", src, x)
				continue
			}
			line := fmt.Sprintf("%v %v %v host %v rules %v upstream %v up %v down %v", x["level"], x["msg"],
				netip.MustParseAddrPort(x["dst"].(string)).Addr(), x["host"], x["rules"], x["upstream"], x["up"], x["down"])
			if line != want {
				t.Errorf("%s, want %s", line, want)
			}
		}
		if len(got) != 0 {
			t.Errorf("more lines: %v", got)
		}
	}
}
