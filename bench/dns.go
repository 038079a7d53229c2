package main

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// dnsSockets is how many clients ask at once.
const dnsSockets = 4

// asker asks over one socket with a window of questions under way.
type asker struct {
	conn   net.Conn
	window int
	names  func() (n int, more bool) // the next name's number
	sent   []time.Time               // by the question's id
	buf    []byte
	times  []time.Duration
	lost   int
}

// dnsRole asks a resolver for addresses: -n distinct names once each, or names
// below -n over and over for -time.
func dnsRole(args []string, out io.Writer) error {
	f := flag.NewFlagSet("dns", flag.ContinueOnError)
	to := f.String("to", "", "ADDR:PORT")
	n := f.Int("n", 1000, "names")
	window := f.Int("window", 12, "questions in flight for each socket")
	span := f.Duration("time", 0, "repeat for so long; 0: each name once")
	if err := f.Parse(args); err != nil {
		return err
	}
	var next atomic.Int64
	began := time.Now()
	names := func() (int, bool) {
		i := int(next.Add(1) - 1)
		if *span == 0 {
			return i, i < *n
		}
		return i % *n, i%64 != 0 || time.Since(began) < *span
	}
	askers := make([]*asker, dnsSockets)
	for i := range askers {
		c, err := net.Dial("udp4", *to)
		if err != nil {
			return err
		}
		defer c.Close()
		askers[i] = &asker{conn: c, window: *window, names: names, sent: make([]time.Time, 1<<16), buf: make([]byte, 2048)}
	}
	var wg sync.WaitGroup
	errs := make([]error, len(askers))
	for i, a := range askers {
		wg.Go(func() { errs[i] = a.run() })
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		return err
	}
	r := result{Elapsed: time.Since(began)}
	var times []time.Duration
	for _, a := range askers {
		times = append(times, a.times...)
		r.Failed += a.lost
	}
	r.Count = len(times)
	r.timesFrom(times)
	return json.NewEncoder(out).Encode(r)
}

// silence is when a question counts as lost.
const silence = 500 * time.Millisecond

// run keeps the window full until there are no more names and every question
// is answered or lost.
func (a *asker) run() error {
	var id uint16
	more := true
	flying := 0
	ask := func() error {
		n, ok := a.names()
		if !ok {
			more = false
			return nil
		}
		id++
		a.sent[id] = time.Now()
		flying++
		_, err := a.conn.Write(appendQuestion(a.buf[:0], id, n))
		return err
	}
	for more || flying > 0 {
		for more && flying < a.window {
			if err := ask(); err != nil {
				return err
			}
		}
		if flying == 0 {
			break
		}
		a.conn.SetReadDeadline(time.Now().Add(silence))
		n, err := a.conn.Read(a.buf)
		switch {
		case errors.Is(err, os.ErrDeadlineExceeded):
			a.lost += flying
			flying = 0
			continue
		case err != nil:
			return fmt.Errorf("dns: %w", err)
		}
		got, ok := answered(a.buf[:n])
		if !ok {
			return fmt.Errorf("dns: no address in the answer %x", a.buf[:n])
		}
		if t := a.sent[got]; !t.IsZero() {
			a.times = append(a.times, time.Since(t))
			a.sent[got] = time.Time{}
			flying--
		}
	}
	return nil
}

// appendQuestion writes a question for the address of hostN.bench.example
// (RFC 1035 section 4).
func appendQuestion(b []byte, id uint16, n int) []byte {
	b = binary.BigEndian.AppendUint16(b, id)
	b = append(b, 1, 0, 0, 1, 0, 0, 0, 0, 0, 0) // RD, one question
	label := append(make([]byte, 0, 16), "host"...)
	label = strconv.AppendInt(label, int64(n), 10)
	b = append(append(b, byte(len(label))), label...)
	b = append(b, "\x05bench\x07example\x00"...)
	return append(b, 0, 1, 0, 1) // A IN
}

// answered returns the id of an answer that holds a record.
func answered(b []byte) (id uint16, ok bool) {
	if len(b) < 12 || b[2]&0x80 == 0 || b[3]&0xf != 0 || binary.BigEndian.Uint16(b[6:]) == 0 {
		return 0, false
	}
	return binary.BigEndian.Uint16(b), true
}
