package redirect

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"net/netip"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// What the kernel decides alone user space does not hear of, unless it is to be told
// of a flow's first packet (nfnetlink_log), with a prefix for the tag of the range.

// Logged is a flow that the kernel decided by a range with a tag of Plan.Log.
type Logged struct {
	Tag      string         // empty: by an address that was admitted
	Protocol byte           // by its IANA number
	Src, Dst netip.AddrPort // without ports if it is neither TCP nor UDP
	IfIndex  int            // by which it entered; 0: it is this host's own
}

// Bounds of what is told, so that nobody is slowed down by it.
const (
	logRate   = 100 // packets in a second, of each rule of the table that tells
	logBytes  = 128 // of a packet
	logFlows  = 4096
	logMemory = time.Minute // how long a flow is told once, from its last packet that was
)

// logGroups are where packets are told, the first that nobody else listens to.
const logGroup, logGroups = 7470, 16

// Messages and attributes of nfnetlink_log (linux/netfilter/nfnetlink_log.h).
const (
	subsysLog = 4
	logPacket = 0
	logConfig = 1

	logConfigCmd  = 1 // with one byte
	logBind       = 1
	logIndev      = 4
	logPayload    = 9
	logPrefixAttr = 10
)

// logs is the listening end.
type logs struct {
	conn  *netlink.Conn // nil: see err
	group uint16
	err   error

	mu   sync.Mutex
	tags map[string]string // by prefix
}

// dialLogs connects in the network namespace of the calling thread. Without it
// everything else works.
func dialLogs() *logs {
	l := &logs{}
	if l.conn, l.err = netlink.Dial(unix.NETLINK_NETFILTER, nil); l.err != nil {
		return l
	}
	for l.group = logGroup; l.group < logGroup+logGroups; l.group++ {
		b, _ := netlink.MarshalAttributes([]netlink.Attribute{{Type: logConfigCmd, Data: []byte{logBind}}})
		m := netlink.Message{
			Header: netlink.Header{Type: subsysLog<<8 | logConfig, Flags: netlink.Request | netlink.Acknowledge},
			Data:   append(binary.BigEndian.AppendUint16([]byte{unix.AF_UNSPEC, unix.NFNETLINK_V0}, l.group), b...),
		}
		if _, l.err = l.conn.Execute(m); !errors.Is(l.err, unix.EPERM) && !errors.Is(l.err, unix.EBUSY) {
			break // else it is a successor's, a predecessor's, or of somebody else
		}
	}
	if l.err != nil {
		l.conn.Close()
		l.conn, l.group = nil, 0
	}
	return l
}

func (l *logs) close() {
	if l != nil && l.conn != nil {
		l.conn.Close()
	}
}

// logPrefix is what the packets of a tag are told with.
func logPrefix(tag string) string {
	h := fnv.New64a()
	h.Write([]byte(tag))
	return fmt.Sprintf("tproxyd %016x", h.Sum64())
}

// listenTo says which tags are told from now on; those before may still come.
func (l *logs) listenTo(p, before *Plan, log *slog.Logger) {
	if l.conn == nil && len(p.Log) > 0 {
		log.Warn(notTold, "err", l.err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.tags = map[string]string{logPrefix(""): ""}
	for _, q := range []*Plan{p, before} {
		if q != nil {
			for _, tag := range q.Log {
				l.tags[logPrefix(tag)] = tag
			}
		}
	}
}

// notTold says that there is no log, in Redirect's own.
const notTold = "flows that the kernel decides are not in the log, whatever rules say"

// applyTelling is apply on a kernel that may lack what tells of packets: no plan fails
// for that.
func (r *Redirect) applyTelling(p *Plan) error {
	err := r.apply(p)
	if len(p.Log) == 0 || !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EOPNOTSUPP) {
		return err // also EPERM, while a table has another owner: that is no lack
	}
	quiet := *p
	quiet.Log = nil
	if r.apply(&quiet) != nil {
		return err
	}
	r.log.Warn(notTold, "err", err)
	return nil
}

// tell adds the rules to a chain that tell of the first packet of a flow. What is
// neither TCP nor known to conntrack by an answer is told again; see Logged.
func (t *table) tell(c *chain, tag string) {
	if _, ok := t.told[tag]; !ok {
		return
	}
	for _, first := range [][]statement{{firstSegment()}, {protoNot(tcp), ctNew()}} {
		c.add(append(first, limit(logRate), logTo(t.listener, logPrefix(tag)))...)
	}
}

// firstSegment is the contrary of notFirst.
func firstSegment() statement {
	s := notFirst()
	s.text = "tcp flags & (syn | ack) == syn"
	s.exprs[len(s.exprs)-1] = eq([]byte{0x02})
	return s
}

func limit(rate uint64) statement {
	return statement{text: fmt.Sprintf("limit rate %d/second burst %[1]d packets", rate), exprs: []expr.Any{
		&expr.Limit{Type: expr.LimitTypePkts, Rate: rate, Unit: expr.LimitTimeSecond, Burst: uint32(rate)}}}
}

func logTo(group uint16, prefix string) statement {
	return statement{text: fmt.Sprintf("log prefix %q group %d snaplen %d", prefix, group, logBytes), exprs: []expr.Any{
		&expr.Log{Key: 1<<unix.NFTA_LOG_GROUP | 1<<unix.NFTA_LOG_PREFIX | 1<<unix.NFTA_LOG_SNAPLEN, Group: group, Snaplen: logBytes, Data: []byte(prefix)}}}
}

// Logged calls f for each flow that the kernel decides by a range with a tag of
// Plan.Log, once and at most a second after its first packet, until ctx ends; then it
// returns nil. More than 100 in a second of one tag and family are not told. Only one
// Logged may run at a time.
func (r *Redirect) Logged(ctx context.Context, f func(Logged)) error {
	l := r.logs
	if l.conn == nil {
		<-ctx.Done()
		return nil
	}
	if err := l.conn.SetReadDeadline(time.Time{}); err != nil { // of one before this one
		return fmt.Errorf("redirect: log: %w", err)
	}
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(interrupted)
		l.conn.SetReadDeadline(time.Unix(1, 0))
	})
	defer func() {
		if !stop() {
			<-interrupted
		}
	}()
	told := map[Logged]time.Time{}
	for {
		msgs, err := l.conn.Receive()
		switch {
		case ctx.Err() != nil || errors.Is(err, os.ErrClosed):
			return nil
		case errors.Is(err, unix.ENOBUFS):
			continue // they are lost
		case err != nil:
			return fmt.Errorf("redirect: log: %w", err)
		}
		for _, m := range msgs {
			e, ok := l.parse(m)
			if !ok {
				continue
			}
			now := time.Now()
			last, known := told[e]
			if len(told) >= logFlows {
				clear(told)
			}
			if told[e] = now; !known || now.Sub(last) > logMemory {
				f(e)
			}
		}
	}
}

// parse reads what is told of a packet.
func (l *logs) parse(m netlink.Message) (e Logged, ok bool) {
	if m.Header.Type != subsysLog<<8|logPacket || len(m.Data) < 4 {
		return e, false
	}
	ad, err := netlink.NewAttributeDecoder(m.Data[4:])
	if err != nil {
		return e, false
	}
	ad.ByteOrder = binary.BigEndian
	var tagged, read bool
	for ad.Next() {
		switch ad.Type() {
		case logIndev:
			e.IfIndex = int(ad.Uint32())
		case logPayload:
			read = e.packet(ad.Bytes())
		case logPrefixAttr:
			l.mu.Lock()
			e.Tag, tagged = l.tags[ad.String()]
			l.mu.Unlock()
		}
	}
	return e, ad.Err() == nil && tagged && read
}

// packet reads the head of an IP packet.
func (e *Logged) packet(b []byte) (ok bool) {
	var src, dst netip.Addr
	first := true // of its fragments
	switch {
	case len(b) >= 20 && b[0]>>4 == 4:
		src, dst = netip.AddrFrom4([4]byte(b[12:16])), netip.AddrFrom4([4]byte(b[16:20]))
		e.Protocol, first = b[9], binary.BigEndian.Uint16(b[6:])&0x1fff == 0
		b = b[min(len(b), int(b[0]&15)*4):]
	case len(b) >= 40 && b[0]>>4 == 6:
		src, dst = netip.AddrFrom16([16]byte(b[8:24])), netip.AddrFrom16([16]byte(b[24:40]))
		e.Protocol, b = b[6], b[40:]
		for len(b) >= 8 && slices.Contains([]byte{unix.IPPROTO_HOPOPTS, unix.IPPROTO_ROUTING, unix.IPPROTO_DSTOPTS, unix.IPPROTO_FRAGMENT}, e.Protocol) {
			n := 8 + 8*int(b[1])
			if e.Protocol == unix.IPPROTO_FRAGMENT {
				n, first = 8, first && binary.BigEndian.Uint16(b[2:])&^7 == 0
			}
			e.Protocol, b = b[0], b[min(len(b), n):]
		}
	default:
		return false
	}
	e.Src, e.Dst = netip.AddrPortFrom(src, 0), netip.AddrPortFrom(dst, 0)
	if first && len(b) >= 4 && (e.Protocol == unix.IPPROTO_TCP || e.Protocol == unix.IPPROTO_UDP) {
		e.Src, e.Dst = netip.AddrPortFrom(src, binary.BigEndian.Uint16(b)), netip.AddrPortFrom(dst, binary.BigEndian.Uint16(b[2:]))
	}
	return true
}
