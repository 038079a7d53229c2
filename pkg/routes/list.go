package routes

import "strings"

// list is what a LIST line defines.
type list struct {
	dest      dest
	file      string
	line, col int // of its name
	number    int // of the statement, for messages
	used      bool
}

// list reads a LIST line.
func (l *line) list(t token) {
	name, ok := l.word()
	if !ok || len(l.rest) == 0 {
		l.errorf(t, "E29", "LIST NAME MEMBER… or LIST NAME file=PATH")
		return
	}
	known := l.lists[name.text]
	if known == nil {
		known = &list{file: l.file, line: t.line, col: name.col, number: l.diags.current}
		l.lists[name.text] = known
	} else if known.file != l.file || known.line != t.line {
		l.errorf(name, "E29", "LIST %s is given twice; the first is %s:%d", name.text, known.file, known.line)
		return
	}
	for {
		w, ok := l.word()
		if !ok {
			return
		}
		if path, ok := strings.CutPrefix(w.text, "file="); ok {
			l.listFile(w, path, known)
			continue
		}
		known.dest.add(l.member(w))
	}
}

// member reads one member of a list; a list cannot have lists.
func (l *line) member(t token) dest {
	if t.text[0] == '$' {
		l.errorf(t, "E29", "a LIST cannot hold a LIST")
		return dest{}
	}
	rest := l.rest
	l.rest = nil // no mask may follow
	d := l.destination(t)
	l.rest = rest
	return d
}

func (d *dest) add(more dest) {
	d.prefixes = append(d.prefixes, more.prefixes...)
	d.names.add(more.names)
	d.suffixes.add(more.suffixes)
	d.anyName = d.anyName || more.anyName
}
