package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/tproxyd/tproxyd/internal/netns"
)

// process is a program that runs in a namespace. It dies with the namespace at
// the latest.
type process struct {
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	stdout *bufio.Reader
	stderr bytes.Buffer
}

// start runs a program in n and waits for its first line, by which it says
// that it is ready.
func start(ctx context.Context, n *netns.Namespace, program string, args ...string) (*process, error) {
	p := &process{cmd: exec.CommandContext(ctx, program, args...)}
	p.cmd.Stderr = &p.stderr
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var err error
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	p.stdout = bufio.NewReader(stdout)
	if err := n.Do(p.cmd.Start); err != nil {
		return nil, err
	}
	if _, err := p.stdout.ReadString('\n'); err != nil {
		p.stop()
		return nil, fmt.Errorf("%s did not become ready: %w\n%s", filepath.Base(program), err, p.stderr.String())
	}
	return p, nil
}

// startRole runs this program in a role.
func startRole(ctx context.Context, n *netns.Namespace, args ...string) (*process, error) {
	p, err := start(ctx, n, "/proc/self/exe", args...)
	if err != nil {
		return nil, fmt.Errorf("role %s: %w", args[0], err)
	}
	return p, nil
}

// stop kills the process and waits for its end.
func (p *process) stop() {
	p.cmd.Process.Kill()
	p.cmd.Wait()
}

// ask writes a line to the process and decodes the line that it answers with.
func (p *process) ask(line string, answer any) error {
	if _, err := fmt.Fprintln(p.stdin, line); err != nil {
		return err
	}
	b, err := p.stdout.ReadBytes('\n')
	if err != nil {
		return fmt.Errorf("no answer: %w\n%s", err, p.stderr.String())
	}
	return json.Unmarshal(b, answer)
}

// load runs one load generator in n to its end and returns what it found.
func load(ctx context.Context, n *netns.Namespace, args ...string) (result, error) {
	var out, stderr bytes.Buffer
	cmd := exec.CommandContext(ctx, "/proc/self/exe", args...)
	cmd.Stdout, cmd.Stderr = &out, &stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := n.Do(cmd.Start); err != nil {
		return result{}, err
	}
	if err := cmd.Wait(); err != nil {
		return result{}, fmt.Errorf("%v: %w\n%s", args, errors.Join(err, context.Cause(ctx)), stderr.String())
	}
	var r result
	return r, json.Unmarshal(out.Bytes(), &r)
}

// userHZ is the unit of the times in /proc/PID/stat, the same on all of
// Linux's architectures that Go runs on.
const userHZ = 100

// cpu returns the processor time that a process has used, user and system,
// all threads. A nil process uses none.
func (p *process) cpu() (time.Duration, error) {
	if p == nil {
		return 0, nil
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", p.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	return parseStat(string(b))
}

// parseStat reads utime and stime of a line of /proc/PID/stat (proc(5)). The
// name of the program may hold blanks and parentheses.
func parseStat(line string) (time.Duration, error) {
	i := strings.LastIndexByte(line, ')')
	fields := strings.Fields(line[i+1:])
	if i < 0 || len(fields) < 13 {
		return 0, fmt.Errorf("/proc/PID/stat: %q", line)
	}
	var ticks int64
	for _, f := range fields[11:13] {
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("/proc/PID/stat: %w", err)
		}
		ticks += n
	}
	return time.Duration(ticks) * time.Second / userHZ, nil
}

// memory returns the resident bytes of a process.
func (p *process) memory() (int64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		return 0, err
	}
	return parseRSS(string(b))
}

// parseRSS reads VmRSS of /proc/PID/status.
func parseRSS(text string) (int64, error) {
	_, rest, ok := strings.Cut(text, "VmRSS:")
	fields := strings.Fields(rest)
	if !ok || len(fields) == 0 {
		return 0, errors.New("/proc/PID/status: no VmRSS")
	}
	kb, err := strconv.ParseInt(fields[0], 10, 64)
	return kb << 10, err
}

// descriptors returns how many descriptors a process holds.
func (p *process) descriptors() (int, error) {
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", p.cmd.Process.Pid))
	return len(entries), err
}
