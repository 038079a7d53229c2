package redirect

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"unsafe"

	nl "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// The guard of routing must know what entered by a named interface. A rule
// "from lan0" says so. But for IPv4 it also matches the question that rp_filter
// asks of an answer to DIRECT, which is put as if a packet went from lan0 the
// other way, and which tells the two apart by nothing but the mark. So where
// rp_filter is on, IPv4 packets get a mark as they enter, before any table, by a
// classifier of two operations; the table replaces the mark, and what comes to
// routing with it has not been through the table. Elsewhere the rule is cheaper.

// The name, priority and handle of the classifier on an interface.
const (
	entryName     = "tproxyd"
	entryPriority = 7
	entryHandle   = 7470
)

// markEntries puts the classifier on the interfaces of the plan, if rp_filter
// asks for it, and returns how many had none, and those that have none now. One
// that is not there gets it when it appears. The error says why one that is
// there cannot have it.
func (p *policy) markEntries(plan *Plan) (added int, without []string, err error) {
	if len(plan.Interfaces) == 0 || !p.reversePathFilter() {
		return 0, sortedInterfaces(plan), nil
	}
	prog, err := loadEntry(plan.Marks)
	if err != nil {
		return 0, sortedInterfaces(plan), fmt.Errorf("redirect: bpf: %w", err)
	}
	defer unix.Close(prog)
	for _, i := range sortedInterfaces(plan) {
		link, e := p.h.LinkByName(i)
		if e != nil {
			without = append(without, i)
			continue
		}
		isNew, e := p.markEntry(link, prog)
		if e != nil {
			without = append(without, i)
			err = errors.Join(err, fmt.Errorf("redirect: bpf classifier on %s: %w", i, e))
		} else if isNew {
			added++
		}
	}
	return added, without, err
}

func (p *policy) markEntry(link netlink.Link, prog int) (added bool, err error) {
	index := link.Attrs().Index
	// Whoever has an ingress qdisc (not clsact) there has the same place for
	// filters, so that one will do.
	err = p.h.QdiscAdd(&netlink.Clsact{QdiscAttrs: netlink.QdiscAttrs{
		LinkIndex: index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_CLSACT}})
	if err != nil && !errors.Is(err, unix.EEXIST) {
		return false, err
	}
	f := &netlink.BpfFilter{Fd: prog, Name: entryName, DirectAction: true, FilterAttrs: netlink.FilterAttrs{
		LinkIndex: index, Parent: netlink.HANDLE_MIN_INGRESS, Priority: entryPriority, Handle: entryHandle, Protocol: unix.ETH_P_IP}}
	if err = p.h.FilterAdd(f); errors.Is(err, unix.EEXIST) {
		return false, p.h.FilterReplace(f) // it may be for other marks
	}
	return err == nil, err
}

// reversePathFilter reports whether rp_filter is on for any interface, or for
// those to come. If the kernel does not tell, it could be.
func (p *policy) reversePathFilter() bool {
	const rpFilter = 3 // NETCONFA_RP_FILTER, behind struct netconfmsg
	msgs, err := p.conf.Execute(nl.Message{
		Header: nl.Header{Type: unix.RTM_GETNETCONF, Flags: nl.Request | nl.Dump}, Data: []byte{unix.AF_INET, 0, 0, 0}})
	for _, m := range msgs {
		if len(m.Data) < 4 {
			continue
		}
		if v, ok := attribute(m.Data[4:], rpFilter); ok && len(v) == 4 && binary.NativeEndian.Uint32(v) != 0 {
			return true
		}
	}
	return err != nil
}

// unmarkEntries takes the classifiers off that the plan does not need, and what
// is empty after that.
func (p *policy) unmarkEntries(plan *Plan) error {
	links, err := p.h.LinkList()
	if err != nil {
		return fmt.Errorf("redirect: interfaces: %w", err)
	}
	var errs []error
	for _, link := range links {
		if name := link.Attrs().Name; plan != nil && slices.Contains(plan.Interfaces, name) && !slices.Contains(p.without, name) {
			continue
		}
		in, err := p.h.FilterList(link, netlink.HANDLE_MIN_INGRESS)
		if err != nil || len(in) == 0 {
			continue // none has a list of its own that could fail: it has no qdisc
		}
		i := slices.IndexFunc(in, func(f netlink.Filter) bool {
			b, ok := f.(*netlink.BpfFilter)
			return ok && b.Name == entryName && f.Attrs().Priority == entryPriority
		})
		if i < 0 {
			continue
		}
		if err := p.h.FilterDel(in[i]); err != nil && !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENODEV) {
			errs = append(errs, fmt.Errorf("redirect: bpf classifier on %s: %w", link.Attrs().Name, err))
			continue
		}
		out, err := p.h.FilterList(link, netlink.HANDLE_MIN_EGRESS)
		if len(in) > 1 || err != nil || len(out) > 0 {
			continue
		}
		qs, err := p.h.QdiscList(link)
		if err != nil {
			continue
		}
		for _, q := range qs {
			if q.Type() == "clsact" {
				errs = append(errs, p.h.QdiscDel(q))
			}
		}
	}
	return errors.Join(errs...)
}

// loadEntry gives the kernel the classifier's program.
func loadEntry(m Marks) (int, error) {
	const mark, goOn = 8, -1 // the place in struct __sk_buff; TC_ACT_UNSPEC
	insns := slices.Concat(
		insn(0x61, 2, 1, mark, 0),                         // r2 = skb->mark
		insn(0x54, 2, 0, 0, int32(^m.Mask)),               // r2 &= ^mask
		insn(0x44, 2, 0, 0, int32(m.Entered())),           // r2 |= entered
		insn(0x63, 1, 2, mark, 0),                         // skb->mark = r2
		insn(0xb4, 0, 0, 0, goOn), insn(0x95, 0, 0, 0, 0)) // return
	license := []byte("GPL\x00")
	// The beginning of union bpf_attr, as BPF_PROG_LOAD takes it.
	attr := struct {
		kind, count       uint32
		insns, license    uint64
		logLevel, logSize uint32
		log               uint64
		version, flags    uint32
		name              [16]byte
	}{kind: unix.BPF_PROG_TYPE_SCHED_CLS, count: uint32(len(insns) / 8),
		insns: uint64(uintptr(unsafe.Pointer(&insns[0]))), license: uint64(uintptr(unsafe.Pointer(&license[0])))}
	copy(attr.name[:], entryName)
	fd, err := bpf(unix.BPF_PROG_LOAD, unsafe.Pointer(&attr), unsafe.Sizeof(attr), insns, license)
	return fd, err
}

// insn is struct bpf_insn.
func insn(code, dst, src byte, off int16, imm int32) []byte {
	regs := dst | src<<4
	if binary.NativeEndian.Uint16([]byte{0, 1}) == 1 {
		regs = dst<<4 | src // bit fields begin at the other end
	}
	b := binary.NativeEndian.AppendUint16([]byte{code, regs}, uint16(off))
	return binary.NativeEndian.AppendUint32(b, uint32(imm))
}
