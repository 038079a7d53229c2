package config

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/tproxyd/tproxyd/pkg/routes"
)

// Credential is a user name and password for a SOCKS server (RFC 1929). It
// never prints: every form that fmt and slog know hides it.
type Credential struct {
	Username string
	Password string
}

// String hides the credential.
func (Credential) String() string { return "credential(hidden)" }

// GoString hides the credential.
func (c Credential) GoString() string { return c.String() }

// Credentials are the known ones by name.
type Credentials map[string]Credential

// LoadCredentials reads the credentials file at path, whose mode must give
// nothing to group and others; an empty path is no file. Files of systemd's
// credential directory dir (empty: none) are added under their own names where
// they hold a user name and a password at their top level.
//
//	[int]
//	username = "…"
//	password = "…"
func LoadCredentials(path, dir string) (Credentials, routes.Diagnostics) {
	all := Credentials{}
	var diags routes.Diagnostics
	if path != "" {
		b, err := readPrivate(path)
		if err != nil {
			return nil, routes.Diagnostics{fileError(path, err)}
		}
		diags = all.add(path, "", b)
	}
	if dir != "" {
		files, _ := os.ReadDir(dir) // a directory that is not there holds none
		for _, f := range files {
			file := filepath.Join(dir, f.Name())
			if _, have := all[f.Name()]; have || !f.Type().IsRegular() || f.Name() == SecretsCredential {
				continue
			}
			b, err := os.ReadFile(file)
			if err != nil {
				diags = append(diags, fileError(file, err))
				continue
			}
			diags = append(diags, all.add(file, f.Name(), b)...)
		}
	}
	if diags.HasErrors() {
		return nil, diags
	}
	return all, diags
}

// readPrivate reads a file that only its owner may read.
func readPrivate(path string) ([]byte, error) {
	st, err := os.Stat(path)
	if err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, errors.New("the credentials file does not exist")
		}
		return nil, err
	}
	if st.Mode().Perm()&0o077 != 0 {
		return nil, fmt.Errorf("mode %#o lets others read the passwords; chmod 600 it", st.Mode().Perm())
	}
	return os.ReadFile(path)
}

// add takes the credentials of one file: tables by their names, or, with name
// given, the two keys of its top level.
func (all Credentials) add(path, name string, b []byte) routes.Diagnostics {
	entries, diags := scan(path, b)
	places := map[string]entry{}
	seen := map[string]bool{}
	for _, e := range entries {
		n, key := name, e.path[len(e.path)-1]
		if name == "" {
			if len(e.path) != 2 {
				diags = append(diags, e.errorf(path, codeUnknown, "unknown key %q; write [NAME] and below it username and password", e.key()))
				continue
			}
			n = e.path[0]
		}
		if seen[e.key()] {
			diags = append(diags, e.errorf(path, codeTwice, "%s of credential %q is given twice", key, n))
			continue
		}
		seen[e.key()] = true
		c := all[n]
		var err error
		switch key {
		case "username":
			err = setSecret(&c.Username, e.value)
		case "password":
			err = setSecret(&c.Password, e.value)
		default:
			diags = append(diags, e.errorf(path, codeUnknown, "unknown key %q; a credential has username and password", key))
			continue
		}
		if err != nil {
			diags = append(diags, e.errorf(path, codeValue, "%s: %v", key, err))
			continue
		}
		all[n] = c
		if _, ok := places[n]; !ok {
			places[n] = e
		}
	}
	for n, e := range places {
		if c := all[n]; c.Username == "" || c.Password == "" {
			diags = append(diags, e.errorf(path, codeValue, "credential %q needs both username and password", n))
		}
	}
	return diags
}

// setSecret takes a string of 1 to 255 bytes, as RFC 1929 allows; its error
// does not show it.
func setSecret(dst *string, v any) error {
	var s string
	if err := set(&s, v, "a string in quotes"); err != nil {
		return err
	}
	if s == "" || len(s) > 255 {
		return errors.New("must be 1 to 255 bytes long")
	}
	*dst = s
	return nil
}
