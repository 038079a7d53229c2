package routes

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"unicode/utf8"
)

// Bounds of what is read.
const (
	maxLine    = 1 << 16 // bytes of a line
	maxInclude = 8       // INCLUDE inside INCLUDE
	maxFiles   = 1024    // in all
)

// token is one word of a statement with its place.
type token struct {
	text      string
	line, col int
}

// end returns the place behind the token.
func (t token) end() token {
	return token{line: t.line, col: t.col + utf8.RuneCountInString(t.text)}
}

// statement is one directive: a line, with the lines that continue it.
type statement struct {
	file   string
	tokens []token // at least one
}

// text returns the statement as written, blanks aside.
func (s *statement) text() string {
	words := make([]string, len(s.tokens))
	for i, t := range s.tokens {
		words[i] = t.text
	}
	return strings.Join(words, " ")
}

// reader collects the statements of a file and of those that it includes.
type reader struct {
	open       func(path string) (io.ReadCloser, error)
	statements []*statement
	diags      *collector
	stack      []string // files being read, the outermost first
	files      int
	sum        hash.Hash
	sources    []source // all that was read, in order
	again      []source // what is read in place of files, in order; see Table.Reread
}

// source is a file of rules as it was read.
type source struct {
	path string
	text []byte
}

// file reads path into statements. At is where its name was written.
func (r *reader) file(path string, at func(code, format string, args ...any)) {
	for _, p := range r.stack {
		if p == path {
			at("E24", "file %s includes itself: %s", path, strings.Join(append(r.stack, path), " > "))
			return
		}
	}
	if len(r.stack) > maxInclude {
		at("E24", "INCLUDE depth > %d", maxInclude)
		return
	}
	if r.files++; r.files > maxFiles {
		at("E24", "more than %d files", maxFiles)
		return
	}
	if len(r.again) > 0 {
		next := r.again[0]
		r.again = r.again[1:]
		r.read(next.path, bytes.NewReader(next.text))
		return
	}
	f, err := r.open(path)
	if err != nil {
		at("E24", "%v", readError(path, err))
		return
	}
	defer f.Close()
	r.read(path, f)
}

// read splits what a file holds into statements.
func (r *reader) read(path string, in io.Reader) {
	r.stack = append(r.stack, path)
	defer func() { r.stack = r.stack[:len(r.stack)-1] }()
	n := len(r.sources)
	r.sources = append(r.sources, source{path: path})
	var kept bytes.Buffer
	defer func() { r.sources[n].text = kept.Bytes() }()
	br := bufio.NewReaderSize(io.TeeReader(in, &kept), maxLine+2)
	var s *statement // continued by the next line; nil: none
	for line := 1; ; line++ {
		text, err := readLine(br)
		if text != "" {
			if s == nil {
				s = &statement{file: path}
			}
			if more := r.line(s, text, line); !more {
				r.finish(s)
				s = nil
			}
		}
		if err != nil {
			if s != nil {
				r.finish(s)
			}
			if err != io.EOF {
				r.diags.at(path, token{line: line, col: 1}, "E24", "%v", readError(path, err))
			}
			return
		}
	}
}

// readLine returns a line with its end. Of one that is too long it returns
// enough to see that it is.
func readLine(br *bufio.Reader) (string, error) {
	b, err := br.ReadSlice('\n')
	text := string(b)
	for err == bufio.ErrBufferFull {
		_, err = br.ReadSlice('\n')
	}
	return text, err
}

// line adds the words of a line to s and tells whether the next line goes on.
func (r *reader) line(s *statement, text string, line int) (more bool) {
	text = strings.TrimRight(text, "\r\n")
	if line == 1 {
		text = strings.TrimPrefix(text, "\ufeff")
	}
	switch i := strings.IndexByte(text, 0); {
	case i >= 0:
		r.diags.at(s.file, token{line: line, col: utf8.RuneCountInString(text[:i]) + 1}, "E25", "NUL byte; is this a text file?")
		return false
	case !utf8.ValidString(text):
		r.diags.at(s.file, token{line: line, col: validPrefix(text) + 1}, "E25", "not UTF-8; save the file as UTF-8")
		return false
	case len(text) > maxLine:
		r.diags.at(s.file, token{line: line, col: 1}, "E25", "line longer than %d bytes; use a LIST with file=", maxLine)
		return false
	}
	col := 1
	for text != "" {
		word := strings.TrimLeft(text, " \t")
		col += len(text) - len(word)
		if word == "" || word[0] == '#' {
			return false
		}
		if word == `\` {
			return true
		}
		n := strings.IndexAny(word, " \t")
		if n < 0 {
			n = len(word)
		}
		t := token{text: word[:n], line: line, col: col}
		text = word[n:]
		if text == "" && strings.HasSuffix(t.text, `\`) {
			t.text, more = t.text[:len(t.text)-1], true
		}
		s.tokens = append(s.tokens, t)
		col += utf8.RuneCountInString(word[:n])
	}
	return more
}

func validPrefix(s string) (n int) {
	for s != "" {
		c, size := utf8.DecodeRuneInString(s)
		if c == utf8.RuneError && size <= 1 {
			break
		}
		s, n = s[size:], n+1
	}
	return n
}

// finish keeps a statement, or does what an INCLUDE says.
func (r *reader) finish(s *statement) {
	if len(s.tokens) == 0 {
		return
	}
	r.statements = append(r.statements, s)
	fmt.Fprintln(r.sum, s.text())
	r.diags.begin()
	if !strings.EqualFold(s.tokens[0].text, "INCLUDE") {
		return
	}
	if len(s.tokens) != 2 {
		r.diags.at(s.file, s.tokens[0], "E29", "INCLUDE takes one path")
		return
	}
	path := s.tokens[1].text
	if !filepath.IsAbs(path) {
		path = filepath.Join(filepath.Dir(s.file), path)
	}
	r.file(path, func(code, format string, args ...any) {
		r.diags.at(s.file, s.tokens[1], code, format, args...)
	})
}

// readError says why a file cannot be read, with its name once.
func readError(path string, err error) error {
	if pe := (*fs.PathError)(nil); errors.As(err, &pe) {
		err = pe.Err
	}
	return fmt.Errorf("cannot read %s: %w", path, err)
}

func openFile(path string) (io.ReadCloser, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err // not a nil *os.File in an interface
	}
	return f, nil
}
