package upstream

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

const (
	probeSoon  = 100 * time.Millisecond // after the fault that made a server bad
	probePause = 700 * time.Millisecond // between the probes of a bad server
	probeWell  = 3                      // probes in a row that make a server good that no flow tries
	probeLeast = time.Second            // a probe is given at least this, and softLeast a flow that can go elsewhere:
	softLeast  = 1500 * time.Millisecond
)

// health is what is known of a server. A server is good, or bad: then it is
// asked after all others, until a probe has found it well or BadExpire is over.
// From then on one flow at a time tries it in its turn, and the first that gets
// an answer makes it good.
type health struct {
	p       *Pool
	retired atomic.Bool  // the pool knows it no more
	flows   atomic.Int64 // carried now

	mu     sync.Mutex
	server *Server            // as the plan in force has it
	stop   context.CancelFunc // of watch; nil: it does not run
	wake   chan struct{}      // makes watch look at once

	asking   int           // handshakes under way
	fails    int           // in a row
	bad      bool          // and then:
	half     bool          // a probe has found it well
	trial    bool          // a flow is trying it
	retry    time.Time     // when a flow may, whatever probes say
	setup    time.Duration // until it has greeted, smoothed; 0: not known
	trip     trip          // until it has answered a SYN, or its chain has led to it
	version  uint8         // of SocksAny: 5 or 4; 0: not known
	pipeline Pipeline      // what a probe has seen it accept; PipelineAuto: nothing is known
	learned  time.Time     // when

	answered   spans // until it did what a flow asked of it, or the destination's refusal
	failed     spans // until it was known that it would not
	carried    uint64
	faults     uint64
	noUDP      time.Time // until then it is not asked for UDP, which it does not have
	noIPv6     time.Time // the same of IPv6 addresses
	associated uint64
	told       struct { // see tell
		since time.Time
		n     int // changes since then
	}

	warm warm
}

// pass is how a flow was let in.
type pass uint8

const (
	inTurn pass = iota
	onTrial
	atLast
)

// errBusy says that a server has as many flows or handshakes as it may.
var errBusy = errors.New("upstream: busy")

// enter asks for a flow to be let in: in is false if it shall come back when
// all others have failed. Last says that this is so.
func (h *health) enter(last bool) (how pass, in bool, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := h.server
	switch {
	case s.MaxFlows > 0 && int(h.flows.Load())+h.asking >= s.MaxFlows:
		return 0, false, fmt.Errorf("%w: %d flows", errBusy, s.MaxFlows)
	case s.MaxHandshakes > 0 && h.asking >= s.MaxHandshakes:
		return 0, false, fmt.Errorf("%w: %d handshakes under way", errBusy, s.MaxHandshakes)
	case last:
		how = atLast
	case h.bad:
		if h.trial || !h.half && time.Now().Before(h.retry) {
			return 0, false, nil
		}
		h.trial, how = true, onTrial
	}
	h.asking++
	return how, true, nil
}

// leave says what came of it, and how long that took.
func (h *health) leave(how pass, v verdict, err error, took time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.asking--
	if v == well || v == destination {
		h.answered.add(took)
	} else {
		h.failed.add(took)
	}
	if how == onTrial {
		h.trial = false
	}
	h.note(v, err)
}

// note takes a verdict in. The lock is held.
func (h *health) note(v verdict, err error) {
	o := h.p.options.Load()
	switch v {
	case unknown:
		return
	case fault:
		h.faults++
		h.half = false
		h.forget()
		if h.fails++; h.fails < o.MaxFail {
			return
		}
		if !h.bad {
			h.tell(slog.LevelWarn, "server is asked last until it answers again", err)
		}
		h.bad, h.retry = true, time.Now().Add(o.BadExpire)
		h.dropWarm()
		h.watch()
	default:
		h.fails = 0
		if h.bad {
			h.bad, h.half = false, false
			h.tell(slog.LevelInfo, "server is back", nil)
		}
	}
}

// tell logs that the server has become bad or good. One that comes and goes with
// every flow would fill the log: of more than tellMost changes in a tellSpan the
// rest is counted.
func (h *health) tell(level slog.Level, change string, err error) {
	now, log := time.Now(), h.p.options.Load().Log.With("upstream", h.server.Name)
	if now.Sub(h.told.since) >= tellSpan {
		if h.told.n > tellMost {
			log.Info("server has come and gone", "changes", h.told.n)
		}
		h.told.since, h.told.n = now, 0
	}
	switch h.told.n++; {
	case h.told.n > tellMost:
		return
	case err != nil:
		log = log.With("err", err)
	}
	log.Log(context.Background(), level, change)
	if h.told.n == tellMost {
		log.Warn("server comes and goes, more of that is not logged for a while", "limit", tellSpan)
	}
}

const (
	tellSpan = time.Minute
	tellMost = 8
)

// up tells whether a flow would be let in in its turn.
func (h *health) up() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return !h.bad
}

// took notes how long it was until the server had greeted.
func (h *health) took(d time.Duration) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.setup == 0 {
		h.setup = d
	} else {
		h.setup += (d - h.setup) / 8
	}
}

// trip is a round trip: the shortest that was seen in the last tripAge or two.
// Longer ones tell more of how busy this host is.
type trip struct {
	best, next time.Duration // 0: not known
	since      time.Time     // of next
}

const tripAge = 5 * time.Minute

// away notes how long a connection took. Of one that was made from here the kernel
// knows better, if it was long: this host may have been busy.
func (h *health) away(conn net.Conn, took time.Duration, here bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if c, ok := conn.(interface{ RoundTrip() time.Duration }); ok && here && took >= worthwhile && !h.trip.near() {
		if trip := c.RoundTrip(); trip > 0 {
			took = min(took, trip)
		}
	}
	h.trip.saw(took, time.Now())
}

// near tells whether a trip has been seen that is short enough for nothing more
// to depend on.
func (t *trip) near() bool { return t.next > 0 && t.next < worthwhile }

func (t *trip) saw(d time.Duration, now time.Time) {
	if now.Sub(t.since) > tripAge {
		t.best, t.next, t.since = t.next, 0, now
	}
	if t.next == 0 || d < t.next {
		t.next = d
	}
	if t.best == 0 || d < t.best {
		t.best = d
	}
}

// patience is how long a flow that can go elsewhere waits for the greeting: four
// times what it usually takes, and longer than a lost SYN does. 0: not known.
func (h *health) patience() time.Duration {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.setup == 0 {
		return 0
	}
	return max(4*h.setup, softLeast)
}

// left says that a flow is over.
func (h *health) left() { h.flows.Add(-1) }

// adopt has s, of a new plan, in the place of the server that it is the same as.
func (h *health) adopt(s *Server) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if old := h.server.Auth; (old == nil) != (s.Auth == nil) || old != nil && *old != *s.Auth {
		h.dropWarm() // they are another user's
	}
	h.server = s
	if h.p.options.Load().Interval > 0 {
		h.watch()
	}
}

// retire ends what runs for a server that is not used any more.
func (h *health) retire() {
	h.retired.Store(true)
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.stop != nil {
		h.stop()
	}
	h.dropWarm()
}

// watch starts the probes, or makes them begin anew. The lock is held.
func (h *health) watch() {
	if h.stop != nil {
		select {
		case h.wake <- struct{}{}:
		default:
		}
		return
	}
	if h.retired.Load() {
		return
	}
	ctx, stop := context.WithCancel(h.p.ctx)
	h.stop, h.wake = stop, make(chan struct{}, 1)
	h.p.task(func() { h.probeOften(ctx) })
}

// probeOften probes a bad server until it is well, and a good one as often as
// Options say. The pauses differ, so that servers, and hosts like this one, do
// not fall into step.
func (h *health) probeOften(ctx context.Context) {
	well := 0
	pause := h.jitter(probeSoon)
	for {
		select {
		case <-ctx.Done():
			return
		case <-h.wake:
			well, pause = 0, h.jitter(probeSoon)
			continue
		case <-time.After(pause):
		}
		h.mu.Lock()
		s, bad, limit := h.server, h.bad, max(4*h.setup, probeLeast)
		h.mu.Unlock()
		o := h.p.options.Load()
		if bad || o.Interval > 0 {
			err := h.p.probe(ctx, s, min(limit, o.ConnectTimeout))
			if ctx.Err() != nil {
				return
			}
			if well++; err != nil {
				well = 0
			}
			h.probed(err, well)
		}
		h.mu.Lock()
		switch {
		case h.bad:
			pause = h.jitter(probePause)
		case o.Interval > 0:
			pause = h.jitter(o.Interval)
		default:
			h.stop()
			h.stop = nil
			h.mu.Unlock()
			return
		}
		h.mu.Unlock()
	}
}

// jitter returns d, a quarter more or less.
func (h *health) jitter(d time.Duration) time.Duration {
	return d*3/4 + d/2*time.Duration(h.p.options.Load().Rand(1024))/1024
}

// probed takes in what a probe found, and how many in a row found the server
// well.
func (h *health) probed(err error, well int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	v := judge(err)
	switch {
	case v == unknown:
	case v == fault:
		if h.bad {
			h.half = false // not counted: it is known
			return
		}
		h.note(v, err)
	case h.bad && well < probeWell:
		h.half = true
	default:
		h.note(v, nil)
	}
}

// probe connects to s and has it greet, and connect to the probe's target if
// there is one. What it answers for that is well.
func (p *Pool) probe(ctx context.Context, s *Server, limit time.Duration) error {
	t, proto, err := p.ready(ctx, s, time.Now().Add(limit))
	if err != nil {
		return err
	}
	defer t.done(errProbed)
	if to := p.options.Load().Probe; to != (flow.Target{}) {
		_, err = p.request(t, proto, s, Request{To: to}, PipelineOff, limit)
		if v := judge(err); v == destination || v == incapable || errors.Is(err, errNeedsAddress) {
			return nil
		}
	}
	return err
}

// Status is what the pool knows of a server.
type Status struct {
	Name         string  `json:"name"`
	Address      string  `json:"address"`
	Protocol     string  `json:"protocol"`
	Up           bool    `json:"up"`                 // false: bad, asked last
	Trial        bool    `json:"trial,omitempty"`    // bad, but a probe has found it well: the next flow tries it
	Flows        int64   `json:"flows"`              // that it carries now
	Carried      uint64  `json:"carried"`            // flows since the start
	Faults       uint64  `json:"faults"`             // since the start
	Associations uint64  `json:"associations"`       // for UDP, since the start
	UDP          string  `json:"udp,omitempty"`      // "yes" or "no"; empty: nobody has asked lately
	IPv6         string  `json:"ipv6,omitempty"`     // "no": it refused an IPv6 address lately, as one of a type that it does not know
	Pipeline     string  `json:"pipeline,omitempty"` // what it is sent ahead: "off", "greeting" or "data"; empty: not known
	Setup        float64 `json:"setup_seconds"`      // until it has greeted, smoothed; 0: not known
	Warm         int     `json:"warm"`               // connections made ahead of need
	// How long it took until flows were answered, by the server or by the
	// destination, and until it was known that they would not be.
	Answered Histogram `json:"answered"`
	Failed   Histogram `json:"failed"`
}

// Status returns what is known of the servers given, in their order.
func (p *Pool) Status(servers []*Server) []Status {
	list := make([]Status, len(servers))
	for i, s := range servers {
		h := p.of(s)
		h.mu.Lock()
		st := Status{
			Name: s.Name, Address: s.address(), Protocol: s.Protocol.String(), Up: !h.bad, Trial: h.bad && h.half,
			Flows: h.flows.Load(), Carried: h.carried, Faults: h.faults, Associations: h.associated,
			Setup: h.setup.Seconds(), Warm: len(h.warm.idle),
			Answered: h.answered.histogram(), Failed: h.failed.histogram(),
		}
		if h.version == 4 {
			st.Protocol = Socks4.String()
		}
		switch {
		case s.lacksUDP() != "" || time.Now().Before(h.noUDP):
			st.UDP = "no"
		case h.associated > 0:
			st.UDP = "yes"
		}
		if time.Now().Before(h.noIPv6) {
			st.IPv6 = "no"
		}
		st.Pipeline = pipelineNames[h.ahead(s)]
		h.mu.Unlock()
		list[i] = st
	}
	return list
}
