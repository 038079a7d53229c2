package control

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func serve(t *testing.T, o Options) (client *Client, path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "run", "control.sock")
	ln, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error)
	go func() { done <- Serve(ctx, ln, Handler(o)) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return NewClient(path), path
}

func TestClientAndServer(t *testing.T) {
	var answer error
	client, path := serve(t, Options{
		Status:  func() any { return map[string]int{"flows": 3} },
		Reload:  func() error { return answer },
		Metrics: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.Write([]byte("tproxyd_up 1\n")) }),
	})
	st, err := os.Stat(path)
	if err != nil || st.Mode().Perm() != 0o660 {
		t.Errorf("socket mode %v, %v", st.Mode(), err)
	}
	ctx := t.Context()
	if b, err := client.Status(ctx); err != nil || !strings.Contains(string(b), `"flows": 3`) {
		t.Errorf("status: %s %v", b, err)
	}
	if b, err := client.Metrics(ctx); err != nil || string(b) != "tproxyd_up 1\n" {
		t.Errorf("metrics: %s %v", b, err)
	}
	if err := client.Reload(ctx); err != nil {
		t.Errorf("reload: %v", err)
	}
	answer = errors.New("the kernel said no")
	if err := client.Reload(ctx); err == nil || !strings.Contains(err.Error(), "the kernel said no") || errors.As(err, new(*Refused)) {
		t.Errorf("a reload that failed: %v", err)
	}
	answer = &Refused{Text: "socks.cnf:3:1: error E01: unknown directive"}
	var refused *Refused
	if err := client.Reload(ctx); !errors.As(err, &refused) || !strings.Contains(refused.Text, "E01") {
		t.Errorf("a refused reload: %v", err)
	}
}

func TestListenReplacesTheDeadOnly(t *testing.T) {
	path := filepath.Join(t.TempDir(), "c.sock")
	dead, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	dead.(*net.UnixListener).SetUnlinkOnClose(false)
	dead.Close()
	ln, err := Listen(path)
	if err != nil {
		t.Fatalf("a dead socket is in the way: %v", err)
	}
	defer ln.Close()
	if _, err := Listen(path); err == nil {
		t.Error("a living socket was replaced")
	}
	file := filepath.Join(t.TempDir(), "notes")
	if err := os.WriteFile(file, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if ln, err := Listen(file); err == nil {
		ln.Close()
		t.Error("a file was replaced")
	}
	if b, err := os.ReadFile(file); err != nil || string(b) != "mine" {
		t.Errorf("the file has %q, %v", b, err)
	}
}

func TestNoDaemon(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	err := NewClient(filepath.Join(t.TempDir(), "none")).Reload(ctx)
	if err == nil || !strings.Contains(err.Error(), "is the daemon running?") {
		t.Errorf("got %v", err)
	}
}
