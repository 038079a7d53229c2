package daemon

import (
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/tproxyd/tproxyd/internal/gateway"
	"github.com/tproxyd/tproxyd/pkg/fakedns"
	"github.com/tproxyd/tproxyd/pkg/redirect"
	"github.com/tproxyd/tproxyd/pkg/relay"
	"github.com/tproxyd/tproxyd/pkg/upstream"
)

// Status is what the daemon tells of itself. It holds no secret.
type Status struct {
	Started time.Time         `json:"started"`
	Config  string            `json:"config"` // path
	Reloads reloadCount       `json:"reloads"`
	Rules   []RuleStatus      `json:"rules"`
	Servers []upstream.Status `json:"servers"`
	Flows   gateway.Stats     `json:"flows"`
	DNS     fakedns.Stats     `json:"dns"`
	Relay   relay.Stats       `json:"relay"`
	UDP     relay.UDPStats    `json:"udp"`
	Kernel  KernelStatus      `json:"kernel"`
	Before  []Carrier         `json:"before,omitempty"` // processes that were taken over and still carry flows
}

// FlowStatus is a TCP flow that is being carried.
type FlowStatus = gateway.FlowStatus

// RuleStatus is a rule with the flows that it decided in user space since the
// last reload; what the kernel decides by it is not counted rule by rule.
type RuleStatus struct {
	Position string `json:"position"`
	Text     string `json:"text"`
	Flows    uint64 `json:"flows"`
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
	s := Status{Started: d.started, Config: d.setup.Config.Path, Reloads: d.reloads}
	d.mu.Unlock()
	plan := d.gateway.Plan()
	for _, r := range plan.Table().Rules() {
		s.Rules = append(s.Rules, RuleStatus{r.Position(), r.Text, plan.Hits(r)})
	}
	s.Servers = d.servers.Status(plan.Servers())
	s.Flows = d.gateway.Stats()
	s.DNS = d.names.Stats()
	s.Relay = d.engine.Stats()
	s.UDP = d.packets.Stats()
	s.Before = d.before.carriers()
	s.Kernel.Healed = d.kernel.Healed()
	var err error
	if s.Kernel.Counters, err = d.kernel.Counters(); err != nil {
		s.Kernel.Error = err.Error()
	}
	return s
}

// metricsHandler serves the status as Prometheus text.
func (d *Daemon) metricsHandler() http.Handler {
	r := prometheus.NewRegistry()
	r.MustRegister(exporter{d}, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return promhttp.HandlerFor(r, promhttp.HandlerOpts{})
}

// exporter makes metrics of a Status at each scrape.
type exporter struct{ d *Daemon }

// Describe describes nothing: which servers there are changes with a reload.
func (exporter) Describe(chan<- *prometheus.Desc) {}

// Collect reads the status once.
func (e exporter) Collect(out chan<- prometheus.Metric) {
	s := e.d.Status()
	send := func(kind prometheus.ValueType, name, help string, value float64, labels ...string) {
		var names, values []string
		for i := 0; i < len(labels); i += 2 {
			names, values = append(names, labels[i]), append(values, labels[i+1])
		}
		out <- prometheus.MustNewConstMetric(prometheus.NewDesc("tproxyd_"+name, help, names, nil), kind, value, values...)
	}
	gauge := func(name, help string, v float64, labels ...string) {
		send(prometheus.GaugeValue, name, help, v, labels...)
	}
	counter := func(name, help string, v uint64, labels ...string) {
		send(prometheus.CounterValue, name+"_total", help, float64(v), labels...)
	}
	gauge("start_time_seconds", "When the daemon started.", float64(s.Started.Unix()))
	counter("reloads", "Reloads of the files.", s.Reloads.Done, "result", "done")
	counter("reloads", "Reloads of the files.", s.Reloads.Refused, "result", "refused")

	gauge("flows", "Flows that are being carried.", float64(s.Flows.Live))
	counter("flows", "Flows carried since the start.", s.Flows.Proxied, "action", "proxied")
	counter("flows", "Flows carried since the start.", s.Flows.Direct, "action", "direct")
	for reason, n := range s.Flows.Refused {
		counter("flows_refused", "Flows refused in user space.", n, "reason", reason)
	}
	counter("flow_bytes", "Bytes carried.", s.Flows.Up, "direction", "up")
	counter("flow_bytes", "Bytes carried.", s.Flows.Down, "direction", "down")

	for _, u := range s.Servers {
		up := 0.0
		if u.Up {
			up = 1
		}
		gauge("upstream_up", "Whether the server is asked in its turn; 0: last.", up, "server", u.Name)
		counter("upstream_flows", "Flows that the server carried.", u.Carried, "server", u.Name)
		counter("upstream_faults", "Faults of the server.", u.Faults, "server", u.Name)
		gauge("upstream_flows", "Flows that the server carries.", float64(u.Flows), "server", u.Name)
		gauge("upstream_setup_seconds", "How long it takes until the server has greeted; 0: not known.", u.Setup, "server", u.Name)
		gauge("upstream_warm", "Connections to the server that are made ahead of need.", float64(u.Warm), "server", u.Name)
	}

	before := Carrier{}
	for _, c := range s.Before {
		before.Flows += c.Flows
		before.Sessions += c.Sessions
	}
	gauge("before_flows", "Flows that processes still carry which were taken over.", float64(before.Flows))
	gauge("before_udp_sessions", "UDP sessions that processes still carry which were taken over.", float64(before.Sessions))

	q := "Questions answered."
	counter("dns_questions", q, s.DNS.Synthetic, "answer", "synthetic")
	counter("dns_questions", q, s.DNS.Local, "answer", "local")
	counter("dns_questions", q, s.DNS.Remote, "answer", "remote")
	counter("dns_questions", q, s.DNS.Refused, "answer", "refused")
	counter("dns_questions", q, s.DNS.Failed, "answer", "failed")
	counter("dns_questions", q, s.DNS.Dropped, "answer", "none")
	gauge("dns_names", "Names that have a synthetic address.", float64(s.DNS.Pool.Names))
	gauge("dns_names_max", "Names that can have one.", float64(s.DNS.Pool.Max))
	counter("dns_names_evicted", "Names that lost theirs to make room.", s.DNS.Pool.Evicted)
	counter("dns_pool_full", "Questions without an answer, since every name has a live flow.", s.DNS.Pool.Full)
	counter("dns_unowned", "Look-ups of synthetic addresses that no name has.", s.DNS.Pool.Unowned)
	counter("state_errors", "Writes to the state directory that failed.", s.DNS.Pool.StoreErrors)

	gauge("relay_sockets", "Sockets of flows.", float64(s.Relay.Conns))
	gauge("relay_pipes", "Pipes that exist.", float64(s.Relay.Pipes))
	counter("relay_refused", "Connections reset for want of descriptors.", s.Relay.Refused)
	counter("relay_shortages", "Chunks that were copied for want of a pipe.", s.Relay.Shortages)

	udp := s.UDP
	gauge("udp_sessions", "Client sockets whose datagrams are carried.", float64(udp.Sessions))
	gauge("udp_flows", "Destinations of all UDP sessions.", float64(udp.Flows))
	gauge("udp_outlets", "Associations with servers, and sockets for DIRECT.", float64(udp.Outlets))
	counter("udp_sessions", "UDP sessions since the start.", udp.Opened)
	counter("udp_associations", "Outlets opened since the start.", udp.Associations)
	counter("udp_evicted", "UDP flows ended early to make room.", udp.Evicted)
	counter("udp_refused", "Datagrams answered with an ICMP error.", udp.Refused)
	for direction, n := range map[string][2]uint64{"up": {udp.UpDatagrams, udp.Up}, "down": {udp.DownDatagrams, udp.Down}} {
		counter("udp_datagrams", "Datagrams carried.", n[0], "direction", direction)
		counter("udp_bytes", "Bytes of datagrams carried.", n[1], "direction", direction)
	}
	for reason, n := range udp.Dropped {
		counter("udp_dropped", "Datagrams dropped.", n, "reason", reason)
	}

	k := s.Kernel
	for verdict, c := range map[string]redirect.Count{
		"diverted": k.Diverted, "datagrams": k.Datagrams, "dns": k.DNS, "direct": k.Direct, "denied": k.Denied, "refused": k.Refused, "guard": k.Guard,
	} {
		counter("kernel_packets", "Packets by what the table did with them; guard: a rule of routing was missing.", c.Packets, "verdict", verdict)
	}
	h := k.Healed
	for what, n := range map[string]uint64{"table": h.Tables, "rule": h.Rules, "route": h.Routes, "mark": h.Marks} {
		counter("healed", "What somebody else changed and was put right.", n, "what", what)
	}
}
