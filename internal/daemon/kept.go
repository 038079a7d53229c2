package daemon

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/tproxyd/tproxyd/pkg/redirect"
)

// decidedFile holds a digest of the rules by which the kernel lets addresses
// pass by name. A daemon that starts with other rules does not trust what the
// one before it let pass; one that starts with the same rules keeps it, so that
// a restart cuts no flow.
const decidedFile = "decided-by"

// decidedBy is what decides that a name is DIRECT.
func (s *Setup) decidedBy() string {
	return fmt.Sprintf("%x %s\n", s.Table.Sum(), strings.Join(s.LocalNames().Search, " "))
}

// readmitAtStart returns what Plan.Readmit shall be for the first plan: nil, so
// that everything is kept, or nothing.
func (s *Setup) readmitAtStart() []redirect.Admission {
	if s.Table == nil || s.enclosure != nil {
		return []redirect.Admission{}
	}
	if s.decided() == s.decidedBy() {
		return nil
	}
	return []redirect.Admission{}
}

// decided returns the digest; empty: there is none.
func (s *Setup) decided() string {
	b, _ := os.ReadFile(filepath.Join(s.Config.State.Directory, decidedFile))
	return string(b)
}

// forgetDecided removes the digest, before other rules let something pass.
func (s *Setup) forgetDecided() {
	if s.enclosure != nil {
		return // nothing is let pass there
	}
	os.Remove(filepath.Join(s.Config.State.Directory, decidedFile))
}

// noteDecided writes the digest; if it cannot be written there is none.
func (s *Setup) noteDecided() error {
	if s.enclosure != nil {
		return nil
	}
	path := filepath.Join(s.Config.State.Directory, decidedFile)
	err := os.WriteFile(path+".new", []byte(s.decidedBy()), 0o644)
	if err == nil {
		err = os.Rename(path+".new", path)
	}
	if err != nil {
		os.Remove(path + ".new")
		s.forgetDecided()
	}
	return err
}
