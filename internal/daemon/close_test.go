package daemon

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"
)

// TestCloseTable: the closed table lets pass by name what the same rules let
// pass before, and nothing that only other rules did.
func TestCloseTable(t *testing.T) {
	const direct = "DIRECT direct.example\nDENY *\n"
	for _, tt := range []struct {
		name, rules string
		passes      bool
	}{
		{"the same rules", direct, true},
		{"other rules", "DIRECT other.example\nSOCKD5 @=127.0.0.1:9 *\n", false},
		{"wrong rules", "DIRCET *\n", false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := serve(t, "")
			r.routes(direct)
			if at := ask(t, "direct.example."); at != directAt {
				t.Fatalf("direct.example is at %s", at)
			}
			r.stop()
			if err := os.WriteFile(filepath.Join(r.dir, "socks.cnf"), []byte(tt.rules), 0o600); err != nil {
				t.Fatal(err)
			}
			setup, _ := LoadClosed(filepath.Join(r.dir, "tproxyd.toml"))
			if setup == nil {
				t.Fatal("no setup")
			}
			if err := CloseTable(setup); err != nil {
				t.Fatal(err)
			}
			// Nobody is there: what passes is not answered.
			_, err := net.DialTimeout("tcp", directAt+":80", 200*time.Millisecond)
			if passes := !errors.Is(err, syscall.ECONNREFUSED); passes != tt.passes {
				t.Errorf("%s passes: %v, want %v: %v", directAt, passes, tt.passes, err)
			}
		})
	}
}
