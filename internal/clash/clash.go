// Package clash is the daemon's address for dashboards: the REST calls and streams
// that dashboards of Clash and its heirs use, a page of our own, and a folder with
// somebody else's.
//
// It promises that nobody gets anything but the page itself without a secret, that
// who has the reader's secret changes nothing, and that what it answers has the
// shapes that existing dashboards read. What Clash has and we have not (modes,
// providers, scripts) is refused or empty, never pretended.
//
// The secret comes as "Authorization: Bearer SECRET"; with a WebSocket, where a
// browser cannot send that, as ?token=SECRET. Origins do not matter, since no
// browser sends a secret by itself.
package clash

import (
	"context"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"
)

// Secrets are what opens the address; an empty one opens nothing.
type Secrets struct{ Admin, Reader string }

// Flow is a flow that is being carried.
type Flow struct {
	ID          string
	Network     string // tcp or udp
	Client      netip.AddrPort
	Destination netip.AddrPort
	Name        string // that the client asked for; empty: none
	Interface   string
	Start       time.Time
	Up, Down    uint64 // bytes
	Kind        string // of the rule, as Rule.Kind
	Payload     string // likewise
	Rule        string // its position
	Server      string // or DIRECT
	List        string // that the server is of; empty: none
}

// Rule is a rule in force.
type Rule struct {
	Kind     string // as Clash calls it: Domain, DomainSuffix, IPCIDR, DstPort, SrcIPCIDR, RuleSet, Match
	Payload  string
	To       string // a list or server, DIRECT or REJECT
	Text     string // the line
	Position string // FILE:LINE
	Flows    uint64 // that it decided
	Up, Down uint64 // bytes
	Kernel   uint64 // bytes from clients that the kernel let pass, or refused, by it alone
}

// Server is a server, with what is known of it.
type Server struct {
	Name    string
	Type    string // as Clash calls it: Socks5, Socks4, Http
	Address string
	Up, UDP bool
	Delay   time.Duration // until it has greeted; 0: not known
	Flows   int64         // now
	Carried uint64
	Faults  uint64
}

// List is servers that a rule has in common.
type List struct {
	Name    string
	Ordered bool // the first that is well is asked; false: they take turns
	Servers []string
	Pinned  string // that is asked before the others; empty: none
}

// Options is what the daemon hands down. All functions are needed.
type Options struct {
	Secrets func() Secrets // asked for each request
	Version string
	UI      string // folder of a dashboard; empty: none

	Flows   func() []Flow
	Kill    func(ids ...string) // those that there are
	Rules   func() []Rule
	Servers func() []Server
	Lists   func() []List
	Totals  func() (up, down uint64) // bytes since the start, with what the kernel let pass by itself
	Pin     func(list, server string) error
	// Delay returns how long a server needs to fetch the head of what a URL names.
	Delay    func(ctx context.Context, server, url string) (time.Duration, error)
	Reload   func() error
	FlushDNS func() // forgets answers, and no synthetic address
	Logs     *Logs
}

// Bounds: of streams that are open at once, of connections, of what a request may
// say, and of flows that an answer tells of, the newest.
const (
	maxStreams = 64
	maxConns   = 256
	maxBody    = 64 << 10
	maxFlows   = 10000
	maxKernel  = 200 // rules by which the kernel let most pass, as connections
)

// Serve answers on ln until ctx ends, and waits for the streams.
func Serve(ctx context.Context, ln net.Listener, o Options) error {
	a := &api{o: o, slots: make(chan struct{}, maxStreams), since: time.Now()}
	defer a.streams.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // before the wait
	if o.UI != "" {
		var err error
		if a.ui, err = os.OpenRoot(o.UI); err != nil {
			return fmt.Errorf("clash: ui: %w", err)
		}
		defer a.ui.Close()
	}
	s := &http.Server{
		Handler: a.handler(), ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute, MaxHeaderBytes: 64 << 10,
		BaseContext: func(net.Listener) context.Context { return ctx },
	}
	stop := context.AfterFunc(ctx, func() {
		grace, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		s.Shutdown(grace)
	})
	defer stop()
	if err := s.Serve(&limited{ln, make(chan struct{}, maxConns)}); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("clash: %w", err)
	}
	return nil
}

// api answers for one daemon.
type api struct {
	o       Options
	slots   chan struct{} // one in it for each stream
	streams sync.WaitGroup
	shot    snapshot
	since   time.Time // it serves
	ui      *os.Root  // nothing outside of it is served, whatever links there are; nil: none
}

func (a *api) handler() http.Handler {
	mux := http.NewServeMux()
	for pattern, answer := range a.answers() {
		mux.Handle(pattern, a.guard(needs(pattern), answer))
	}
	mux.Handle("/", a.guard(reader, func(w http.ResponseWriter, r *http.Request) {
		fail(w, http.StatusNotFound, "there is nothing of this name")
	}))
	mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, r *http.Request) {
		if strings.Contains(r.Header.Get("Accept"), "text/html") {
			page(w)
			return
		}
		a.guard(reader, func(w http.ResponseWriter, r *http.Request) { say(w, map[string]string{"hello": "clash"}) }).ServeHTTP(w, r)
	})
	if a.ui != nil {
		mux.Handle("GET /ui/", http.StripPrefix("/ui/", http.FileServerFS(a.ui.FS())))
		mux.Handle("GET /ui", http.RedirectHandler("/ui/", http.StatusMovedPermanently))
	}
	return cors(mux)
}

// right is what a secret lets do.
type right int

const (
	nobody right = iota
	reader
	admin
)

// needs returns which right a pattern of the mux takes: to change something, and
// to have the daemon connect somewhere, is for admins.
func needs(pattern string) right {
	if !strings.HasPrefix(pattern, "GET ") || strings.HasSuffix(pattern, "/delay") {
		return admin
	}
	return reader
}

// guard lets pass who has the right.
func (a *api) guard(want right, next http.HandlerFunc) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		switch have := a.right(r); {
		case have == nobody:
			fail(w, http.StatusUnauthorized, "Unauthorized")
		case have < want:
			fail(w, http.StatusForbidden, "this secret lets look, and not change anything")
		default:
			r.Body = http.MaxBytesReader(w, r.Body, maxBody)
			next(w, r)
		}
	})
}

func (a *api) right(r *http.Request) right {
	token, ok := strings.CutPrefix(r.Header.Get("Authorization"), "Bearer ")
	if !ok && upgrades(r) {
		token = r.URL.Query().Get("token")
	}
	s := a.o.Secrets()
	switch {
	case same(token, s.Admin):
		return admin
	case same(token, s.Reader):
		return reader
	}
	return nobody
}

// same compares without telling by its time how much is right.
func same(token, secret string) bool {
	t, s := sha256.Sum256([]byte(token)), sha256.Sum256([]byte(secret))
	return subtle.ConstantTimeCompare(t[:], s[:]) == 1 && secret != ""
}

// cors lets dashboards from anywhere ask; the secret is what counts.
func cors(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		h := w.Header()
		h.Set("Access-Control-Allow-Origin", "*")
		h.Set("X-Content-Type-Options", "nosniff")
		h.Set("Cache-Control", "no-store")
		if r.Method == http.MethodOptions {
			h.Set("Access-Control-Allow-Methods", "GET, POST, PUT, PATCH, DELETE")
			h.Set("Access-Control-Allow-Headers", "Content-Type, Authorization")
			h.Set("Access-Control-Allow-Private-Network", "true")
			h.Set("Access-Control-Max-Age", "300")
			w.WriteHeader(http.StatusNoContent)
			return
		}
		next.ServeHTTP(w, r)
	})
}

// say answers with a value as JSON.
func say(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	json.NewEncoder(w).Encode(v) // the only error is a reader that left
}

// fail answers as Clash does.
func fail(w http.ResponseWriter, status int, message string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(map[string]string{"message": message})
}
