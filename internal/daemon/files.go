package daemon

import "path/filepath"

// Files returns what a running daemon opens: files that a reload reads, which an
// editor may have replaced by others of the same name, and files that it makes or
// changes. A folder is named by a file in it; what is not in use is empty.
func (s *Setup) Files() (read, write []string) {
	c := s.Config
	read = append([]string{c.Path, c.Routes, resolvConf}, s.included...)
	read = append(read, c.Credentials, c.Control.Secrets)
	if s.credentialDir != "" {
		read = append(read, filepath.Join(s.credentialDir, "name"))
	}
	if c.Control.UI != "" {
		read = append(read, filepath.Join(c.Control.UI, "index.html"))
	}
	return read, []string{filepath.Join(c.State.Directory, decidedFile), c.Control.Socket}
}
