package doctor

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// networkd finds a systemd-networkd that removes routing rules and routes which
// it did not make (networkd.conf(5)). Root is where files are looked for.
func networkd(root string) []Finding {
	if _, err := os.Stat(filepath.Join(root, "run/systemd/netif/state")); err != nil {
		return nil // it does not run
	}
	var lost []string
	for _, key := range []string{"ManageForeignRoutingPolicyRules", "ManageForeignRoutes"} {
		if v := networkdSetting(root, key); v != "no" && v != "false" && v != "0" && v != "off" {
			lost = append(lost, key)
		}
	}
	if lost == nil {
		return nil
	}
	return []Finding{{
		"networkd", "systemd-networkd removes routing rules and routes of others (" + strings.Join(lost, ", ") + ")",
		"whenever it is restarted flows are refused until ours are put back",
		`printf '[Network]\nManageForeignRoutingPolicyRules=no\nManageForeignRoutes=no\n' > /etc/systemd/networkd.conf.d/tproxyd.conf and restart it`,
	}}
}

// networkdSetting returns the value of a key of the section [Network]; the file
// that is read last has the last word. Empty: none has it.
func networkdSetting(root, key string) (value string) {
	// A folder of the host's goes before one of the distribution's with a file of
	// that name, and all of them go behind the main file, by their names.
	drops := map[string]string{}
	for _, dir := range []string{"usr/lib", "usr/local/lib", "run", "etc"} {
		files, _ := filepath.Glob(filepath.Join(root, dir, "systemd/networkd.conf.d/*.conf"))
		for _, f := range files {
			drops[filepath.Base(f)] = f
		}
	}
	var names []string
	for name := range drops {
		names = append(names, name)
	}
	slices.Sort(names)
	files := []string{filepath.Join(root, "etc/systemd/networkd.conf")}
	for _, name := range names {
		files = append(files, drops[name])
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		section := ""
		for line := range strings.Lines(string(b)) {
			line = strings.TrimSpace(line)
			if strings.HasPrefix(line, "[") {
				section = line
			}
			if k, v, ok := strings.Cut(line, "="); ok && section == "[Network]" && strings.TrimSpace(k) == key {
				value = strings.ToLower(strings.TrimSpace(v))
			}
		}
	}
	return value
}
