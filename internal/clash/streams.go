package clash

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"hash/fnv"
	"net/http"
	"net/netip"
	"runtime/metrics"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/coder/websocket"
)

const (
	period       = time.Second
	leastPeriod  = 100 * time.Millisecond
	writeTimeout = 5 * time.Second // of a reader that does not read
)

// upgrades tells whether a request wants a WebSocket.
func upgrades(r *http.Request) bool {
	return strings.EqualFold(r.Header.Get("Upgrade"), "websocket")
}

// stream has feed send values until it returns, the reader leaves or the server
// ends: as text frames of a WebSocket, else as lines of a response that does not
// end.
func (a *api) stream(w http.ResponseWriter, r *http.Request, feed func(ctx context.Context, send func(any) error)) {
	select {
	case a.slots <- struct{}{}:
	default:
		fail(w, http.StatusServiceUnavailable, "too many streams are open")
		return
	}
	a.streams.Add(1)
	defer func() { <-a.slots; a.streams.Done() }()
	if !upgrades(r) {
		w.Header().Set("Content-Type", "application/json")
		out := http.NewResponseController(w)
		enc := json.NewEncoder(w)
		feed(r.Context(), func(v any) error {
			out.SetWriteDeadline(time.Now().Add(writeTimeout))
			if err := enc.Encode(v); err != nil {
				return err
			}
			return out.Flush()
		})
		return
	}
	// The secret has been seen, and it is nothing that a browser adds by itself.
	c, err := websocket.Accept(w, r, &websocket.AcceptOptions{InsecureSkipVerify: true})
	if err != nil {
		return // it has been answered
	}
	defer c.CloseNow()
	ctx := c.CloseRead(r.Context()) // ends when the reader leaves
	feed(ctx, func(v any) error {
		b, err := json.Marshal(v)
		if err != nil {
			return err
		}
		limited, cancel := context.WithTimeout(ctx, writeTimeout)
		defer cancel()
		return c.Write(limited, websocket.MessageText, b)
	})
	c.Close(websocket.StatusGoingAway, "")
}

// every sends what value returns, at once and then once a period.
func every(ctx context.Context, pause time.Duration, send func(any) error, value func() any) {
	tick := time.NewTicker(pause)
	defer tick.Stop()
	for send(value()) == nil {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// traffic is how much moves in a second.
type traffic struct {
	Up        uint64 `json:"up"`
	Down      uint64 `json:"down"`
	UpTotal   uint64 `json:"upTotal"`
	DownTotal uint64 `json:"downTotal"`
}

func (a *api) trafficStream(w http.ResponseWriter, r *http.Request) {
	a.stream(w, r, func(ctx context.Context, send func(any) error) {
		up, down := a.o.Totals()
		every(ctx, period, send, func() any {
			t := traffic{}
			t.UpTotal, t.DownTotal = a.o.Totals()
			t.Up, t.Down = t.UpTotal-min(up, t.UpTotal), t.DownTotal-min(down, t.DownTotal)
			up, down = t.UpTotal, t.DownTotal
			return t
		})
	})
}

// memory is what the process has taken from the system, in bytes.
func memory() uint64 {
	s := []metrics.Sample{{Name: "/memory/classes/total:bytes"}, {Name: "/memory/classes/heap/released:bytes"}}
	metrics.Read(s)
	return s[0].Value.Uint64() - s[1].Value.Uint64()
}

func (a *api) memoryStream(w http.ResponseWriter, r *http.Request) {
	a.stream(w, r, func(ctx context.Context, send func(any) error) {
		first := true
		every(ctx, period, send, func() any {
			v := map[string]uint64{"inuse": 0, "oslimit": 0} // dashboards begin their chart with it
			if !first {
				v["inuse"] = memory()
			}
			first = false
			return v
		})
	})
}

// connections is a snapshot.
type connections struct {
	DownloadTotal uint64       `json:"downloadTotal"`
	UploadTotal   uint64       `json:"uploadTotal"`
	Memory        uint64       `json:"memory"`
	Connections   []connection `json:"connections"`
}

type connection struct {
	ID       string    `json:"id"`
	Metadata metadata  `json:"metadata"`
	Upload   uint64    `json:"upload"`
	Download uint64    `json:"download"`
	Start    time.Time `json:"start"`
	Chains   []string  `json:"chains"` // from the server outwards
	Rule     string    `json:"rule"`
	Payload  string    `json:"rulePayload"`
	Position string    `json:"tproxydRule"` // for our page
}

type metadata struct {
	Network         string `json:"network"`
	Type            string `json:"type"`
	SourceIP        string `json:"sourceIP"`
	DestinationIP   string `json:"destinationIP"`
	SourcePort      string `json:"sourcePort"`
	DestinationPort string `json:"destinationPort"`
	Host            string `json:"host"`
	DNSMode         string `json:"dnsMode"`
	Process         string `json:"process"`
	ProcessPath     string `json:"processPath"`
	InboundName     string `json:"inboundName"`
	InboundIP       string `json:"inboundIP"`
	InboundPort     string `json:"inboundPort"`
	RemoteDest      string `json:"remoteDestination"`
	SpecialProxy    string `json:"specialProxy"`
	SpecialRules    string `json:"specialRules"`
	SniffHost       string `json:"sniffHost"`
}

// snapshot is connections for whoever asks at about the same time.
type snapshot struct {
	mu   sync.Mutex
	at   time.Time
	text json.RawMessage
}

func (a *api) connections() json.RawMessage {
	s := &a.shot
	s.mu.Lock()
	defer s.mu.Unlock()
	if time.Since(s.at) < leastPeriod/2 {
		return s.text
	}
	c := connections{Memory: memory(), Connections: []connection{}}
	c.UploadTotal, c.DownloadTotal = a.o.Totals()
	flows := a.o.Flows()
	if len(flows) > maxFlows {
		slices.SortFunc(flows, func(a, b Flow) int { return b.Start.Compare(a.Start) })
		flows = flows[:maxFlows]
	}
	for _, f := range flows {
		c.Connections = append(c.Connections, f.connection())
	}
	c.Connections = append(c.Connections, a.byKernel()...)
	s.text, _ = json.Marshal(c) // nothing in it can fail
	s.at = time.Now()
	return s.text
}

// kernelID begins the IDs of connections that are none.
const kernelID = "kernel-"

// byKernel returns a connection for each rule by which the kernel lets packets pass
// without us, so that what dashboards add up is all that passes. There is no client
// of it, and nothing can end it but another rule.
func (a *api) byKernel() (list []connection) {
	var rules []Rule
	for _, r := range a.o.Rules() {
		if r.To == Direct && r.Kernel > 0 {
			rules = append(rules, r)
		}
	}
	if len(rules) > maxKernel {
		slices.SortStableFunc(rules, func(a, b Rule) int { return cmp.Compare(b.Kernel, a.Kernel) })
		rules = rules[:maxKernel]
	}
	for _, r := range rules {
		h := fnv.New64a()
		fmt.Fprint(h, r.Position, "\x00", r.Text)
		list = append(list, connection{
			ID: fmt.Sprintf("%s%016x", kernelID, h.Sum64()), Upload: r.Kernel, Start: a.since, Chains: []string{Direct},
			Metadata: metadata{Network: "ip", Type: "Kernel", SourceIP: "0.0.0.0", SourcePort: "0", DestinationPort: "0", Host: r.Text, DNSMode: "normal", InboundPort: "0"},
			Rule:     r.Kind, Payload: r.Payload, Position: r.Position,
		})
	}
	return list
}

func (f *Flow) connection() connection {
	port := func(a netip.AddrPort) string { return strconv.Itoa(int(a.Port())) }
	m := metadata{
		Network: f.Network, Type: "TProxy", SourceIP: f.Client.Addr().String(), SourcePort: port(f.Client),
		DestinationIP: f.Destination.Addr().String(), DestinationPort: port(f.Destination),
		Host: f.Name, DNSMode: "normal", InboundName: f.Interface, InboundPort: "0",
	}
	if f.Name != "" {
		m.DNSMode = "fake-ip"
	}
	c := connection{ID: f.ID, Metadata: m, Upload: f.Up, Download: f.Down, Start: f.Start, Chains: []string{f.Server}, Rule: f.Kind, Payload: f.Payload, Position: f.Rule}
	if f.List != "" {
		c.Chains = append(c.Chains, f.List)
	}
	return c
}

func (a *api) connectionStream(w http.ResponseWriter, r *http.Request) {
	if !upgrades(r) {
		say(w, a.connections())
		return
	}
	pause := period
	if ms, err := strconv.ParseUint(r.URL.Query().Get("interval"), 10, 31); err == nil && ms > 0 {
		pause = max(time.Duration(ms)*time.Millisecond, leastPeriod)
	}
	a.stream(w, r, func(ctx context.Context, send func(any) error) {
		every(ctx, pause, send, func() any { return a.connections() })
	})
}
