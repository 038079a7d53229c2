package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	runWeb      = 8088      // the web server's port
	runNear     = 1182      // danted, as it is reached by the short way
	runFar      = 1183      // and by the long one
	runBulk     = 256 << 20 // bytes of the large page
	runRequests = 200       // of one curl, each over a connection of its own
)

// wrapper is a way to have a command go through a SOCKS server.
type wrapper struct {
	name string
	// line puts the server at host:port in front of a command, and returns what
	// is added to the environment.
	line func(dir, host string, port int) (args, env []string, err error)
}

func (b *bench) wrappers() []wrapper {
	return []wrapper{
		{"no proxy", func(string, string, int) ([]string, []string, error) { return nil, nil, nil }},
		{"tproxyd run", func(_, host string, port int) ([]string, []string, error) {
			return []string{b.program, "run", "--socks", fmt.Sprintf("%s:%d", host, port), "--"}, nil, nil
		}},
		{"proxychains4", func(dir, host string, port int) ([]string, []string, error) {
			conf := filepath.Join(dir, fmt.Sprintf("proxychains-%d.conf", port))
			text := fmt.Sprintf("strict_chain\n[ProxyList]\nsocks5 %s %d\n", host, port)
			return []string{"proxychains4", "-q", "-f", conf}, nil, os.WriteFile(conf, []byte(text), 0o644)
		}},
		{"socksify", func(dir, host string, port int) ([]string, []string, error) {
			conf := filepath.Join(dir, fmt.Sprintf("socks-%d.conf", port))
			text := fmt.Sprintf("logoutput: /dev/null\nroute { from: 0.0.0.0/0 to: 0.0.0.0/0 via: %s port = %d proxyprotocol: socks_v5 }\n", host, port)
			return []string{"socksify"}, []string{"SOCKS_CONF=" + conf}, os.WriteFile(conf, []byte(text), 0o644)
		}},
	}
}

// oneCommand measures one command through a SOCKS server, beside the preloaded
// libraries: what it takes to start and end, what a fetch takes whose server is
// 40 ms away, and what passes where it is near.
func (b *bench) oneCommand(ctx context.Context) error {
	danted, err := exec.LookPath("danted")
	if err != nil {
		b.report.note("danted is not installed: no figures of one command")
		return nil
	}
	stop, err := b.lab.lengthen(udp)
	if err != nil {
		return err
	}
	defer stop()
	dir, err := os.MkdirTemp("", "tproxyd-bench-run") // nobody has to read in it
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	conf := filepath.Join(dir, "danted.conf")
	text := fmt.Sprintf("logoutput: /dev/null\ninternal: %s port = %d\ninternal: %s port = %d\nexternal: lo\nclientmethod: none\nsocksmethod: none\n"+
		"user.privileged: root\nuser.unprivileged: nobody\nclient pass { from: 0/0 to: 0/0 }\nsocks pass { from: 0/0 to: 0/0 }\n",
		udp.wan(2), runNear, farAt, runFar)
	if err := os.WriteFile(conf, []byte(text), 0o600); err != nil {
		return err
	}
	server := exec.CommandContext(ctx, danted, "-f", conf)
	server.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := b.lab.server.Do(server.Start); err != nil {
		return err
	}
	defer func() { server.Process.Signal(syscall.SIGTERM); server.Wait() }()
	var web net.Listener
	if err := b.lab.server.Do(func() (err error) {
		web, err = net.Listen("tcp", fmt.Sprintf("%s:%d", udp.target(0).Addr(), runWeb))
		return err
	}); err != nil {
		return err
	}
	defer web.Close()
	go http.Serve(web, http.HandlerFunc(page))
	time.Sleep(300 * time.Millisecond) // danted does not say when it is ready

	t := b.report.table("One command: `true`, and curl through danted; the server 40 ms away for the first byte, near for the rest",
		"", "start and end, ms", "first byte, ms", "MB/s", "requests/s")
	for _, w := range b.wrappers() {
		if err := b.runRow(ctx, t, w, dir); err != nil {
			return fmt.Errorf("%s: %w", w.name, err)
		}
	}
	t.end()
	return nil
}

// page is one of runBulk bytes at /bulk, and a short one elsewhere.
func page(rw http.ResponseWriter, r *http.Request) {
	if r.URL.Path != "/bulk" {
		fmt.Fprintln(rw, "hello")
		return
	}
	rw.Header().Set("Content-Length", strconv.Itoa(runBulk))
	block := make([]byte, 1<<18)
	for n := 0; n < runBulk; n += len(block) {
		if _, err := rw.Write(block); err != nil {
			return
		}
	}
}

func (b *bench) runRow(ctx context.Context, t *table, w wrapper, dir string) error {
	near, env, err := w.line(dir, udp.wan(2), runNear)
	if err != nil {
		return err
	}
	if len(near) > 0 && near[0] != b.program {
		if _, err := exec.LookPath(near[0]); err != nil {
			b.report.note("%s is not installed: no figures of it", w.name)
			return nil
		}
	}
	far, farEnv, err := w.line(dir, farAt, runFar)
	if err != nil {
		return err
	}
	base := fmt.Sprintf("http://%s:%d/", udp.target(0).Addr(), runWeb)
	rounds := b.size.rounds * 3
	var cells [4]float64
	for i, measure := range []func() (float64, error){
		func() (float64, error) {
			began := time.Now()
			_, err := b.command(ctx, near, env, "true")
			return time.Since(began).Seconds() * 1e3, err
		},
		func() (float64, error) {
			s, err := b.command(ctx, far, farEnv, "curl", "-sS", "-o", "/dev/null", "-w", "%{time_starttransfer}", base)
			return s * 1e3, err
		},
		func() (float64, error) {
			s, err := b.command(ctx, near, env, "curl", "-sS", "-o", "/dev/null", "-w", "%{speed_download}", base+"bulk")
			return s / 1e6, err
		},
		func() (float64, error) {
			began := time.Now()
			_, err := b.command(ctx, near, env, "curl", "-sS", "-o", "/dev/null", "-H", "Connection: close", fmt.Sprintf("%s[1-%d]", base, runRequests))
			return runRequests / time.Since(began).Seconds(), err
		},
	} {
		values := make([]float64, rounds)
		for n := range values {
			if values[n], err = measure(); err != nil {
				return err
			}
		}
		slices.Sort(values)
		cells[i] = values[rounds/2]
	}
	t.row(w.name, cells[0], cells[1], cells[2], cells[3])
	return nil
}

// command runs a command of the gateway's machine behind what a wrapper puts in
// front, as nobody, and returns the number that it prints, if any.
func (b *bench) command(ctx context.Context, before, env []string, args ...string) (float64, error) {
	line := slices.Concat([]string{"setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"}, before, args)
	c := exec.CommandContext(ctx, line[0], line[1:]...)
	c.Env = append(os.Environ(), env...)
	c.Dir = "/"
	c.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var out, errs bytes.Buffer
	c.Stdout, c.Stderr = &out, &errs
	err := b.lab.gateways[udp].Do(c.Start)
	if err == nil {
		err = c.Wait()
	}
	if err != nil {
		return 0, errors.Join(fmt.Errorf("%s: %w", strings.Join(line, " "), err), errors.New(errs.String()))
	}
	v, _ := strconv.ParseFloat(strings.TrimSpace(out.String()), 64)
	return v, nil
}
