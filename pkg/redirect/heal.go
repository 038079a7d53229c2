package redirect

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/mdlayher/netlink"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// Healed counts what Heal has put back.
type Healed struct {
	Tables uint64 // the table, changed or removed by somebody else
	Rules  uint64 // routing rules
	Routes uint64 // routes
	Marks  uint64 // what marks the packets that enter by an interface
}

// monitor hears of changes to nftables and to the routing.
type monitor struct {
	nft, route *netlink.Conn
	own        uint32 // of the socket whose changes are ours
	touched    bool   // somebody changes our table; for the reader of nft only
}

// dialMonitor connects in the network namespace of the calling thread. From
// here on nothing is missed, also before Heal is called.
func dialMonitor(own uint32) (*monitor, error) {
	m := &monitor{own: own}
	for _, s := range []struct {
		conn   **netlink.Conn
		family int
		groups []uint32
	}{
		{&m.nft, unix.NETLINK_NETFILTER, []uint32{unix.NFNLGRP_NFTABLES}},
		{&m.route, unix.NETLINK_ROUTE, []uint32{unix.RTNLGRP_LINK, unix.RTNLGRP_TC, unix.RTNLGRP_IPV4_NETCONF, unix.RTNLGRP_IPV4_RULE, unix.RTNLGRP_IPV6_RULE,
			unix.RTNLGRP_IPV4_ROUTE, unix.RTNLGRP_IPV6_ROUTE}},
	} {
		c, err := netlink.Dial(s.family, nil)
		if err != nil {
			m.close()
			return nil, fmt.Errorf("redirect: monitor: %w", err)
		}
		*s.conn = c
		if s.conn == &m.nft {
			err = m.ignoreOwn()
		}
		for _, g := range s.groups {
			if err == nil {
				err = c.JoinGroup(g)
			}
		}
		if err == nil {
			err = c.SetReadBuffer(1 << 20)
		}
		if err != nil {
			m.close()
			return nil, fmt.Errorf("redirect: monitor: %w", err)
		}
	}
	return m, nil
}

// ignoreOwn has the kernel leave out the notifications of our own changes: a
// large set makes one for each of its elements. The number of the socket that
// a change came by is the fourth word of the message (struct nlmsghdr).
func (m *monitor) ignoreOwn() error {
	raw, err := m.nft.SyscallConn()
	if err != nil {
		return err
	}
	own := binary.BigEndian.Uint32(native32(m.own)) // the filter loads words as the network orders them
	program := []unix.SockFilter{
		{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, K: 12},
		{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, K: own, Jt: 0, Jf: 1},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0},
		{Code: unix.BPF_RET | unix.BPF_K, K: 0xffffffff},
	}
	if e := raw.Control(func(fd uintptr) {
		err = unix.SetsockoptSockFprog(int(fd), unix.SOL_SOCKET, unix.SO_ATTACH_FILTER,
			&unix.SockFprog{Len: uint16(len(program)), Filter: &program[0]})
	}); e != nil {
		return e
	}
	return err
}

func (m *monitor) close() {
	for _, c := range []*netlink.Conn{m.nft, m.route} {
		if c != nil {
			c.Close()
		}
	}
}

// event is what was heard: what to look after.
type event struct {
	table   bool // somebody changed our table
	policy  bool // a rule or route of ours may be missing
	lost    bool // more came than could be heard
	links   []string
	foreign []place // where somebody else put a route
	again   bool    // nothing was heard: what failed is to be tried again
}

// place is a routing table of a family.
type place struct{ family, table int }

func (e *event) empty() bool {
	return !e.table && !e.policy && !e.lost && !e.again && len(e.links) == 0 && len(e.foreign) == 0
}

// Heal looks after what Apply has made until the context ends, and then
// returns nil. A table that somebody changed or removed is replaced, a routing
// rule or route that is gone is put back, at once and from memory; also when an
// interface comes up, since one that went down may have taken routes with it.
// Where cgroups are named, the table follows those that come and go. What was put
// right is counted, and told to onEvent ("table", "rule", "route", "mark", "cgroup"
// for such that have changed, and "link NAME" for an interface of the plan that came up), which may
// be nil and must not call the Redirect. Only one Heal may run at a time.
func (r *Redirect) Heal(ctx context.Context, onEvent func(what string)) error {
	if onEvent == nil {
		onEvent = func(string) {}
	}
	g, ctx := errgroup.WithContext(ctx)
	for _, c := range []*netlink.Conn{r.monitor.nft, r.monitor.route} {
		if err := c.SetReadDeadline(time.Time{}); err != nil { // of a Heal before this one
			return fmt.Errorf("redirect: monitor: %w", err)
		}
	}
	interrupted := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(interrupted)
		past := time.Unix(1, 0)
		r.monitor.nft.SetReadDeadline(past)
		r.monitor.route.SetReadDeadline(past)
	})
	defer func() {
		if !stop() {
			<-interrupted // it must not end the next Heal
		}
	}()
	g.Go(func() error { return r.listen(ctx, r.monitor.nft, r.monitor.nftEvent, onEvent) })
	g.Go(func() error { return r.listen(ctx, r.monitor.route, r.monitor.routeEvent, onEvent) })
	g.Go(func() error { return r.healAgain(ctx, onEvent) })
	g.Go(func() error { return r.followCgroups(ctx, onEvent) })
	return g.Wait()
}

// Healed returns what Heal has done so far.
func (r *Redirect) Healed() Healed {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.healed
}

func (r *Redirect) listen(ctx context.Context, c *netlink.Conn, parse func(*event, netlink.Message), onEvent func(string)) error {
	for {
		msgs, err := c.Receive()
		var e event
		switch {
		case ctx.Err() != nil || errors.Is(err, os.ErrClosed):
			return nil
		case errors.Is(err, unix.ENOBUFS):
			e.lost = true
		case err != nil:
			return fmt.Errorf("redirect: monitor: %w", err)
		}
		for _, m := range msgs {
			parse(&e, m)
		}
		for _, what := range r.heal(&e) {
			onEvent(what)
		}
	}
}

// The pause before what failed is tried again, at first and at most.
const (
	healSoon = 100 * time.Millisecond
	healLate = 5 * time.Second
)

// healAgain tries again what heal could not put right: the kernel may have had no
// memory for it, and does not say when it has.
func (r *Redirect) healAgain(ctx context.Context, onEvent func(string)) error {
	for pause := healSoon; ; {
		select {
		case <-ctx.Done():
			return nil
		case <-r.unhealed:
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
		for _, what := range r.heal(&event{again: true}) {
			onEvent(what)
		}
		if pause = min(2*pause, healLate); len(r.unhealed) == 0 {
			pause = healSoon
		}
	}
}

// heal puts right what an event says, and returns what was wrong. What fails is
// left to healAgain.
func (r *Redirect) heal(e *event) []string {
	if e.empty() {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if e.again {
		e.table, e.policy, e.foreign = r.failed.table, r.failed.policy, r.failed.foreign
		r.failed = event{}
	}
	defer func() {
		if !r.failed.empty() {
			select {
			case r.unhealed <- struct{}{}:
			default:
			}
		}
	}()
	if r.closed || r.lent || r.plan == nil {
		return nil
	}
	var did []string
	if e.lost {
		e.policy = true
		info, err := r.nf.table()
		e.table = err != nil || !r.can.own || info.flags&flagOwner == 0
	}
	if e.table {
		if err := r.healTable(); err != nil {
			r.log.Error("the table cannot be put back", "err", err)
			r.failed.table = true
		} else {
			r.healed.Tables++
			did = append(did, "table")
		}
	}
	for _, f := range e.foreign {
		e.policy = e.policy || f.family == unix.AF_INET6 && r.policy.off // lo may have IPv6 again
		if f.table != r.plan.Table {
			continue
		}
		if err := r.policy.replace(r.plan, f.family); err != nil {
			r.log.Error("the route cannot be put back", "err", err)
			if !slices.Contains(r.failed.foreign, f) {
				r.failed.foreign = append(r.failed.foreign, f)
			}
		} else {
			r.healed.Routes++
			did = append(did, "route")
		}
	}
	if e.policy || len(e.links) > 0 {
		m, err := r.policy.ensure(r.plan, everyRule)
		if err != nil && !errors.Is(err, unix.ENETDOWN) { // lo is down: its coming up is an event
			r.log.Error("the routing cannot be put back", "err", err)
			r.failed.policy = true
		}
		if m.rules > 0 {
			r.healed.Rules += uint64(m.rules)
			did = append(did, "rule")
		}
		if m.routes > 0 {
			r.healed.Routes += uint64(m.routes)
			did = append(did, "route")
		}
		// With what rp_filter is, and with what interfaces there are, the guard
		// changes.
		if err := r.policy.drop(r.plan); err != nil {
			r.log.Error("the routing cannot be put right", "err", err)
			r.failed.policy = true
		}
		if m.entries > 0 {
			r.healed.Marks += uint64(m.entries)
			did = append(did, "mark")
		}
	}
	for _, l := range e.links {
		if slices.Contains(r.plan.Interfaces, l) {
			did = append(did, "link "+l)
		}
	}
	return did
}

func (r *Redirect) healTable() error {
	_, err := r.nf.table()
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	exists := err == nil
	return r.putTable(r.plan, exists, exists, dynamic{elements: r.admitted.all(time.Now())})
}

// nftEvent reads a notification of nftables. In all that name a table it is
// the attribute with the number 1. What a transaction has changed is told piece
// by piece, and then that there is a new generation, which is the moment to act.
func (m *monitor) nftEvent(e *event, msg netlink.Message) {
	const tableAttr = 1
	kind := int(msg.Header.Type) & 0xff
	switch {
	case msg.Header.PID == m.own || msg.Header.Type>>8 != unix.NFNL_SUBSYS_NFTABLES || len(msg.Data) < 4:
	case kind == unix.NFT_MSG_NEWGEN:
		e.table = e.table || m.touched
		m.touched = false
	case msg.Data[0] == unix.NFPROTO_INET:
		if name, ok := attribute(msg.Data[4:], tableAttr); ok && text(name) == tableName {
			m.touched = true
		}
	}
}

// routeEvent reads a notification of the routing: of a rule, a route or a
// link.
func (m *monitor) routeEvent(e *event, msg netlink.Message) {
	const rtmsgLen = 12 // struct rtmsg and struct fib_rule_hdr alike
	b := msg.Data
	switch msg.Header.Type {
	case unix.RTM_DELRULE:
		if len(b) < rtmsgLen {
			return
		}
		if p, ok := attribute(b[rtmsgLen:], unix.FRA_PROTOCOL); ok && len(p) == 1 && p[0] == RouteProtocol {
			e.policy = true
		}
	case unix.RTM_NEWROUTE, unix.RTM_DELROUTE:
		if len(b) < rtmsgLen {
			return
		}
		if b[5] == RouteProtocol { // rtm_protocol
			e.policy = e.policy || msg.Header.Type == unix.RTM_DELROUTE
			return
		}
		if t, ok := attribute(b[rtmsgLen:], unix.RTA_TABLE); ok && len(t) == 4 && msg.Header.Type == unix.RTM_NEWROUTE {
			e.foreign = append(e.foreign, place{int(b[0]), int(binary.NativeEndian.Uint32(t))})
		}
	case unix.RTM_DELTFILTER, unix.RTM_DELQDISC, unix.RTM_NEWNETCONF:
		e.policy = true
	case unix.RTM_NEWLINK:
		if len(b) < unix.SizeofIfInfomsg || binary.NativeEndian.Uint32(b[8:])&unix.IFF_UP == 0 { // ifi_flags
			return
		}
		if name, ok := attribute(b[unix.SizeofIfInfomsg:], unix.IFLA_IFNAME); ok {
			e.links = append(e.links, text(name))
		}
	}
}

// attribute returns the first attribute of a type.
func attribute(b []byte, t uint16) ([]byte, bool) {
	ad, err := netlink.NewAttributeDecoder(b)
	if err != nil {
		return nil, false
	}
	for ad.Next() {
		if ad.Type() == t {
			return ad.Bytes(), true
		}
	}
	return nil, false
}

// text is a string of the kernel without the zero that ends it.
func text(b []byte) string { return strings.TrimRight(string(b), "\x00") }
