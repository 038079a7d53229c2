package config

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestLoadSecrets(t *testing.T) {
	const admin, reader = "correct horse battery", "staple of the reader"
	dir := t.TempDir()
	file := func(name, text string, mode os.FileMode) string {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		return path
	}
	both := fmt.Sprintf("admin = %q\nreader = %q\n", admin, reader)
	want := Secrets{Admin: admin, Reader: reader}
	if got, diags := LoadSecrets(file("both", both, 0o600), ""); got != want || len(diags) != 0 {
		t.Errorf("%v", diags)
	}
	file(SecretsCredential, both, 0o400)
	if got, diags := LoadSecrets("", dir); got != want || len(diags) != 0 {
		t.Errorf("systemd's: %v", diags)
	}
	systemd := t.TempDir()
	if err := os.WriteFile(filepath.Join(systemd, SecretsCredential), []byte(both), 0o400); err != nil {
		t.Fatal(err)
	}
	if _, diags := LoadCredentials("", systemd); len(diags) != 0 {
		t.Errorf("taken for a server's credential: %v", diags)
	}
	for what, tt := range map[string]struct{ path, dir, says string }{
		"nothing named":  {"", "", "needs secrets"},
		"not there":      {filepath.Join(dir, "none"), "", "does not exist"},
		"none of them":   {"", t.TempDir(), "does not exist"},
		"others may too": {file("open", both, 0o644), "", "chmod 600"},
		"too short":      {file("short", "admin = \"tooshort\"\n", 0o600), "", "16 bytes"},
		"no string":      {file("number", "admin = 1234567890123456\n", 0o600), "", "16 bytes"},
		"unknown":        {file("unknown", "root = \"correct horse battery\"\n", 0o600), "", `unknown key "root"`},
		"twice":          {file("twice", "admin = \"correct horse battery\"\nadmin = \"correct horse battery\"\n", 0o600), "", "twice"},
		"empty":          {file("empty", "", 0o600), "", "neither"},
		"the same":       {file("same", "admin = \"correct horse battery\"\nreader = \"correct horse battery\"\n", 0o600), "", "the same"},
	} {
		_, diags := LoadSecrets(tt.path, tt.dir)
		if !diags.HasErrors() || !strings.Contains(diags.Error(), tt.says) {
			t.Errorf("%s: %v, want %q", what, diags, tt.says)
		}
		if strings.Contains(diags.Error(), "tooshort") || strings.Contains(diags.Error(), "battery") {
			t.Errorf("%s: a message has the secret: %v", what, diags)
		}
	}
	for _, form := range []string{"%v", "%+v", "%#v", "%s"} {
		if text := fmt.Sprintf(form, want); strings.Contains(text, "correct") || strings.Contains(text, "staple") {
			t.Errorf("%s prints %s", form, text)
		}
	}
}
