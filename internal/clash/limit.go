package clash

import (
	"errors"
	"net"
	"sync"
	"syscall"
	"time"
)

// limited is a listener that accepts no more than there is room for: whoever floods
// it takes no descriptors from flows.
type limited struct {
	net.Listener
	room chan struct{} // one in it for each connection
}

// Accept waits for a client. One that there is no room for is turned away.
func (l *limited) Accept() (net.Conn, error) {
	for {
		c, err := l.Listener.Accept()
		if errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.ENOMEM) || errors.Is(err, syscall.ENOBUFS) { // no memory, or no watch of epoll
			time.Sleep(10 * time.Millisecond)
			continue
		}
		if err != nil {
			return nil, err
		}
		select {
		case l.room <- struct{}{}:
			return &counted{Conn: c, leave: sync.OnceFunc(func() { <-l.room })}, nil
		default:
			c.Close()
		}
	}
}

// counted is a connection that makes room at its end.
type counted struct {
	net.Conn
	leave func()
}

// Close makes room for another.
func (c *counted) Close() error {
	defer c.leave()
	return c.Conn.Close()
}
