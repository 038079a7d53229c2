package routes

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"path/filepath"
	"slices"
	"strings"
	"unicode/utf8"
)

// Bounds of the files of a LIST.
const (
	maxMembers  = 1 << 24   // names and networks of all files together
	maxText     = 1<<31 - 1 // bytes of the names: an int of 32 bits holds it, and a nameRef could name twice as much
	maxMistakes = 100       // of one file that are reported one by one
	listLine    = 28        // bytes of a line, for a guess how many there are
)

// listFile reads members from a file, in any mix of the forms that lists come
// in, line by line:
//
//	10.0.0.0/8 *.example.org      networks and names, any number of them
//	0.0.0.0 ads.example           of hosts(5): the names, not the address
//	address=/ads.example/#        of dnsmasq(8): the names, and those below them
func (l *line) listFile(t token, path string, into *list) {
	if !filepath.IsAbs(path) {
		path = filepath.Join(filepath.Dir(l.file), path)
	}
	if !slices.Contains(l.files, path) {
		l.files = append(l.files, path)
	}
	f, err := l.open(path)
	if err != nil {
		l.errorf(t, "E24", "%v", readError(path, err))
		return
	}
	defer f.Close()
	r := &listReader{line: &line{parser: l.parser, statement: &statement{file: path}}, into: &into.dest}
	if f, ok := f.(fs.File); ok {
		if info, err := f.Stat(); err == nil { // most lines are a name: to grow by and by costs several times as much
			into.dest.names.refs = slices.Grow(into.dest.names.refs, int(min(info.Size(), 1<<28)/listLine))
		}
	}
	if err := r.read(f); err != nil {
		l.errorf(t, "E24", "%v", readError(path, err))
	}
	r.unsaid()
	fmt.Fprintf(l.reader.sum, "%s %d\n", t.text, r.hidden)
}

// listReader reads one file of a LIST. Most lines of a long one are a name and
// nothing else, so those are not taken apart like a rule.
type listReader struct {
	*line            // for what is not a plain name, and for messages
	into    *dest    //
	number  int      // of the line
	words   []token  // of the line
	said    []byte   // a name in lower case, as Table.Sum hears of it
	hosts   bool     // a line of hosts(5) with an address that means something was met
	shown   int      // mistakes reported
	hidden  int      // mistakes not reported
	hiddenE Severity // the worst of them
}

func (r *listReader) read(in io.Reader) error {
	r.hiddenE = Warning
	br := bufio.NewReaderSize(in, maxLine)
	for {
		text, err := br.ReadSlice('\n')
		r.number++
		if err == bufio.ErrBufferFull {
			r.report(func() {
				r.errorf(token{line: r.number, col: 1}, "E25", "line longer than %d bytes; write one member a line", maxLine)
			})
			for err == bufio.ErrBufferFull {
				_, err = br.ReadSlice('\n')
			}
			text = nil
		}
		if r.number == 1 {
			text = bytes.TrimPrefix(text, []byte("\ufeff"))
		}
		if !r.plain(bytes.TrimRight(text, "\r\n")) {
			r.report(func() { r.line1(string(text)) })
		}
		if n := len(r.into.names.refs) + len(r.into.suffixes.refs) + len(r.into.prefixes); n > maxMembers {
			return fmt.Errorf("more than %d names and networks", maxMembers)
		}
		if r.names.size() > maxText {
			return fmt.Errorf("more than %d MB of names, those of other files included", maxText>>20)
		}
		switch {
		case err == io.EOF:
			return nil
		case err != nil:
			return err
		}
	}
}

// plain takes a line that is one name or pattern, or nothing.
func (r *listReader) plain(text []byte) bool {
	text = bytes.Trim(text, " \t")
	if len(text) == 0 || text[0] == '#' {
		return true
	}
	kind := exactly
	if rest, ok := bytes.CutPrefix(text, []byte("*.")); ok {
		text, kind = rest, beneath
	}
	r.said = append(r.said[:0], kind)
	label, letters := 0, false
	for _, c := range text {
		switch {
		case c >= 'a' && c <= 'z' || c == '-' || c == '_':
			letters = true
		case c >= 'A' && c <= 'Z':
			c += 'a' - 'A'
			letters = true
		case c >= '0' && c <= '9':
		case c == '.' && label > 0:
			label = -1
		default:
			return false
		}
		if label++; label > 63 {
			return false
		}
		r.said = append(r.said, c)
	}
	if !letters || label == 0 || len(r.said) > 254 {
		return false // an address, an empty label, too long
	}
	r.enter()
	return true
}

// What stands before a name in listReader.said.
const (
	exactly byte = '='
	beneath byte = '.'
)

// enter adds the name that was said.
func (r *listReader) enter() {
	to := &r.into.names
	if r.said[0] == beneath {
		to = &r.into.suffixes
	}
	to.text, to.refs = r.names, append(to.refs, r.names.add(r.said[1:]))
	r.said = append(r.said, '\n')
	r.reader.sum.Write(r.said)
}

// say is enter for a name in another form.
func (r *listReader) say(kind byte, name string) {
	r.said = append(append(r.said[:0], kind), name...)
	r.enter()
}

// report lets f report mistakes, as long as there were not too many.
func (r *listReader) report(f func()) {
	before := len(r.diags.list)
	f()
	if r.shown += len(r.diags.list) - before; r.shown <= maxMistakes {
		return
	}
	for _, d := range r.diags.list[before:] {
		r.hidden++
		r.hiddenE = min(r.hiddenE, d.Severity)
	}
	r.diags.list = r.diags.list[:before]
}

// unsaid says how many mistakes were not reported.
func (r *listReader) unsaid() {
	if r.hidden > 0 {
		r.diags.add(r.file, token{line: r.number, col: 1}, r.hiddenE, "E29", "%d more mistakes in this file are not shown", r.hidden)
	}
}

// line1 takes any other line apart.
func (r *listReader) line1(text string) {
	r.words = r.words[:0]
	col := 1
	text = strings.TrimRight(text, "\r\n")
	text = strings.TrimSuffix(text, `\`) // the next line goes on, as in rules, but members need no such thing
	for {
		word := strings.TrimLeft(text, " \t")
		col += len(text) - len(word)
		if word == "" || word[0] == '#' {
			break
		}
		n := strings.IndexAny(word, " \t")
		if n < 0 {
			n = len(word)
		}
		t := token{text: word[:n], line: r.number, col: col}
		switch text = word[n:]; {
		case !utf8.ValidString(t.text):
			r.errorf(t, "E25", "not UTF-8; save the file as UTF-8")
		case strings.IndexByte(t.text, 0) >= 0:
			r.errorf(t, "E25", "NUL byte; is this a text file?")
		default:
			r.words = append(r.words, t)
		}
		col += utf8.RuneCountInString(word[:n])
	}
	switch {
	case len(r.words) == 0:
	case strings.Contains(r.words[0].text, "="):
		r.dnsmasq(r.words[0])
		if len(r.words) > 1 {
			r.errorf(r.words[1], "E29", "%q is too much here", r.words[1].text)
		}
	case len(r.words) > 1 && isHostLine(r.words):
		r.hostLine()
	default:
		for _, t := range r.words {
			r.said = append(append(r.said[:0], t.text...), '\n')
			r.reader.sum.Write(r.said)
			r.into.add(r.member(t))
		}
	}
}

// isHostLine tells whether words are an address and then names.
func isHostLine(words []token) bool {
	_, err := netip.ParseAddr(words[0].text)
	return err == nil && !slices.ContainsFunc(words[1:], func(t token) bool {
		return isAddressLike(t.text) && t.text != "0.0.0.0" || strings.ContainsAny(t.text, "*/$") || t.text[0] == '.'
	})
}

// ownNames are the names that a file of hosts(5) has for the host itself.
var ownNames = []string{"localhost", "localhost.localdomain", "local", "broadcasthost", "ip6-localhost", "ip6-loopback",
	"ip6-localnet", "ip6-mcastprefix", "ip6-allnodes", "ip6-allrouters", "ip6-allhosts", "0.0.0.0"}

// hostLine takes the names of a line of hosts(5).
func (r *listReader) hostLine() {
	a, _ := netip.ParseAddr(r.words[0].text)
	nowhere := a.IsUnspecified() || a.IsLoopback() || a.IsMulticast() || a.IsLinkLocalUnicast() || a == netip.AddrFrom4([4]byte{255, 255, 255, 255}) ||
		a == netip.MustParseAddr("fe00::0")
	if !nowhere && !r.hosts {
		r.hosts = true
		r.warnf(r.words[0], "W06", "an address and then names are taken as a line of hosts(5): the names are members, the address is none; write it on a line of its own if it shall be one")
	}
	for _, t := range r.words[1:] {
		if nowhere && slices.Contains(ownNames, strings.ToLower(t.text)) {
			continue
		}
		if name, _, ok := r.pattern(t, t.text); ok {
			r.say(exactly, name)
		}
	}
}

// dnsmasqWords are the options of dnsmasq(8) that have names.
var dnsmasqWords = []string{"address", "server", "local", "ipset", "nftset"}

// dnsmasq takes the names of an option of dnsmasq: KEY=/NAME/NAME/VALUE.
func (r *listReader) dnsmasq(t token) {
	key, value, _ := strings.Cut(t.text, "=")
	if !slices.Contains(dnsmasqWords, key) {
		r.errorf(t, "E26", "%q is no member of a LIST; of dnsmasq's options address=, server=, local=, ipset= and nftset= are read", t.text)
		return
	}
	names := strings.Split(value, "/")
	if len(names) < 3 || names[0] != "" {
		r.errorf(t, "E26", "%q has no names; write %s=/NAME/…", t.text, key)
		return
	}
	at := token{line: t.line, col: t.col + utf8.RuneCountInString(key) + 2}
	last := names[len(names)-1]
	names = names[1 : len(names)-1]
	if last == "#" && key != "address" {
		r.warnf(t, "W06", "%q is an exception from other lines, which a LIST cannot say; it is left out", t.text)
		return
	}
	for _, n := range names {
		at.text = n
		if rest, ok := strings.CutPrefix(n, "*."); ok {
			r.domain(at, rest, false)
		} else {
			r.domain(at, strings.TrimLeft(n, "."), true)
		}
		at.col += utf8.RuneCountInString(n) + 1
	}
}

// domain takes the names below a domain, and with apex the domain itself.
func (r *listReader) domain(t token, domain string, apex bool) {
	if domain == "#" || domain == "" {
		r.errorf(t, "E26", "%q stands for names that a LIST cannot name one by one; write a rule with the destination *", t.text)
		return
	}
	name, _, ok := r.pattern(t, domain)
	if !ok {
		return
	}
	r.say(beneath, name)
	if apex {
		r.say(exactly, name)
	}
}
