package redirect

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// nfnl is a netlink connection to nftables. The library marshals what we want,
// but sends it with neither the flags of a table nor in fewer than one
// acknowledgement for each message, so the sending is done here. The socket is
// what owns a table with the owner flag. An nfnl is for one user at a time.
type nfnl struct {
	fd  int
	pid uint32
	seq uint32
	buf []byte
}

// netlinkBuffer holds a batch of some 100,000 elements; it is a limit and not
// taken before it is used.
const netlinkBuffer = 64 << 20

// dialNfnl connects in the network namespace of the calling thread.
func dialNfnl() (*nfnl, error) { return dialNetlink(unix.NETLINK_NETFILTER) }

// dialNetlink connects to a family of netlink.
func dialNetlink(family int) (*nfnl, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, family)
	if err != nil {
		return nil, fmt.Errorf("redirect: netlink socket: %w", err)
	}
	c := &nfnl{fd: fd, buf: make([]byte, 64<<10)}
	if err := c.init(); err != nil {
		unix.Close(fd)
		return nil, err
	}
	return c, nil
}

func (c *nfnl) init() error {
	if err := unix.Bind(c.fd, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("redirect: bind netlink socket: %w", err)
	}
	name, err := unix.Getsockname(c.fd)
	if err != nil {
		return fmt.Errorf("redirect: netlink socket: %w", err)
	}
	c.pid = name.(*unix.SockaddrNetlink).Pid
	if err := errors.Join(buffer(c.fd, unix.SO_SNDBUFFORCE, netlinkBuffer), buffer(c.fd, unix.SO_RCVBUFFORCE, netlinkBuffer)); err != nil {
		return fmt.Errorf("redirect: netlink buffers: %w", err)
	}
	// Errors come with a text, and without the message that caused them. A
	// kernel that knows neither sends them all the same.
	unix.SetsockoptInt(c.fd, unix.SOL_NETLINK, unix.NETLINK_EXT_ACK, 1)
	unix.SetsockoptInt(c.fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1)
	// The kernel answers before the request returns; this is for a kernel that
	// has lost an answer.
	return unix.SetsockoptTimeval(c.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &unix.Timeval{Sec: 5})
}

func (c *nfnl) close() error { return unix.Close(c.fd) }

// nfMessage makes a message of nftables for a table of family inet.
func nfMessage(kind int, flags netlink.HeaderFlags, attrs ...netlink.Attribute) netlink.Message {
	b, err := netlink.MarshalAttributes(attrs)
	if err != nil {
		panic(err) // an attribute of more than 64 KB: none of ours is
	}
	return netlink.Message{
		Header: netlink.Header{Type: netlink.HeaderType(unix.NFNL_SUBSYS_NFTABLES<<8 | kind), Flags: flags},
		Data:   append([]byte{unix.NFPROTO_INET, unix.NFNETLINK_V0, 0, 0}, b...),
	}
}

func stringAttr(t uint16, s string) netlink.Attribute {
	return netlink.Attribute{Type: t, Data: append([]byte(s), 0)}
}

func u32Attr(t uint16, v uint32) netlink.Attribute {
	return netlink.Attribute{Type: t, Data: binary.BigEndian.AppendUint32(nil, v)}
}

func (c *nfnl) append(b []byte, m netlink.Message, flags netlink.HeaderFlags, seq uint32) []byte {
	n := unix.SizeofNlMsghdr + len(m.Data)
	b = binary.NativeEndian.AppendUint32(b, uint32(n))
	b = binary.NativeEndian.AppendUint16(b, uint16(m.Header.Type))
	b = binary.NativeEndian.AppendUint16(b, uint16(flags))
	b = binary.NativeEndian.AppendUint32(b, seq)
	b = binary.NativeEndian.AppendUint32(b, c.pid)
	b = append(b, m.Data...)
	for ; n%unix.NLMSG_ALIGNTO != 0; n++ {
		b = append(b, 0)
	}
	return b
}

// receive reads one datagram and gives its messages to f.
func (c *nfnl) receive(f func(h netlink.Header, data []byte) error) error {
	for {
		n, _, err := unix.Recvfrom(c.fd, c.buf, unix.MSG_TRUNC|unix.MSG_PEEK)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		if n > len(c.buf) {
			c.buf = make([]byte, n)
		}
		break
	}
	n, _, err := unix.Recvfrom(c.fd, c.buf, 0)
	if err != nil {
		return err
	}
	return eachMessage(c.buf[:n], f)
}

// eachMessage takes a datagram of netlink apart.
func eachMessage(b []byte, f func(h netlink.Header, data []byte) error) error {
	for len(b) >= unix.SizeofNlMsghdr {
		h := netlink.Header{
			Length:   binary.NativeEndian.Uint32(b),
			Type:     netlink.HeaderType(binary.NativeEndian.Uint16(b[4:])),
			Flags:    netlink.HeaderFlags(binary.NativeEndian.Uint16(b[6:])),
			Sequence: binary.NativeEndian.Uint32(b[8:]),
			PID:      binary.NativeEndian.Uint32(b[12:]),
		}
		if h.Length < unix.SizeofNlMsghdr || int64(h.Length) > int64(len(b)) {
			return errors.New("a message of impossible length")
		}
		if err := f(h, b[unix.SizeofNlMsghdr:h.Length]); err != nil {
			return err
		}
		b = b[min(len(b), (int(h.Length)+unix.NLMSG_ALIGNTO-1)&^(unix.NLMSG_ALIGNTO-1)):]
	}
	return nil
}

// query sends a request and gives the attributes of each answer to f. With
// dump there are any number of answers, without it one.
func (c *nfnl) query(m netlink.Message, dump bool, f func(*netlink.AttributeDecoder) error) error {
	return c.exchange(m, dump, func(data []byte) error {
		if len(data) < 4 {
			return nil
		}
		ad, err := netlink.NewAttributeDecoder(data[4:])
		if err != nil {
			return err
		}
		ad.ByteOrder = binary.BigEndian
		return f(ad)
	})
}

// exchange is query for answers of any form.
func (c *nfnl) exchange(m netlink.Message, dump bool, f func(data []byte) error) error {
	c.seq++
	flags := netlink.Request | netlink.Acknowledge
	if dump {
		flags = netlink.Request | netlink.Dump
	}
	if err := unix.Sendto(c.fd, c.append(nil, m, flags, c.seq), 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("redirect: netlink: %w", err)
	}
	var failed error
	for done := false; !done; {
		err := c.receive(func(h netlink.Header, data []byte) error {
			if h.Sequence != c.seq {
				return nil
			}
			switch h.Type {
			case netlink.Done:
				done = true
			case netlink.Error:
				failed, done = ackError(data), true
			default:
				if failed == nil {
					failed = f(data)
				}
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("redirect: netlink: no answer: %w", err)
		}
	}
	return failed
}

// tableInfo is what the kernel says of our table.
type tableInfo struct{ flags uint32 }

// The flags of a table, NFT_TABLE_F_OWNER and NFT_TABLE_F_PERSIST.
const (
	flagOwner   = 0x2
	flagPersist = 0x4
)

// table returns our table; an error that is ENOENT if there is none.
func (c *nfnl) table() (info tableInfo, err error) {
	err = c.query(nfMessage(unix.NFT_MSG_GETTABLE, 0, stringAttr(unix.NFTA_TABLE_NAME, tableName)), false, func(ad *netlink.AttributeDecoder) error {
		for ad.Next() {
			if ad.Type() == unix.NFTA_TABLE_FLAGS {
				info.flags = ad.Uint32()
			}
		}
		return ad.Err()
	})
	return info, err
}

// names returns the names of the chains (NFT_MSG_GETCHAIN) or sets
// (NFT_MSG_GETSET) of our table, but of anonymous sets.
func (c *nfnl) names(kind int) ([]string, error) {
	// Table and name have the same numbers in both.
	var names []string
	err := c.query(nfMessage(kind, 0, stringAttr(unix.NFTA_SET_TABLE, tableName)), true, func(ad *netlink.AttributeDecoder) error {
		var table, name string
		var flags uint32
		for ad.Next() {
			switch ad.Type() {
			case unix.NFTA_SET_TABLE:
				table = ad.String()
			case unix.NFTA_SET_NAME:
				if kind == unix.NFT_MSG_GETSET {
					name = ad.String()
				}
			case unix.NFTA_CHAIN_NAME:
				if kind == unix.NFT_MSG_GETCHAIN {
					name = ad.String()
				}
			}
			if kind == unix.NFT_MSG_GETSET && ad.Type() == unix.NFTA_SET_FLAGS {
				flags = ad.Uint32()
			}
		}
		if table == tableName && flags&unix.NFT_SET_ANONYMOUS == 0 {
			names = append(names, name)
		}
		return ad.Err()
	})
	return names, err
}

// element is one element of a set, its key in the kernel's form.
type element struct {
	key   []byte
	data  []byte        // of a map
	end   bool          // it is the first address behind a range
	left  time.Duration // 0: it does not end
	count Count         // if the elements of the set count
}

// elements gives the elements of a set of ours to f. The key is valid for the
// call.
func (c *nfnl) elements(set string, f func(element)) error {
	m := nfMessage(unix.NFT_MSG_GETSETELEM, 0, stringAttr(unix.NFTA_SET_ELEM_LIST_TABLE, tableName), stringAttr(unix.NFTA_SET_ELEM_LIST_SET, set))
	return c.query(m, true, elementsOf(f))
}

// has tells whether a set of ours has an element.
func (c *nfnl) has(set string, e nftables.SetElement) (has bool, err error) {
	list, err := elementList(e)
	if err != nil {
		return false, err
	}
	// It answers with an element that is near if it has not the one asked for.
	err = c.query(elementsMessage(set, list), false, elementsOf(func(there element) {
		has = has || bytes.Equal(there.key, e.Key) && there.end == e.IntervalEnd
	}))
	if errors.Is(err, unix.ENOENT) {
		return false, nil
	}
	return has, err
}

// elementsOf reads an answer with elements.
func elementsOf(f func(element)) func(*netlink.AttributeDecoder) error {
	one := func(e *element) func(*netlink.AttributeDecoder) error {
		return func(ad *netlink.AttributeDecoder) error {
			for ad.Next() {
				switch ad.Type() {
				case unix.NFTA_SET_ELEM_KEY:
					ad.Nested(func(key *netlink.AttributeDecoder) error {
						for key.Next() {
							e.key = key.Bytes()
						}
						return nil
					})
				case unix.NFTA_SET_ELEM_DATA:
					ad.Nested(func(data *netlink.AttributeDecoder) error {
						for data.Next() {
							e.data = data.Bytes()
						}
						return nil
					})
				case unix.NFTA_SET_ELEM_EXPR:
					ad.Nested(func(x *netlink.AttributeDecoder) error {
						for x.Next() {
							if x.Type() == unix.NFTA_EXPR_DATA {
								x.Nested(e.count.read)
							}
						}
						return nil
					})
				case unix.NFTA_SET_ELEM_FLAGS:
					e.end = ad.Uint32()&unix.NFT_SET_ELEM_INTERVAL_END != 0
				case unix.NFTA_SET_ELEM_EXPIRATION:
					e.left = time.Duration(ad.Uint64()) * time.Millisecond
				}
			}
			return nil
		}
	}
	return func(ad *netlink.AttributeDecoder) error {
		for ad.Next() {
			if ad.Type() != unix.NFTA_SET_ELEM_LIST_ELEMENTS {
				continue
			}
			ad.Nested(func(list *netlink.AttributeDecoder) error {
				for list.Next() {
					var e element
					list.Nested(one(&e))
					f(e)
				}
				return nil
			})
		}
		return ad.Err()
	}
}

// read reads the attributes of a counter.
func (n *Count) read(data *netlink.AttributeDecoder) error {
	for data.Next() {
		switch data.Type() {
		case unix.NFTA_COUNTER_PACKETS:
			n.Packets = data.Uint64()
		case unix.NFTA_COUNTER_BYTES:
			n.Bytes = data.Uint64()
		}
	}
	return nil
}

// counters returns packets and bytes of the counters of our table.
func (c *nfnl) counters() (map[string]Count, error) {
	counts := map[string]Count{}
	m := nfMessage(unix.NFT_MSG_GETOBJ, 0, stringAttr(unix.NFTA_OBJ_TABLE, tableName), u32Attr(unix.NFTA_OBJ_TYPE, unix.NFT_OBJECT_COUNTER))
	err := c.query(m, true, func(ad *netlink.AttributeDecoder) error {
		var table, name string
		var n Count
		for ad.Next() {
			switch ad.Type() {
			case unix.NFTA_OBJ_TABLE:
				table = ad.String()
			case unix.NFTA_OBJ_NAME:
				name = ad.String()
			case unix.NFTA_OBJ_DATA:
				ad.Nested(n.read)
			}
		}
		if table == tableName {
			counts[name] = n
		}
		return ad.Err()
	})
	return counts, err
}

// errRecorded ends the library's attempt to send.
var errRecorded = errors.New("recorded")

// record returns the messages that the library makes of what f asks of it.
func record(f func(*nftables.Conn) error) ([]netlink.Message, error) {
	var msgs []netlink.Message
	c, err := nftables.New(nftables.WithTestDial(func(req []netlink.Message) ([]netlink.Message, error) {
		for _, m := range req {
			if t := int(m.Header.Type); t != unix.NFNL_MSG_BATCH_BEGIN && t != unix.NFNL_MSG_BATCH_END {
				msgs = append(msgs, m)
			}
		}
		return nil, errRecorded
	}))
	if err != nil {
		return nil, err
	}
	if err := f(c); err != nil {
		return nil, fmt.Errorf("redirect: %w", err)
	}
	if err := c.Flush(); err != nil && !errors.Is(err, errRecorded) {
		return nil, fmt.Errorf("redirect: %w", err)
	}
	return msgs, nil
}
