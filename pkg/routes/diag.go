package routes

import (
	"fmt"
	"strings"
)

// Severity says whether a file can be used.
type Severity uint8

// The severities.
const (
	Error   Severity = iota // the file is refused
	Warning                 // it is used as the message says
)

// String returns "error" or "warning".
func (s Severity) String() string {
	if s == Warning {
		return "warning"
	}
	return "error"
}

// Diagnostic is one thing that is wrong with a file.
type Diagnostic struct {
	File      string
	Line, Col int // from 1; Col counts characters
	Severity  Severity
	Code      string // E01 and so on, as the manual lists them
	Msg       string // what is wrong and what to do
}

// String returns "FILE:LINE:COL: error E05: text".
func (d Diagnostic) String() string {
	return fmt.Sprintf("%s:%d:%d: %s %s: %s", d.File, d.Line, d.Col, d.Severity, d.Code, d.Msg)
}

// Diagnostics are all that is wrong, in the order of the files.
type Diagnostics []Diagnostic

// HasErrors tells whether one of them is an error.
func (ds Diagnostics) HasErrors() bool {
	for _, d := range ds {
		if d.Severity == Error {
			return true
		}
	}
	return false
}

// Error returns all of them, one a line.
func (ds Diagnostics) Error() string {
	lines := make([]string, len(ds))
	for i, d := range ds {
		lines[i] = d.String()
	}
	return strings.Join(lines, "\n")
}

// closest returns the word that text most probably is a misspelling of, empty
// if none is near. Words are compared without regard to case.
func closest(text string, words []string) string {
	best, bestDistance := "", 3
	for _, w := range words {
		if d := distance(strings.ToUpper(text), strings.ToUpper(w)); d < bestDistance && d < len(w)/2+1 {
			best, bestDistance = w, d
		}
	}
	return best
}

// distance is how many letters must be changed, added, dropped or swapped with
// their neighbour to make b of a.
func distance(a, b string) int {
	if len(a) > 64 || len(b) > 64 {
		return 64
	}
	var rows [3][65]int
	for j := range len(b) + 1 {
		rows[0][j] = j
	}
	for i := 1; i <= len(a); i++ {
		cur, prev, before := &rows[i%3], &rows[(i+2)%3], &rows[(i+1)%3]
		cur[0] = i
		for j := 1; j <= len(b); j++ {
			cost := 1
			if a[i-1] == b[j-1] {
				cost = 0
			}
			cur[j] = min(prev[j]+1, cur[j-1]+1, prev[j-1]+cost)
			if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
				cur[j] = min(cur[j], before[j-2]+1)
			}
		}
	}
	return rows[len(a)%3][len(b)]
}
