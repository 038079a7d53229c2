package clash

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"maps"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
)

// What Clash calls a way that is no server.
const (
	Direct = "DIRECT"
	Reject = "REJECT"
	global = "GLOBAL" // the list of all, which dashboards look for
)

// answers is every call but the page, by pattern of the mux.
func (a *api) answers() map[string]http.HandlerFunc {
	return map[string]http.HandlerFunc{
		"GET /version": func(w http.ResponseWriter, _ *http.Request) {
			// Dashboards that read "sing-box" hide what only mihomo has, as we lack
			// it too.
			say(w, map[string]any{"version": "tproxyd " + a.o.Version + " (API as sing-box)", "meta": true, "premium": true})
		},
		"GET /configs":   func(w http.ResponseWriter, _ *http.Request) { say(w, configs()) },
		"PATCH /configs": patchConfigs,
		"PUT /configs":   a.reload,

		"GET /proxies":              func(w http.ResponseWriter, _ *http.Request) { say(w, map[string]any{"proxies": a.proxies()}) },
		"GET /proxies/{name}":       a.proxy,
		"PUT /proxies/{name}":       a.pin,
		"DELETE /proxies/{name}":    a.unpin,
		"GET /proxies/{name}/delay": a.delay,
		"GET /group":                a.groups,
		"GET /group/{name}":         a.proxy,
		"GET /group/{name}/delay":   a.groupDelay,

		"GET /rules":             func(w http.ResponseWriter, _ *http.Request) { say(w, map[string]any{"rules": a.rules()}) },
		"GET /providers/proxies": func(w http.ResponseWriter, _ *http.Request) { say(w, map[string]any{"providers": map[string]any{}}) },
		"GET /providers/rules":   func(w http.ResponseWriter, _ *http.Request) { say(w, map[string]any{"providers": map[string]any{}}) },

		"GET /connections":         a.connectionStream,
		"DELETE /connections":      a.killAll,
		"DELETE /connections/{id}": a.kill,
		"GET /traffic":             a.trafficStream,
		"GET /memory":              a.memoryStream,
		"GET /logs":                a.logStream,

		"POST /cache/dns/flush": func(w http.ResponseWriter, _ *http.Request) {
			a.o.FlushDNS()
			w.WriteHeader(http.StatusNoContent)
		},
		"POST /cache/fakeip/flush": func(w http.ResponseWriter, _ *http.Request) {
			fail(w, http.StatusBadRequest, "synthetic addresses are not forgotten: clients would go on to use them")
		},
	}
}

// mode is the only one: what is decided is decided by rules.
const mode = "rule"

func configs() map[string]any {
	return map[string]any{
		"port": 0, "socks-port": 0, "redir-port": 0, "tproxy-port": 0, "mixed-port": 0, "allow-lan": false, "bind-address": "*",
		"mode": mode, "mode-list": []string{mode}, "modes": []string{mode}, "log-level": "info", "ipv6": true, "tun": map[string]any{},
	}
}

func patchConfigs(w http.ResponseWriter, r *http.Request) {
	var want map[string]any
	if err := json.NewDecoder(r.Body).Decode(&want); err != nil {
		fail(w, http.StatusBadRequest, "the body is not JSON")
		return
	}
	for key, value := range want {
		if key != "mode" || value != mode {
			fail(w, http.StatusBadRequest, "only the files of the daemon can change "+key)
			return
		}
	}
	w.WriteHeader(http.StatusNoContent)
}

// reload has the daemon read its own files; others cannot be handed in.
func (a *api) reload(w http.ResponseWriter, r *http.Request) {
	var body struct{ Path, Payload string }
	if err := json.NewDecoder(r.Body).Decode(&body); err != nil && !errors.Is(err, io.EOF) {
		fail(w, http.StatusBadRequest, "the body is not JSON")
		return
	}
	if body.Path != "" || body.Payload != "" {
		fail(w, http.StatusBadRequest, "the daemon reads its own files and no others")
		return
	}
	if err := a.o.Reload(); err != nil {
		fail(w, http.StatusBadRequest, err.Error())
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

// delayed is how long something took, at a time.
type delayed struct {
	Time  time.Time `json:"time"`
	Delay int64     `json:"delay"` // milliseconds
}

// proxyStatus is a server, a list or a way without a server.
type proxyStatus struct {
	Name    string         `json:"name"`
	Type    string         `json:"type"`
	UDP     bool           `json:"udp"`
	XUDP    bool           `json:"xudp"`
	History []delayed      `json:"history"`
	Alive   bool           `json:"alive"`
	Extra   map[string]any `json:"extra"`
	Now     string         `json:"now,omitempty"` // of a list
	Fixed   string         `json:"fixed,omitempty"`
	All     []string       `json:"all,omitempty"`
	Tproxyd *serverFigures `json:"tproxyd,omitempty"` // for our page
}

// serverFigures are what Clash has no word for.
type serverFigures struct {
	Address string `json:"address"`
	Flows   int64  `json:"flows"`
	Carried uint64 `json:"carried"`
	Faults  uint64 `json:"faults"`
}

func (a *api) proxies() map[string]proxyStatus {
	all := map[string]proxyStatus{}
	var order []string
	add := func(p proxyStatus) {
		if p.History == nil {
			p.History = []delayed{}
		}
		p.Extra = map[string]any{}
		all[p.Name] = p
		order = append(order, p.Name)
	}
	up := map[string]proxyStatus{}
	now := time.Now()
	servers := a.o.Servers()
	for _, s := range servers {
		p := proxyStatus{
			Name: s.Name, Type: s.Type, UDP: s.UDP, Alive: s.Up,
			Tproxyd: &serverFigures{Address: s.Address, Flows: s.Flows, Carried: s.Carried, Faults: s.Faults},
		}
		if s.Delay > 0 {
			p.History = []delayed{{now, max(s.Delay.Milliseconds(), 1)}}
		}
		up[s.Name] = p
	}
	for _, l := range a.o.Lists() {
		p := proxyStatus{Name: l.Name, Type: "LoadBalance", All: l.Servers, Fixed: l.Pinned}
		if l.Ordered {
			p.Type = "Fallback"
		}
		for _, s := range l.Servers {
			p.UDP = p.UDP || up[s].UDP
			p.Alive = p.Alive || up[s].Alive
			if l.Ordered && p.Now == "" && up[s].Alive {
				p.Now, p.History = s, up[s].History
			}
		}
		if s := l.Pinned; up[s].Alive {
			p.Now, p.History = s, up[s].History
		}
		if p.Now == "" && l.Ordered {
			p.Now = l.Servers[0]
		}
		add(p)
	}
	for _, s := range servers {
		add(up[s.Name])
	}
	add(proxyStatus{Name: Direct, Type: "Direct", UDP: true, Alive: true})
	add(proxyStatus{Name: Reject, Type: "Reject", UDP: true, Alive: true})
	add(proxyStatus{Name: global, Type: "Fallback", UDP: true, Alive: true, Now: order[0], All: order[:len(order):len(order)]})
	return all
}

func (a *api) proxy(w http.ResponseWriter, r *http.Request) {
	p, ok := a.proxies()[r.PathValue("name")]
	if !ok {
		fail(w, http.StatusNotFound, "Resource not found")
		return
	}
	say(w, p)
}

func (a *api) groups(w http.ResponseWriter, _ *http.Request) {
	list := []proxyStatus{}
	all := a.proxies()
	for _, n := range slices.Sorted(maps.Keys(all)) {
		if all[n].All != nil {
			list = append(list, all[n])
		}
	}
	say(w, map[string]any{"proxies": list})
}

func (a *api) pin(w http.ResponseWriter, r *http.Request) {
	var body struct{ Name string }
	if err := json.NewDecoder(r.Body).Decode(&body); err != nil || body.Name == "" {
		fail(w, http.StatusBadRequest, "want {\"name\": SERVER}")
		return
	}
	a.pinned(w, r.PathValue("name"), body.Name)
}

func (a *api) unpin(w http.ResponseWriter, r *http.Request) { a.pinned(w, r.PathValue("name"), "") }

func (a *api) pinned(w http.ResponseWriter, list, server string) {
	if err := a.o.Pin(list, server); err != nil {
		fail(w, http.StatusBadRequest, err.Error())
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

const longestDelay = 30 * time.Second

// probe reads what a request for a delay says.
func probe(w http.ResponseWriter, r *http.Request) (url string, limit time.Duration, ok bool) {
	q := r.URL.Query()
	ms, err := strconv.ParseUint(q.Get("timeout"), 10, 31)
	if url = q.Get("url"); url == "" || err != nil || ms == 0 {
		fail(w, http.StatusBadRequest, "want ?url=URL&timeout=MILLISECONDS")
		return "", 0, false
	}
	return url, min(time.Duration(ms)*time.Millisecond, longestDelay), true
}

func (a *api) delay(w http.ResponseWriter, r *http.Request) {
	p, known := a.proxies()[r.PathValue("name")]
	url, limit, ok := probe(w, r)
	switch {
	case !ok:
		return
	case !known:
		fail(w, http.StatusNotFound, "Resource not found")
		return
	}
	server := p.Name
	if p.All != nil {
		if server = p.Now; server == "" {
			server = p.All[0]
		}
	}
	ctx, cancel := context.WithTimeout(r.Context(), limit)
	defer cancel()
	took, err := a.o.Delay(ctx, server, url)
	var timeout net.Error
	switch {
	case ctx.Err() != nil, errors.As(err, &timeout) && timeout.Timeout():
		fail(w, http.StatusGatewayTimeout, "Timeout")
	case err != nil:
		fail(w, http.StatusServiceUnavailable, "An error occurred in the delay test: "+err.Error())
	default:
		say(w, map[string]int64{"delay": max(took.Milliseconds(), 1)})
	}
}

// groupDelay asks all servers of a list at once; those that fail are not in the
// answer.
func (a *api) groupDelay(w http.ResponseWriter, r *http.Request) {
	p, known := a.proxies()[r.PathValue("name")]
	url, limit, ok := probe(w, r)
	switch {
	case !ok:
		return
	case !known || p.All == nil:
		fail(w, http.StatusNotFound, "Resource not found")
		return
	}
	ctx, cancel := context.WithTimeout(r.Context(), limit)
	defer cancel()
	var mu sync.Mutex
	var wg sync.WaitGroup
	delays := map[string]int64{}
	for _, s := range p.All {
		wg.Go(func() {
			if took, err := a.o.Delay(ctx, s, url); err == nil {
				mu.Lock()
				defer mu.Unlock()
				delays[s] = max(took.Milliseconds(), 1)
			}
		})
	}
	wg.Wait()
	say(w, delays)
}

// ruleStatus is a rule.
type ruleStatus struct {
	Index   int         `json:"index"`
	Type    string      `json:"type"`
	Payload string      `json:"payload"`
	Proxy   string      `json:"proxy"`
	Size    int         `json:"size"` // of a set; -1: it is none
	Extra   ruleExtra   `json:"extra"`
	Tproxyd ruleFigures `json:"tproxyd"`
}

type ruleExtra struct {
	HitCount uint64 `json:"hitCount"`
	Disabled bool   `json:"disabled"`
}

// ruleFigures are what Clash has no word for.
type ruleFigures struct {
	Text     string `json:"text"`
	Position string `json:"position"`
	Up       uint64 `json:"up"`
	Down     uint64 `json:"down"`
	Kernel   uint64 `json:"kernel"`
}

func (a *api) rules() []ruleStatus {
	list := []ruleStatus{}
	for i, r := range a.o.Rules() {
		list = append(list, ruleStatus{
			Index: i, Type: r.Kind, Payload: r.Payload, Proxy: r.To, Size: -1,
			Extra: ruleExtra{HitCount: r.Flows}, Tproxyd: ruleFigures{r.Text, r.Position, r.Up, r.Down, r.Kernel},
		})
	}
	return list
}

func (a *api) kill(w http.ResponseWriter, r *http.Request) {
	if strings.HasPrefix(r.PathValue("id"), kernelID) {
		fail(w, http.StatusBadRequest, "the kernel lets it pass by a rule, and only another rule ends that")
		return
	}
	a.o.Kill(r.PathValue("id")) // one that has just ended is as good
	w.WriteHeader(http.StatusNoContent)
}

func (a *api) killAll(w http.ResponseWriter, _ *http.Request) {
	var ids []string
	for _, f := range a.o.Flows() {
		ids = append(ids, f.ID)
	}
	a.o.Kill(ids...)
	w.WriteHeader(http.StatusNoContent)
}
