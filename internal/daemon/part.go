package daemon

import (
	"context"
	"fmt"
	"sync"

	"golang.org/x/sync/errgroup"
)

// part is tasks of the daemon's errgroup that end together, when the group does
// or before.
type part struct {
	group   *errgroup.Group
	ctx     context.Context
	end     context.CancelFunc
	running sync.WaitGroup
}

// newPart makes a part of the group whose context is given.
func newPart(ctx context.Context, g *errgroup.Group) *part {
	p := &part{group: g}
	p.ctx, p.end = context.WithCancel(ctx)
	return p
}

// task runs f until it returns; an error ends the daemon, unless the part has
// been ended.
func (p *part) task(name string, f func(context.Context) error) {
	p.running.Add(1)
	p.group.Go(func() error {
		defer p.running.Done()
		if err := f(p.ctx); err != nil && p.ctx.Err() == nil {
			return fmt.Errorf("daemon: %s: %w", name, err)
		}
		return nil
	})
}

// stop ends the tasks and waits for them.
func (p *part) stop() {
	p.end()
	p.running.Wait()
}
