package redirect

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// The kernel remembers a connection for two minutes after its end, and a question
// of DNS for half a minute after its answer. Those that end here are two each, or
// come by the thousand, and the table that they are in is everybody's: where it is
// full packets of new flows are dropped. So ours are remembered briefly: as long as
// a segment or a question may come again.

// brief is for what may be remembered briefly, of one protocol.
type brief struct {
	name    string
	proto   l4
	seconds map[uint16]uint32 // by state, CTA_TIMEOUT_TCP_* and CTA_TIMEOUT_UDP_*
	text    string            // of seconds
}

// States of connection tracking (linux/netfilter/nfnetlink_cttimeout.h), and the
// attributes of an object that has times for them.
const (
	ctTimeWait  = 7
	ctUnreplied = 1
	ctReplied   = 2

	ctTimeoutProto = 2 // NFTA_CT_TIMEOUT_L4PROTO
	ctTimeoutData  = 3 // NFTA_CT_TIMEOUT_DATA
)

// briefs returns both. A question without an answer after ten seconds has been given
// up: its resolvers have had five.
func briefs() []brief {
	return []brief{
		{"brief_tcp", tcp, map[uint16]uint32{ctTimeWait: 10}, "time_wait : 10"},
		{"brief_udp", udp, map[uint16]uint32{ctUnreplied: 10, ctReplied: 10}, "unreplied : 10, replied : 10"},
	}
}

// message adds it to a table that has been named.
func (b brief) message(table string) (netlink.Message, error) {
	var times []netlink.Attribute
	for _, state := range slices.Sorted(maps.Keys(b.seconds)) {
		times = append(times, u32Attr(state, b.seconds[state]))
	}
	policy, err := netlink.MarshalAttributes(times)
	if err != nil {
		return netlink.Message{}, err
	}
	data, err := netlink.MarshalAttributes([]netlink.Attribute{
		{Type: ctTimeoutProto, Data: []byte{byte(b.proto)}}, {Type: netlink.Nested | ctTimeoutData, Data: policy}})
	if err != nil {
		return netlink.Message{}, err
	}
	return nfMessage(unix.NFT_MSG_NEWOBJ, netlink.Create,
		stringAttr(unix.NFTA_OBJ_TABLE, table), stringAttr(unix.NFTA_OBJ_NAME, b.name),
		u32Attr(unix.NFTA_OBJ_TYPE, unix.NFT_OBJECT_CT_TIMEOUT), netlink.Attribute{Type: netlink.Nested | unix.NFTA_OBJ_DATA, Data: data}), nil
}

// briefMessages adds them to our table.
func briefMessages() (msgs []netlink.Message, err error) {
	for _, b := range briefs() {
		m, err := b.message(tableName)
		if err != nil {
			return nil, err
		}
		msgs = append(msgs, m)
	}
	return msgs, nil
}

// knowsBrief tries whether the kernel knows such times (CONFIG_NF_CONNTRACK_TIMEOUT),
// in a transaction that comes to nothing.
func (c *nfnl) knowsBrief() bool {
	const trial = tableName + "_trial"
	m, err := briefs()[0].message(trial)
	return err == nil && errors.Is(c.attempt([]netlink.Message{newNamed(trial, 0), m}), errAborted)
}

// briefly is the end of a rule for packets that flows of ours begin with: the kernel
// does it to what it does not remember yet, and only by one that is of the protocol.
func (t *table) briefly(protocols ...l4) (list []statement) {
	for _, b := range briefs() {
		if t.brief && slices.Contains(protocols, b.proto) {
			list = append(list, statement{text: fmt.Sprintf("ct timeout set %q", b.name), exprs: []expr.Any{
				&expr.Objref{Type: unix.NFT_OBJECT_CT_TIMEOUT, Name: b.name}}})
		}
	}
	return list
}

func (b brief) write(w *strings.Builder) {
	fmt.Fprintf(w, "\tct timeout %s {\n\t\tprotocol %s\n\t\tl3proto inet\n\t\tpolicy = { %s }\n\t}\n\n", b.name, b.proto, b.text)
}
