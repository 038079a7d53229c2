package main

import (
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"
)

// spread is the median of some runs with the least and the greatest of them.
type spread struct{ median, low, high float64 }

// over returns the spread of a figure over runs; of none it is all NaN.
func over(runs []sample, f func(sample) float64) spread {
	if len(runs) == 0 {
		return spread{math.NaN(), math.NaN(), math.NaN()}
	}
	values := make([]float64, len(runs))
	for i, r := range runs {
		values[i] = f(r)
	}
	slices.Sort(values)
	n := len(values)
	return spread{(values[(n-1)/2] + values[n/2]) / 2, values[0], values[n-1]}
}

// report prints Markdown tables as they are measured.
type report struct {
	out   io.Writer
	began time.Time
	notes []string
}

func newReport(out io.Writer) *report { return &report{out: out, began: time.Now()} }

// note remembers a line for the end of the report.
func (r *report) note(format string, args ...any) {
	r.notes = append(r.notes, fmt.Sprintf(format, args...))
}

// head says what was measured on which machine.
func (r *report) head(program string, size sizes) {
	kernel, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		kernel = []byte("unknown")
	}
	fmt.Fprintf(r.out, "# tproxyd bench: %s, Linux %s, %s, %d processors\n\n", filepath.Base(program),
		strings.TrimSpace(string(kernel)), runtime.Version(), runtime.NumCPU())
	fmt.Fprintf(r.out, "plain: the kernel forwards. splice: a bare relay, without SOCKS, names or rules. tproxyd: through a SOCKS\n"+
		"server, UDP through its associations. Client, gateway, SOCKS server and target share the processors. Cells:\n"+
		"median (least-greatest) of %d interleaved runs. CPU is user and system time of the gateway's process; a tick\n"+
		"is 10 ms.\n\n", size.rounds)
}

// end prints the notes and the time that it all took.
func (r *report) end() {
	for _, n := range r.notes {
		fmt.Fprintln(r.out, n)
	}
	fmt.Fprintf(r.out, "%.0f s in all\n", time.Since(r.began).Seconds())
}

// table is one Markdown table; rows are printed when it ends, aligned.
type table struct {
	out   io.Writer
	title string
	rows  [][]string
}

func (r *report) table(title string, columns ...string) *table {
	return &table{out: r.out, title: title, rows: [][]string{columns}}
}

// row adds a row: strings, figures, spreads. Missing cells stay empty.
func (t *table) row(cells ...any) {
	row := make([]string, len(t.rows[0]))
	for i, c := range cells {
		switch c := c.(type) {
		case string:
			row[i] = c
		case float64:
			row[i] = figure(c)
		case spread:
			row[i] = figure(c.median)
			if c.low < c.high {
				row[i] += fmt.Sprintf(" (%s-%s)", figure(c.low), figure(c.high))
			}
		}
	}
	t.rows = append(t.rows, row)
}

func (t *table) end() {
	width := make([]int, len(t.rows[0]))
	for _, row := range t.rows {
		for i, c := range row {
			width[i] = max(width[i], len(c))
		}
	}
	fmt.Fprintf(t.out, "## %s\n\n", t.title)
	for n, row := range t.rows {
		for i, c := range row {
			fmt.Fprintf(t.out, "| %-*s ", width[i], c)
		}
		fmt.Fprintln(t.out, "|")
		if n == 0 {
			for _, w := range width {
				fmt.Fprint(t.out, "|", strings.Repeat("-", w+2))
			}
			fmt.Fprintln(t.out, "|")
		}
	}
	fmt.Fprintln(t.out)
}

// figure prints three digits that count, and no more; a dash for what is not a
// number.
func figure(v float64) string {
	switch a := math.Abs(v); {
	case math.IsNaN(v) || math.IsInf(v, 0):
		return "-"
	case a >= 100 || a == 0:
		return fmt.Sprintf("%.0f", v)
	case a >= 10:
		return fmt.Sprintf("%.1f", v)
	case a >= 1:
		return fmt.Sprintf("%.2f", v)
	}
	return fmt.Sprintf("%.3f", v)
}
