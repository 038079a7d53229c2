package main

import (
	"bufio"
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// result is what a load generator found.
type result struct {
	Bytes   int64         `json:"bytes"`
	Count   int           `json:"count"`  // connections, round trips, answers
	Failed  int           `json:"failed"` // of those asked for, or sent
	Sent    int           `json:"sent"`   // datagrams
	Wrong   int           `json:"wrong"`  // datagrams that came to another socket than their question's
	Elapsed time.Duration `json:"elapsed"`
	P50     time.Duration `json:"p50"`
	P99     time.Duration `json:"p99"`
	Spent   time.Duration `json:"spent"` // processor time of a flood
}

// perSecond is the rate of what Count counts.
func (r result) perSecond() float64 { return float64(r.Count) / r.Elapsed.Seconds() }

// gbit is the rate of Bytes in Gbit/s.
func (r result) gbit() float64 { return float64(r.Bytes) * 8 / r.Elapsed.Seconds() / 1e9 }

// gigabytes is Bytes in 10^9.
func (r result) gigabytes() float64 { return float64(r.Bytes) / 1e9 }

// timesFrom fills in the quantiles of a list, which it sorts.
func (r *result) timesFrom(all []time.Duration) {
	slices.Sort(all)
	r.P50, r.P99 = quantile(all, 0.5), quantile(all, 0.99)
}

// quantile of a sorted list; 0 of an empty one.
func quantile(sorted []time.Duration, q float64) time.Duration {
	if len(sorted) == 0 {
		return 0
	}
	return sorted[int(q*float64(len(sorted)-1)+0.5)]
}

func stdin() io.Reader { return os.Stdin }

// breathe is the pause before something is tried again.
func breathe() { time.Sleep(10 * time.Millisecond) }

// patience is how long a load generator waits for a single answer.
const patience = 5 * time.Second

// loadRole is a load generator: one kind of load to one address.
func loadRole(args []string, out io.Writer) error {
	f := flag.NewFlagSet("load", flag.ContinueOnError)
	kind := f.String("kind", "", "up, down, connect, ping or flood")
	to := f.String("to", "", "ADDR:PORT")
	n := f.Int("n", 1, "streams, connections, round trips or datagrams")
	parallel := f.Int("parallel", 1, "connections at a time")
	span := f.Duration("time", time.Second, "of streams")
	if err := f.Parse(args); err != nil {
		return err
	}
	var r result
	var err error
	switch *kind {
	case "up", "down":
		r, err = streams(*to, *kind == "up", *n, *span)
	case "connect":
		r, err = connects(*to, *n, *parallel)
	case "ping":
		r, err = pings(*to, *n)
	case "flood":
		r, err = flood(*to, *n)
	default:
		err = fmt.Errorf("load: no kind %q", *kind)
	}
	if err != nil {
		return err
	}
	return json.NewEncoder(out).Encode(r)
}

// streams sends or receives on n connections at once for span. What counts is
// what has arrived: a sender asks the sink for its number of bytes at the end.
func streams(to string, upload bool, n int, span time.Duration) (result, error) {
	conns := make([]*net.TCPConn, n)
	for i := range conns {
		c, err := net.DialTimeout("tcp4", to, patience)
		if err != nil {
			return result{}, err
		}
		defer c.Close()
		conns[i] = c.(*net.TCPConn)
	}
	var total atomic.Int64
	var wg sync.WaitGroup
	errs := make(chan error, n)
	began := time.Now()
	end := began.Add(span)
	for _, c := range conns {
		wg.Go(func() {
			n, err := stream(c, upload, end)
			total.Add(n)
			if err != nil {
				errs <- err
			}
		})
	}
	wg.Wait()
	r := result{Bytes: total.Load(), Elapsed: time.Since(began)}
	select {
	case err := <-errs:
		return r, err
	default:
		return r, nil
	}
}

func stream(c *net.TCPConn, upload bool, end time.Time) (total int64, err error) {
	b := make([]byte, chunk)
	if !upload {
		c.SetReadDeadline(end)
		for {
			n, err := c.Read(b)
			total += int64(n)
			if errors.Is(err, os.ErrDeadlineExceeded) {
				return total, nil
			}
			if err != nil {
				return total, err
			}
		}
	}
	for time.Now().Before(end) {
		if _, err := c.Write(b); err != nil {
			return 0, err
		}
	}
	if err := c.CloseWrite(); err != nil {
		return 0, err
	}
	c.SetReadDeadline(time.Now().Add(patience))
	var count [8]byte
	if _, err := io.ReadFull(c, count[:]); err != nil {
		return 0, fmt.Errorf("the sink did not tell: %w", err)
	}
	return int64(binary.BigEndian.Uint64(count[:])), nil
}

// connects makes n connections, some in parallel: connect, one byte there and
// back, close.
func connects(to string, n, parallel int) (result, error) {
	var next, failed atomic.Int64
	times := make([]time.Duration, n) // each element is written once; 0: failed
	var wg sync.WaitGroup
	began := time.Now()
	for range parallel {
		wg.Go(func() {
			for i := next.Add(1) - 1; i < int64(n); i = next.Add(1) - 1 {
				t := time.Now()
				c, err := greet(to)
				if err != nil {
					failed.Add(1)
					continue
				}
				c.Close()
				times[i] = time.Since(t)
			}
		})
	}
	wg.Wait()
	r := result{Elapsed: time.Since(began), Failed: int(failed.Load())}
	times = slices.DeleteFunc(times, func(d time.Duration) bool { return d == 0 })
	r.Count = len(times)
	r.timesFrom(times)
	return r, nil
}

// greet connects and has one byte echoed: proof that the flow is carried.
func greet(to string) (net.Conn, error) {
	c, err := net.DialTimeout("tcp4", to, patience)
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(patience))
	var b [1]byte
	if _, err = c.Write(b[:]); err == nil {
		_, err = io.ReadFull(c, b[:])
	}
	if err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// pings sends 64 bytes and waits for them, n times on one connection.
func pings(to string, n int) (result, error) {
	c, err := greet(to)
	if err != nil {
		return result{}, err
	}
	defer c.Close()
	c.SetDeadline(time.Now().Add(time.Minute))
	var b [64]byte
	times := make([]time.Duration, n)
	began := time.Now()
	for i := range times {
		t := time.Now()
		if _, err := c.Write(b[:]); err != nil {
			return result{}, err
		}
		if _, err := io.ReadFull(c, b[:]); err != nil {
			return result{}, err
		}
		times[i] = time.Since(t)
	}
	r := result{Count: n, Elapsed: time.Since(began)}
	r.timesFrom(times)
	return r, nil
}

// idleRole holds connections. Each line of its standard input is a number of
// them to have; the answer is how many there are.
func idleRole(args []string, out io.Writer) error {
	if len(args) != 1 {
		return errors.New("idle: ADDR:PORT")
	}
	fmt.Fprintln(out, "ready")
	var held []net.Conn
	for lines := bufio.NewScanner(stdin()); lines.Scan(); {
		var want int
		if _, err := fmt.Sscan(lines.Text(), &want); err != nil {
			return err
		}
		held = append(held, hold(args[0], want-len(held))...)
		if err := json.NewEncoder(out).Encode(result{Count: len(held), Failed: want - len(held)}); err != nil {
			return err
		}
	}
	return nil
}

// hold makes n connections, and gives up where they begin to fail: whoever is
// full stays full.
func hold(to string, n int) []net.Conn {
	const parallel = 32
	var mu sync.Mutex
	var held []net.Conn
	var next, failed atomic.Int64
	var wg sync.WaitGroup
	for range parallel {
		wg.Go(func() {
			for next.Add(1) <= int64(n) && failed.Load() == 0 {
				c, err := greet(to)
				if err != nil {
					failed.Add(1)
					return
				}
				mu.Lock()
				held = append(held, c)
				mu.Unlock()
			}
		})
	}
	wg.Wait()
	return held
}
