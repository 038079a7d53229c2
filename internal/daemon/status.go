package daemon

import (
	"cmp"
	"slices"
	"strings"
	"time"

	"github.com/tproxyd/tproxyd/internal/gateway"
	"github.com/tproxyd/tproxyd/pkg/fakedns"
	"github.com/tproxyd/tproxyd/pkg/redirect"
	"github.com/tproxyd/tproxyd/pkg/relay"
	"github.com/tproxyd/tproxyd/pkg/routes"
	"github.com/tproxyd/tproxyd/pkg/upstream"
)

// Status is what the daemon tells of itself. It holds no secret.
type Status struct {
	Started time.Time         `json:"started"`
	Pid     int               `json:"pid"`
	Version string            `json:"version"`           // of the program
	Trouble []string          `json:"trouble,omitempty"` // what is wrong at this moment, and what to do about it
	Limits  []Limit           `json:"limits"`
	Config  string            `json:"config"` // path
	Reloads reloadCount       `json:"reloads"`
	Rules   []RuleStatus      `json:"rules"`
	Gone    RuleStatus        `json:"gone"` // the rules of before a reload that are not in force any longer
	Servers []upstream.Status `json:"servers"`
	Flows   gateway.Stats     `json:"flows"`
	DNS     fakedns.Stats     `json:"dns"`
	Relay   relay.Stats       `json:"relay"`
	UDP     relay.UDPStats    `json:"udp"`
	Kernel  KernelStatus      `json:"kernel"`
	Before  []Carrier         `json:"before,omitempty"` // processes that were taken over and still carry flows
}

// FlowStatus is a flow that is being carried.
type FlowStatus = gateway.FlowStatus

// RuleStatus is a rule with what it decided in user space, and what the kernel
// decided by it alone, since the daemon first read it.
type RuleStatus struct {
	Position string `json:"position,omitempty"`
	Text     string `json:"text,omitempty"`
	Action   string `json:"action,omitempty"`
	Flows    uint64 `json:"flows"`
	Up       uint64 `json:"up"`   // bytes from clients
	Down     uint64 `json:"down"` // bytes to clients

	// What the kernel let pass, or refused, of packets from clients; their answers
	// are not counted. A rule can have none that is one of very many (see
	// routes.Range) or decides nothing without its servers.
	Packets uint64 `json:"kernel_packets"`
	Bytes   uint64 `json:"kernel_bytes"`

	rule *routes.Rule // nil: of another process, or gone
	list string       // as gateway.RuleStats.List
}

func (r *RuleStatus) add(o RuleStatus) {
	r.Flows += o.Flows
	r.Up += o.Up
	r.Down += o.Down
	r.Packets += o.Packets
	r.Bytes += o.Bytes
}

// KernelStatus is what the table has counted, and what others did to it.
type KernelStatus struct {
	redirect.Counters
	Healed redirect.Healed `json:"healed"`
	Error  string          `json:"error,omitempty"` // why the counters are missing
}

// Status reads everything; the values need not be of one instant.
func (d *Daemon) Status() Status {
	d.mu.Lock()
	s := Status{Started: d.started, Pid: pid, Version: d.version, Config: d.setup.Config.Path}
	reloads, setup := d.reloads, d.setup
	d.mu.Unlock()
	c, err := d.counts(reloads)
	if err != nil {
		s.Kernel.Error = err.Error()
	}
	s.Reloads, s.Rules, s.Gone, s.Flows, s.DNS, s.Relay, s.UDP = c.Reloads, c.Rules, c.Gone, c.Flows, c.DNS, c.Relay, c.UDP
	s.Servers = d.servers.Status(d.gateway.Plan().Servers())
	s.Before = d.before.carriers()
	s.Kernel.Healed = c.Healed
	if s.Kernel.Counters, err = d.kernel.Counters(); err != nil {
		s.Kernel.Error = err.Error()
	}
	tracked, _ := d.kernel.Tracked() // a kernel without it tracks nothing
	s.Limits = s.limits(tracked)
	s.Trouble = append(s.trouble(time.Now()), setup.goneLists()...)
	return s
}

// Flows returns what is being carried, TCP first, each the oldest first. What
// processes carry that were taken over is among it.
func (d *Daemon) Flows() []FlowStatus { return d.carried(askLimit) }

// carried is Flows, for who waits so long for those of other processes.
func (d *Daemon) carried(within time.Duration) []FlowStatus {
	list := append(d.gateway.Flows(), d.gateway.UDPFlows(d.packets.List())...)
	if others := d.before.ask(question{Within: within}, d.log).Flows; len(others) > 0 {
		list = append(list, others...)
		slices.SortFunc(list, func(a, b FlowStatus) int {
			return cmp.Or(strings.Compare(a.Network, b.Network), cmp.Compare(a.ID, b.ID))
		})
	}
	return list
}

// Kill ends flows, also those of processes that were taken over, and returns how
// many of these there were.
func (d *Daemon) Kill(ids ...uint64) int { return d.kill(ids, askLimit) }

func (d *Daemon) kill(ids []uint64, within time.Duration) int {
	n := d.gateway.Kill(ids...) + d.packets.Kill(ids...)
	if n < len(ids) {
		n += d.before.ask(question{Within: within, Kill: ids}, d.log).Killed
	}
	return n
}
