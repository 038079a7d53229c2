package daemon

import (
	"net/http"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/tproxyd/tproxyd/pkg/redirect"
	"github.com/tproxyd/tproxyd/pkg/upstream"
)

// maxRuleSeries is how many rules have metrics of their own, the first of the
// table; the others are counted together, so that a long table does not make a
// database of metrics unusable.
const maxRuleSeries = 500

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
func (e exporter) Collect(out chan<- prometheus.Metric) { scrape{out}.status(e.d.Status()) }

// scrape sends what a Status says as metrics. Labels are pairs of name and value.
type scrape struct{ out chan<- prometheus.Metric }

func (c scrape) describe(name, help string, labels []string) (desc *prometheus.Desc, values []string) {
	var names []string
	for i := 0; i < len(labels); i += 2 {
		names, values = append(names, labels[i]), append(values, labels[i+1])
	}
	return prometheus.NewDesc("tproxyd_"+name, help, names, nil), values
}

func (c scrape) gauge(name, help string, v float64, labels ...string) {
	desc, values := c.describe(name, help, labels)
	c.out <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, v, values...)
}

func (c scrape) counter(name, help string, v uint64, labels ...string) {
	desc, values := c.describe(name+"_total", help, labels)
	c.out <- prometheus.MustNewConstMetric(desc, prometheus.CounterValue, float64(v), values...)
}

func (c scrape) histogram(name, help string, h upstream.Histogram, labels ...string) {
	desc, values := c.describe(name, help, labels)
	c.out <- prometheus.MustNewConstHistogram(desc, h.Count, h.Sum, h.Buckets, values...)
}

func (c scrape) status(s Status) {
	gauge, counter := c.gauge, c.counter
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

	c.rules(s)
	for _, l := range s.Limits {
		gauge("limit", "How much there may be of a resource.", float64(l.Max), "resource", l.Name)
		gauge("limit_used", "How much of a limit is in use.", float64(l.Used), "resource", l.Name)
	}
	gauge("trouble", "How many things are wrong; status says which.", float64(len(s.Trouble)))

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
		c.histogram("upstream_answer_seconds", "How long flows waited for a server until it, or the destination, answered.", u.Answered, "server", u.Name)
		c.histogram("upstream_failure_seconds", "How long flows waited for a server that could not serve them.", u.Failed, "server", u.Name)
		counter("upstream_associations", "UDP associations with the server.", u.Associations, "server", u.Name)
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
	counter("dns_pool_full", "Questions without an answer, since every name has a live flow or every free address rests.", s.DNS.Pool.Full)
	counter("dns_unowned", "Look-ups of synthetic addresses that no name has.", s.DNS.Pool.Unowned)
	counter("state_errors", "Writes to the state directory that failed.", s.DNS.Pool.StoreErrors)

	gauge("relay_sockets", "Sockets of flows.", float64(s.Relay.Conns))
	gauge("relay_pipes", "Pipes that exist.", float64(s.Relay.Pipes))
	counter("relay_refused", "Connections reset, or not made, for want of descriptors.", s.Relay.Refused)
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
		"diverted": k.Diverted, "datagrams": k.Datagrams, "dns": k.DNS, "direct": k.Direct, "answers": k.Answers, "denied": k.Denied, "refused": k.Refused, "guard": k.Guard,
	} {
		counter("kernel_packets", "Packets by what the table did with them; guard: a rule of routing was missing.", c.Packets, "verdict", verdict)
	}
	h := k.Healed
	for what, n := range map[string]uint64{"table": h.Tables, "rule": h.Rules, "route": h.Routes, "mark": h.Marks} {
		counter("healed", "What somebody else changed and was put right.", n, "what", what)
	}
}

// rules sends what the rules decided.
func (c scrape) rules(s Status) {
	const flows, bytes = "Flows that a rule decided; those beyond the first rules are others, and those of before a reload gone.", "Bytes of flows that a rule decided."
	type labels struct{ rule, action string }
	var order []labels
	sums := map[labels]RuleStatus{} // a file that is included twice has its lines twice
	send := func(rule, action string, r RuleStatus) {
		l := labels{rule, action}
		sum, seen := sums[l]
		if !seen {
			order = append(order, l)
		}
		sum.add(r)
		sums[l] = sum
	}
	for i, r := range s.Rules {
		if i < maxRuleSeries {
			send(r.Position, r.Action, r)
		} else {
			send("others", "", r)
		}
	}
	send("gone", "", s.Gone)
	for _, l := range order {
		rule, action, r := l.rule, l.action, sums[l]
		c.counter("rule_flows", flows, r.Flows, "rule", rule, "action", action)
		c.counter("rule_bytes", bytes, r.Up, "rule", rule, "action", action, "direction", "up")
		c.counter("rule_bytes", bytes, r.Down, "rule", rule, "action", action, "direction", "down")
		c.counter("rule_kernel_packets", "Packets from clients that the kernel let pass or refused by a rule.", r.Packets, "rule", rule, "action", action)
		c.counter("rule_kernel_bytes", "Bytes of packets from clients that the kernel let pass or refused by a rule.", r.Bytes, "rule", rule, "action", action)
	}
}
