package routes

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/tproxyd/tproxyd/pkg/flow"
)

// parse reads rules in which INCLUDE and LIST find nothing but files.
func parse(text string, files map[string]string) (*Table, Diagnostics) {
	return Parse("socks.cnf", strings.NewReader(text), Options{Open: func(path string) (io.ReadCloser, error) {
		if text, ok := files[path]; ok {
			return io.NopCloser(strings.NewReader(text)), nil
		}
		return nil, &fs.PathError{Op: "open", Path: path, Err: fs.ErrNotExist}
	}})
}

// mustParse reads rules without an error.
func mustParse(t testing.TB, lines ...string) *Table {
	t.Helper()
	table, ds := parse(strings.Join(lines, "\n"), nil)
	if ds.HasErrors() {
		t.Fatal(ds.Error())
	}
	return table
}

// short returns diagnostics as "LINE:COL CODE", an exclamation mark for errors.
func short(ds Diagnostics) []string {
	var out []string
	for _, d := range ds {
		s := fmt.Sprintf("%d:%d %s", d.Line, d.Col, d.Code)
		if d.Severity == Error {
			s += "!"
		}
		out = append(out, s)
	}
	return out
}

func TestDiagnostics(t *testing.T) {
	tests := []struct {
		text string
		want string // LINE:COL CODE[!] …
		msg  string // part of the first message
	}{
		{"SOCKS5 @=10.0.4.1 *", "1:1 E01!", `unknown directive "SOCKS5"; did you mean SOCKD5?; this looks like a NEC or Dante file`},
		{"permit - - - - - -", "1:1 E01!", "NEC or Dante file: tproxyd convert --from nec makes rules of it"},
		{"route { from: 0.0.0.0/0 }", "1:1 E01!", "NEC or Dante file: tproxyd convert --from dante"},
		{"strict_chain", "1:1 E01!", "proxychains file: tproxyd convert --from proxychains"},
		{"DIRECT 0.0.0.0. 0.0.0.0.", "1:8 E03! 1:17 E05!", "there is a dot too many: 0.0.0.0"},
		{"DIRECT 10.0.0.0 255.0.0", "1:17 E05!", "it has 3 numbers, and an IPv4 address four"},
		{"DIRECT 10.0.0.256", "1:8 E03!", "256 is more than 255"},
		{"DIRECT 10.0.0.010", "1:8 E03!", "write 10, without zeros in front"},
		{"DENY * htpps", "1:8 E08!", "did you mean https?"},
		{"LIST lan 10.0.0.0/8\nDIRECT $lna", "2:8 E12!", "did you mean lan?"},
		{"SERVER int1 10.0.3.1\nSOCKD5 @=itn1 *", "2:10 E12!", "(SERVER lines: int1); did you mean int1?"},
		{"SERVER int1 10.0.3.1\nSERVER int2 10.0.3.2\nLIST lan 10.0.0.0/8\nDEFAULT-SERVER @=int1\nSOCKD5 @=int2 *", "1:8 W05 3:6 W05", "SERVER int1 is used by no rule"},
		{"SERVER int1 10.0.3.1\nSERVER int2 10.0.3.2\nLIST lan 10.0.0.0/8\nPROXY_NAME @=int1\nDEFAULT-SERVER @=int2\nSOCKD5 * src=$lan", "", ""},
		{"SERVER int1 10.0.3.1\nSERVER int2 10.0.3.2\nSOCKD5 @=int1>int2 *", "", ""},
		{"DIRCET *", "1:1 E01!", "did you mean DIRECT?"},
		{"noproxy 10. -", "1:1 E01!", "NEC or Dante"},
		{"SOCKD5 @=10.0.4.1", "1:18 E02!", "missing destination after SOCKD5 @=10.0.4.1"},
		{"DENY", "1:5 E02!", "missing destination after DENY"},
		{"DENY proto=udp", "1:6 E02!", "missing destination after DENY; write *"},
		{"DIRECT 10.0.0.", "1:8 E03!", `"10.0.0." is not an address (a NEC style prefix? write 10.0.0.0/24)`},
		{"DIRECT 10.0.0.256", "1:8 E03!", "is not an address"},
		{"DIRECT 10.0.0.0/33", "1:8 E03!", "from 0 to 32"},
		{"DIRECT fe80::1%eth0", "1:8 E03!", "is not an address"},
		{"DIRECT ::ffff:0:0/95", "1:8 E03!", "IPv4"},
		{"DIRECT 10.0.0.9-10.0.0.1", "1:8 E03!", "reversed"},
		{"DIRECT 0.0.0.0/0 0.0.0.0", "1:18 E04", "one is enough"},
		{"DIRECT 10.0.0.0/8 255.255.0.0", "1:19 E04!", "contradict"},
		{"DIRECT 10.0.0.0 0.0.0.255", "1:17 E05!", "did you mean 255.255.255.0?"},
		{"DIRECT 10.0.0.0 255.0.255.0", "1:17 E05!", "not contiguous"},
		{"DIRECT 10.0.0.0 255.256.0.0", "1:17 E05!", "not a mask"},
		{"DIRECT 10.0.0.0", "1:8 E06", "taken as the host"},
		{"DIRECT 10.1.2.3 255.0.0.0", "1:8 E07", "masked to 10.0.0.0"},
		{"DIRECT fd00::1/8", "1:8 E07", "masked to fd00::"},
		{"DENY * eq htpp", "1:11 E08!", `port "htpp" is neither a number nor a service`},
		{"DENY * 80,htpp", "1:11 E08!", `"htpp"`},
		{"DENY * eq 70000", "1:11 E09!", "out of range 1-65535"},
		{"DENY * 0-3", "1:8 E09!", "out of range"},
		{"DENY * 80,90-80", "1:11 E09!", "reversed"},
		{"DENY * gt 65535", "1:11 E09!", "no port"},
		{"DENY * eq", "1:8 E10!", `operator "eq" without a port`},
		{"DENY * >= proto=tcp", "1:8 E10!", `operator ">=" without a port`},
		{"DENY * >1023", "1:8 E10!", "blank between"},
		{"SOCKD5 @=10.0.3.1, 10.0.3.2 *", "1:8 E11!", `near "10.0.3.1, 10.0.3.2"`},
		{"SOCKD5 @=10.0.3.1 ,10.0.3.2 *", "1:8 E11!", `near "10.0.3.1 ,10.0.3.2"`},
		{"SERVER int1 10.0.3.1\nSERVER int2 10.0.3.2\nSOCKD5 @=int1,int3 *", "3:15 E12!", `server "int3" is not defined (SERVER lines: int1, int2)`},
		{"SOCKD5 @=int3 *", "1:10 E12!", "there is no SERVER line"},
		{"DIRECT $lan", "1:8 E12!", `LIST "lan" is not defined`},
		{"DIRECT * src=$lan", "1:10 E12!", `LIST "lan"`},
		{"SOCKD5 *", "1:7 E13!", "SOCKD5 without @= and no DEFAULT-SERVER"},
		{"SERVER a 10.0.0.1\nSOCKD5 @=a>a *", "2:12 E14!", "twice"},
		{"BALANCE\nDIRECT 10.0.0.0/8\nSOCKD5 @=10.0.3.1,10.0.3.2 *", "1:1 E15", "BALANCE is followed by DIRECT"},
		{"BALANCE\nSOCKD5 @=10.0.3.1 *", "1:1 E15", "single server"},
		{"BALANCE\nDIRECT *", "1:1 E15 1:1 E15", "followed by DIRECT"},
		{"SOCKD4 @=10.0.9.9 *.legacy.example", "1:19 E16!", "add RESOLVE local for *.legacy.example"},
		{"SOCKD4 @=10.0.9.9 2001:db8::/32", "1:19 E17!", "SOCKD4 cannot carry IPv6"},
		{"SOCKD4 @=10.0.9.9 * proto=udp", "1:21 E17!", "SOCKD4 cannot carry UDP"},
		{"HTTP @=10.0.9.9:3128 * proto=udp", "1:24 E17!", "HTTP cannot carry UDP"},
		{"HTTP @=10.0.9.9 * eq 21 bind=ftp", "1:25 E27 1:25 E18!", ""},
		{"SOCKD5 @=10.0.4.1>10.0.4.2 * proto=udp", "1:8 E19!", "10.0.4.2 is reached through 10.0.4.1"},
		{"SERVER a 10.0.4.1\nSERVER b 10.0.4.2 udp=chain\nSOCKD5 @=a>b,b>a * proto=udp", "3:8 E19!", "chain b>a: a is reached through b"},
		{"SERVER a 10.0.4.1 type=http\nSERVER b 10.0.4.2 udp=chain\nSOCKD5 @=a>b * proto=udp", "3:8 E19!", "TCP only"},
		{"SERVER a 10.0.4.1\nSERVER b 10.0.4.2 udp=chain tls\nSOCKD5 @=a>b * proto=udp", "3:8 E19!", "without TLS"},
		{"SERVER a 10.0.4.1\nSERVER b 10.0.4.2 udp=chain\nSOCKD5 @=a>b * proto=udp", "", ""},
		{"SERVER int1 10.0.3.1 auth=userpass", "1:22 E20!", "no credential"},
		{"SERVER int1 10.0.3.1 auth=none credential=x", "1:22 E20!", "auth=none"},
		{"DENY * : /bin/mail root", "1:8 E21!", "is not run"},
		{"SOCKD5 @=10.0.4.1 *\nDENY 10.0.0.0/8 eq 25", "2:1 E22", "covered by socks.cnf:1: SOCKD5 @=10.0.4.1 *"},
		{"DIRECT *=root,backup *", "1:8 E23", "processes of this machine"},
		{"INCLUDE missing.cnf", "1:9 E24!", "cannot read missing.cnf: file does not exist"},
		{"INCLUDE socks.cnf", "1:9 E24!", "includes itself"},
		{"LIST lan file=missing", "1:10 E24!", "cannot read missing"},
		{"DENY \x00*", "1:6 E25!", "NUL byte"},
		{"DENY \xff*", "1:6 E25!", "not UTF-8"},
		{"DENY " + strings.Repeat("x", maxLine), "1:1 E25!", "longer than"},
		{"DENY *foo.org", "1:6 E26!", `"*foo.org": a star is allowed only as the first label`},
		{"DENY foo.*.org", "1:6 E26!", "a star"},
		{"DENY foo..org", "1:6 E26!", "empty label"},
		{"DENY bücher.example", "1:6 E26!", "xn--"},
		{"BIND-MODULE wsftp", "1:1 E27", "no effect"},
		{"EXCLUDE-MODULE OUTLOOK.EXE", "1:1 E27", "a Windows program: kept as a tag, it has no effect"},
		{"EXCLUDE-MODULE wsock32.dll", "1:1 E27", "a Windows program"},
		{"EXCLUDE-MODULE /usr/bin/ssh\nEXCLUDE-MODULE outlook", "", ""},
		{"EXCLUDE-MODULE bin/ssh", "1:16 E29!", "/usr/bin/ssh or ssh"},
		{"EXCLUDE-MODULE /usr/bin/", "1:16 E29!", "/usr/bin/ssh or ssh"},
		{"EXCLUDE-MODULE ssh.service x", "1:28 E29!", "too much"},
		{"EXCLUDE-MODULE", "1:15 E29!", "without a module"},
		{"EXCLUDE-MODULE a.service\nEXCLUDE-MODULE /machine.slice/web\nEXCLUDE-MODULE /sys/fs/cgroup/x/y/", "", ""},

		// What is not built yet says so.
		{"SOCKD @=10.0.9.9 10.64.0.0/10", "", ""},
		{"SOCKD4 @=10.0.9.9 *.legacy.example\nRESOLVE local *.example", "1:1 E22", "then the address decides"},
		{"SOCKD4 @=10.0.9.9 a.legacy.example\nRESOLVE remote a.legacy.example\nRESOLVE local *", "1:19 E16!", ""},
		{"SERVER p 10.0.0.1 type=http\nSOCKD5 @=p *", "2:1 E29!", "SOCKD5, but server p has type=http (socks.cnf:1)"},
		{"SERVER p 10.0.0.1 type=http\nSOCKD5 @=p>10.0.0.2 *.a.example\nHTTP @=p *", "", ""},
		{"SERVER p 10.0.0.1 type=socks4\nSOCKD @=p *", "", ""},
		{"SERVER p 10.0.0.1 warm=hot", "1:19 E29!", "warm is one of auto, off"},
		{"SERVER p 10.0.0.1 flows=0 handshakes=x", "1:19 E29! 1:27 E29!", "a limit is a number from 1 on"},
		{"SERVER p 10.0.0.1 sni=a.example", "1:19 E29!", "sni= without tls"},
		{"SERVER p 10.0.0.1 source=0.0.0.0 if=a/b", "1:19 E29! 1:34 E29!", ""},
		{"SOCKD4A @=10.0.9.9 *", "", ""},
		{"SOCKD5 @=10.0.4.1>10.0.4.2 *", "", ""},
		{"GSS 2", "1:1 E28!", "GSS"},
		{"DENY * reject=drop", "", ""},
		{"DENY * reject=icmp", "", ""},
		{"DIRECT * uid=root,0,1000 *", "1:26 E29!", ""},
		{"DIRECT *=root * uid=1", "1:8 E23 1:17 E29!", ""},
		{"DIRECT * uid=root,nobodyatall gid=root,1,x", "1:10 W08 1:31 W08", "no user"},
		{"DIRECT * uid=/nowhere", "1:10 E24!", ""},
		{"DIRECT * uid=1 if=lan0", "1:16 E29!", "never match"},
		{"DIRECT * cgroup=a.slice mac=00:00:5e:00:53:01", "1:25 E29!", "never match"},
		{"DIRECT * cgroup=a/../b", "1:10 E29!", ""},
		{"DIRECT * cgroup=/", "", ""},
		{"DIRECT * mark=0x10/0x1", "1:10 E29!", ""},
		{"DIRECT * mark=10/ff,0x1", "", ""},
		{"DIRECT * gid=5 cgroup=/a mark=0x10 cmd=connect,udp", "", ""},
		{"DIRECT * auth=none resolve=local bind=ftp timeout=3s", "1:10 E29! 1:34 E27", ""},
		{"SOCKD5 @=10.0.0.1 * auth=userpass", "1:21 E20!", "no credential"},
		{"SERVER a 10.0.0.1 credential=c\nSOCKD5 @=a * auth=none", "2:14 E20!", ""},
		{"SERVER a 10.0.0.1 credential=c\nSOCKD5 @=a * auth=userpass", "", ""},
		{"SOCKD5 @=10.0.0.1 * auth=gssapi", "1:21 E28!", "GSSAPI is not built in"},
		{"DIRECT * cmd=bind", "1:10 E29!", "never match"},
		{"DIRECT * cmd=connect,bind", "1:10 E27", ""},
		{"DIRECT * cmd=udp proto=udp", "1:10 E29!", "the same"},
		{"HTTP @=10.0.0.1 * cmd=udp", "1:19 E17!", ""},
		{"DIRECT 10.0.0.0/8 resolve=local", "1:19 E29!", "with names"},
		{"DIRECT * timeout=x", "1:10 E29!", "duration"},
		{"DIRECT * mac=00:00:5e:00:53:01 via=eth0", "1:32 E29!", ""},
		{"SOCKD5 @=10.0.0.1,10.0.0.2 * balance=hash", "", ""},
		{"BALANCE leastload", "1:1 E15", "no SOCKD or HTTP rule follows"},
		{"SERVER a 10.0.0.1 type=http tls sni=a gss-service=x gss-level=1 source=10.0.0.2 if=eth0",
			"1:39 E28! 1:53 E28!", ""},
		{"SERVER a 10.0.0.1 auth=gssapi pipeline=data", "1:19 E28!", "GSSAPI is not built in"},
		{"HEALTH interval=1s probe=tcp", "1:20 E29!", "HOST:PORT"},
		{"HEALTH interval=1s probe=example.org:443", "", ""},
		{"HEALTH probe=off", "", ""},

		// What UDP cannot go by, and where udp= says nothing.
		{"DENY * udp=deny", "1:8 E29!", "for rules with servers, not for DENY"},
		{"DEFAULT DIRECT udp=socks", "1:16 E29!", "not for DIRECT"},
		{"SOCKD5 @=10.0.0.1 * proto=tcp udp=socks", "1:31 E29!", "proto=tcp"},
		{"SOCKD5 @=10.0.0.1 * udp=on", "1:21 E29!", "udp=socks, deny or direct"},
		{"SOCKD5 @=10.0.0.1 * udp=deny UDP=deny", "1:30 E29!", "given twice"},
		{"HTTP @=10.0.9.9 * proto=udp udp=deny", "", ""},
		{"SOCKD5 @=10.0.4.1>10.0.4.2 * proto=udp udp=direct", "", ""},
		{"SERVER a 10.0.0.1 udp=none", "1:19 E29!", "udp is one of own, zero, off"},
		{"SERVER a 10.0.0.1 udp=off udp=own", "1:27 E29!", "given twice"},
		{"SERVER a 10.0.0.1 UDP=OFF\nSOCKD5 @=a * proto=udp", "2:14 W04", "so that UDP is refused"},
		{"SERVER a 10.0.0.1 udp=off\nSOCKD5 @=a * udp=socks\nSOCKD5 @=a * if=b", "2:14 W04 3:1 E22", "no server of the rule carries UDP"},
		{"SERVER a 10.0.0.1 udp=off\nSOCKD5 @=a,10.0.0.2 * proto=udp\nSOCKD5 @=a * proto=tcp\nSOCKD5 @=a * proto=tcp if=b", "4:1 E22", ""},

		// And all else that can be wrong with a word.
		{"DENY * foo=1", "1:8 E29!", `unknown option "foo=1"`},
		{"DENY * if=lan0 eq 25", "1:16 E29!", "ports stand before the options"},
		{"DENY * scr=10.0.0.1", "1:8 E29!", "did you mean src="},
		{"DENY * eq 25 tag", "1:14 E29!", "write tag=WORD"},
		{"DENY * log=1", "1:8 E29!", "write log"},
		{"DENY * proto=sctp", "1:8 E29!", "proto=tcp, udp or any"},
		{"DENY * proto=tcp proto=tcp", "1:18 E29!", "given twice"},
		{"DENY * if=averyveryverylongname", "1:8 E29!", "interface"},
		{"DENY * src=10.0.0.0/40", "1:8 E03!", "src="},
		{"DIRECT * reject=reset", "1:10 E29!", "for DENY"},
		{"DIRECT @=10.0.0.1 *", "1:8 E29!", "takes no servers"},
		{"DENY www.example.org by=address", "1:22 E29!", "is a name"},
		{"DENY 10.0.0.1 by=name", "1:15 E29!", "is an address"},
		{"DENY * cgroup=x mark=0x123456789 cmd=jump auth=x", "1:17 E29! 1:34 E29! 1:43 E29!", ""},
		{"DEFAULT", "1:8 E29!", "DENY or DIRECT"},
		{"DEFAULT SOCKD5 @=10.0.0.1", "1:9 E29!", "as the last rule"},
		{"DEFAULT DENY\nDEFAULT DIRECT", "2:1 E29!", "given twice; the first is socks.cnf:1"},
		{"DEFAULT DIRECT proto=tcp", "1:1 E29!", "no condition"},
		{"DEFAULT-SERVER 10.0.0.1", "1:16 E29!", "takes @="},
		{"SERVER a", "1:9 E29!", "SERVER NAME"},
		{"SERVER a 10.0.0.1\nSERVER a 10.0.0.2", "2:8 E29!", "the first is socks.cnf:1"},
		{"SERVER a 2001:db8::1", "1:10 E03!", "brackets"},
		{"SERVER a 10.0.0.1:0", "1:10 E09!", "port"},
		{"SERVER a 0.0.0.0", "1:10 E03!", "cannot be the address"},
		{"SERVER a 10.0.0.1 credentail=x", "1:19 E29!", "did you mean credential=?"},
		{"RESOLVE", "1:8 E29!", "RESOLVE local|remote"},
		{"RESOLVE localy *", "1:9 E29!", "no way to resolve"},
		{"RESOLVE local", "1:14 E02!", "missing name"},
		{"RESOLVE local * x", "1:17 E29!", "too much"},
		{"RESOLVE local *.a via=", "1:19 E29!", "write via=10.0.0.53"},
		{"RESOLVE local *.a via=10.0.0.53, 10.0.0.54", "1:19 E29!", "without blanks"},
		{"RESOLVE local *.a via=10.0.0.53,ns.example", "1:33 E03!", "a name would have to be resolved itself"},
		{"RESOLVE local *.a via=[10.0.0.53]", "1:23 E03!", "not the address of a resolver"},
		{"RESOLVE local *.a via=0.0.0.0", "1:23 E03!", "cannot be the address of a resolver"},
		{"RESOLVE local *.a via=10.0.0.53:0", "1:23 E09!", "from 1 to 65535"},
		{"RESOLVE local *.a via=[2001:db8::53]:x", "1:23 E09!", `port "x"`},
		{"RESOLVE local *.a via=10.0.0.53,10.0.0.53:53", "1:33 E29!", "10.0.0.53:53 is given twice"},
		{"RESOLVE local *.a resolver=10.0.0.53", "1:19 E29!", "takes via=RESOLVER and nothing else"},
		{"RESOLVE local *.a via=10.0.0.53 x", "1:33 E29!", "too much"},
		{"TIMEOUT connect=0s", "1:9 E29!", "no duration"},
		{"TIMEOUT", "1:8 E29!", "without KEY=VALUE"},
		{"TIMEOUT foo=1s", "1:9 E29!", "no time limit"},
		{"HEALTH maxfail=0", "1:8 E29!", "maxfail"},
		{"LIST lan", "1:1 E29!", "LIST NAME"},
		{"LIST lan 10.0.0.0/8\nLIST lan fd00::/8", "2:6 E29!", "given twice"},
		{"LIST l *.example.org\nDENY * src=$l", "2:8 E29!", "addresses alone"},
		{"DIRECT 10.0.0.0/8 80", "1:19 W01", "taken as eq 80"},
		{"DIRECT 10.0.0.0/8 80 443", "1:19 W01 1:22 E29!", "taken as eq 80"},
		{"PROXY_NAME @=10.0.0.1\nPROXY_NAME @=10.0.0.2", "2:1 E29!", "PROXY_NAME is given twice"},
		{"DEFAULT-SERVER @=10.0.0.1\nDEFAULT-SERVER @=10.0.0.1", "2:1 E29!", "DEFAULT-SERVER is given twice"},
		{"SOCKD5 @=10.0.0.1,10.0.0.2,10.0.0.1 *", "1:28 E29!", "10.0.0.1 is given twice"},
		{"TIMEOUT connect=5s idle=5m\nTIMEOUT dns=3s connect=7s", "2:16 E29!", "TIMEOUT connect= is given twice"},
		{"HEALTH maxfail=1 badexpire=5s MAXFAIL=2", "1:31 E29!", "HEALTH maxfail= is given twice"},
		{"RESOLVE local *.example.org\nRESOLVE remote www.example.org\nRESOLVE remote *.a.example.org\nRESOLVE remote example.org\nRESOLVE remote *\nRESOLVE local *.org", "2:1 E22 3:1 E22 6:1 E22", "covered by"},
		{"RESOLVE remote www.b.example\nRESOLVE local *.example\nDENY www.a.example\nDENY *.b.example\nDENY *.c.example\nDENY *.example by=name\nDIRECT *.org\nDIRECT *", "3:1 E22 5:1 E22", "socks.cnf:2 has its names resolved here"},
		{"DENY 127.0.0.0/8\nSOCKD5 @=10.0.0.1 224.0.0.0 240.0.0.0\nDENY fe80::1\nDIRECT 127.0.0.1\nDENY 126.0.0.0/7", "1:1 E22 2:1 E22 3:1 E22 4:1 E22", "loopback addresses are DIRECT before all rules"},
		{"LIST none file=empty\nDENY $none", "2:6 E22", "LIST none is empty"},
		{"DENY * eq nosuchservice\nDIRECT 10.0.0.0/8", "1:11 E08!", "nosuchservice"},
	}
	seen := map[string]bool{}
	for _, tt := range tests {
		table, ds := parse(tt.text, map[string]string{"empty": ""})
		if got := strings.Join(short(ds), " "); got != tt.want {
			t.Errorf("%q:\n got %s\nwant %s\n%s", tt.text, got, tt.want, ds.Error())
			continue
		}
		if len(ds) > 0 && !strings.Contains(ds[0].Msg, tt.msg) {
			t.Errorf("%q: %q does not say %q", tt.text, ds[0].Msg, tt.msg)
		}
		if (table == nil) != ds.HasErrors() {
			t.Errorf("%q: a table in spite of errors, or none without", tt.text)
		}
		for _, d := range ds {
			seen[d.Code] = true
		}
	}
	for n := 1; n <= 29; n++ {
		if code := fmt.Sprintf("E%02d", n); !seen[code] {
			t.Errorf("no case for %s", code)
		}
	}
}

func TestIncludeDepth(t *testing.T) {
	files := map[string]string{}
	for i := range 20 {
		files[fmt.Sprintf("%d.cnf", i)] = fmt.Sprintf("INCLUDE %d.cnf", i+1)
	}
	_, ds := parse("INCLUDE 0.cnf", files)
	if len(ds) != 1 || ds[0].Code != "E24" || ds[0].File != "7.cnf" {
		t.Error(ds.Error())
	}
	// Many files that each include many others come to an end.
	for i := range 20 {
		files[fmt.Sprintf("%d.cnf", i)] = strings.Repeat(fmt.Sprintf("INCLUDE %d.cnf\n", i+1), 50)
	}
	if _, ds = parse("INCLUDE 0.cnf", files); !ds.HasErrors() {
		t.Error("no error")
	}
}

func TestFixtures(t *testing.T) {
	tests := []struct {
		file  string
		warns []string
	}{
		{"testdata/socks.cnf", nil},
		{"testdata/socks.cnf-verbatim", []string{"7:38 E04", "7:46 W01"}},
	}
	for _, tt := range tests {
		table, ds := ParseFile(tt.file, Options{})
		if got := short(ds); !slices.Equal(got, tt.warns) {
			t.Errorf("%s: %v, want %v", tt.file, got, tt.warns)
			continue
		}
		if n := len(table.Rules()); n != 5 {
			t.Errorf("%s: %d rules, want 4 and the DEFAULT", tt.file, n)
		}
		last := table.Rules()[3]
		if last.Action != Socks5 || last.Balance != Random || len(last.Servers) != 2 || last.Ports[0] != (PortRange{80, 80}) {
			t.Errorf("%s: %+v", tt.file, last)
		}
		if d := table.Rules()[4]; d.Action != Deny || !d.Default || d.Position() != "DEFAULT" {
			t.Errorf("%s: DEFAULT is %+v", tt.file, d)
		}
	}
	if _, ds := ParseFile("testdata/none", Options{}); len(ds) != 1 || ds[0].Code != "E24" {
		t.Error(ds)
	}
}

func TestServers(t *testing.T) {
	table := mustParse(t,
		"SOCKD5 @=int1,10.0.9.9,[2001:db8::9]:1081,proxy.example:99 192.0.2.0/24", // before the SERVER line
		"SERVER int1 10.0.3.1:1082 auth=userpass credential=office pipeline=greeting",
		"SERVER int2 Proxy.Example.Org",
		"DEFAULT-SERVER @=int2,10.0.9.9",
		"PROXY_NAME @=int1",
		"BALANCE ON",
		"SOCKD5 *.example.org",
		"SOCKD5 *.example.net balance=first",
		"BALANCE OFF",
		"SOCKD5 @=int2 *.example.com",
		"TIMEOUT connect=3 handshake=4s idle=1h halfclosed=5m udp=2m dns=1500ms",
		"HEALTH maxfail=3 badexpire=10s",
	)
	r := table.Rules()
	var got []string
	for _, c := range r[0].Servers {
		s := c[0]
		got = append(got, fmt.Sprintf("%s|%s|%s|%s|%d", c, s.Host, s.AddrPort(), s.Credential, s.Pipeline))
	}
	want := []string{
		"int1||10.0.3.1:1082|office|2", "10.0.9.9||10.0.9.9:1080||0", "[2001:db8::9]:1081||[2001:db8::9]:1081||0",
		"proxy.example:99|proxy.example|invalid AddrPort||0",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if r[1].Servers[0].String() != "int2" || r[1].Servers[1][0] != r[0].Servers[1][0] || r[1].Balance != Random {
		t.Errorf("the default list: %+v", r[1])
	}
	if r[2].Balance != First || r[3].Balance != First || r[0].Balance != First {
		t.Error("balance=first, BALANCE OFF")
	}
	if s := r[1].Servers[0][0]; s.Host != "proxy.example.org" || s.Port != 1080 {
		t.Errorf("%+v", s)
	}
	if n := len(table.FirstHops()); n != 5 {
		t.Errorf("%d first hops", n)
	}
	if l := table.Limits(); l.Connect.Seconds() != 3 || l.Handshake.Seconds() != 4 || l.Idle.Hours() != 1 || l.HalfClosed.Minutes() != 5 || l.UDP.Minutes() != 2 || l.DNS.Milliseconds() != 1500 {
		t.Errorf("%+v", l)
	}
	if h := table.Health(); h.MaxFail != 3 || h.BadExpire.Seconds() != 10 {
		t.Errorf("%+v", h)
	}
	if table.ProxyName()[0].String() != "int1" {
		t.Error(table.ProxyName())
	}
}

func TestUDP(t *testing.T) {
	table := mustParse(t,
		"SERVER own 10.0.3.1",
		"SERVER also 10.0.3.2 udp=own",
		"SERVER zero 10.0.3.3 udp=Zero",
		"SERVER off 10.0.3.4 udp=off",
		"DIRECT 10.0.0.0/8", // 5
		"SOCKD5 @=own,off *.a.example",
		"SOCKD5 @=off *.b.example",
		"SOCKD5 @=zero *.c.example udp=socks",
		"SOCKD5 @=zero *.d.example udp=deny",
		"SOCKD5 @=zero *.e.example udp=direct", // 10
		"SOCKD5 @=zero *.f.example proto=udp udp=deny",
		"SOCKD5 @=also *.g.example proto=udp udp=direct balance=random",
		"SOCKD5 @=also *.h.example proto=udp",
	)
	var modes []UDPMode
	for _, s := range table.Servers() {
		modes = append(modes, s.UDP)
	}
	if want := []UDPMode{UDPOwn, UDPOwn, UDPZero, UDPOff}; !slices.Equal(modes, want) {
		t.Errorf("%v, want %v", modes, want)
	}
	var got []string
	for _, r := range table.Rules() {
		got = append(got, fmt.Sprintf("%s %s/%s %v %d", r.Position(), r.ActionFor(flow.TCP), r.ActionFor(flow.UDP), r.CarriesUDP(), len(r.Servers)))
	}
	want := []string{
		"socks.cnf:5 DIRECT/DIRECT false 0",
		"socks.cnf:6 SOCKD5/SOCKD5 true 2",
		"socks.cnf:7 SOCKD5/SOCKD5 false 1", // the servers are not asked, and the datagram is refused
		"socks.cnf:8 SOCKD5/SOCKD5 true 1",
		"socks.cnf:9 SOCKD5/DENY false 1",
		"socks.cnf:10 SOCKD5/DIRECT false 1",
		"socks.cnf:11 DENY/DENY false 0", // of UDP alone: nothing is left for servers
		"socks.cnf:12 DIRECT/DIRECT false 0",
		"socks.cnf:13 SOCKD5/SOCKD5 true 1",
		"DEFAULT DENY/DENY false 0",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestLexer(t *testing.T) {
	table := mustParse(t,
		"\ufeff# a comment",
		"\tdirect   10.0.0.0/8  # another",
		"Deny * \\",
		"   eq 25 \\",
		"   tag=a#b\r",
		"",
		"   \\",
		"deny *.example.org \\",
	)
	var got []string
	for _, r := range table.Rules() {
		got = append(got, fmt.Sprintf("%s %s %s", r.Position(), r.Text, r.Tag))
	}
	want := []string{
		"socks.cnf:2 direct 10.0.0.0/8 ", "socks.cnf:3 Deny * eq 25 tag=a#b a#b",
		"socks.cnf:8 deny *.example.org ", "DEFAULT DEFAULT DENY ",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestSum(t *testing.T) {
	files := map[string]string{"a.cnf": "DENY 10.0.0.1\n", "l": "10.0.0.2"}
	text := "INCLUDE a.cnf\nLIST l file=l\nDENY $l\n"
	sum := func() [32]byte {
		table, ds := parse(text, files)
		if table == nil {
			t.Fatal(ds.Error())
		}
		return table.Sum()
	}
	first := sum()
	if text = "# a comment\n  " + text; sum() != first {
		t.Error("a comment and blanks change the sum")
	}
	files["a.cnf"] = "DENY 10.0.0.3\n"
	second := sum()
	files["l"] = "10.0.0.4"
	if third := sum(); second == first || third == second {
		t.Error("a change of an included file or of a list does not")
	}
}

func TestReadFails(t *testing.T) {
	_, ds := Parse("socks.cnf", io.MultiReader(strings.NewReader("DENY *\nDI"), failing{}), Options{})
	if !slices.ContainsFunc(ds, func(d Diagnostic) bool { return d.Code == "E24" && strings.Contains(d.Msg, "the disk is gone") }) {
		t.Error(ds)
	}
}

type failing struct{}

func (failing) Read([]byte) (int, error) { return 0, errors.New("the disk is gone") }
