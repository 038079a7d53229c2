// Command bench measures the built daemon in network namespaces of its own,
// beside plain kernel forwarding and beside a bare relay that does nothing but
// splice(2), and prints one report.
//
// It needs root, Linux, and nothing else: load generators, SOCKS server,
// resolver and the bare relay are in this program, which runs itself again in
// each namespace. It is bounded in time (under four minutes) and leaves nothing
// behind. All figures of one table come from interleaved runs; a cell is their
// median.
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
	windows int           // DNS questions in flight for each of four sockets
}

// full is what the report is about.
func full() sizes {
	return sizes{3, 1500 * time.Millisecond, 4000, 4000, []int{0, 1000, 9000}, 100000, 100000, 2 * time.Second, 12}
}

// short is what shows in seconds that all of it works.
func short() sizes {
	return sizes{1, 200 * time.Millisecond, 200, 200, []int{0, 50}, 1000, 2000, 200 * time.Millisecond, 12}
}

// limit bounds a whole run.
const limit = 235 * time.Second

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
	return measure(ctx, *program, size, out)
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
	}
}
