// Package convert reads the configurations of older SOCKS clients and writes
// what they say in the language of pkg/routes.
//
// It promises that what it writes is read by routes.Parse without an error (where
// the files of users that it names are there),
// that each line of the old file has its fate told (kept, changed and how,
// refused and why), and that nothing is guessed: what the language cannot say is
// refused and stands in the output as a comment. What a refused line would have
// denied or proxied does not pass for want of it: as far as its destination is
// known it is denied in its place, and else a DEFAULT that lets pass is not
// written. Each system's own rule for what nothing matches is written out. User
// names and passwords are never copied.
//
// The grammars are those of Hummingbird's socks.cnf, CSTC's socks.conf(5) of
// SOCKS version 4, NEC's libsocks5.conf, Dante's socks.conf(5) 1.4, and of
// proxychains.conf, tsocks.conf(5) and redsocks.conf.
package convert

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode"

	"github.com/tproxyd/tproxyd/pkg/routes"
)

// Format is a language that can be read.
type Format string

// The formats.
const (
	Hummingbird Format = "hummingbird" // socks.cnf of the SOCKS Client
	CSTC        Format = "cstc"        // socks.conf(5) of SOCKS version 4
	NEC         Format = "nec"         // libsocks5.conf of runsocks
	Dante       Format = "dante"       // socks.conf(5) of socksify
	Proxychains Format = "proxychains" // proxychains.conf
	Tsocks      Format = "tsocks"      // tsocks.conf(5)
	Redsocks    Format = "redsocks"    // redsocks.conf
)

// readers read a file into a builder.
var readers = map[Format]func(*builder, string){
	Hummingbird: (*builder).hummingbird, CSTC: (*builder).cstc, NEC: (*builder).nec, Dante: (*builder).dante,
	Proxychains: (*builder).proxychains, Tsocks: (*builder).tsocks, Redsocks: (*builder).redsocks,
}

// Formats returns the names of all formats, sorted.
func Formats() (names []string) {
	for f := range readers {
		names = append(names, string(f))
	}
	slices.Sort(names)
	return names
}

// Fate is what became of a line.
type Fate uint8

// The fates.
const (
	Kept    Fate = iota // it says the same
	Changed             // it says it otherwise, or not quite the same
	LeftOut             // it has no meaning here, and no flow is decided otherwise without it
	Refused             // it cannot be said; what it was about is denied, or decided by what follows
	Added               // no line says it, but the client did it
	Note                // for whoever reads the result
)

// String returns the word for the fate.
func (f Fate) String() string {
	return [...]string{"kept", "changed", "left out", "refused", "added", "note"}[f]
}

// Entry is the fate of a line of the old file.
type Entry struct {
	Line int // from 1; 0: the file as a whole
	Fate Fate
	Text string // what was made of it, how it was changed, or why it was refused
}

// Result is what became of a file.
type Result struct {
	Rules  []byte  // a file of rules; routes.Parse finds no error in it
	Report []Entry // in the order of lines, those about the whole file last
}

// Refused tells whether a line was.
func (r *Result) Refused() bool {
	return slices.ContainsFunc(r.Report, func(e Entry) bool { return e.Fate == Refused })
}

// maxSize is how many bytes of a file are read.
const maxSize = 16 << 20

// Convert reads a file of a format. The error is one of reading, or says that
// there is no such format; whatever is wrong with the text is in the report.
func Convert(f Format, in io.Reader) (*Result, error) {
	read := readers[f]
	if read == nil {
		return nil, fmt.Errorf("convert: no format %q; there are %s", f, strings.Join(Formats(), ", "))
	}
	text, err := io.ReadAll(io.LimitReader(in, maxSize+1))
	if err != nil {
		return nil, fmt.Errorf("convert: %w", err)
	}
	if len(text) > maxSize {
		return nil, errors.New("convert: the file is larger than 16 MiB")
	}
	b := &builder{}
	b.comment("converted from " + string(f) + "; what is refused stands as a comment")
	read(b, strings.TrimPrefix(string(text), "\ufeff"))
	return b.result(), nil
}

// builder collects what is written, and the fates.
type builder struct {
	out    []output
	report []Entry
	known  map[string]bool // servers that have a SERVER line
	lost   bool            // a line was refused that may have been about anything
}

// output is a line of the result.
type output struct {
	text   string
	line   int  // of the old file; 0: of none
	fate   Fate // unless the language refuses the text
	how    string
	origin string // as the old file has it
	why    string // it is refused, and text is the denial in its place
	gone   bool   // it is refused, and text is a comment
}

// source is a line of the old file.
type source struct {
	line int
	text string
}

// comment writes a line that decides nothing.
func (b *builder) comment(text string) {
	b.out = append(b.out, output{text: strings.TrimRightFunc("# "+printable(text), unicode.IsSpace)})
}

// write writes what a line says. How it was changed is empty if it was not.
func (b *builder) write(s source, text, how string) {
	fate := Kept
	if how != "" {
		fate = Changed
	}
	b.out = append(b.out, output{text: text, line: s.line, fate: fate, how: how, origin: s.text})
}

// add writes what no line says alone.
func (b *builder) add(text, why string) {
	b.out = append(b.out, output{text: text, fate: Added, how: why})
}

// refuse tells why a line cannot be said, and keeps it as a comment: it may have
// been about anything.
func (b *builder) refuse(s source, format string, args ...any) {
	b.lost = true
	b.dismiss(s, format, args...)
}

// dismiss is refuse for a line for want of which nothing passes.
func (b *builder) dismiss(s source, format string, args ...any) {
	b.out = append(b.out, output{text: refusedComment(s.line, s.text), line: s.line, gone: true})
	b.report = append(b.report, Entry{s.line, Refused, fmt.Sprintf(format, args...)})
}

// deny tells why a line cannot be said, and denies what it is about.
func (b *builder) deny(s source, what []string, format string, args ...any) {
	b.out = append(b.out, output{
		text: "DENY " + strings.Join(what, " "), line: s.line, origin: s.text, why: fmt.Sprintf(format, args...),
	})
}

// refusedComment is what stands for a line that was refused. What may hold a
// password has no text.
func refusedComment(line int, text string) string {
	if text == "" {
		text = fmt.Sprintf("line %d", line)
	}
	return "# refused: " + printable(text)
}

// leaveOut tells why a line is not needed.
func (b *builder) leaveOut(s source, format string, args ...any) {
	b.report = append(b.report, Entry{s.line, LeftOut, fmt.Sprintf(format, args...)})
}

// note tells of something that holds for a line, or with line 0 for the file.
func (b *builder) note(line int, format string, args ...any) {
	b.report = append(b.report, Entry{line, Note, fmt.Sprintf(format, args...)})
}

// result asks the language about each line that was written. One that it does
// not take is refused with what it says, and all are asked again, since others
// may lean on it.
func (b *builder) result() *Result {
	for i := range b.out {
		if why := unsafe(b.out[i].text); why != "" {
			b.reject(i, why)
		}
	}
	b.unbalance()
	for {
		_, diags := routes.Parse("output", bytes.NewReader(b.text()), elsewhere())
		if !diags.HasErrors() {
			for _, d := range diags {
				b.note(b.out[d.Line-1].line, "%s: %s", b.out[d.Line-1].text, d.Msg)
			}
			break
		}
		last := -1 // one mistake of a line is enough
		for _, d := range diags {
			if i := d.Line - 1; d.Severity == routes.Error && i != last && i < len(b.out) && b.out[i].text[0] != '#' {
				b.reject(i, d.Msg)
				last = i
			}
		}
		b.unbalance()
	}
	b.close()
	for _, o := range b.out {
		if o.text[0] == '#' {
			continue
		}
		if o.why != "" {
			b.report = append(b.report, Entry{o.line, Refused, o.why + "; what it is about is denied in its place: " + o.text})
			continue
		}
		text := o.text
		if o.how != "" {
			text += ": " + o.how
		}
		b.report = append(b.report, Entry{o.line, o.fate, text})
	}
	slices.SortStableFunc(b.report, func(x, y Entry) int {
		if x.Line == 0 || y.Line == 0 {
			return cmp.Compare(y.Line, x.Line)
		}
		return cmp.Compare(x.Line, y.Line)
	})
	return &Result{Rules: b.text(), Report: b.report}
}

// reject turns a line that was written into the denial of what it is about, and
// that, or what is no rule with servers, into a comment.
func (b *builder) reject(i int, why string) {
	o := &b.out[i]
	if o.why == "" {
		if denial := denialOf(o.text); denial != "" && unsafe(denial) == "" {
			o.text, o.why = denial, why
			return
		}
		o.why = why
	}
	b.lost = b.lost || !strings.HasPrefix(o.text, "DIRECT ") && isRule(o.text)
	b.report = append(b.report, Entry{o.line, Refused, o.why})
	text := o.origin
	if text == "" {
		text = o.text
	}
	o.text, o.why, o.gone = refusedComment(o.line, text), "", true
}

// isRule tells whether a line decides flows.
func isRule(text string) bool {
	word, _, _ := strings.Cut(text, " ")
	return word == "DENY" || word == "DIRECT" || word == "HTTP" || strings.HasPrefix(strings.ToUpper(word), "SOCKD")
}

// denialOf returns a rule that denies what a rule with servers is about; empty:
// the line is none.
func denialOf(text string) string {
	words := strings.Fields(text)
	if len(words) < 2 || !isRule(text) || words[0] == "DENY" || words[0] == "DIRECT" {
		return ""
	}
	words[0] = "DENY"
	return strings.Join(slices.DeleteFunc(words, func(w string) bool {
		return strings.HasPrefix(w, "@=") || strings.HasPrefix(w, "balance=")
	}), " ")
}

// unbalance refuses a line BALANCE whose rule was refused, for it would be that
// of the next one.
func (b *builder) unbalance() {
	for i := range b.out {
		if b.out[i].text != "BALANCE" {
			continue
		}
		for _, next := range b.out[i+1:] {
			switch {
			case next.gone || next.why != "":
				b.report = append(b.report, Entry{b.out[i].line, Refused, fmt.Sprintf("it is for line %d, which is refused", next.line)})
				b.out[i].text, b.out[i].gone = refusedComment(b.out[i].line, b.out[i].text), true
			case strings.HasPrefix(next.text, "#"), next.line == 0, !isRule(next.text), denialOf(next.text) == "":
				continue
			}
			break
		}
	}
}

// close takes back a DEFAULT that lets pass what a line may have been about that
// was refused.
func (b *builder) close() {
	if last := &b.out[len(b.out)-1]; b.lost && last.text == "DEFAULT DIRECT" {
		last.text = "DEFAULT DENY"
		last.how += "; but a line was refused that may have been about anything, so nothing passes for want of it"
	}
}

func (b *builder) text() []byte {
	var t bytes.Buffer
	for _, o := range b.out {
		t.WriteString(o.text)
		if o.why != "" {
			t.WriteString(" " + refusedComment(o.line, o.origin))
		}
		t.WriteString("\n")
	}
	return t.Bytes()
}

// elsewhere reads rules as on a host of which nothing is known: it has every user.
func elsewhere() routes.Options {
	anybody := func(string) (uint32, bool) { return 0, true }
	return routes.Options{Open: anyFile, User: anybody, Group: anybody}
}

// anyFile stands for the files that rules name, such as those of users: they
// are of the host that the rules are for, and are read there. It has one user.
func anyFile(string) (io.ReadCloser, error) { return io.NopCloser(strings.NewReader("0")), nil }

// unsafe tells why a line would not be read as the one statement that it was
// written as; empty: it would.
func unsafe(text string) string {
	switch {
	case strings.HasPrefix(text, "#"):
		return ""
	case strings.ContainsFunc(text, func(r rune) bool { return r != '\t' && unicode.IsControl(r) || r == unicode.ReplacementChar }):
		return "it has characters that are not of a text"
	case strings.HasSuffix(text, `\`):
		return `a \ at its end would continue it on the next line`
	}
	for _, w := range strings.Fields(text) {
		if w[0] == '#' {
			return fmt.Sprintf("%q would begin a comment", w)
		}
	}
	return ""
}

// maxComment is how many characters of a refused line are kept.
const maxComment = 400

// printable makes one line of text that is safe in a comment.
func printable(text string) string {
	clean := strings.Map(func(r rune) rune {
		if unicode.IsControl(r) || r == unicode.ReplacementChar {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(text, " "))
	if r := []rune(clean); len(r) > maxComment {
		clean = string(r[:maxComment]) + "…"
	}
	return clean
}

// lines calls f for each line that is not blank, with its words.
func lines(text string, f func(s source, words []string)) {
	for i, line := range strings.Split(text, "\n") {
		line = strings.TrimRight(line, " \t\r")
		if words := strings.Fields(line); len(words) > 0 {
			f(source{i + 1, line}, words)
		}
	}
}

// commented keeps a line that is a comment.
func (b *builder) commented(s source) bool {
	if s.text[0] != '#' {
		return false
	}
	b.comment(strings.TrimSpace(strings.TrimLeft(s.text, "#")))
	return true
}

// server writes a SERVER line for one that needs a user name and password, once,
// and returns what stands for it in a list.
func (b *builder) server(s source, name, endpoint, options, credential string) string {
	if b.known[name] {
		return name
	}
	if b.known == nil {
		b.known = map[string]bool{}
	}
	b.known[name] = true
	how := ""
	if credential != "" {
		options += " credential=" + credential
		how = fmt.Sprintf("the user name and password go into credentials.toml, mode 0600: [%s] username = \"…\" password = \"…\"", credential)
	}
	b.out = append(b.out, output{text: strings.TrimSpace("SERVER " + name + " " + endpoint + options), line: s.line, fate: Added, how: how, origin: "SERVER " + name})
	return name
}
