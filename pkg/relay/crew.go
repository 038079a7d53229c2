package relay

import (
	"sync"
	"sync/atomic"
)

// crewIdle is how many goroutines of a crew wait for work at most.
const crewIdle = 64

// crew does work that may block, each piece on a goroutine of its own. Some of
// those that have done theirs wait for more: the stack that a handshake wants is
// larger than the one that a goroutine begins with, and growing it costs more
// than the switch.
type crew[T any] struct {
	work func(T)
	all  *sync.WaitGroup // counts the goroutines
	next chan T          // unbuffered: who takes from it has been waiting
	idle atomic.Int32
}

func newCrew[T any](all *sync.WaitGroup, work func(T)) *crew[T] {
	return &crew[T]{work: work, all: all, next: make(chan T)}
}

// do begins a piece of work. One goroutine at a time may call it, and none after
// end.
func (c *crew[T]) do(piece T) {
	select {
	case c.next <- piece:
	default:
		c.all.Add(1)
		go c.run(piece)
	}
}

func (c *crew[T]) run(piece T) {
	defer c.all.Done()
	for ok := true; ok; {
		c.work(piece)
		if c.idle.Add(1) > crewIdle {
			c.idle.Add(-1)
			return
		}
		piece, ok = <-c.next
		c.idle.Add(-1)
	}
}

// end lets those go that wait for work. The others finish theirs.
func (c *crew[T]) end() { close(c.next) }
