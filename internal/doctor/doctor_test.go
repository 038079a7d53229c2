package doctor

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestNetworkd(t *testing.T) {
	const no = "[Network]\nManageForeignRoutingPolicyRules=no\nManageForeignRoutes = no\n"
	for name, tt := range map[string]struct {
		files map[string]string
		want  bool // it is a finding
	}{
		"not there":               {nil, false},
		"default":                 {map[string]string{"run/systemd/netif/state": ""}, true},
		"told not to":             {map[string]string{"run/systemd/netif/state": "", "etc/systemd/networkd.conf": no}, false},
		"one of two":              {map[string]string{"run/systemd/netif/state": "", "etc/systemd/networkd.conf": "[Network]\nManageForeignRoutes=no\n"}, true},
		"another section":         {map[string]string{"run/systemd/netif/state": "", "etc/systemd/networkd.conf": "[DHCP]\nManageForeignRoutingPolicyRules=no\nManageForeignRoutes=no\n"}, true},
		"a drop-in":               {map[string]string{"run/systemd/netif/state": "", "etc/systemd/networkd.conf.d/a.conf": no}, false},
		"the host's goes first":   {map[string]string{"run/systemd/netif/state": "", "usr/lib/systemd/networkd.conf.d/a.conf": no, "etc/systemd/networkd.conf.d/a.conf": "\n"}, true},
		"the last one has it":     {map[string]string{"run/systemd/netif/state": "", "etc/systemd/networkd.conf.d/a.conf": no, "etc/systemd/networkd.conf.d/b.conf": "[Network]\nManageForeignRoutes=yes\n"}, true},
		"a comment is no setting": {map[string]string{"run/systemd/netif/state": "", "etc/systemd/networkd.conf": "[Network]\n#ManageForeignRoutes=no\n"}, true},
	} {
		root := t.TempDir()
		for path, text := range tt.files {
			path = filepath.Join(root, path)
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if got := networkd(root); (len(got) == 1) != tt.want {
			t.Errorf("%s: %v", name, got)
		}
	}
}

func TestProcess(t *testing.T) {
	const limits = "Limit                     Soft Limit           Hard Limit           Units     \nMax processes             1                    2                    processes \nMax open files            1024                 524288               files     \n"
	if n, ok := hardLimit(limits, "Max open files"); n != 524288 || !ok {
		t.Errorf("a limit of %d, %v", n, ok)
	}
	if _, ok := hardLimit("Max open files  unlimited  unlimited  files\n", "Max open files"); ok {
		t.Error("no limit is one")
	}
	if got := capEffective("Name:\tx\nCapInh:\t0000000000000000\nCapEff:\t000001ffffffffff\n"); got != 0x1ffffffffff {
		t.Errorf("capabilities %#x", got)
	}
}

func TestConntrack(t *testing.T) {
	root := t.TempDir()
	dir := filepath.Join(root, "proc/sys/net/netfilter")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if got := conntrack(root); got != nil {
		t.Errorf("a kernel that tracks nothing: %v", got)
	}
	for count, want := range map[string]bool{"100": false, "899": false, "900": true, "1000": true} {
		for name, text := range map[string]string{"count": count, "max": "1000"} {
			if err := os.WriteFile(filepath.Join(dir, "nf_conntrack_"+name), []byte(text+"\n"), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if got := conntrack(root); (len(got) == 1) != want || want && !strings.Contains(got[0].Mend, "nf_conntrack_max=4000") {
			t.Errorf("%s of 1000: %v", count, got)
		}
	}
}

func TestState(t *testing.T) {
	if got := state(filepath.Join(t.TempDir(), "none")); len(got) != 1 {
		t.Errorf("a directory that is not there: %v", got)
	}
	if got := state(""); got != nil {
		t.Errorf("no directory: %v", got)
	}
}
