package fakedns

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"net"
	"net/netip"
	"slices"
	"strings"
	"time"

	"github.com/miekg/dns"
)

// handle answers one question the slow way; it never returns nil.
func (s *Server) handle(ctx context.Context, req *dns.Msg, a Asker) *dns.Msg {
	if len(req.Question) != 1 {
		s.count.failed.Add(1)
		return new(dns.Msg).SetRcode(req, dns.RcodeFormatError)
	}
	if opt := req.IsEdns0(); opt != nil && opt.Version() != 0 {
		return s.refuse(req, dns.RcodeBadVers) // RFC 6891 section 6.1.3
	}
	switch req.Opcode {
	case dns.OpcodeQuery, dns.OpcodeNotify, dns.OpcodeUpdate:
	default:
		return s.refuse(req, dns.RcodeNotImplemented)
	}
	q := req.Question[0]
	name := strings.ToLower(strings.TrimSuffix(q.Name, "."))
	if q.Qclass != dns.ClassINET {
		return s.refuse(req, dns.RcodeRefused)
	}
	if addr, ok := reverse(name); ok && s.pool.contains(addr) {
		return s.pointer(req, addr)
	}
	verdict := Real // the root, and what the rules do not speak of
	if name != "" {
		verdict, _ = s.o.Decide(name, a)
	}
	switch verdict {
	case Refused:
		return s.refuse(req, dns.RcodeRefused)
	case NXDomain:
		return s.refuse(req, dns.RcodeNameError)
	}
	ctx, cancel := context.WithTimeout(ctx, s.o.Timeout)
	defer cancel()
	switch {
	case verdict == Synthetic:
		return s.proxied(ctx, req, name, a)
	case verdict == LocalFirst:
		resp, err := s.fwd.exchange(ctx, req, a)
		if err == nil && resp.Rcode != dns.RcodeNameError && resp.Rcode != dns.RcodeServerFailure {
			s.count.local.Add(1)
			return resp
		}
		again, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.o.Timeout)
		defer cancel()
		return s.proxied(again, req, name, a)
	}
	resp, err := s.fwd.exchange(ctx, req, a)
	if err == nil && verdict == RealDirect {
		if addrs, ttl := addresses(resp); len(addrs) > 0 {
			if e := s.o.Admit(name, a, addrs, ttl); e != nil {
				// The client could not go there. By a synthetic address it can.
				s.o.Log.Debug("addresses that are not let pass", "host", name, "err", e)
				switch q.Qtype {
				case dns.TypeA, dns.TypeAAAA, dns.TypeHTTPS, dns.TypeSVCB, dns.TypeANY:
					return s.proxied(ctx, req, name, a)
				}
				resp.Extra = slices.DeleteFunc(resp.Extra, isAddress)
			}
		}
	}
	if err != nil {
		return s.fail(req, err)
	}
	s.count.local.Add(1)
	return resp
}

func (s *Server) refuse(req *dns.Msg, rcode int) *dns.Msg {
	s.count.refused.Add(1)
	return new(dns.Msg).SetRcode(req, rcode)
}

func (s *Server) fail(req *dns.Msg, err error) *dns.Msg {
	s.count.failed.Add(1)
	s.o.Log.Debug("question without an answer", "host", req.Question[0].Name, "type", dns.TypeToString[req.Question[0].Qtype], "err", err)
	return new(dns.Msg).SetRcode(req, dns.RcodeServerFailure)
}

// pointer answers who owns a synthetic address.
func (s *Server) pointer(req *dns.Msg, addr netip.Addr) *dns.Msg {
	q := req.Question[0]
	if req.Opcode != dns.OpcodeQuery || q.Qtype == dns.TypeAXFR || q.Qtype == dns.TypeIXFR {
		return s.refuse(req, dns.RcodeRefused)
	}
	s.count.synthetic.Add(1)
	name, ok := s.pool.lookup(addr)
	if !ok {
		return new(dns.Msg).SetRcode(req, dns.RcodeNameError)
	}
	resp := new(dns.Msg).SetReply(req)
	if q.Qtype == dns.TypePTR || q.Qtype == dns.TypeANY {
		resp.Answer = []dns.RR{&dns.PTR{Hdr: s.header(q.Name, dns.TypePTR), Ptr: dns.Fqdn(name)}}
	}
	return resp
}

func (s *Server) header(name string, rrtype uint16) dns.RR_Header {
	return dns.RR_Header{Name: name, Rrtype: rrtype, Class: dns.ClassINET, Ttl: s.ttl}
}

// proxied answers a question about a name whose flows go through a server.
// No question about it is ever sent by another way.
func (s *Server) proxied(ctx context.Context, req *dns.Msg, name string, a Asker) *dns.Msg {
	q := req.Question[0]
	if req.Opcode != dns.OpcodeQuery {
		return s.refuse(req, dns.RcodeRefused)
	}
	switch q.Qtype {
	case dns.TypeAXFR, dns.TypeIXFR:
		return s.refuse(req, dns.RcodeRefused)
	case dns.TypeA, dns.TypeAAAA, dns.TypeHTTPS, dns.TypeSVCB, dns.TypeANY:
	default:
		return s.remote(ctx, req, name, a)
	}
	v4, v6, err := s.pool.assign(name)
	if err != nil {
		return s.fail(req, err)
	}
	s.count.synthetic.Add(1)
	resp := new(dns.Msg).SetReply(req)
	if v4.IsValid() && (q.Qtype == dns.TypeA || q.Qtype == dns.TypeANY) {
		resp.Answer = append(resp.Answer, &dns.A{Hdr: s.header(q.Name, dns.TypeA), A: v4.AsSlice()})
	}
	if v6.IsValid() && (q.Qtype == dns.TypeAAAA || q.Qtype == dns.TypeANY) {
		resp.Answer = append(resp.Answer, &dns.AAAA{Hdr: s.header(q.Name, dns.TypeAAAA), AAAA: v6.AsSlice()})
	}
	if len(resp.Answer) == 0 {
		// HTTPS and SVCB too: with hints a client would go to an address that
		// nobody decided about, and without them they say nothing.
		resp.Ns = []dns.RR{&dns.SOA{Hdr: s.header(q.Name, dns.TypeSOA), Ns: q.Name, Mbox: q.Name,
			Serial: 1, Refresh: 3600, Retry: 600, Expire: 86400, Minttl: s.ttl}}
	}
	return resp
}

// remote asks the resolvers through the SOCKS server that carries the name, by
// DNS over TCP.
func (s *Server) remote(ctx context.Context, req *dns.Msg, name string, a Asker) *dns.Msg {
	if s.o.DialRemote == nil {
		return s.fail(req, errors.New("fakedns: no way through a server"))
	}
	err := errors.New("fakedns: no resolver that a server could reach")
	for _, r := range s.remoteResolvers(name, a) {
		var conn net.Conn
		if conn, err = s.o.DialRemote(ctx, name, a, r); err != nil {
			continue
		}
		var resp *dns.Msg
		if resp, err = exchangeTCP(ctx, conn, req); err == nil {
			s.count.remote.Add(1)
			// A mail host's addresses, say: the client shall ask for them, so
			// that its flows have a name.
			resp.Extra = slices.DeleteFunc(resp.Extra, isAddress)
			return resp
		}
	}
	return s.fail(req, err)
}

func isAddress(rr dns.RR) bool {
	t := rr.Header().Rrtype
	return t == dns.TypeA || t == dns.TypeAAAA
}

// remoteResolvers are those that make sense from elsewhere: ours, but those on
// this host itself; without any, the one that the client asked.
func (s *Server) remoteResolvers(name string, a Asker) (list []netip.AddrPort) {
	for _, r := range s.fwd.of(name, *s.fwd.resolvers.Load()) {
		if !r.Addr().IsLoopback() && !s.o.Own(r.Addr()) {
			list = append(list, r)
		}
	}
	if r := a.Server; len(list) == 0 && r.IsValid() && !r.Addr().IsLoopback() && !s.o.Own(r.Addr()) {
		list = append(list, r)
	}
	return list
}

// exchangeTCP asks one question on a connection and closes it.
func exchangeTCP(ctx context.Context, conn net.Conn, req *dns.Msg) (*dns.Msg, error) {
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	ask := question1(req)
	b, err := ask.Pack()
	if err != nil {
		return nil, err
	}
	out := binary.BigEndian.AppendUint16(make([]byte, 0, len(b)+2), uint16(len(b)))
	if _, err := conn.Write(append(out, b...)); err != nil {
		return nil, err
	}
	var head [2]byte
	if _, err := io.ReadFull(conn, head[:]); err != nil {
		return nil, err
	}
	in := make([]byte, binary.BigEndian.Uint16(head[:]))
	if _, err := io.ReadFull(conn, in); err != nil {
		return nil, err
	}
	return accept(ask, in)
}

// question1 is the question of req as we ask it: our own id, our own EDNS.
func question1(req *dns.Msg) *dns.Msg {
	ask := &dns.Msg{MsgHdr: req.MsgHdr, Question: req.Question}
	if req.Opcode != dns.OpcodeQuery { // NOTIFY, UPDATE: as they are
		ask = req.Copy()
		ask.Id = dns.Id()
		return ask
	}
	ask.Id = dns.Id()
	opt := req.IsEdns0()
	ask.SetEdns0(udpSize, opt != nil && opt.Do())
	return ask
}

// accept takes a message as the answer to ask.
func accept(ask *dns.Msg, b []byte) (*dns.Msg, error) {
	resp := new(dns.Msg)
	if err := resp.Unpack(b); err != nil {
		return nil, err
	}
	if resp.Id != ask.Id || !resp.Response || len(resp.Question) > 0 && (len(ask.Question) == 0 ||
		!strings.EqualFold(resp.Question[0].Name, ask.Question[0].Name) || resp.Question[0].Qtype != ask.Question[0].Qtype) {
		return nil, errors.New("fakedns: an answer to another question")
	}
	return resp, nil
}

// addresses are those that an answer leads a client to, with the shortest of
// their times.
func addresses(m *dns.Msg) (list []netip.Addr, ttl time.Duration) {
	seconds := uint32(1<<31 - 1)
	add := func(rr dns.RR, ip net.IP) {
		if a, ok := netip.AddrFromSlice(ip); ok {
			list = append(list, a.Unmap())
			seconds = min(seconds, rr.Header().Ttl)
		}
	}
	hints := func(rr dns.RR, values []dns.SVCBKeyValue) {
		for _, v := range values {
			switch h := v.(type) {
			case *dns.SVCBIPv4Hint:
				for _, ip := range h.Hint {
					add(rr, ip)
				}
			case *dns.SVCBIPv6Hint:
				for _, ip := range h.Hint {
					add(rr, ip)
				}
			}
		}
	}
	for _, rr := range append(append([]dns.RR(nil), m.Answer...), m.Extra...) {
		switch rr := rr.(type) {
		case *dns.A:
			add(rr, rr.A)
		case *dns.AAAA:
			add(rr, rr.AAAA)
		case *dns.HTTPS:
			hints(rr, rr.Value)
		case *dns.SVCB:
			hints(rr, rr.Value)
		}
	}
	return list, time.Duration(seconds) * time.Second
}

// reverse reads a name under in-addr.arpa or ip6.arpa as the address that it
// stands for.
func reverse(name string) (a netip.Addr, ok bool) {
	if rest, is4 := strings.CutSuffix(name, ".in-addr.arpa"); is4 {
		l := strings.Split(rest, ".")
		if len(l) != 4 {
			return a, false
		}
		a, err := netip.ParseAddr(l[3] + "." + l[2] + "." + l[1] + "." + l[0])
		return a, err == nil
	}
	rest, is6 := strings.CutSuffix(name, ".ip6.arpa")
	if !is6 || len(rest) != 63 {
		return a, false
	}
	var digits [32]byte
	for i := range digits {
		digits[31-i] = rest[2*i]
		if i < 31 && rest[2*i+1] != '.' {
			return a, false
		}
	}
	var b [16]byte
	if _, err := hex.Decode(b[:], digits[:]); err != nil {
		return a, false
	}
	return netip.AddrFrom16(b), true
}
