package socks

import (
	"bytes"
	"encoding/json"
	"fmt"
	"log/slog"
	"strings"
	"testing"
)

// TestAuthHidden prints a credential in every way at hand.
func TestAuthHidden(t *testing.T) {
	type holder struct {
		Pointer *Auth
		Value   Auth
	}
	h := holder{alice, *alice}
	var out bytes.Buffer
	for _, v := range []any{alice, *alice, h, &h, Options{Auth: alice}, []Auth{*alice}, map[string]*Auth{"a": alice}} {
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
			fmt.Fprintf(&out, verb+"\n", v)
		}
		b, err := json.Marshal(v)
		if err != nil {
			t.Error(err)
		}
		out.Write(append(b, '\n'))
		slog.New(slog.NewTextHandler(&out, nil)).Info("text", "v", v)
		slog.New(slog.NewJSONHandler(&out, nil)).Info("json", "v", v)
	}
	fmt.Fprintln(&out, (*Auth)(nil))
	for line := range strings.Lines(out.String()) {
		for _, secret := range []string{alice.Username, alice.Password, "616c696365", "68756e74657232"} {
			if strings.Contains(line, secret) {
				t.Errorf("shown: %s", line)
			}
		}
	}
	if !strings.Contains(out.String(), "hidden") {
		t.Error("nothing says that something is hidden")
	}
}
