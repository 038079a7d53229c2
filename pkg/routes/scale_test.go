package routes

import (
	"bufio"
	"fmt"
	"math/rand/v2"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

// The size that the language promises to bear.
const (
	manyNames    = 1_000_000
	manyPrefixes = 200_000
)

// manyMembers writes rules with LISTs of so many names, in the three forms that
// lists come in, and of networks, and returns the path of the rules.
func manyMembers(tb testing.TB, names, prefixes int) string {
	tb.Helper()
	dir := tb.TempDir()
	write := func(name string, line func(i int) string, n int) {
		f, err := os.Create(filepath.Join(dir, name))
		if err != nil {
			tb.Fatal(err)
		}
		w := bufio.NewWriter(f)
		for i := range n {
			w.WriteString(line(i))
		}
		if err := w.Flush(); err != nil {
			tb.Fatal(err)
		}
		if err := f.Close(); err != nil {
			tb.Fatal(err)
		}
	}
	write("plain", func(i int) string { return manyName(i) + "\n" }, names/2)
	write("hosts", func(i int) string { return "0.0.0.0 " + manyName(names/2+i) + "\n" }, names/4)
	write("dnsmasq", func(i int) string { return "address=/" + manyName(names/2+names/4+i) + "/\n" }, names/4)
	write("networks", func(i int) string { return manyPrefix(i).String() + "\n" }, prefixes)
	rules := `LIST ads file=plain file=hosts file=dnsmasq
LIST near file=networks
DENY   $ads reject=dns-nxdomain
DIRECT $near
SOCKD5 @=192.0.2.1 *
`
	path := filepath.Join(dir, "socks.cnf")
	if err := os.WriteFile(path, []byte(rules), 0o644); err != nil {
		tb.Fatal(err)
	}
	return path
}

func manyName(i int) string {
	return fmt.Sprintf("host%d.zone%d.example", i, i%5000)
}

// manyPrefix returns networks that do not touch: a fifth of IPv6.
func manyPrefix(i int) netip.Prefix {
	if i%5 == 0 {
		return netip.PrefixFrom(netip.AddrFrom16([16]byte{0x20, 1, 0xd, 0xb8, byte(i >> 16), byte(i >> 8), byte(i), 0}), 56)
	}
	return netip.PrefixFrom(netip.AddrFrom4([4]byte{byte(11 + i>>15), byte(i >> 7), byte(i << 1), 0}), 24)
}

// scaleChild is the file of rules that this process shall read and do no more.
const scaleChild = "TPROXYD_TEST_RULES"

func TestMain(m *testing.M) {
	if path := os.Getenv(scaleChild); path != "" {
		os.Exit(readMany(path))
	}
	os.Exit(m.Run())
}

func readMany(path string) int {
	table, ds := ParseFile(path, Options{})
	if table == nil || len(ds) > 0 {
		fmt.Println(ds.Error())
		return 1
	}
	blocks := table.Kernel()
	n := 0
	for _, b := range blocks {
		n += len(b.Direct)
	}
	fmt.Println(n)
	runtime.KeepAlive(table)
	return 0
}

// TestManyMembers: what it costs to read a million names and 200,000 networks,
// as a process of its own sees it.
func TestManyMembers(t *testing.T) {
	path := manyMembers(t, manyNames/under, manyPrefixes/under)
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), scaleChild+"="+path)
	began := time.Now()
	out, err := cmd.CombinedOutput()
	if err != nil || strings.TrimSpace(string(out)) != fmt.Sprint(manyPrefixes/under) {
		t.Fatalf("%v: %s", err, out)
	}
	used := cmd.ProcessState.SysUsage().(*syscall.Rusage)
	cpu := time.Duration(used.Utime.Nano() + used.Stime.Nano())
	t.Logf("%v, CPU %v, %d MB at most", time.Since(began), cpu, used.Maxrss>>10)
	if limit := int64(200 << 10); int64(used.Maxrss) > limit { // 32 bits on some
		t.Errorf("%d KB of memory, more than %d", used.Maxrss, limit)
	}
	if limit := 3 * time.Second; cpu > limit { // a fifth of it where nothing else runs
		t.Errorf("%v of CPU, more than %v", cpu, limit)
	}
}

func BenchmarkManyMembers(b *testing.B) {
	path := manyMembers(b, manyNames, manyPrefixes)
	var table *Table
	b.Run("read", func(b *testing.B) {
		for b.Loop() {
			table, _ = ParseFile(path, Options{})
		}
	})
	b.Run("kernel", func(b *testing.B) {
		for b.Loop() {
			table.Kernel()
		}
	})
	rnd := rand.New(rand.NewPCG(1, 2))
	var named, addressed, other [4096]flow.Flow
	for i := range named {
		named[i] = flow.Flow{Name: manyName(rnd.IntN(manyNames)), Dst: netip.AddrPortFrom(netip.Addr{}, 443)}
		other[i] = flow.Flow{Name: "www." + manyName(rnd.IntN(manyNames)), Dst: netip.AddrPortFrom(netip.Addr{}, 443)}
		addressed[i] = flow.Flow{Dst: netip.AddrPortFrom(manyPrefix(rnd.IntN(manyPrefixes)).Addr().Next(), 443)}
	}
	for _, bb := range []struct {
		name  string
		flows *[4096]flow.Flow
	}{{"name", &named}, {"below", &other}, {"address", &addressed}} {
		b.Run(bb.name, func(b *testing.B) {
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				table.Match(bb.flows[i&4095])
			}
		})
	}
}
