package netns_test

import (
	"fmt"
	"io"
	"maps"
	"net"
	"net/netip"
	"sync"
	"testing"
	"time"
)

// Topology: world, with real servers that are killed and started again below a
// list of them:
//
//	client --300 flows/s--> gateway --+--> socks1 (danted) ------> outside
//	                                  +--> socks2 (microsocks) --> outside
//	                                  '--> inside (microsocks) --> outside

// whoTCP is a service that tells who asks whom it sees, and waits for the end.
func whoTCP(c *net.TCPConn) {
	c.Read(make([]byte, 1))
	fmt.Fprintln(c, netip.MustParseAddrPort(c.RemoteAddr().String()).Addr())
	io.Copy(io.Discard, c)
}

// carrier connects to such a service, and returns whom it sees and the
// connection.
func (w *world) carrier(to string) (from string, c net.Conn, err error) {
	if c, err = w.client.dial("tcp", to, 5*time.Second); err != nil {
		return "", nil, err
	}
	c.SetDeadline(time.Now().Add(5 * time.Second))
	c.Write([]byte("?"))
	if _, err = fmt.Fscanln(c, &from); err != nil {
		c.Close()
		return "", nil, err
	}
	return from, c, nil
}

// TestFailoverKilled: a server that is killed takes with it the flows that it
// carries, and no other.
func TestFailoverKilled(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one, two := w.sites()
	start := map[string]func() *process{
		socks1Out: func() *process { return interopDante("none")(t, one) },
		socks2Out: func() *process { return interopMicrosocks()(t, two) },
	}
	servers := map[string]*process{socks1Out: start[socks1Out](), socks2Out: start[socks2Out]()}
	w.outside.answerTCP(t, outsideAt+":7000", whoTCP)
	serve(t, w.gateway, settings{routes: "SERVER int1 198.51.100.11\nSERVER int2 198.51.100.12\nBALANCE\nSOCKD5 @=int1,int2 *\n"})
	w.observe(t)

	type visit struct {
		began time.Time
		took  time.Duration
		from  string
		err   error
	}
	var mu sync.Mutex
	var visits []visit
	var all sync.WaitGroup
	end := make(chan struct{})
	all.Go(func() {
		tick := time.NewTicker(time.Second / 300)
		defer tick.Stop()
		for {
			select {
			case <-end:
				return
			case <-tick.C:
			}
			all.Go(func() {
				began := time.Now()
				from, c, err := w.carrier(outsideAt + ":7000")
				if err == nil {
					c.Close()
				}
				mu.Lock()
				defer mu.Unlock()
				visits = append(visits, visit{began, time.Since(began), from, err})
			})
		}
	})
	time.Sleep(500 * time.Millisecond)
	type outage struct {
		server           string
		kill, down, back time.Time
	}
	var outages []outage
	for _, server := range []string{socks1Out, socks2Out, socks1Out} {
		o := outage{server: server, kill: time.Now()}
		servers[server].kill()
		o.down = time.Now()
		time.Sleep(time.Second)
		servers[server] = start[server]()
		o.back = time.Now()
		time.Sleep(2 * time.Second)
		outages = append(outages, o)
	}
	close(end)
	all.Wait()

	for _, o := range outages {
		down, shares := 0, map[string]int{}
		for _, v := range visits {
			switch {
			case v.began.After(o.down) && v.began.Before(o.back):
				down++
				if v.err != nil || v.took > 2*time.Second {
					t.Errorf("%v after %s was killed: %v after %v", v.began.Sub(o.down), o.server, v.err, v.took)
				}
			case v.began.After(o.back.Add(time.Second)) && v.began.Before(o.back.Add(2*time.Second)):
				shares[v.from]++
			}
		}
		// However slow the machine: of 60 flows a quarter is four standard
		// deviations less than half.
		if total := shares[socks1Out] + shares[socks2Out]; down < 60 || total < 60 || shares[o.server] < total/4 {
			t.Errorf("%d flows without %s, and a second after it was back shares of %v", down, o.server, shares)
		}
	}
	lost := 0
	for _, v := range visits {
		if v.err == nil {
			continue
		}
		lost++
		under := false // way when a server was killed
		for _, o := range outages {
			under = under || v.began.Before(o.down) && v.began.Add(v.took).After(o.kill)
		}
		if !under {
			t.Errorf("lost: %v after %v", v.err, v.took)
		}
	}
	t.Logf("%d flows, %d lost with the server that carried them", len(visits), lost)
	if n, who := w.leaked(t); n != 0 {
		t.Errorf("%d packets leaked:\n%s", n, who)
	}
}

// TestBalanceState: what depends on what there is: the load of each server, and
// which of them there are.
func TestBalanceState(t *testing.T) {
	t.Parallel()
	w := newWorld(t)
	one, two := w.sites()
	three := &site{w.inside, insideAt, []string{insideAt}}
	interopMicrosocks()(t, one)
	interopMicrosocks()(t, three)
	server := interopMicrosocks()(t, two)
	const least, hash, n = 20000, 30000, 60
	for i := range n {
		w.outside.answerTCP(t, fmt.Sprintf("%s:%d", outsideAt, hash+i), whoTCP)
	}
	w.outside.answerTCP(t, fmt.Sprintf("%s:%d", outsideAt, least), whoTCP)
	serve(t, w.gateway, settings{routes: fmt.Sprintf(`SERVER one 198.51.100.11
SERVER two 198.51.100.12
SERVER three %s
SOCKD5 @=one,two,three * eq %d balance=leastload
SOCKD5 @=one,two,three * balance=hash
`, insideAt, least)})

	// Flows that stay spread evenly; so they do where some have gone.
	open := map[string][]net.Conn{}
	fill := func(n int) {
		t.Helper()
		for range n {
			from, c, err := w.carrier(fmt.Sprintf("%s:%d", outsideAt, least))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
			open[from] = append(open[from], c)
		}
		for _, s := range []*site{one, two, three} {
			if len(open[s.out[0]]) != 10 {
				t.Errorf("%s carries %d of 30 flows", s.at, len(open[s.out[0]]))
			}
		}
	}
	fill(30)
	for _, c := range open[socks1Out] {
		c.Close()
	}
	open[socks1Out] = nil
	time.Sleep(300 * time.Millisecond) // the gateway has seen their end
	fill(10)

	// Each destination has its server: always the same one, another one while
	// that is gone, and it again when it is back.
	carriers := func() map[int]string {
		t.Helper()
		m := map[int]string{}
		for i := range n {
			from, c, err := w.carrier(fmt.Sprintf("%s:%d", outsideAt, hash+i))
			if err != nil {
				t.Fatal(err)
			}
			c.Close()
			m[i] = from
		}
		return m
	}
	before := carriers()
	if again := carriers(); !maps.Equal(before, again) {
		t.Errorf("%v, and then %v", before, again)
	}
	server.kill()
	moved := map[string]int{}
	for i, from := range carriers() {
		switch {
		case before[i] == socks2Out && from != socks2Out:
			moved[from]++
		case before[i] != from:
			t.Errorf("destination %d went from %s to %s", i, before[i], from)
		}
	}
	if len(moved) != 2 {
		t.Errorf("the lost server's destinations went to %v", moved)
	}
	interopMicrosocks()(t, two)
	eventually(t, 3*time.Second, "each destination has its server back", func() bool { return maps.Equal(before, carriers()) })
}
