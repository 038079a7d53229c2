package convert

import (
	"fmt"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/tproxyd/tproxyd/pkg/flow"
	"github.com/tproxyd/tproxyd/pkg/routes"
)

// decision is what a table does with a flow: the action and where the servers
// are, whatever they are called.
func decision(t *routes.Table, f flow.Flow) string {
	r := t.Match(f)
	out := []string{r.Action.String()}
	for _, c := range r.Servers {
		for _, s := range c {
			out = append(out, s.AddrPort().String())
		}
	}
	return strings.Join(out, " ")
}

// scenarioFlows are flows to each destination that the scenario is about, and
// to neighbours of these, by each protocol.
func scenarioFlows() (list []flow.Flow) {
	src := netip.MustParseAddrPort("10.1.1.1:40000")
	for _, to := range []string{
		"10.0.0.1", "10.255.255.255", "10.0.3.1", "11.0.0.1", "9.255.255.255", "192.168.99.255", "192.168.100.0", "192.168.100.254", "192.168.101.1",
		"172.31.0.9", "203.0.113.80", "198.51.100.7", "2001:db8::1", "www.private-net.org", "a.b.private-net.org", "private-net.org",
		"www.example.org", "private-net.org.example.com", "notprivate-net.org",
	} {
		for _, port := range []uint16{22, 79, 80, 81, 443} {
			for _, n := range []flow.Network{flow.TCP, flow.UDP} {
				f := flow.Flow{Network: n, Src: src}
				if a, err := netip.ParseAddr(to); err == nil {
					f.Dst = netip.AddrPortFrom(a, port)
				} else {
					f.Name, f.Dst = to, netip.AddrPortFrom(netip.MustParseAddr("198.18.0.1"), port)
				}
				list = append(list, f)
			}
		}
	}
	return list
}

// load converts a file of testdata, or reads it as it is with no format.
func load(t *testing.T, f Format, name string) (*routes.Table, *Result) {
	t.Helper()
	text, err := os.ReadFile("testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	r := &Result{Rules: text}
	if f != "" {
		if r, err = Convert(f, strings.NewReader(string(text))); err != nil {
			t.Fatal(err)
		}
	}
	table, diags := routes.Parse(name, strings.NewReader(string(r.Rules)), routes.Options{})
	if table == nil {
		t.Fatalf("%s: %v\n%s", name, diags, r.Rules)
	}
	return table, r
}

// TestScenario: the reference scenario in the formats of its time decides as the
// native file does, but where the old file says otherwise, which its report
// tells.
func TestScenario(t *testing.T) {
	native, _ := load(t, "", "native.cnf")
	const int1, int2 = " 10.0.3.1:1080", " 10.0.3.2:1080"
	for _, tt := range []struct {
		format Format
		file   string
		// differs tells what is decided in place of what the native file says.
		differs func(f flow.Flow, native string) string
		report  []string // what tells of it
	}{
		{Hummingbird, "hummingbird.cnf", func(f flow.Flow, native string) string {
			if f.Name == "" && f.Dst.Addr().Is6() { // its masks are of IPv4
				return "DENY"
			}
			return native
		}, []string{"DEFAULT DENY", "no IPv6 address is matched; write ::/0 for these"}},
		{NEC, "nec.conf", func(_ flow.Flow, native string) string {
			if native == "DENY" { // its client connected by itself
				return "DIRECT"
			}
			return native
		}, []string{"DEFAULT DIRECT: what no line matches this client connected to directly"}},
		{Dante, "dante.conf", func(f flow.Flow, native string) string {
			switch {
			case native != "SOCKD5"+int1+int2:
				return native
			case f.Name == "": // "to: ." is names alone
				return "DENY"
			}
			return "SOCKD5" + int1 // the file has one server for the Internet
		}, []string{"@=10.0.3.1 * eq 80 by=name", "credential=dante"}},
	} {
		t.Run(string(tt.format), func(t *testing.T) {
			table, r := load(t, tt.format, tt.file)
			flows := scenarioFlows()
			for _, f := range flows {
				if want, got := tt.differs(f, decision(native, f)), decision(table, f); got != want {
					t.Errorf("%v: %s, want %s", f, got, want)
				}
			}
			for _, want := range tt.report {
				if !strings.Contains(fmt.Sprint(r.Report), want) {
					t.Errorf("the report does not tell of %q:\n%v", want, r.Report)
				}
			}
			if r.Refused() {
				t.Errorf("refused: %v", r.Report)
			}
		})
	}
}

// TestVerbatim: the files as printed, with their slips, give the errors that
// their users need.
func TestVerbatim(t *testing.T) {
	for _, tt := range []struct {
		format Format
		file   string
		want   []Entry // those that are not kept or added
	}{
		{Hummingbird, "hummingbird-verbatim.cnf", []Entry{
			{7, Changed, "SOCKD5 @=10.0.3.1,10.0.3.2 0.0.0.0/0 eq 80: 0.0.0.0/0 0.0.0.0 says its mask twice; a port without an operator is taken as eq"},
		}},
		{NEC, "nec-verbatim.conf", []Entry{
			{2, Refused, "a blank is missing: write NOPROXY -"},
			{3, Refused, "10.0.4.1 stands where users do, the servers are the sixth field: write SOCKS5 - 192.168.100. - - 10.0.4.1; what it is about is denied in its place: DENY 192.168.100.0/24"},
			{4, Refused, "10.0.4.1 stands where users do, the servers are the sixth field: write SOCKS5 - .private-net.org - - 10.0.4.1; what it is about is denied in its place: DENY *.private-net.org"},
			{5, Refused, "10.0.3.1,10.0.3.2 stands where users do, the servers are the sixth field: write SOCKS5 - - 80 - 10.0.3.1,10.0.3.2; what it is about is denied in its place: DENY * eq 80"},
		}},
		{Dante, "dante-verbatim.conf", []Entry{
			{12, Refused, `"(http)." is not read: a file is settings (NAME: VALUE) and route { … }`},
		}},
		{NEC, "nec-server.conf", []Entry{
			{2, Refused, "the file is that of a server (socks5.conf); its lines are not a client's matter"},
		}},
		{Dante, "dante-server.conf", []Entry{
			{3, Refused, "the file is that of a server (sockd.conf, danted.conf); its lines are not a client's matter"},
		}},
	} {
		_, r := load(t, tt.format, tt.file)
		var got []Entry
		for _, e := range r.Report {
			if e.Fate == Changed || e.Fate == Refused {
				got = append(got, e)
			}
		}
		if strings.HasSuffix(tt.file, "nec-server.conf") {
			got = got[:1]
		}
		if d := cmp.Diff(tt.want, got); d != "" {
			t.Errorf("%s: (-want +got)\n%s", tt.file, d)
		}
	}
}
