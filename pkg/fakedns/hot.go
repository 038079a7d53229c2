package fakedns

import (
	"encoding/binary"

	"github.com/miekg/dns"
)

// The fast path: a question for the address of a synthetic name, read and
// answered without taking a message apart. Everything that is not exactly such
// a question goes the slow way.

const (
	headerLen = 12
	// maxQuestion is the longest question that the fast path takes: header, a
	// name, type and class, and an OPT record without options.
	maxQuestion = headerLen + 255 + 4 + optLen
	optLen      = 11
	// maxHot is the longest answer of the fast path: question, one AAAA record
	// or a SOA of known size, OPT.
	maxHot = maxQuestion + 96

	flagResponse = 1 << 15
	opcodeMask   = 0xf << 11
	flagTC       = 1 << 9
	flagRD       = 1 << 8
	flagRA       = 1 << 7
	flagCD       = 1 << 4
)

// question is a plain question as the fast path reads it. Its slices point
// into the message and into the scratch.
type question struct {
	msg   []byte // the whole message
	end   int    // of the question section
	name  []byte // lower case, no final dot
	qtype uint16
	edns  bool
	do    bool
}

// parse reads a message that is one question of class IN, with an OPT record
// at most. False: it is something else.
func (q *question) parse(msg []byte, scratch *[256]byte) bool {
	if len(msg) < headerLen+5 || len(msg) > maxQuestion {
		return false
	}
	bits := binary.BigEndian.Uint16(msg[2:])
	if bits&(flagResponse|opcodeMask|flagTC) != 0 ||
		binary.BigEndian.Uint32(msg[4:]) != 1<<16 || // one question, no answer
		binary.BigEndian.Uint16(msg[8:]) != 0 {
		return false
	}
	n, at := 0, headerLen
	for {
		if at >= len(msg) {
			return false
		}
		l := int(msg[at])
		at++
		if l == 0 {
			break
		}
		if l > 63 || at+l > len(msg) || n+1+l > 253 {
			return false
		}
		if n > 0 {
			scratch[n] = '.'
			n++
		}
		for _, c := range msg[at : at+l] {
			if 'A' <= c && c <= 'Z' {
				c += 'a' - 'A'
			}
			// What needs escapes in text goes the slow way.
			if c <= ' ' || c >= 0x7f || c == '.' || c == '\\' || c == '"' || c == '\'' || c == '(' || c == ')' || c == ';' || c == '@' || c == '$' {
				return false
			}
			scratch[n] = c
			n++
		}
		at += l
	}
	if n == 0 || at+4 > len(msg) || binary.BigEndian.Uint16(msg[at+2:]) != dns.ClassINET {
		return false
	}
	q.msg, q.name, q.qtype, q.end = msg, scratch[:n], binary.BigEndian.Uint16(msg[at:]), at+4
	q.edns, q.do = false, false
	switch extra := msg[q.end:]; binary.BigEndian.Uint16(msg[10:]) {
	case 0:
		return len(extra) == 0
	case 1:
		// root name, type OPT, size, extended code 0, version 0, flags.
		if len(extra) < optLen || extra[0] != 0 || binary.BigEndian.Uint16(extra[1:]) != dns.TypeOPT || extra[5] != 0 || extra[6] != 0 {
			return false
		}
		if int(binary.BigEndian.Uint16(extra[9:])) != len(extra)-optLen || !plainOptions(extra[optLen:]) {
			return false
		}
		q.edns, q.do = true, extra[7]&0x80 != 0
		return true
	}
	return false
}

// plainOptions tells whether the options of an OPT record are well formed and
// of kinds that are well formed whatever they hold: cookies and padding.
func plainOptions(b []byte) bool {
	for len(b) > 0 {
		if len(b) < 4 {
			return false
		}
		code, n := binary.BigEndian.Uint16(b), int(binary.BigEndian.Uint16(b[2:]))
		if code != dns.EDNS0COOKIE && code != dns.EDNS0PADDING || n > len(b)-4 {
			return false
		}
		b = b[4+n:]
	}
	return true
}

// serverFailure appends SERVFAIL to b, so that who asked need not wait for a
// time-out; nil: the message is no plain question.
func serverFailure(msg []byte, scratch *[256]byte, b []byte) []byte {
	var q question
	if !q.parse(msg, scratch) {
		return nil
	}
	b = q.head(b, 0, 0)
	b[3] |= dns.RcodeServerFailure
	return q.tail(b)
}

// head appends the answer's header and question to b.
func (q *question) head(b []byte, answers, authority int) []byte {
	start := len(b)
	b = append(b, q.msg[:q.end]...)
	bits := flagResponse | flagRA | binary.BigEndian.Uint16(b[start+2:])&(flagRD|flagCD)
	binary.BigEndian.PutUint16(b[start+2:], bits)
	binary.BigEndian.PutUint16(b[start+6:], uint16(answers))
	binary.BigEndian.PutUint16(b[start+8:], uint16(authority))
	binary.BigEndian.PutUint16(b[start+10:], 0)
	if q.edns {
		b[start+11] = 1
	}
	return b
}

// tail appends our OPT record if the question had one.
func (q *question) tail(b []byte) []byte {
	if !q.edns {
		return b
	}
	b = append(b, 0, 0, byte(dns.TypeOPT), udpSize>>8, udpSize&0xff, 0, 0, 0, 0, 0, 0)
	if q.do {
		b[len(b)-4] = 0x80
	}
	return b
}

// address appends the whole answer that says that the name has the address.
func (q *question) address(b []byte, addr []byte, ttl uint32) []byte {
	b = q.head(b, 1, 0)
	b = append(b, 0xc0, headerLen, byte(q.qtype>>8), byte(q.qtype), 0, dns.ClassINET)
	b = binary.BigEndian.AppendUint32(b, ttl)
	b = append(b, 0, byte(len(addr)))
	b = append(b, addr...)
	return q.tail(b)
}

// nodata appends the whole answer that says that the name has nothing of this
// type (RFC 2308: with a SOA, so that it is kept for the time it says).
func (q *question) nodata(b []byte, ttl uint32) []byte {
	b = q.head(b, 0, 1)
	b = append(b, 0xc0, headerLen, 0, byte(dns.TypeSOA), 0, dns.ClassINET)
	b = binary.BigEndian.AppendUint32(b, ttl)
	rdata := [...]byte{0xc0, headerLen, 0xc0, headerLen, // primary server and mailbox: the name itself
		0, 0, 0, 1, 0, 0, 0x0e, 0x10, 0, 0, 0x02, 0x58, 0, 0x01, 0x51, 0x80} // serial, refresh, retry, expire
	b = append(b, 0, byte(len(rdata)+4))
	b = append(b, rdata[:]...)
	b = binary.BigEndian.AppendUint32(b, ttl) // how long "no" is kept
	return q.tail(b)
}
