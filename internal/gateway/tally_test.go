package gateway_test

import (
	"fmt"
	"log/slog"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/tproxyd/tproxyd/internal/socksserver"
	"github.com/tproxyd/tproxyd/pkg/relay"
)

// counted spells what each rule has counted.
func (l *lab) counted() string {
	var b strings.Builder
	for _, r := range l.Rules() {
		words := "gone"
		if r.Rule != nil {
			words = r.Rule.Text
		}
		if r.Flows+r.Up+r.Down > 0 {
			fmt.Fprintf(&b, "%s: %d %d %d\n", words, r.Flows, r.Up, r.Down)
		}
	}
	return b.String()
}

// TestTallies: a rule's count goes on over reloads that move it, what a rule has
// counted that is gone is not lost, and all of them make up what the gateway has
// carried, at every moment.
func TestTallies(t *testing.T) {
	l := newLab(t, slog.LevelDebug, socksserver.Fault{}, "DENY 127.20.0.2", "DIRECT 127.20.0.0/16", "DIRECT *")
	want := func(what string, lines ...string) {
		t.Helper()
		if got, want := l.counted(), strings.Join(lines, "\n")+"\n"; got != want {
			t.Errorf("%s: counted\n%swant\n%s", what, got, want)
		}
		s, up := l.Stats(), uint64(0)
		for _, r := range l.Rules() {
			up += r.Up
		}
		if up != s.Up {
			t.Errorf("%s: the rules have %d bytes up, all of them %d", what, up, s.Up)
		}
	}
	wantReset(t, l.connect("127.20.0.2"))
	c := l.connect(realAt)
	echoes(t, c, "hello")
	<-l.handled
	<-l.handled
	want("a flow lives", "DENY 127.20.0.2: 1 0 0", "DIRECT 127.20.0.0/16: 1 5 5")

	old := l.Plan()
	l.Swap(l.plan(socksserver.Fault{}, "DIRECT 127.20.0.0/16", "DENY 127.20.0.2"))
	want("in another order", "DIRECT 127.20.0.0/16: 1 5 5", "DENY 127.20.0.2: 1 0 0")
	l.Swap(old)
	want("and back", "DENY 127.20.0.2: 1 0 0", "DIRECT 127.20.0.0/16: 1 5 5")

	l.Swap(l.plan(socksserver.Fault{}, "DIRECT *"))
	echoes(t, c, "again")
	want("its rule is gone", "gone: 2 10 10")
	finish(t, c)
	eventually(t, "the flow has ended", func() bool { return l.Stats().Live == 0 })
	want("it has ended", "gone: 2 10 10")
}

// TestUDPFlows: flows of UDP are told as those of TCP are.
func TestUDPFlows(t *testing.T) {
	l := newLab(t, slog.LevelDebug, socksserver.Fault{}, "SERVER one $S", "SERVER two $S", "SOCKD5 @=one,two *")
	l.names.owner[pool.Addr().Next()] = "www.example.org"
	dst, client := netip.MustParseAddrPort(pool.Addr().Next().String()+":443"), netip.MustParseAddrPort("[::ffff:127.0.0.9]:1234")
	v := l.DecideUDP(client, dst, 1)
	defer v.Release()
	v.Up.Add(7)
	via := l.Plan().Servers()[1]
	got := l.UDPFlows([]relay.UDPFlow{
		{ID: 9, Client: client, Dst: dst, Start: time.Now(), Why: v.Why, Via: via, UDPTraffic: relay.UDPTraffic{Up: 7}},
		{ID: 3, Client: client, Dst: dst, Start: time.Now()},
	})
	f := got[1]
	if got[0].ID != 3 || f.ID != 9 || f.Network != "udp" || f.Client.String() != "127.0.0.9:1234" || f.Name != "www.example.org" ||
		f.Rule != "socks.cnf:3" || f.Action != "SOCKD5" || f.List != "one,two" || f.Server != "two" || f.Up != 7 {
		t.Errorf("%+v", got)
	}
	if counted := l.counted(); counted != "SOCKD5 @=one,two *: 1 7 0\n" {
		t.Errorf("counted %s", counted)
	}
}

// TestPin: a pinned server comes before the others, is still pinned after a reload
// that has it, and only there.
func TestPin(t *testing.T) {
	const rule = "SOCKD5 @=one,two * balance=roundrobin"
	l := newLab(t, slog.LevelDebug, socksserver.Fault{}, "DENY *")
	at := []string{l.startSocks(socksserver.Fault{}), l.startSocks(socksserver.Fault{})}
	l.Swap(l.plan(socksserver.Fault{}, "SERVER one "+at[0], "SERVER two "+at[1], rule, "SOCKD5 @=one *"))
	const list = "one,two roundrobin"
	pinned := func() string {
		for _, s := range l.Plan().Lists() {
			if s.Name == list && s.Pinned != nil {
				return s.Pinned.Name
			}
		}
		return ""
	}
	if lists := l.Plan().Lists(); len(lists) != 1 || lists[0].Name != list || len(lists[0].Servers) != 2 {
		t.Fatalf("lists: %+v", lists)
	}
	if err := l.Pin(list, "three"); err == nil || pinned() != "" {
		t.Errorf("%v, %q is pinned", err, pinned())
	}
	if err := l.Pin("one", "one"); err == nil {
		t.Error("there is no such list")
	}
	if err := l.Pin(list, "two"); err != nil || pinned() != "two" {
		t.Fatalf("%v, %q is pinned", err, pinned())
	}
	for range 4 {
		c := l.connect(realAt)
		echoes(t, c, "hello")
		finish(t, c)
		if got := l.flow()["upstream"]; got != "two" {
			t.Errorf("by %v, not by the one that is pinned", got)
		}
	}
	text := []string{"SERVER one " + at[0], "SERVER two " + at[1], rule, "DENY 10.0.0.0/8"}
	for _, tt := range []struct {
		rules []string
		want  string
	}{
		{text, "two"},
		{append(text[:3:3], "DIRECT *"), "two"},
		{[]string{text[0], text[1], "SOCKD5 @=two,one *"}, ""},
		{text, ""}, // it was gone in between
	} {
		l.Swap(l.plan(socksserver.Fault{}, tt.rules...))
		if got := pinned(); got != tt.want {
			t.Errorf("after a reload to %q %q is pinned, want %q", tt.rules, got, tt.want)
		}
	}
	if err := l.Pin(list, "one"); err != nil || pinned() != "one" {
		t.Errorf("%v, %q is pinned", err, pinned())
	}
	if err := l.Pin(list, ""); err != nil || pinned() != "" {
		t.Errorf("%v, %q is still pinned", err, pinned())
	}
}
