package relay

import (
	"net"
	"time"
)

// deadlines are the time limits of a Conn; nil means none were ever set. Its
// timers are started only when a goroutine parks.
type deadlines struct {
	read, write           time.Time
	readTimer, writeTimer *time.Timer
}

func (d *deadlines) readEnd() time.Time {
	if d == nil {
		return time.Time{}
	}
	return d.read
}

func (d *deadlines) writeEnd() time.Time {
	if d == nil {
		return time.Time{}
	}
	return d.write
}

func (d *deadlines) armRead(c *Conn) {
	if d != nil {
		d.readTimer = arm(d.readTimer, d.read, c.wakeReaders)
	}
}

func (d *deadlines) armWrite(c *Conn) {
	if d != nil {
		d.writeTimer = arm(d.writeTimer, d.write, c.wakeWriters)
	}
}

// arm has f called at the given time; not at all if that is zero.
func arm(t *time.Timer, at time.Time, f func()) *time.Timer {
	switch {
	case at.IsZero():
		return t
	case t == nil:
		return time.AfterFunc(time.Until(at), f)
	}
	t.Reset(time.Until(at))
	return t
}

func (d *deadlines) stop() {
	if d == nil {
		return
	}
	if d.readTimer != nil {
		d.readTimer.Stop()
	}
	if d.writeTimer != nil {
		d.writeTimer.Stop()
	}
}

func (c *Conn) wakeReaders() {
	c.mu.Lock()
	r := c.waitR
	c.waitR = nil
	c.mu.Unlock()
	wakeAll(r)
}

func (c *Conn) wakeWriters() {
	c.mu.Lock()
	w := c.waitW
	c.waitW = nil
	c.mu.Unlock()
	wakeAll(w)
}

// SetDeadline sets both deadlines; see net.Conn.
func (c *Conn) SetDeadline(t time.Time) error {
	return c.setDeadline(t, true, true)
}

// SetReadDeadline sets the time after which Read returns
// os.ErrDeadlineExceeded; zero means never.
func (c *Conn) SetReadDeadline(t time.Time) error {
	return c.setDeadline(t, true, false)
}

// SetWriteDeadline sets the time after which Write returns
// os.ErrDeadlineExceeded; zero means never.
func (c *Conn) SetWriteDeadline(t time.Time) error {
	return c.setDeadline(t, false, true)
}

func (c *Conn) setDeadline(t time.Time, read, write bool) error {
	c.mu.Lock()
	if c.state != connOpen {
		c.mu.Unlock()
		return c.fail("set", net.ErrClosed)
	}
	if c.deadline == nil {
		if t.IsZero() {
			c.mu.Unlock()
			return nil
		}
		c.deadline = new(deadlines)
	}
	// Who is parked looks at the new time, and parks again by it.
	var r, w *waiter
	if read {
		c.deadline.read = t
		r, c.waitR = c.waitR, nil
	}
	if write {
		c.deadline.write = t
		w, c.waitW = c.waitW, nil
	}
	c.mu.Unlock()
	wakeAll(r)
	wakeAll(w)
	return nil
}
