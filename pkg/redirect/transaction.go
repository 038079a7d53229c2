package redirect

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// commit sends the messages as one transaction: all of it is done, or nothing.
func (c *nfnl) commit(msgs []netlink.Message) error {
	if len(msgs) == 0 {
		return nil
	}
	return c.transact(msgs, true)
}

// errAborted is what becomes of an attempt that would have succeeded.
var errAborted = errors.New("redirect: nftables: a transaction without an end")

// attempt sends a transaction that the kernel tries and then takes back, since it
// has no end. It returns errAborted, or what is wrong with it.
func (c *nfnl) attempt(msgs []netlink.Message) error {
	return cmp.Or(c.transact(msgs, false), errAborted)
}

// transact sends a transaction, and waits for what becomes of it.
func (c *nfnl) transact(msgs []netlink.Message, end bool) error {
	edge := func(kind int) netlink.Message {
		return netlink.Message{Header: netlink.Header{Type: netlink.HeaderType(kind)}, Data: []byte{unix.AF_UNSPEC, unix.NFNETLINK_V0, 0, unix.NFNL_SUBSYS_NFTABLES}}
	}
	size := 64
	for _, m := range msgs {
		size += unix.SizeofNlMsghdr + len(m.Data) + 3
	}
	first := c.seq + 1
	b := c.append(make([]byte, 0, size), edge(unix.NFNL_MSG_BATCH_BEGIN), netlink.Request, first)
	seq := first
	for i, m := range msgs {
		seq++
		// Only the last is acknowledged: errors are told of any, and neither
		// they nor one answer can be too many for the buffer.
		flags := m.Header.Flags&^(netlink.Acknowledge|netlink.Echo) | netlink.Request
		if i == len(msgs)-1 {
			flags |= netlink.Acknowledge
		}
		b = c.append(b, m, flags, seq)
	}
	last := seq
	c.seq = last + 1
	if end {
		b = c.append(b, edge(unix.NFNL_MSG_BATCH_END), netlink.Request, c.seq)
	}
	if err := unix.Sendto(c.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return fmt.Errorf("redirect: nftables: %w", err)
	}
	var failed error
	for done := false; !done; {
		err := c.receive(func(h netlink.Header, data []byte) error {
			if h.Type != netlink.Error || h.Sequence-first > last-first {
				return nil // of an earlier transaction
			}
			if e := ackError(data); e != nil && failed == nil {
				failed = fmt.Errorf("redirect: nftables: %s: %w", messageName(msgs, h.Sequence-first), e)
			}
			// An error of the whole stands under the first number; one that
			// ends it all at once (no permission) comes alone.
			done = done || h.Sequence == first || h.Sequence == last || errors.Is(failed, unix.EPERM)
			return nil
		})
		if err != nil {
			return errors.Join(failed, fmt.Errorf("redirect: nftables: no answer: %w", err))
		}
	}
	return failed
}

// messageName says what the nth message of a transaction, counted from 1, was
// about.
func messageName(msgs []netlink.Message, n uint32) string {
	if n == 0 || int(n) > len(msgs) {
		return "transaction"
	}
	m := msgs[n-1]
	names := map[int]string{
		unix.NFT_MSG_NEWTABLE: "new table", unix.NFT_MSG_DELTABLE: "delete table",
		unix.NFT_MSG_NEWCHAIN: "new chain", unix.NFT_MSG_DELCHAIN: "delete chain",
		unix.NFT_MSG_NEWRULE: "new rule", unix.NFT_MSG_DELRULE: "delete rules",
		unix.NFT_MSG_NEWSET: "new set", unix.NFT_MSG_DELSET: "delete set",
		unix.NFT_MSG_NEWSETELEM: "new elements", unix.NFT_MSG_DELSETELEM: "delete elements",
		unix.NFT_MSG_NEWOBJ: "new object",
	}
	return names[int(m.Header.Type)&0xff]
}

// ackError reads the body of an NLMSG_ERROR; nil is an acknowledgement.
func ackError(data []byte) error {
	if len(data) < 4 {
		return errors.New("short answer")
	}
	errno := unix.Errno(-int32(binary.NativeEndian.Uint32(data)))
	if errno == 0 {
		return nil
	}
	const text = 1 // NLMSGERR_ATTR_MSG, behind the header of the message
	if len(data) > 4+unix.SizeofNlMsghdr {
		if ad, err := netlink.NewAttributeDecoder(data[4+unix.SizeofNlMsghdr:]); err == nil {
			for ad.Next() {
				if ad.Type() == text {
					return fmt.Errorf("%w (%s)", errno, ad.String())
				}
			}
		}
	}
	return errno
}
