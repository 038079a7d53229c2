package fakedns

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
)

// written returns the names and indexes that stand in a directory's file, as
// another process would find them at this moment.
func written(t testing.TB, dir string) map[string]uint32 {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, logName))
	if err != nil {
		t.Fatal(err)
	}
	rest, ok := bytes.CutPrefix(b, []byte(logHeader))
	if !ok {
		t.Fatalf("the file begins with %q", b[:min(len(b), 20)])
	}
	tab := newTable(maxIndex, 1<<20)
	tab.load(rest) // another write may be half done
	return names(tab)
}

func names(tab *table) map[string]uint32 {
	m := map[string]uint32{}
	for i := tab.oldest; i != 0; i = tab.entries[i].newer {
		m[string(tab.name(i))] = i
	}
	return m
}

// putLog makes a directory whose file says log.
func putLog(t testing.TB, log []byte) (dir string) {
	t.Helper()
	dir = t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, logName), log, 0o640); err != nil {
		t.Fatal(err)
	}
	return dir
}

// reopen returns what a pool makes of a directory, and closes it.
func reopen(t testing.TB, dir string) map[string]uint32 {
	t.Helper()
	p, err := openPool(&Options{Dir: dir, Pool4: pool4, Quarantine: time.Hour, Log: discard})
	if err != nil {
		t.Fatal(err)
	}
	check(t, p.t)
	m := names(p.t)
	if err := p.close(); err != nil {
		t.Fatal(err)
	}
	return m
}

func TestStoreReopen(t *testing.T) {
	dir := t.TempDir()
	o := Options{Dir: dir, Pool4: pool4, Pool6: pool6, Max: 50, Quarantine: time.Hour, Log: discard}
	p, err := openPool(&o)
	if err != nil {
		t.Fatal(err)
	}
	var evicted []netip.Addr
	for i := range 60 {
		a := addr4(p, fmt.Sprintf("host%d.example", i))
		if i < 10 {
			evicted = append(evicted, a)
		}
	}
	addr4(p, "host10.example") // the last one used
	want := names(p.t)
	if got := written(t, dir); !cmp.Equal(got, want) {
		t.Fatal(cmp.Diff(got, want))
	}
	if err := p.close(); err != nil {
		t.Fatal(err)
	}

	p = newPool(t, o)
	check(t, p.t)
	if got := names(p.t); !cmp.Equal(got, want) {
		t.Fatal(cmp.Diff(got, want))
	}
	for i := range 10 {
		a := addr4(p, fmt.Sprintf("new%d.example", i))
		for _, b := range evicted {
			if a == b {
				t.Errorf("%v was given again though in quarantine before the restart", a)
			}
		}
	}
	if p.t.find([]byte("host10.example")) == 0 || p.t.find([]byte("host11.example")) != 0 {
		t.Error("the order of last use did not survive")
	}
}

func TestStoreSmallerAfterwards(t *testing.T) {
	dir := t.TempDir()
	o := Options{Dir: dir, Pool4: pool4, Log: discard}
	p, err := openPool(&o)
	if err != nil {
		t.Fatal(err)
	}
	for i := range 100 {
		addr4(p, fmt.Sprint("host", i))
	}
	if err := p.close(); err != nil {
		t.Fatal(err)
	}
	o.Pool4, o.Max = netip.MustParsePrefix("198.18.0.0/26"), 10
	p = newPool(t, o)
	check(t, p.t)
	if p.t.size != 10 || addr4(p, "host61").String() != "198.18.0.62" {
		t.Errorf("%d names, host61 has %v", p.t.size, addr4(p, "host61"))
	}
}

func sample() (log []byte, want map[string]uint32) {
	log, want = []byte(logHeader), map[string]uint32{}
	for i := range uint32(5) {
		name := fmt.Sprintf("host%d.example", i)
		log = appendRecord(log, recordGiven, i+1, 0, []byte(name))
		want[name] = i + 1
	}
	return log, want
}

func TestStoreTruncated(t *testing.T) {
	log, want := sample()
	if got := reopen(t, putLog(t, log)); !cmp.Equal(got, want) {
		t.Fatal(cmp.Diff(got, want))
	}
	delete(want, "host4.example")
	const last = recordHead + len("host4.example") + recordTail
	for cut := 1; cut <= last; cut++ {
		dir := putLog(t, log[:len(log)-cut])
		if got := reopen(t, dir); !cmp.Equal(got, want) {
			t.Fatalf("%d bytes off: %s", cut, cmp.Diff(got, want))
		}
		if b, err := os.ReadFile(filepath.Join(dir, logName)); err != nil || !bytes.Equal(b, log[:len(log)-last]) {
			t.Fatalf("%d bytes off: the file is %q", cut, b)
		}
	}
}

func TestStoreFlippedByte(t *testing.T) {
	log, _ := sample()
	record := (len(log) - len(logHeader)) / 5
	for at := range len(logHeader) + 3*record {
		if at > len(logHeader) && at < len(logHeader)+2*record {
			continue // the third record stands for all
		}
		bad := bytes.Clone(log)
		bad[at] ^= 0x55
		dir := putLog(t, bad)
		got := reopen(t, dir)
		if at < len(logHeader) {
			if _, err := os.Stat(filepath.Join(dir, logName+".bad")); err != nil || len(got) != 0 {
				t.Errorf("byte %d: %v, %v; want the file put aside", at, got, err)
			}
			continue
		}
		if want := (at - len(logHeader)) / record; len(got) != want {
			t.Errorf("byte %d: %d names, want the %d before it", at, len(got), want)
		}
	}
}

func TestStoreStrangeFiles(t *testing.T) {
	log, want := sample()
	none := map[string]uint32{}
	tests := []struct {
		name string
		make func(path string) error
		want map[string]uint32
	}{
		{"none", func(string) error { return nil }, none},
		{"empty", func(p string) error { return os.WriteFile(p, nil, 0o600) }, none},
		{"header only", func(p string) error { return os.WriteFile(p, []byte(logHeader), 0o600) }, none},
		{"something else", func(p string) error { return os.WriteFile(p, bytes.Repeat([]byte("x"), 9999), 0o600) }, none},
		{"a directory", func(p string) error { return os.Mkdir(p, 0o700) }, none},
		{"a renewal that a crash cut", func(p string) error {
			return errors.Join(os.WriteFile(p, log, 0o600), os.WriteFile(p+".new", log[:40], 0o600))
		}, want},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			if err := tt.make(filepath.Join(dir, logName)); err != nil {
				t.Fatal(err)
			}
			if got := reopen(t, dir); !cmp.Equal(got, tt.want) {
				t.Error(cmp.Diff(got, tt.want))
			}
			if got := written(t, dir); !cmp.Equal(got, tt.want) {
				t.Error(cmp.Diff(got, tt.want))
			}
		})
	}
}

// What is put aside is said, since addresses that clients still have will mean
// other names.
func TestStorePutsAside(t *testing.T) {
	for content, want := range map[string]bool{"": false, logHeader: false, "something else altogether": true} {
		dir := t.TempDir()
		path := filepath.Join(dir, logName)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		var log bytes.Buffer
		p, err := openPool(&Options{Dir: dir, Pool4: pool4, Log: slog.New(slog.NewTextHandler(&log, nil))})
		if err != nil {
			t.Fatal(err)
		}
		p.close()
		_, err = os.Stat(path + ".bad")
		if said := strings.Contains(log.String(), "was put aside"); said != want || (err == nil) != want {
			t.Errorf("%q: said %v, put aside %v, want %v:\n%s", content, said, err == nil, want, log.String())
		}
	}
}

func TestStoreInUse(t *testing.T) {
	dir := t.TempDir()
	o := Options{Dir: dir, Pool4: pool4}
	s, err := New(o)
	if err != nil {
		t.Fatal(err)
	}
	if other, err := New(o); err == nil {
		other.Close()
		t.Error("two servers on one directory")
	} else if !strings.Contains(err.Error(), "in use") {
		t.Error(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if s, err = New(o); err != nil {
		t.Fatal(err)
	}
	s.Close()
	if s, err := New(Options{Dir: filepath.Join(dir, logName, "below"), Pool4: pool4}); err == nil {
		s.Close()
		t.Error("opened a directory below a file")
	}
}

// Each step of a renewal is a moment at which the process may end; the file
// that a new process finds must hold every name that was given until then.
func TestStoreRenewal(t *testing.T) {
	dir := t.TempDir()
	p := newPool(t, Options{Dir: dir, Pool4: pool4, Max: 100})
	given := 0
	give := func() {
		for range 30 {
			addr4(p, fmt.Sprintf("host%d.example", given))
			given++
		}
	}
	intact := func(when string) {
		t.Helper()
		if got, want := written(t, dir), names(p.t); !cmp.Equal(got, want) {
			t.Fatalf("%s: %s", when, cmp.Diff(got, want))
		}
	}
	give()
	intact("before")
	log := p.t.dump()
	p.since = []byte{}
	give()
	intact("after the dump")
	f, err := p.s.writeAnew(log)
	if err != nil {
		t.Fatal(err)
	}
	give() // some of the first go
	intact("after the write")
	give()
	if err := p.s.adopt(f, len(log), p.since); err != nil {
		t.Fatal(err)
	}
	p.since = nil
	intact("after the rename")
	give()
	intact("in the new file")
}

func TestStoreRenewalBesideAnswers(t *testing.T) {
	dir := t.TempDir()
	p := newPool(t, Options{Dir: dir, Pool4: pool4, Max: 300})
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for i := range 15_000 { // too few for housekeeping to renew too
			select {
			case <-stop:
				return
			default:
				addr4(p, fmt.Sprintf("host%d.example", i))
			}
		}
	})
	for range 8 {
		p.renew()
		p.mu.Lock()
		got, want := written(t, dir), names(p.t)
		p.mu.Unlock()
		if !maps.Equal(got, want) {
			t.Errorf("%d names in the file, %d in the table, not the same", len(got), len(want))
		}
	}
	close(stop)
	wg.Wait()
}

// The file must not grow without end, and renewals go on beside answers.
func TestStoreStaysSmall(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := t.TempDir()
		p := newPool(t, Options{Dir: dir, Pool4: netip.MustParsePrefix("192.0.2.0/24"), Max: 100})
		for i := range 60_000 {
			addr4(p, fmt.Sprintf("host%d.example", i))
			if i%10_000 == 0 {
				time.Sleep(2 * time.Second) // housekeeping has its turn
			}
		}
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if st, err := os.Stat(filepath.Join(dir, logName)); err != nil || st.Size() > 1<<20+1<<17 {
			t.Errorf("%v, %v", st.Size(), err)
		}
		if got, want := written(t, dir), names(p.t); !cmp.Equal(got, want) {
			t.Error(cmp.Diff(got, want))
		}
	})
}
