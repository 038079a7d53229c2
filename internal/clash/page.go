package clash

import (
	"bytes"
	"crypto/sha256"
	"embed"
	"encoding/base64"
	"net/http"
)

// pageHTML is the page at /, page.html: one file that needs nothing else.
//
//go:embed page.html
var pageHTML embed.FS

// page serves the page. It runs its own script and no other.
func page(w http.ResponseWriter) {
	text, err := pageHTML.ReadFile("page.html")
	if err != nil {
		fail(w, http.StatusInternalServerError, err.Error())
		return
	}
	h := w.Header()
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Security-Policy", "default-src 'none'; style-src 'unsafe-inline'; script-src "+scriptHash(text)+"; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'")
	h.Set("Referrer-Policy", "no-referrer")
	w.Write(text)
}

// scriptHash is what a Content-Security-Policy calls the page's script.
func scriptHash(page []byte) string {
	_, script, _ := bytes.Cut(page, []byte("<script>"))
	script, _, _ = bytes.Cut(script, []byte("</script>"))
	sum := sha256.Sum256(script)
	return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
}
