package daemon

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/tproxyd/tproxyd/internal/control"
	"github.com/tproxyd/tproxyd/internal/gateway"
	"github.com/tproxyd/tproxyd/pkg/redirect"
	"github.com/tproxyd/tproxyd/pkg/routes"
)

// Reload reads the files again and puts what they say in force, or changes
// nothing and says why: with routes.Diagnostics if a file has an error.
//
// User space changes first, then the kernel, in one transaction, so that at no
// moment a flow is let pass by the kernel that neither the old nor the new
// rules let pass. Proxied flows go on as they are (R11).
func (d *Daemon) Reload() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.takenOver {
		d.log.Warn("the files are not reloaded", "err", errTakenOver)
		return errTakenOver
	}
	defer frugal()()
	notifyReloading()
	defer func() { notifyReady(d.readyLine()) }()
	err := d.reload()
	if err != nil {
		d.reloads.Refused++
		d.log.Error("the files were not reloaded, the old rules stay in force", "err", err)
		return err
	}
	d.reloads.Done++
	d.missInterfaces()
	d.log.Info("reloaded", "rules", len(d.setup.Table.Rules()), "servers", len(d.setup.Table.Servers()))
	return nil
}

func (d *Daemon) reload() error {
	next, diags := d.setup.again()
	if diags.HasErrors() {
		return diags
	}
	for _, w := range diags {
		d.log.Warn(w.String())
	}
	if err := d.setup.changeable(next); err != nil {
		return err
	}
	return d.put(next)
}

// put puts what next says in force, or changes nothing and says why.
func (d *Daemon) put(next *Setup) error {
	plan, err := next.plan()
	if err != nil {
		return err
	}
	if next.search = d.setup.search; next.search == nil {
		if err := next.mayFindPrograms(); err != nil {
			return err
		}
	}
	kernel := kernelPlan(next, d.ports())
	if err := d.takeNotes(kernel.Who); err != nil {
		return err
	}
	anew := next.decidedBy() != d.setup.decidedBy() // else it all stays, what a daemon before this one let pass too
	if next.enclosure == nil {
		if anew {
			kernel.Readmit = []redirect.Admission{}
		}
		d.kernel.Prepare(kernel)
	}
	// From here on answers for names that are DIRECT wait.
	d.admitting.Lock()
	defer d.admitting.Unlock()
	if next.enclosure != nil { // the kernel's plan is the same for all rules
		d.follow(next, plan)
		d.setup = next
		d.watcher.Set(next.lists)
		return nil
	}
	if anew {
		inForce, err := d.inForce()
		if err != nil {
			return err
		}
		kernel.Readmit = toKernel(d.gateway.Readmit(plan, inForce))
	}
	old := d.gateway.Plan()
	d.setup.forgetDecided()
	d.follow(next, plan)
	if err := d.kernel.Apply(kernel); err != nil {
		d.follow(d.setup, old)
		d.noteDecided(d.setup)
		return err
	}
	d.setup = next
	d.noteDecided(next)
	d.watcher.Set(next.lists)
	select {
	case d.relisted <- struct{}{}:
	default: // it has not looked yet
	}
	d.before.tell(next.decidedBy())
	return nil
}

// takeNotes has the kernel note of clients what the next rules ask for, before
// they are asked. The rules in force stay as they are.
func (d *Daemon) takeNotes(who *redirect.Who) error {
	if who == nil {
		return nil // and compile nothing
	}
	p := kernelPlan(d.setup, d.ports())
	if p.Who != nil && slices.Equal(p.Who.Cgroups, who.Cgroups) {
		return nil
	}
	p.Who = who
	if d.enclosure != nil {
		if err := d.setup.enclose(&p); err != nil {
			return err
		}
	}
	d.kernel.Prepare(p)
	return d.kernel.Apply(p)
}

// again reads the files of s again.
func (s *Setup) again() (*Setup, routes.Diagnostics) {
	if s.enclosure != nil {
		return s.enclosure.setup()
	}
	return loadAgain(s.Config.Path, s.credentialDir, s.gone)
}

// follow makes user space do what s says, of which plan is made.
func (d *Daemon) follow(s *Setup, plan *gateway.Plan) {
	d.servers.Configure(d.upstreamOptions(s), plan.Servers())
	d.gateway.Swap(plan)
	d.packets.SetLimits(s.udpLimits())
	d.packets.Invalidate()
	d.names.SetResolvers(s.resolvers())
	d.names.Reset()
}

// restartError says that files cannot be followed by a running daemon.
type restartError struct{ msg string }

func (e *restartError) Error() string { return e.msg }

// refusal tells the control socket's client whether the files are at fault.
func refusal(err error) error {
	var diags routes.Diagnostics
	var restart *restartError
	if errors.As(err, &diags) || errors.As(err, &restart) {
		return &control.Refused{Text: err.Error()}
	}
	return err
}

// changeable tells what of next cannot be changed in a running daemon.
func (s *Setup) changeable(next *Setup) error {
	old, c := s.Config, next.Config
	var keys []string
	for _, k := range []struct {
		key     string
		changed bool
	}{
		{"sandbox", old.Sandbox != c.Sandbox},
		{"[intercept] dns", old.Intercept.DNS != c.Intercept.DNS},
		{"[intercept] mark", old.Intercept.Mark != c.Intercept.Mark},
		{"[intercept] table", old.Intercept.Table != c.Intercept.Table},
		{"[dns] pool4", old.DNS.Pool4 != c.DNS.Pool4},
		{"[dns] pool6", old.DNS.Pool6 != c.DNS.Pool6},
		{"[dns] ttl", old.DNS.TTL != c.DNS.TTL},
		{"[state] directory", old.State != c.State},
		{"[control] socket", old.Control.Socket != c.Control.Socket},
		{"[control] metrics", old.Control.Metrics != c.Control.Metrics},
		{"[control] clash", old.Control.Clash != c.Control.Clash},
		{"[control] ui", old.Control.UI != c.Control.UI},
		{"TIMEOUT dns=", s.Table.Limits().DNS != next.Table.Limits().DNS},
	} {
		if k.changed {
			keys = append(keys, k.key)
		}
	}
	if keys == nil {
		return nil
	}
	return &restartError{fmt.Sprintf("%s: changed: %s; restart the daemon for that, or change it back", c.Path, strings.Join(keys, ", "))}
}

// watchReload reloads for each signal until ctx ends. What went wrong is in
// the log.
func (d *Daemon) watchReload(ctx context.Context, signals <-chan os.Signal) error {
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-signals:
			d.Reload()
		}
	}
}
