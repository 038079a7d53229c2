package config

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/tproxyd/tproxyd/pkg/routes"
)

// SecretsCredential is the name of systemd's credential that holds the Secrets.
const SecretsCredential = "clash-secrets"

// shortestSecret is how long a secret must be: nobody is kept from guessing.
const shortestSecret = 16

// Secrets are what opens the address of the Clash API. They never print: every
// form that fmt and slog know hides them.
type Secrets struct {
	Admin  string // who has it may change something; empty: nobody may
	Reader string // who has it may look; empty: it takes the other one
}

// String hides the secrets.
func (Secrets) String() string { return "secrets(hidden)" }

// GoString hides the secrets.
func (s Secrets) GoString() string { return s.String() }

// LoadSecrets reads the file at path, whose mode must give nothing to group and
// others; an empty path is SecretsCredential in systemd's credential directory
// dir (empty: none). One of both secrets is needed.
//
//	admin  = "…"
//	reader = "…"
func LoadSecrets(path, dir string) (Secrets, routes.Diagnostics) {
	var s Secrets
	var b []byte
	var err error
	switch {
	case path != "":
		b, err = readPrivate(path)
	case dir == "":
		path, err = SecretsCredential, errors.New("[control] clash needs secrets: name a file of mode 0600 by secrets, or hand in a credential of systemd of this name")
	default:
		path = filepath.Join(dir, SecretsCredential)
		b, err = os.ReadFile(path)
	}
	if errors.Is(err, fs.ErrNotExist) {
		err = errors.New("[control] clash needs the secrets of this file, which does not exist")
	}
	if err != nil {
		return s, routes.Diagnostics{fileError(path, err)}
	}
	entries, diags := scan(path, b)
	places := map[string]entry{}
	for _, e := range entries {
		key := e.key()
		dst := map[string]*string{"admin": &s.Admin, "reader": &s.Reader}[key]
		if dst == nil {
			diags = append(diags, e.errorf(path, codeUnknown, "unknown key %q; there are admin and reader", key))
			continue
		}
		if _, twice := places[key]; twice {
			diags = append(diags, e.errorf(path, codeTwice, "%s is given twice", key))
			continue
		}
		places[key] = e
		if text, ok := e.value.(string); ok && len(text) >= shortestSecret {
			*dst = text
		} else { // what it is stays unsaid
			diags = append(diags, e.errorf(path, codeValue, "%s: want a string of %d bytes or more", key, shortestSecret))
		}
	}
	switch {
	case diags.HasErrors():
	case len(places) == 0:
		diags = append(diags, fileError(path, errors.New("it has neither admin nor reader")))
	case s.Admin == s.Reader:
		diags = append(diags, places["reader"].errorf(path, codeValue, "reader is the same as admin: whoever may look could change something"))
	}
	return s, diags
}
