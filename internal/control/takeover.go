package control

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/http"
	"syscall"
	"time"
)

// The socket is also where another process asks to take the daemon's place:
//
//	POST /takeover  with "Upgrade: tproxyd-takeover"; 101, and the connection is
//	                theirs; anything else is a refusal
//
// What is said then is none of this package's business.
const takeoverProtocol = "tproxyd-takeover"

// ErrNobody says that no daemon answers at the socket.
var ErrNobody = errors.New("nobody answers there")

// takeOver gives the connection of the request to take, which owns it.
func takeOver(take func(*net.UnixConn)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Upgrade") != takeoverProtocol {
			http.Error(w, "this is for tproxyd serve --takeover", http.StatusUpgradeRequired)
			return
		}
		c, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		u, ok := c.(*net.UnixConn)
		if !ok {
			c.Close()
			return
		}
		u.SetDeadline(time.Time{})
		if _, err := fmt.Fprintf(u, "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: %s\r\n\r\n", takeoverProtocol); err != nil {
			u.Close()
			return
		}
		take(u)
	}
}

// TakeOver asks the daemon for a connection by which its place can be taken. The
// error is ErrNobody if there is no daemon.
func (c *Client) TakeOver(ctx context.Context) (*net.UnixConn, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", c.path)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED) {
		return nil, fmt.Errorf("control: %s: %w", c.path, ErrNobody)
	}
	if err != nil {
		return nil, fmt.Errorf("control: %w", err)
	}
	if end, ok := ctx.Deadline(); ok {
		conn.SetDeadline(end)
	}
	u := conn.(*net.UnixConn)
	if err := c.switchOver(ctx, u); err != nil {
		u.Close()
		return nil, fmt.Errorf("control: %s: %w", c.path, err)
	}
	u.SetDeadline(time.Time{})
	return u, nil
}

// switchOver makes the request on u. Nothing follows the answer until we speak.
func (c *Client) switchOver(ctx context.Context, u *net.UnixConn) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://tproxyd/takeover", nil)
	if err != nil {
		return err
	}
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", takeoverProtocol)
	if err := req.Write(u); err != nil {
		return err
	}
	resp, err := http.ReadResponse(bufio.NewReader(u), req)
	if err != nil {
		return err
	}
	switch resp.StatusCode {
	case http.StatusSwitchingProtocols:
		return nil
	case http.StatusNotFound, http.StatusMethodNotAllowed:
		return errors.New("the daemon there is of a version that cannot be taken over; stop it first")
	}
	return fmt.Errorf("the daemon there refuses to be taken over: %s", resp.Status)
}
