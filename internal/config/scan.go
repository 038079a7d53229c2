package config

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/pelletier/go-toml/v2/unstable"
	"github.com/tproxyd/tproxyd/pkg/routes"
)

// The codes of the messages about TOML files, beside the E.. of the routing
// language.
const (
	codeSyntax  = "T01" // not TOML
	codeUnknown = "T02" // a key that does not exist
	codeType    = "T03" // a value of the wrong type
	codeValue   = "T04" // a value that makes no sense
	codeTwice   = "T05" // a key given twice
	codeFile    = "T06" // the file itself: unreadable, wrong mode
)

// entry is one key of a file with its value and place. The value is a string,
// bool, int64 or []any of these; other TOML types, of which no key makes use,
// come as their unstable.Kind.
type entry struct {
	path      []string
	value     any
	line, col int
}

func (e entry) key() string { return strings.Join(e.path, ".") }

func (e entry) errorf(file, code, format string, args ...any) routes.Diagnostic {
	return routes.Diagnostic{File: file, Line: e.line, Col: e.col, Severity: routes.Error, Code: code, Msg: fmt.Sprintf(format, args...)}
}

func fileError(path string, err error) routes.Diagnostic {
	return routes.Diagnostic{File: path, Line: 1, Col: 1, Severity: routes.Error, Code: codeFile, Msg: err.Error()}
}

// scan flattens a TOML document into its keys in file order. It stops at the
// first syntax error, since what follows cannot be trusted; the keys before it
// are returned all the same.
func scan(file string, b []byte) (entries []entry, diags routes.Diagnostics) {
	var p unstable.Parser
	p.Reset(b)
	var table []string
	for p.NextExpression() {
		e := p.Expression()
		switch e.Kind {
		case unstable.Table, unstable.ArrayTable:
			table, _, _ = keyPath(&p, e)
		case unstable.KeyValue:
			entries = append(entries, flatten(&p, table, e)...)
		}
	}
	if err := p.Error(); err != nil {
		d := routes.Diagnostic{File: file, Line: 1, Col: 1, Severity: routes.Error, Code: codeSyntax, Msg: err.Error()}
		var perr *unstable.ParserError
		if errors.As(err, &perr) {
			start := p.Shape(p.Range(perr.Highlight)).Start
			d.Line, d.Col, d.Msg = start.Line, start.Column, perr.Message
		}
		diags = append(diags, d)
	}
	return entries, diags
}

// flatten returns the entries of one key and value: several where the value is
// an inline table.
func flatten(p *unstable.Parser, table []string, e *unstable.Node) []entry {
	path, line, col := keyPath(p, e)
	full := append(append([]string(nil), table...), path...)
	v := e.Value()
	if v.Kind != unstable.InlineTable {
		return []entry{{full, value(v), line, col}}
	}
	var all []entry
	for it := v.Children(); it.Next(); {
		all = append(all, flatten(p, full, it.Node())...)
	}
	return all
}

func keyPath(p *unstable.Parser, e *unstable.Node) (path []string, line, col int) {
	for it := e.Key(); it.Next(); {
		n := it.Node()
		if path == nil {
			start := p.Shape(n.Raw).Start
			line, col = start.Line, start.Column
		}
		path = append(path, string(n.Data))
	}
	return path, line, col
}

func value(n *unstable.Node) any {
	switch n.Kind {
	case unstable.String:
		return string(n.Data)
	case unstable.Bool:
		return len(n.Data) > 0 && n.Data[0] == 't'
	case unstable.Integer:
		if i, err := strconv.ParseInt(strings.ReplaceAll(string(n.Data), "_", ""), 0, 64); err == nil {
			return i
		}
	case unstable.Array:
		list := []any{}
		for it := n.Children(); it.Next(); {
			list = append(list, value(it.Node()))
		}
		return list
	}
	return n.Kind
}
