package main

import (
	"encoding/gob"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"sync"
	"syscall"
	"time"

	"github.com/tproxyd/tproxyd/internal/sandbox"
	"github.com/tproxyd/tproxyd/pkg/redirect"
)

// searcher is a process that looks at others for a daemon whose sandbox does not let
// it: which sockets the programs of EXCLUDE-MODULE have. It hears the daemon alone, and
// has of rights what it takes to look. The zero value is to be started; it ends with
// the daemon.
type searcher struct {
	mu   sync.Mutex
	cmd  *exec.Cmd // nil: it does not run
	in   io.Closer
	out  *os.File
	to   *gob.Encoder
	from *gob.Decoder
}

// searchLimit is how long a search may take: flows wait for it.
const searchLimit = 5 * time.Second

// searcherVariable in the environment makes serve a searcher.
const searcherVariable = "TPROXYD_SEARCHER"

// found is its answer to a list of programs.
type found struct {
	Sockets map[uint64]string
	Err     string
}

func (s *searcher) start(e *env) error {
	cmd := exec.Command("/proc/self/exe", "serve")
	cmd.Env, cmd.Stderr = []string{searcherVariable + "=1", "GOMAXPROCS=1"}, e.stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // an interrupt at the terminal is for the daemon
	in, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	out, answers, err := os.Pipe()
	if err != nil {
		return err
	}
	cmd.Stdout = answers
	err = cmd.Start()
	answers.Close()
	if err != nil {
		out.Close()
		return fmt.Errorf("a process that looks for programs: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.cmd, s.in, s.out, s.to, s.from = cmd, in, out, gob.NewEncoder(in), gob.NewDecoder(out)
	return nil
}

// ask is redirect.SearchPrograms.
func (s *searcher) ask(named []string) (map[uint64]string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.cmd == nil {
		return nil, errors.New("the process that looks for programs does not run")
	}
	var f found
	s.out.SetReadDeadline(time.Now().Add(searchLimit))
	if err := errors.Join(s.to.Encode(named), s.from.Decode(&f)); err != nil {
		s.cmd.Process.Kill() // an answer that is late would be taken for the next one
		return nil, fmt.Errorf("the process that looks for programs has ended, and a restart is needed: %w", err)
	}
	if f.Err != "" {
		return nil, errors.New(f.Err)
	}
	return f.Sockets, nil
}

// stop ends it, and waits for that.
func (s *searcher) stop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.in.Close()
	s.cmd.Wait()
	s.out.Close()
	s.cmd = nil
}

// search is what it does, until the daemon is gone.
func (e *env) search() error {
	for _, what := range sandbox.EnterToLook() {
		fmt.Fprintf(e.stderr, "tproxyd: the sandbox of what looks for programs is weaker than it could be: %s\n", what)
	}
	from, to := gob.NewDecoder(os.Stdin), gob.NewEncoder(e.stdout)
	for {
		var named []string
		if err := from.Decode(&named); errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		f := found{}
		var err error
		if f.Sockets, err = redirect.SearchPrograms(named); err != nil {
			f.Err = err.Error()
		}
		if err := to.Encode(f); err != nil {
			return err
		}
	}
}
