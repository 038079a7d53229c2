package main

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// udpRun is a daemon that has carried nothing yet on the way for datagrams, and
// the load generators of some ways.
type udpRun struct {
	*bench
	conf string // the daemon's
	load [ways]*process
	done udpTally // when trouble was called last
}

// startUDP starts the daemon, with rules before the one for everything, and
// load generators for some ways. The caller stops it.
func (b *bench) startUDP(ctx context.Context, compared []way, rules string) (u *udpRun, err error) {
	u = &udpRun{bench: b}
	defer func() {
		if err != nil {
			u.stop()
		}
	}()
	dir, err := os.MkdirTemp(b.dir, udp.String())
	if err != nil {
		return u, err
	}
	u.conf, err = configure(filepath.Join(dir, "etc"), fmt.Sprintf("%sSOCKD5 @=%s:%d *\n", rules, udp.wan(2), socksUDPPort))
	if err != nil {
		return u, err
	}
	if b.gateway[udp], err = start(ctx, b.lab.gateways[udp], b.program, "serve", "-c", u.conf, "--log-level", "error"); err != nil {
		return u, err
	}
	for _, w := range compared {
		if u.load[w], err = startRole(ctx, b.lab.client, "udp", "-to", w.target(echoPort).String()); err != nil {
			return u, err
		}
	}
	return u, nil
}

func (u *udpRun) stop() {
	for _, p := range append(u.load[:], u.gateway[udp]) {
		if p != nil {
			p.stop()
		}
	}
	u.gateway[udp] = nil
}

// order has the load generator of a way do something, and takes the processor
// time that the way's process used meanwhile.
func (u *udpRun) order(w way, o order) (sample, error) {
	p := u.gateway[w]
	before, err := p.cpu()
	if err != nil {
		return sample{}, err
	}
	r, err := u.load[w].order(o)
	if err != nil {
		return sample{}, fmt.Errorf("by way of %v: %w", w, err)
	}
	if r.Wrong > 0 {
		u.report.note("UDP by way of %v, %s of %d flows: %d ANSWERS CAME TO THE WRONG SOCKET", w, o.Do, o.Flows, r.Wrong)
	}
	after, err := p.cpu()
	return sample{r, after - before}, err
}

// udpTally is what the daemon tells of what went wrong.
type udpTally struct {
	Evicted uint64            `json:"evicted"`
	Refused uint64            `json:"refused"`
	Dropped map[string]uint64 `json:"dropped"`
}

// trouble notes what went wrong at the daemon since it was called last, so that
// a loss has a cause.
func (u *udpRun) trouble(ctx context.Context, what string) error {
	out, err := exec.CommandContext(ctx, u.program, "status", "--json", "-c", u.conf).Output()
	if err != nil {
		return fmt.Errorf("status: %w", err)
	}
	var status struct {
		UDP udpTally `json:"udp"`
	}
	if err := json.Unmarshal(out, &status); err != nil {
		return fmt.Errorf("status: %w", err)
	}
	now := status.UDP
	if words := now.since(u.done); words != "" {
		u.report.note("UDP, %s: at the daemon: %s", what, words)
	}
	u.done = now
	return nil
}

// since tells what is more than it was; "" if nothing is.
func (t udpTally) since(old udpTally) string {
	var words []string
	add := func(what string, now, then uint64) {
		if now > then {
			words = append(words, fmt.Sprintf("%d %s", now-then, what))
		}
	}
	add("flows evicted", t.Evicted, old.Evicted)
	add("datagrams refused", t.Refused, old.Refused)
	for _, why := range slices.Sorted(maps.Keys(t.Dropped)) {
		add("datagrams dropped ("+why+")", t.Dropped[why], old.Dropped[why])
	}
	return strings.Join(words, ", ")
}

// unitFiles is LimitNOFILE of the daemon's unit.
const unitFiles = 262144

// allowFiles lets this process, and those that it starts, have as many
// descriptors as the unit lets the daemon have, and notes it if they cannot.
func (r *report) allowFiles() error {
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err != nil {
		return fmt.Errorf("RLIMIT_NOFILE: %w", err)
	}
	if l.Max < unitFiles {
		if syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: unitFiles, Max: unitFiles}) == nil {
			return nil
		}
		r.note("RLIMIT_NOFILE is %d here and not %d as by the unit: flows of UDP have %d sockets", l.Max, unitFiles, l.Max/4)
	}
	l.Cur = l.Max
	return syscall.Setrlimit(syscall.RLIMIT_NOFILE, &l)
}
