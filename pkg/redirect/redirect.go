package redirect

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// ErrInUse says that a living process has the table: there is one redirector
// for a network namespace.
var ErrInUse = errors.New("redirect: another process has the table inet " + tableName)

var errNotApplied = errors.New("redirect: no plan is in force")

// Options are those of Open. The zero value works.
type Options struct {
	Log *slog.Logger // nil: silence

	// NoOwner leaves the table to nobody, as on a kernel that knows no owners. It
	// is for a namespace that ends with this process, where nobody else can
	// change anything: what the kernel does at the end of an owner takes it
	// some ten milliseconds.
	NoOwner bool
	Search  func(named []string) (map[uint64]string, error) // in place of SearchPrograms, for a process that must not

	// Taken is the hold of a process whose place this one takes; it stays the
	// caller's. nil: nobody has the table, or it is an error.
	Taken *Hold
}

// Redirect has the table and the routing of a network namespace in hand. Its
// methods may be used by any number of goroutines.
type Redirect struct {
	log        *slog.Logger
	can        abilities
	interfaces *interfaces

	mu       sync.Mutex // holds for all below, and for what is done to the kernel
	nf       *nfnl      // owns the table
	policy   *policy
	monitor  *monitor
	lock     net.Listener     // instead of owning, where the kernel knows no owners
	plan     *Plan            // what is in force; nil: nothing of ours
	cgroups  cgroups          // that it names, as they were then
	within   []*namedCgroups  // the sets of them, of the table in force
	notebook *notebook        // for Who
	programs *programs        // for Program
	logs     *logs            // for Logged
	prepared *prepared        // see Prepare; nil: nothing
	epoch    uint64           // counts changes of the table
	tallies  tallies          // what the table in force counts by tags
	tallied  map[string]Count // what those before it have counted

	named    chan struct{} // has something once a plan has named cgroups
	admitted admissions
	live     string // which of liveSets is in use
	alive    Marks  // of the table of that name; zero: there is none
	healed   Healed
	failed   event         // what could not be healed
	unhealed chan struct{} // has something when failed is not empty
	made     bool          // there was no table before Open
	recalled bool          // the table was there, and can be read
	lent     bool          // another process uses the hold
	closed   bool
}

// Open takes the table of the network namespace that the calling thread is in:
// on Linux 6.9 and later it is owned by this process from here on (flags owner
// and persist), so that nobody else can change or flush it, and it stays if
// this process dies. A table that an earlier process left stays in force until
// Apply. If a living process has it the error is ErrInUse.
func Open(o Options) (*Redirect, error) {
	r := &Redirect{log: o.Log, named: make(chan struct{}, 1), unhealed: make(chan struct{}, 1)}
	if r.log == nil {
		r.log = slog.New(slog.DiscardHandler)
	}
	r.admitted.clear()
	var err error
	if o.Taken != nil {
		err = r.take(o.Taken)
	} else {
		r.nf, err = dialNfnl()
	}
	r.notebook = &notebook{}
	if err == nil {
		r.notebook.nf, err = dialNfnl()
	}
	r.programs, r.logs = dialPrograms(o.Search), dialLogs()
	if err == nil {
		r.policy, err = dialPolicy()
	}
	if err == nil {
		r.interfaces, err = dialInterfaces()
	}
	if err == nil {
		r.monitor, err = dialMonitor(r.nf.pid)
	}
	if err == nil {
		err = r.claim(o.NoOwner)
	}
	if err == nil {
		r.can.brief = r.nf.knowsBrief()
	}
	if err != nil {
		r.release()
		if r.interfaces != nil {
			r.interfaces.close()
		}
		return nil, err
	}
	return r, nil
}

// claim makes the table ours. A table that is there and has no flags cannot be
// owned as it is; it stays until Apply replaces it.
func (r *Redirect) claim(noOwner bool) error {
	r.can = abilities{refresh: kernelAtLeast(6, 12), own: !noOwner}
	if r.can.own {
		info, err := r.nf.table()
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("redirect: nftables: %w", err)
		}
		if err == nil && info.flags&(flagOwner|flagPersist) == 0 {
			return r.claimLock() // somebody without owner flags may be alive
		}
		exists := err == nil
		switch err = r.nf.commit([]netlink.Message{newTableMessage(flagOwner | flagPersist)}); {
		case err == nil && exists:
			return r.recall()
		case err == nil:
			r.made = true
			return nil
		case errors.Is(err, unix.EPERM) && info.flags&flagOwner != 0:
			return ErrInUse
		case errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EINVAL):
			r.can.own = false
			r.log.Warn("the kernel knows no owner of a table (before Linux 6.9): others can remove it, and it is put back then")
		default:
			return err
		}
	}
	return r.claimLock()
}

func (r *Redirect) claimLock() (err error) {
	if r.lock == nil { // it was not handed over
		r.lock, err = takeLock()
	}
	return err
}

// Apply makes the kernel do what the plan says, from whatever it does, and may
// be called as often as one likes. The routing comes first and its guard last,
// the table in between: its sets, and then all of its rules in one transaction.
// With an error the table is what it was. If lo is down it is brought up.
func (r *Redirect) Apply(p Plan) error {
	if err := p.check(); err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || r.lent {
		return net.ErrClosed
	}
	before := r.plan
	r.logs.listenTo(&p, before, r.log)
	if err := r.applyTelling(&p); err != nil {
		return err
	}
	if p.Ports.UDP != 0 || before != nil && before.Ports.UDP != 0 {
		r.forget(p.Marks, &p)
	}
	return nil
}

// forget is forgetUDP where an error is no reason to stop.
func (r *Redirect) forget(m Marks, p *Plan) {
	if err := r.forgetUDP(m, p); err != nil {
		r.log.Warn("flows of UDP that passed or were diverted until now may be refused, or sent with the wrong address, while they last", "err", err)
	}
}

func (r *Redirect) apply(p *Plan) error {
	if err := r.policy.loUp(); err != nil {
		return err
	}
	if _, err := r.policy.ensure(p, divertRules); err != nil {
		return err
	}
	if err := r.applyTable(p); err != nil {
		return err
	}
	r.plan = p
	m, err := r.policy.ensure(p, guardRules)
	if err != nil {
		return err
	}
	if m.unmarked != nil {
		r.log.Warn("DIRECT does not pass over IPv4 where rp_filter is on", "err", m.unmarked)
	}
	return r.policy.drop(p)
}

// applyTable puts the table in force: by changing the one that is there, if it
// is ours, so that dynamic elements and counters stay; else by replacing it.
func (r *Redirect) applyTable(p *Plan) error {
	info, err := r.nf.table()
	exists := err == nil
	if err != nil && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("redirect: nftables: %w", err)
	}
	err = nil
	before := r.admitted
	d := dynamic{flush: p.Readmit != nil}
	if d.flush {
		r.admitted.clear()
		_, err = r.admitted.add(p.Readmit, time.Now())
		d.elements = r.admitted.all(time.Now())
	}
	if err == nil {
		err = r.putTable(p, exists && (info.flags&flagOwner != 0) == r.can.own, exists, d)
	}
	if err != nil {
		r.admitted = before // Heal goes on with the plan before
	}
	return err
}

// putTable puts the table in force. One that is there is changed, if it can be;
// else it is replaced.
func (r *Redirect) putTable(p *Plan, ours, exists bool, d dynamic) (err error) {
	before := r.cgroups
	defer func() {
		if err != nil {
			r.cgroups = before
			return
		}
		r.notebook.set(p, r.cgroups)
	}()
	if r.cgroups, err = r.findNamed(p); err != nil {
		return err
	}
	alive := r.beAlive(p)
	if ours {
		err := r.changeTable(p, alive, d)
		if err == nil || errors.Is(err, unix.EPERM) || errors.Is(err, errTruncated) {
			return err
		}
		r.log.Debug("the table that is there cannot be changed", "err", err)
	}
	return r.replaceTable(p, alive, exists)
}

// changeTable adds the sets of the plan to the table that is there, and then
// has the rules change over to them.
func (r *Redirect) changeTable(p *Plan, alive bool, d dynamic) error {
	there, err := r.presence()
	if err != nil {
		return err
	}
	var t *table
	if r.prepared.isFor(p, alive, d.flush, r.cgroups, r.epoch) {
		t = r.prepared.table
	} else if t, err = r.load(p, there, r.cgroups, alive, d.flush, func(f func()) error { f(); return nil }); err != nil {
		return err
	}
	rules, err := t.ruleMessages(there, d)
	var counted map[string]Count
	if err == nil {
		if counted, err = r.tally(); errors.Is(err, unix.ENOENT) { // the table is not the one that counted
			counted, err = r.tallied, nil
		}
	}
	if err == nil {
		err = r.nf.commit(rules)
	}
	if err != nil {
		r.prepared = nil
		r.dropUnused(t, there)
		return err
	}
	r.inForce(t)
	r.carryOver(counted, t.tallies)
	return nil
}

// inForce notes that a table is in force.
func (r *Redirect) inForce(t *table) {
	r.live, r.within, r.prepared = t.live, t.named, nil
	r.epoch++
}

// dropUnused removes the sets of a table whose rules could not be put in force.
func (r *Redirect) dropUnused(t *table, before present) error {
	now, err := r.nf.names(unix.NFT_MSG_GETSET)
	if err != nil {
		return err
	}
	msgs, err := t.unset(stale(now, func(n string) bool { return slices.Contains(before.sets, n) && !strings.HasSuffix(n, t.gen) }))
	if err == nil {
		err = r.nf.commit(msgs)
	}
	return err
}

// replaceTable makes the table from nothing. If one is there it ends with the
// beginning of the new one, at the price that the sets of that are empty for
// the first moment.
func (r *Redirect) replaceTable(p *Plan, alive, exists bool) error {
	r.prepared = nil // it is in no other table
	flags := uint32(0)
	if r.can.own {
		flags = flagOwner | flagPersist
	}
	d := dynamic{elements: r.admitted.all(time.Now())}
	if !exists {
		if err := r.nf.commit([]netlink.Message{newTableMessage(flags)}); err != nil {
			return err
		}
		err := r.changeTable(p, alive, d)
		if err != nil {
			r.nf.commit([]netlink.Message{deleteTable()})
		}
		return err
	}
	t, err := newTable(p, "a", liveSets[0], alive, r.can.brief, r.cgroups, r.logs.group)
	if err != nil {
		return err
	}
	sets, err := t.setMessages()
	if err != nil {
		return err
	}
	rules, err := t.ruleMessages(present{}, d)
	if err != nil {
		return err
	}
	err = r.nf.commit(slices.Concat([]netlink.Message{deleteTable(), newTableMessage(flags)}, sets, rules))
	if errors.Is(err, unix.ENOENT) { // somebody was quicker to delete it
		return r.replaceTable(p, alive, false)
	}
	if err != nil {
		return err
	}
	r.inForce(t)
	r.carryOver(r.tallied, t.tallies)
	return r.verify(t)
}

var errTruncated = errors.New("redirect: the kernel has not taken all elements of a set")

// verify asks for the first and the last element of each message of the large
// sets. A kernel that cuts lists off does so silently, and what is missing would
// be decided by the next rule. (To count all takes seconds: the kernel walks from
// the beginning for each answer.)
func (r *Redirect) verify(t *table) error {
	for _, s := range t.sets {
		if len(s.elements)+len(s.ranges) <= chunk/2 {
			continue
		}
		for piece := range s.pieces() {
			for _, e := range []nftables.SetElement{piece[0], piece[len(piece)-1]} {
				switch has, err := r.nf.has(s.name, e); {
				case err != nil:
					return fmt.Errorf("redirect: set %s: %w", s.name, err)
				case !has:
					return fmt.Errorf("%w: %s has no %x", errTruncated, s.name, e.Key)
				}
			}
		}
	}
	return nil
}

// Close ends the hold on the kernel. With keep the closed form of the plan in
// force stays behind, for the next Open or for Remove: what may pass does, all
// else is refused; if nothing was applied, what was there before Open. Without
// keep everything of ours is removed.
func (r *Redirect) Close(keep bool) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed {
		r.interfaces.close() // after Release; else it is again
		return nil
	}
	var err error
	switch {
	case !keep:
		err = errors.Join(remove(r.nf, r.policy), r.unAlive())
		if r.plan != nil {
			r.forget(r.plan.Marks, nil)
		}
	case r.plan == nil && r.made:
		err = r.nf.commit([]netlink.Message{deleteTable()})
	case r.plan != nil:
		closed := r.plan.Closed()
		err = r.apply(&closed)
	}
	r.release()
	r.interfaces.close()
	return err
}

// release closes all but interfaces.
func (r *Redirect) release() {
	r.closed, r.plan = true, nil
	if r.monitor != nil {
		r.monitor.close()
	}
	if r.policy != nil {
		r.policy.close()
	}
	if r.lock != nil {
		r.lock.Close()
	}
	r.notebook.close()
	r.programs.close()
	r.logs.close()
	if r.nf != nil {
		r.nf.close()
	}
}

// Remove takes everything of ours out of the network namespace that the calling
// thread is in, found by the name of the table and by RouteProtocol. What is
// not there is no error. If a living process has the table nothing is done, and
// the error is ErrInUse.
func Remove() error {
	l, err := takeLock()
	if err != nil {
		return err
	}
	defer l.Close()
	nf, err := dialNfnl()
	if err != nil {
		return err
	}
	defer nf.close()
	p, err := dialPolicy()
	if err != nil {
		return err
	}
	defer p.close()
	return remove(nf, p)
}

func remove(nf *nfnl, p *policy) error {
	info, err := nf.table()
	switch {
	case err == nil:
		// The table first: while the guards of routing are still there what
		// comes in meanwhile is prohibited.
		err = nf.commit([]netlink.Message{deleteTable()})
		if errors.Is(err, unix.EPERM) && info.flags&flagOwner != 0 {
			return ErrInUse
		}
		if err != nil && !errors.Is(err, unix.ENOENT) {
			return err
		}
	case !errors.Is(err, unix.ENOENT):
		return fmt.Errorf("redirect: nftables: %w", err)
	}
	return p.drop(nil)
}

// Owned reports whether the table is owned by this process in the kernel's
// eyes, so that nobody else can change it. Without, Heal puts back what others
// take away.
func (r *Redirect) Owned() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.can.own
}
