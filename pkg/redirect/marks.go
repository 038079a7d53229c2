package redirect

import (
	"fmt"
	"math/bits"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Marks says which bits of the packet mark are ours and what the first of our
// six values is. The others follow by counting on within the mask and passing
// over zero: for 0x7000/0xf000 they are 0x8000, 0x9000, 0xa000, 0xb000 and 0xc000;
// for 0xf000/0xf000 they are 0x1000, 0x2000, 0x3000, 0x4000 and 0x5000. Bits
// outside of the mask are never looked at and never changed.
type Marks struct {
	Value uint32 // within Mask and not 0
	Mask  uint32 // at least three bits, not necessarily side by side
}

// ParseMarks reads "VALUE/MASK", both as Go writes integers: "0x7000/0xf000".
func ParseMarks(s string) (Marks, error) {
	value, mask, ok := strings.Cut(s, "/")
	v, err1 := strconv.ParseUint(value, 0, 32)
	m, err2 := strconv.ParseUint(mask, 0, 32)
	if !ok || err1 != nil || err2 != nil {
		return Marks{}, fmt.Errorf(`redirect: mark %q is not VALUE/MASK, as "0x7000/0xf000"`, s)
	}
	marks := Marks{Value: uint32(v), Mask: uint32(m)}
	return marks, marks.check()
}

func (m Marks) check() error {
	if m.Value == 0 || m.Value&^m.Mask != 0 {
		return fmt.Errorf("redirect: mark %s: the value must be within the mask and not 0", m)
	}
	if bits.OnesCount32(m.Mask) < 3 {
		return fmt.Errorf("redirect: mark %s: the mask needs at least three bits for six values", m)
	}
	return nil
}

// String returns the marks as ParseMarks reads them.
func (m Marks) String() string { return fmt.Sprintf("%#x/%#x", m.Value, m.Mask) }

// Lan is the mark of packets of a named interface that are diverted to us.
func (m Marks) Lan() uint32 { return m.Value }

// Local is the mark of this host's own packets that are diverted to us.
func (m Marks) Local() uint32 { return m.next(1) }

// Direct is the mark of packets of a named interface that may pass.
func (m Marks) Direct() uint32 { return m.next(2) }

// Own is the mark of the packets that we send ourselves, which are never
// diverted.
func (m Marks) Own() uint32 { return m.next(3) }

// Entered is the mark of IPv4 packets of a named interface that no table of
// ours has seen.
func (m Marks) Entered() uint32 { return m.next(4) }

// Alive is the mark of this host's own datagrams while there is a process that
// takes those that are diverted.
func (m Marks) Alive() uint32 { return m.next(5) }

// next counts n values on within the mask: filling the bits outside of it with
// ones lets the carry run over them.
func (m Marks) next(n int) uint32 {
	v := m.Value
	for ; n > 0; n-- {
		if v = ((v | ^m.Mask) + 1) & m.Mask; v == 0 {
			v = (^m.Mask + 1) & m.Mask
		}
	}
	return v
}

// Control gives a new socket the Own mark (SO_MARK), so that what it sends is
// never diverted. It has the form of net.Dialer.Control and
// net.ListenConfig.Control.
func (m Marks) Control(network, address string, c syscall.RawConn) error {
	var err error
	if e := c.Control(func(fd uintptr) { err = m.MarkOwn(int(fd)) }); e != nil {
		return e
	}
	return err
}

// MarkOwn gives a socket the Own mark, as Control does, by its descriptor.
func (m Marks) MarkOwn(fd int) error {
	if err := setsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, int(m.Own())); err != nil {
		return fmt.Errorf("redirect: SO_MARK: %w", err)
	}
	return nil
}
