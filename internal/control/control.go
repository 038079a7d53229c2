// Package control is how the running daemon is asked and told: HTTP on a UNIX
// socket, and the client that the commands use.
//
// The socket has mode 0660 and belongs to the group tproxyd where that group
// exists: its members may read. What changes something (every method but GET and
// HEAD) is for root and for the user that the daemon runs as; anybody else gets
// 403. The kernel says who asks. A second, read-only address for /metrics can be
// opened on TCP.
//
//	GET  /status   the daemon's figures, JSON
//	POST /reload   reads the files again; 200, 422 with what is wrong with them, or
//	               500 with what failed, as text
//	GET  /metrics  Prometheus text
//	GET  /process  which process answers, a Process as JSON
//	GET  /flows    the flows of TCP and of UDP that are carried, a JSON array
//	DELETE /flows/ID  resets one; 204, or 404 if there is none
package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"time"
)

// Options is what the daemon hands down. Every field but TakeOver is needed.
type Options struct {
	Status func() any             // any value that encodes as JSON
	Flows  func() any             // a list, likewise
	Kill   func(flow uint64) bool // false: there is no such flow
	// Reload returns nil if the new files are in force; else the old ones are. A
	// *Refused says what is wrong with the files, any other error what failed.
	Reload  func() error
	Metrics http.Handler
	Process Process
	// TakeOver owns the connection of a process that wants to take the daemon's
	// place; nil: it cannot be taken.
	TakeOver func(*net.UnixConn)
}

// Process is who answers at the socket.
type Process struct {
	Pid     int      `json:"pid"`
	Version string   `json:"version"` // of the program
	Args    []string `json:"args"`    // its command line
}

// Handler is the whole of the socket's surface.
func Handler(o Options) http.Handler {
	mux := http.NewServeMux()
	for path, value := range map[string]func() any{"/status": o.Status, "/flows": o.Flows, "/process": func() any { return o.Process }} {
		mux.HandleFunc("GET "+path, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/json")
			enc := json.NewEncoder(w)
			enc.SetIndent("", "  ")
			enc.SetEscapeHTML(false) // a>b is a chain
			enc.Encode(value())      // the only error is a reader that left
		})
	}
	mux.HandleFunc("DELETE /flows/{id}", func(w http.ResponseWriter, r *http.Request) {
		id, err := strconv.ParseUint(r.PathValue("id"), 10, 64)
		if err != nil || !o.Kill(id) {
			http.Error(w, "there is no flow "+r.PathValue("id"), http.StatusNotFound)
			return
		}
		w.WriteHeader(http.StatusNoContent)
	})
	mux.HandleFunc("POST /reload", func(w http.ResponseWriter, _ *http.Request) {
		if err := o.Reload(); err != nil {
			status := http.StatusInternalServerError
			if refused := (*Refused)(nil); errors.As(err, &refused) {
				status = http.StatusUnprocessableEntity
			}
			http.Error(w, err.Error(), status)
			return
		}
		fmt.Fprintln(w, "reloaded")
	})
	mux.Handle("GET /metrics", o.Metrics)
	if o.TakeOver != nil {
		mux.HandleFunc("POST /takeover", takeOver(o.TakeOver))
	}
	return rights(mux)
}

// MetricsHandler is the surface of the TCP listener: metrics and nothing else.
func MetricsHandler(o Options) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", o.Metrics)
	return mux
}

// Listen opens the control socket at path, making its folder (mode 0755) if
// need be. A socket left behind by a daemon that died is replaced; one that
// answers belongs to a living daemon and is an error, and so is anything else
// at path.
func Listen(path string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return nil, fmt.Errorf("control: %w", err)
	}
	if c, err := net.DialTimeout("unix", path, time.Second); err == nil {
		c.Close()
		return nil, fmt.Errorf("control: %s: another daemon answers there", path)
	}
	if f, err := os.Lstat(path); err == nil && f.Mode().Type() != fs.ModeSocket {
		return nil, fmt.Errorf("control: %s is there, and is no socket: name another path by [control] socket", path)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("control: %w", err)
	}
	ln, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("control: %w", err)
	}
	if err := restrict(path); err != nil {
		ln.Close()
		return nil, fmt.Errorf("control: %w", err)
	}
	return ln, nil
}

func restrict(path string) error {
	if g, err := user.LookupGroup("tproxyd"); err == nil {
		if gid, err := strconv.Atoi(g.Gid); err == nil {
			if err := os.Chown(path, -1, gid); err != nil {
				return err
			}
		}
	}
	return os.Chmod(path, 0o660)
}

// Serve answers on ln until ctx ends, then lets requests under way finish for
// a second.
func Serve(ctx context.Context, ln net.Listener, h http.Handler) error {
	r := newReserve(ln)
	defer r.end()
	s := &http.Server{Handler: h, ReadHeaderTimeout: 5 * time.Second, IdleTimeout: time.Minute, ConnContext: withPeer, ConnState: r.closed}
	stop := context.AfterFunc(ctx, func() {
		grace, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		s.Shutdown(grace)
	})
	defer stop()
	if err := s.Serve(r); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("control: %w", err)
	}
	return nil
}

// Client talks to the daemon behind a control socket.
type Client struct {
	path string
	http *http.Client
}

// NewClient returns a client for the socket at path; nothing is opened yet.
func NewClient(path string) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", path)
	}
	return &Client{path: path, http: &http.Client{Transport: &http.Transport{DialContext: dial, DisableKeepAlives: true}}}
}

// Reload asks the daemon to read its files again. The error holds the
// daemon's own words if it kept the old ones.
func (c *Client) Reload(ctx context.Context) error {
	_, err := c.do(ctx, http.MethodPost, "/reload")
	return err
}

// Status returns the daemon's figures as JSON.
func (c *Client) Status(ctx context.Context) ([]byte, error) {
	return c.do(ctx, http.MethodGet, "/status")
}

// Process returns which process answers.
func (c *Client) Process(ctx context.Context) (p Process, err error) {
	b, err := c.do(ctx, http.MethodGet, "/process")
	if err == nil {
		err = json.Unmarshal(b, &p)
	}
	return p, err
}

// Flows returns the flows that are being carried, as JSON.
func (c *Client) Flows(ctx context.Context) ([]byte, error) {
	return c.do(ctx, http.MethodGet, "/flows")
}

// Kill resets a flow.
func (c *Client) Kill(ctx context.Context, flow uint64) error {
	_, err := c.do(ctx, http.MethodDelete, "/flows/"+strconv.FormatUint(flow, 10))
	return err
}

// Metrics returns the daemon's metrics as Prometheus text.
func (c *Client) Metrics(ctx context.Context) ([]byte, error) {
	return c.do(ctx, http.MethodGet, "/metrics")
}

// Refused is the daemon's own answer to a request that it would not carry out.
type Refused struct{ Text string }

func (r *Refused) Error() string { return r.Text }

func (c *Client) do(ctx context.Context, method, path string) ([]byte, error) {
	req, err := http.NewRequestWithContext(ctx, method, "http://tproxyd"+path, nil)
	if err != nil {
		return nil, err
	}
	resp, err := c.http.Do(req)
	if err != nil {
		var op *net.OpError
		if errors.As(err, &op) {
			err = op.Err
		}
		if errors.Is(err, fs.ErrPermission) {
			return nil, fmt.Errorf("control: %s: permission denied: root may ask, and whoever is in the group of the socket", c.path)
		}
		return nil, fmt.Errorf("control: %s: %w; is the daemon running?", c.path, err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	switch {
	case err != nil:
		return nil, fmt.Errorf("control: %s: %w", c.path, err)
	case resp.StatusCode == http.StatusUnprocessableEntity:
		return nil, &Refused{Text: string(body)}
	case resp.StatusCode != http.StatusOK && resp.StatusCode != http.StatusNoContent:
		return nil, fmt.Errorf("control: %s%s: %s: %s", c.path, path, resp.Status, bytes.TrimSpace(body))
	}
	return body, nil
}
