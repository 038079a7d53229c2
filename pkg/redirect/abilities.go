package redirect

import (
	"errors"
	"fmt"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"
)

// abilities is what depends on the kernel.
type abilities struct {
	own     bool // a table can have an owner and outlive it (6.9)
	refresh bool // to add an element anew gives it a new time (6.12)
	brief   bool // a rule can say how long a flow is remembered
}

// Ability is something that a kernel can do, or cannot.
type Ability struct {
	Name  string // such as "nftables table owner"
	State string // "yes", or why not
}

// Abilities tries what the package needs of the kernel, in a network namespace
// made for it, so that nothing of the host's is touched. It needs
// CAP_SYS_ADMIN for that; without, the states say so.
func Abilities() []Ability {
	done := make(chan []Ability)
	go func() {
		// Never unlocked: the thread ends with the goroutine, and the namespace
		// with the thread.
		runtime.LockOSThread()
		done <- tryAbilities()
	}()
	return <-done
}

func tryAbilities() []Ability {
	state := func(err error) string {
		if err != nil {
			return "no: " + err.Error()
		}
		return "yes"
	}
	names := []string{"nftables tproxy", "nftables table owner", "policy routing", "transparent sockets", "bpf classifier"}
	all := func(err error) (as []Ability) {
		for _, n := range names {
			as = append(as, Ability{n, "unknown: " + err.Error()})
		}
		return as
	}
	if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
		return all(err)
	}
	r, err := Open(Options{})
	if err != nil {
		return all(err)
	}
	defer r.Close(false)
	p := &Plan{Interfaces: []string{"lan0"}, Local: true, DNS: true, Ports: Ports{TCP: 1, DNSTCP: 1, DNSUDP: 1},
		Marks: Marks{Value: 0x7000, Mask: 0xf000}, Table: 7470}
	var owner error
	if !r.can.own {
		owner = errors.New("before Linux 6.9")
	}
	_, routing := r.policy.ensure(p, everyRule)
	if errors.Is(routing, unix.ENETDOWN) {
		routing = nil // lo of the new namespace is down; that is all
	}
	l, sockets := ListenTCP(p.Marks)
	if sockets == nil {
		l.Close()
	}
	return []Ability{
		{names[0], state(r.applyTable(p))},
		{names[1], state(owner)},
		{names[2], state(routing)},
		{names[3], state(sockets)},
		{names[4], state(tryEntry(p.Marks, r.policy))},
	}
}

// tryEntry puts the classifier on lo, where it does no harm.
func tryEntry(m Marks, p *policy) error {
	prog, err := loadEntry(m)
	if err != nil {
		return err
	}
	defer unix.Close(prog)
	link, err := p.h.LinkByIndex(loIndex)
	if err == nil {
		_, err = p.markEntry(link, prog)
	}
	return err
}

// kernelAtLeast compares the version of the running kernel.
func kernelAtLeast(major, minor int) bool {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return false
	}
	var a, b int
	if n, _ := fmt.Sscanf(strings.TrimRight(string(u.Release[:]), "\x00"), "%d.%d", &a, &b); n != 2 {
		return false
	}
	return a > major || a == major && b >= minor
}
