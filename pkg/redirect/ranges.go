package redirect

import (
	"errors"
	"net/netip"
	"slices"
)

// family is IPv4 or IPv6 as nftables numbers them (NFPROTO_IPV4, NFPROTO_IPV6).
type family byte

const (
	ip4 family = 2
	ip6 family = 10
)

func familyOf(a netip.Addr) family {
	if a.Is4() {
		return ip4
	}
	return ip6
}

// word is how nft calls the family: "ip" or "ip6".
func (f family) word() string {
	if f == ip4 {
		return "ip"
	}
	return "ip6"
}

// digit ends the names of sets and chains of the family.
func (f family) digit() string {
	if f == ip4 {
		return "4"
	}
	return "6"
}

func (f family) first() netip.Addr {
	if f == ip4 {
		return netip.IPv4Unspecified()
	}
	return netip.IPv6Unspecified()
}

// normal returns the ranges of the family, sorted and merged where they have the
// same tag.
func normal(ranges []Range, f family) []Range {
	n := 0
	for _, r := range ranges {
		if familyOf(r.From) == f {
			n++
		}
	}
	rs := make([]Range, 0, n)
	for _, r := range ranges {
		if familyOf(r.From) == f {
			rs = append(rs, r)
		}
	}
	before := func(a, b Range) int { return a.From.Compare(b.From) }
	if !slices.IsSortedFunc(rs, before) {
		slices.SortFunc(rs, before)
	}
	merged := rs[:0]
	for _, r := range rs {
		if n := len(merged); n > 0 {
			last := &merged[n-1]
			if last.Tag == r.Tag && (!last.To.Less(r.From) || last.To.Next() == r.From) {
				if last.To.Less(r.To) {
					last.To = r.To
				}
				continue
			}
		}
		merged = append(merged, r)
	}
	return merged
}

// prefixRanges returns the addresses of the prefixes.
func prefixRanges(prefixes []netip.Prefix) []Range {
	var rs []Range
	for _, p := range prefixes {
		p = p.Masked()
		rs = append(rs, Range{From: p.Addr(), To: lastOf(p)})
	}
	return rs
}

func lastOf(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < 8*len(b); i++ {
		b[i/8] |= 0x80 >> (i % 8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

var errOverlap = errors.New("the same address is in two of its lists")

// covers reports whether the normal lists together hold every address of the
// family. Two that share an address are an error.
func covers(f family, lists ...[]Range) (bool, error) {
	next := make([]int, len(lists))
	want, whole := f.first(), true // the address after those seen; invalid after the last of all
	for {
		first := -1
		for i, l := range lists {
			if next[i] < len(l) && (first < 0 || l[next[i]].From.Less(lists[first][next[first]].From)) {
				first = i
			}
		}
		if first < 0 {
			return whole && !want.IsValid(), nil
		}
		r := lists[first][next[first]]
		next[first]++
		if !want.IsValid() || r.From.Less(want) {
			return false, errOverlap
		}
		whole = whole && r.From == want
		want = r.To.Next()
	}
}

// text returns the range as nft prints it.
func (r Range) text() string {
	if r.From == r.To {
		return r.From.String()
	}
	for bits := r.From.BitLen() - 1; bits >= 0; bits-- {
		p := netip.PrefixFrom(r.From, bits)
		if p.Masked().Addr() != r.From {
			break
		}
		if last := lastOf(p); last == r.To {
			return p.String()
		} else if r.To.Less(last) {
			break
		}
	}
	return r.From.String() + "-" + r.To.String()
}
