//go:build example

// Package gotest shows how a test binary is socksified whole: TestMain starts it
// again by tproxyd run, and from then on every connection of every test goes where
// socks.cnf says, without a word about proxies in the tests.
//
//	go test -tags example ./examples/gotest
package gotest

import (
	"errors"
	"net/http"
	"os"
	"os/exec"
	"testing"
)

func TestMain(m *testing.M) {
	if os.Getenv("SOCKSIFIED") == "" {
		c := exec.Command("tproxyd", append([]string{"run", "--routes", "socks.cnf", "--", os.Args[0]}, os.Args[1:]...)...)
		c.Env = append(os.Environ(), "SOCKSIFIED=yes")
		c.Stdin, c.Stdout, c.Stderr = os.Stdin, os.Stdout, os.Stderr
		var exit *exec.ExitError
		if err := c.Run(); err != nil && !errors.As(err, &exit) {
			panic(err) // tproxyd is not installed
		}
		os.Exit(c.ProcessState.ExitCode())
	}
	os.Exit(m.Run())
}

func TestFetch(t *testing.T) {
	r, err := http.Get("http://www.example.org/")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	if r.StatusCode != http.StatusOK {
		t.Error(r.Status)
	}
}
