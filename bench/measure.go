package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

// bench is one run: the lab, what runs in it, and the report.
type bench struct {
	size    sizes
	lab     *lab
	gateway [ways]*process // nil where the kernel alone forwards
	report  *report
	program string // the daemon
	dir     string // for files of its
}

// measure builds the lab, starts everything in it, measures case after case
// and prints the report: of the parts whose name has only in it.
func measure(ctx context.Context, program string, size sizes, only string, out io.Writer) error {
	program, err := filepath.Abs(program)
	if err != nil {
		return err
	}
	if _, err := os.Stat(program); err != nil {
		return fmt.Errorf("%w: make build makes it", err)
	}
	if !slices.ContainsFunc((*bench)(nil).parts(), func(p part) bool { return strings.Contains(p.name, only) }) {
		return fmt.Errorf("no table has %q in its name", only)
	}
	dir, err := os.MkdirTemp("", "tproxyd-bench")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	l, err := newLab()
	if err != nil {
		return err
	}
	defer l.close()
	b := &bench{size: size, lab: l, report: newReport(out), program: program, dir: dir}
	if err := b.report.allowFiles(); err != nil {
		return err
	}

	for _, role := range []string{"targets", "socks"} {
		p, err := startRole(ctx, l.server, role)
		if err != nil {
			return err
		}
		defer p.stop()
	}
	if err := errors.Join(l.gateways[splice].Do(divert), l.gateways[tracked].Do(track)); err != nil {
		return err
	}
	if b.gateway[splice], err = startRole(ctx, l.gateways[splice], "splice"); err != nil {
		return err
	}
	defer b.gateway[splice].stop()
	for w, rules := range map[way]string{proxied: proxyRules(), direct: directRules(size.prefix)} {
		conf, err := configure(filepath.Join(dir, w.String()), rules)
		if err != nil {
			return err
		}
		began := time.Now()
		if b.gateway[w], err = start(ctx, l.gateways[w], program, "serve", "-c", conf, "--log-level", "error"); err != nil {
			return err
		}
		defer b.gateway[w].stop()
		b.report.note("%s: ready %.2f s after its start", w, time.Since(began).Seconds())
	}
	b.report.head(program, size)
	for _, m := range b.parts() {
		if !strings.Contains(m.name, only) {
			continue
		}
		if err := m.measure(ctx); err != nil {
			return errors.Join(err, context.Cause(ctx))
		}
	}
	b.report.end()
	return nil
}

// part is a table of the report.
type part struct {
	name    string
	measure func(context.Context) error
}

// parts are all tables in their order.
func (b *bench) parts() []part {
	return []part{
		{"throughput", b.throughput}, {"connections", b.connections}, {"latency", b.latency}, {"far", b.far},
		{"one-command", b.oneCommand}, {"prefixes", b.prefixes}, {"dns", b.dns}, {"idle", b.idle},
		{"udp-datagrams", b.datagrams}, {"udp-flows", b.newFlows}, {"udp-sessions", b.sessions},
	}
}

// configure writes the daemon's files into dir and returns the first.
func configure(dir, rules string) (string, error) {
	conf := filepath.Join(dir, "tproxyd.toml")
	text := "routes = \"socks.cnf\"\n[intercept]\ninterfaces = [\"lan0\"]\n[dns]\nresolvers = [\"203.0.113.10\"]\n" +
		"[state]\ndirectory = \"state\"\n[control]\nsocket = \"control.sock\"\n"
	return conf, errors.Join(
		os.Mkdir(dir, 0o700),
		os.WriteFile(conf, []byte(text), 0o600),
		os.WriteFile(filepath.Join(dir, "socks.cnf"), []byte(rules), 0o600),
	)
}

// proxyRules carry everything through the SOCKS server, idle flows through the
// one that holds no pipes.
func proxyRules() string {
	return fmt.Sprintf("SOCKD5 @=%[1]s:%[2]d * %[3]d\nSOCKD5 @=%[1]s:%[4]d *\n",
		proxied.wan(2), socksCopyPort, idleEchoPort, socksPort)
}

// directRules are n prefixes that are DIRECT, the server's the last of them,
// and a catch-all that is not.
func directRules(n int) string {
	var s strings.Builder
	r := rand.New(rand.NewPCG(1, 2))
	for at := uint32(1 << 24); n > 1; n-- { // upwards from 1.0.0.0, with gaps, so that none can be merged
		bits := 24 + r.IntN(9)
		size := uint32(1) << (32 - bits)
		at = (at + size - 1) &^ (size - 1)
		fmt.Fprintf(&s, "DIRECT %v/%d\n", netip.AddrFrom4([4]byte{byte(at >> 24), byte(at >> 16), byte(at >> 8), byte(at)}), bits)
		at += size + 1
	}
	fmt.Fprintf(&s, "DIRECT %s/32\nSOCKD5 @=%s:%d *\n", direct.target(0).Addr(), direct.wan(2), socksPort)
	return s.String()
}

// sample is one run of a load through a gateway.
type sample struct {
	result
	cpu time.Duration // of the gateway's process
}

// through runs one load generator through a way and takes the processor time
// that the way's process used meanwhile.
func (b *bench) through(ctx context.Context, w way, args ...string) (sample, error) {
	p := b.gateway[w]
	before, err := p.cpu()
	if err != nil {
		return sample{}, err
	}
	r, err := load(ctx, b.lab.client, args...)
	if err != nil {
		return sample{}, fmt.Errorf("by way of %v: %w", w, err)
	}
	after, err := p.cpu()
	return sample{r, after - before}, err
}

// interleaved runs a load over some ways in turn, round by round.
func (b *bench) interleaved(ctx context.Context, compared []way, rounds int, port uint16, args ...string) (map[way][]sample, error) {
	all := map[way][]sample{}
	for round := range rounds {
		for _, w := range compared {
			s, err := b.through(ctx, w, append(args[:len(args):len(args)], "-to", w.target(port).String())...)
			if err != nil {
				return nil, fmt.Errorf("round %d: %w", round, err)
			}
			all[w] = append(all[w], s)
		}
	}
	return all, nil
}

// contenders are the ways that most tables compare.
func contenders() []way { return []way{plain, splice, proxied} }

func (b *bench) throughput(ctx context.Context) error {
	t := b.report.table("TCP streams, Gbit/s and CPU-s/GB of the gateway's process",
		"", "plain", "splice", "CPU", "tproxyd", "CPU", "CPU / splice's")
	for _, c := range []struct {
		name, kind string
		port       uint16
		n          string
	}{
		{"1 stream up", "up", sinkPort, "1"}, {"1 stream down", "down", sourcePort, "1"},
		{"8 streams up", "up", sinkPort, "8"}, {"8 streams down", "down", sourcePort, "8"},
	} {
		all, err := b.interleaved(ctx, contenders(), b.size.rounds, c.port,
			"load", "-kind", c.kind, "-n", c.n, "-time", b.size.stream.String())
		if err != nil {
			return err
		}
		gbit := func(w way) spread { return over(all[w], func(s sample) float64 { return s.gbit() }) }
		cpu := func(w way) spread {
			return over(all[w], func(s sample) float64 { return s.cpu.Seconds() / s.gigabytes() })
		}
		t.row(c.name, gbit(plain), gbit(splice), cpu(splice), gbit(proxied), cpu(proxied), cpu(proxied).median/cpu(splice).median)
	}
	t.end()
	return nil
}

func (b *bench) connections(ctx context.Context) error {
	all, err := b.interleaved(ctx, contenders(), b.size.rounds, echoPort,
		"load", "-kind", "connect", "-n", fmt.Sprint(b.size.conns), "-parallel", "64")
	if err != nil {
		return err
	}
	t := b.report.table(fmt.Sprintf("New connections: connect, one byte there and back, close; %d, 64 at a time", b.size.conns),
		"", "connections/s", "CPU-s per 1,000", "p50 ms", "p99 ms", "failed")
	for _, w := range contenders() {
		of := func(f func(sample) float64) spread { return over(all[w], f) }
		t.row(w.String(),
			of(func(s sample) float64 { return s.perSecond() }),
			of(func(s sample) float64 { return s.cpu.Seconds() / float64(s.Count) * 1000 }),
			of(func(s sample) float64 { return s.P50.Seconds() * 1e3 }),
			of(func(s sample) float64 { return s.P99.Seconds() * 1e3 }),
			of(func(s sample) float64 { return float64(s.Failed) }))
	}
	t.end()
	return nil
}

func (b *bench) latency(ctx context.Context) error {
	t := b.report.table("Latency in us: 64 bytes there and back on one connection; a new connection to its first byte, one at a time",
		"", "p50", "added", "p99", "first byte p50", "added", "p99")
	round, err := b.interleaved(ctx, contenders(), b.size.rounds, echoPort, "load", "-kind", "ping", "-n", fmt.Sprint(b.size.pings))
	if err != nil {
		return err
	}
	first, err := b.interleaved(ctx, contenders(), b.size.rounds, echoPort, "load", "-kind", "connect", "-n", fmt.Sprint(b.size.pings/8))
	if err != nil {
		return err
	}
	p50 := func(s sample) float64 { return s.P50.Seconds() * 1e6 }
	p99 := func(s sample) float64 { return s.P99.Seconds() * 1e6 }
	for _, w := range contenders() {
		t.row(w.String(),
			over(round[w], p50), over(round[w], p50).median-over(round[plain], p50).median, over(round[w], p99),
			over(first[w], p50), over(first[w], p50).median-over(first[plain], p50).median, over(first[w], p99))
	}
	t.end()
	return nil
}

// prefixes compares DIRECT traffic beside a large set with plain forwarding, and
// with that of a kernel that tracks connections, as a router with NAT has it.
func (b *bench) prefixes(ctx context.Context) error {
	t := b.report.table(fmt.Sprintf("DIRECT traffic beside %d prefixes", b.size.prefix),
		"", "plain", "tracked", "direct", "direct / plain", "daemon's CPU s")
	rounds := b.size.rounds + 2
	streams, err := b.interleaved(ctx, []way{plain, direct}, rounds, sourcePort,
		"load", "-kind", "down", "-n", "8", "-time", b.size.stream.String())
	if err != nil {
		return err
	}
	conns, err := b.interleaved(ctx, []way{plain, direct}, rounds, echoPort,
		"load", "-kind", "connect", "-n", fmt.Sprint(b.size.conns), "-parallel", "64")
	if err != nil {
		return err
	}
	for _, c := range []struct {
		name string
		all  map[way][]sample
		f    func(sample) float64
	}{
		{"8 streams down, Gbit/s", streams, func(s sample) float64 { return s.gbit() }},
		{"connections/s", conns, func(s sample) float64 { return s.perSecond() }},
	} {
		x, y := over(c.all[plain], c.f), over(c.all[direct], c.f)
		var cpu time.Duration
		for _, s := range c.all[direct] {
			cpu += s.cpu
		}
		t.row(c.name, x, "", y, y.median/x.median, cpu.Seconds())
	}
	if err := b.forwarded(ctx, t, rounds); err != nil {
		return err
	}
	t.end()
	return nil
}

// dns measures synthetic answers: known names, then new ones, each of which
// goes to disk before its answer leaves.
func (b *bench) dns(ctx context.Context) error {
	t := b.report.table("DNS, 4 clients; plain: a resolver behind plain forwarding that gives one answer",
		"", "plain answers/s", "tproxyd answers/s", "p50 us", "p99 us", "lost", "CPU-s per 100,000", "bytes of memory per name")
	window := fmt.Sprint(b.size.windows)
	for _, c := range []struct {
		name string
		args []string
		more int // names that the daemon did not know before
	}{
		{"1,000 names over and over", []string{"-n", "1000", "-time", b.size.dns.String()}, 0},
		{fmt.Sprintf("%d names, each new", b.size.names), []string{"-n", fmt.Sprint(b.size.names)}, b.size.names - 1000},
	} {
		before, err := b.gateway[proxied].memory()
		if err != nil {
			return err
		}
		ask := append([]string{"dns", "-window", window}, c.args...)
		all, err := b.interleaved(ctx, []way{plain, proxied}, 1, dnsPort, ask...)
		if err != nil {
			return err
		}
		after, err := b.gateway[proxied].memory()
		if err != nil {
			return err
		}
		s := all[proxied][0]
		cells := []any{c.name, all[plain][0].perSecond(), s.perSecond(), s.P50.Seconds() * 1e6, s.P99.Seconds() * 1e6,
			float64(s.Failed), s.cpu.Seconds() / float64(s.Count) * 1e5}
		if c.more > 0 {
			cells = append(cells, float64(after-before)/float64(c.more))
		}
		t.row(cells...)
	}
	t.end()
	return nil
}

// idle measures what flows cost that do nothing.
func (b *bench) idle(ctx context.Context) error {
	t := b.report.table("Idle flows", "", "asked for", "established", "RSS KB", "descriptors", "bytes per flow", "descriptors per flow")
	for _, w := range []way{splice, proxied} {
		p, err := startRole(ctx, b.lab.client, "idle", w.target(idleEchoPort).String())
		if err != nil {
			return err
		}
		var rss0 int64
		var fds0 int
		for i, n := range b.size.idle {
			var r result
			if err := p.ask(fmt.Sprint(n), &r); err != nil {
				p.stop()
				return err
			}
			time.Sleep(20 * time.Millisecond * time.Duration(b.size.rounds*b.size.rounds)) // let it settle
			rss, err1 := b.gateway[w].memory()
			fds, err2 := b.gateway[w].descriptors()
			if err := errors.Join(err1, err2); err != nil {
				p.stop()
				return err
			}
			cells := []any{w.String(), float64(n), float64(r.Count), float64(rss >> 10), float64(fds)}
			if i == 0 {
				rss0, fds0 = rss, fds
			} else if r.Count > 0 {
				cells = append(cells, float64(rss-rss0)/float64(r.Count), float64(fds-fds0)/float64(r.Count))
			}
			t.row(cells...)
		}
		p.stop()
	}
	t.end()
	return nil
}
