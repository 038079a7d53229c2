// Command bench measures the built daemon in network namespaces of its own,
// beside plain kernel forwarding and beside a bare relay that does nothing but
// splice(2), and prints one report.
//
// It needs root, Linux, and for two tables danted, microsocks and what is to be
// compared (proxychains4, socksify): load generators, SOCKS servers, resolver
// and the bare relay are in this program, which runs itself again in each namespace.
// It is bounded in time (under five minutes) and leaves nothing behind. All figures of one table come from interleaved runs; a cell is their
// median.
//
// The tables, with the name that -only knows them by:
//
//	throughput     TCP streams
//	connections    new ones
//	latency        of round trips and of first bytes
//	far            first bytes with danted and microsocks 40 ms away
//	one-command    `tproxyd run` beside libraries that are preloaded
//	prefixes       DIRECT traffic beside a large set
//	dns            synthetic answers
//	idle           memory and descriptors of TCP flows
//	udp-datagrams  datagrams/s, losses and CPU of 1, 100 and 5,000 flows, each a
//	               source port, of 64 and 1,200 bytes: echoes, 128 in flight in
//	               all. Both directions count, so an echo is two.
//	udp-flows      new flows/s and CPU of each: one datagram and its answer, 32
//	               at a time; also with what their end costs, by their idle limit
//	udp-sessions   memory and descriptors of idle client sockets, after one
//	               datagram, and after so many that each has a socket of its own
//
// UDP goes through associations with a SOCKS server that is a loop over all of
// them. Notes at the end tell where the daemon evicted, refused or dropped
// something, and of answers that came to a wrong socket. 5,000 flows want 10,000
// sockets, and UDP may have a quarter of RLIMIT_NOFILE: if that cannot be
// raised to what the unit allows, a note says so, and flows do without.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"
)

// sizes say how much is measured.
type sizes struct {
	rounds  int           // of each interleaved case
	stream  time.Duration // of one throughput run
	conns   int           // connections of one run
	pings   int           // round trips of one run
	idle    []int         // idle flows, ascending
	prefix  int           // DIRECT prefixes
	names   int           // distinct DNS names
	dns     time.Duration // of the run over known names
	flood   int           // datagrams of one flow, of one run
	windows int           // DNS questions in flight for each of four sockets

	udp      time.Duration // of one run of datagrams
	flows    []int         // of datagrams, in one run, ascending
	fresh    int           // new flows of datagrams of one run
	sessions []int         // idle ones, ascending
}

// full is what the report is about.
func full() sizes {
	return sizes{3, 1500 * time.Millisecond, 4000, 4000, []int{0, 1000, 9000}, 100000, 100000, 2 * time.Second, 100000, 12,
		700 * time.Millisecond, []int{1, 100, 5000}, 2000, []int{0, 1000, 5000}}
}

// short is what shows in seconds that all of it works.
func short() sizes {
	return sizes{1, 200 * time.Millisecond, 200, 200, []int{0, 50}, 1000, 2000, 200 * time.Millisecond, 1000, 12,
		100 * time.Millisecond, []int{1, 20}, 100, []int{0, 50}}
}

// limit bounds a whole run.
const limit = 295 * time.Second

func main() {
	if err := run(os.Args[1:], os.Stdout); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

// run measures, or, where the first argument is the name of a role, plays it.
func run(args []string, out io.Writer) error {
	if len(args) > 0 {
		if play, ok := roles()[args[0]]; ok {
			return play(args[1:], out)
		}
	}
	f := flag.NewFlagSet("bench", flag.ContinueOnError)
	program := f.String("tproxyd", "bin/tproxyd", "the `program` to measure")
	quick := f.Bool("short", false, "a few seconds in all; the figures mean nothing")
	only := f.String("only", "", "measure only tables with `name` in their name: throughput, connections, latency, far,\n"+
		"one-command, prefixes, dns, idle, udp-datagrams, udp-flows, udp-sessions")
	if err := f.Parse(args); err != nil {
		return err
	}
	if os.Geteuid() != 0 {
		return errors.New("it makes network namespaces: run it as root")
	}
	size := full()
	if *quick {
		size = short()
	}
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	return measure(ctx, *program, size, *only, out)
}

// roles are what this program does when it runs itself again in a namespace.
func roles() map[string]func(args []string, out io.Writer) error {
	return map[string]func([]string, io.Writer) error{
		"targets": targetsRole,
		"socks":   socksRole,
		"splice":  spliceRole,
		"load":    loadRole,
		"idle":    idleRole,
		"dns":     dnsRole,
		"udp":     udpRole,
	}
}
