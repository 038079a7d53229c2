package relay

import (
	"sync"
	"testing"
	"time"
)

func TestCrew(t *testing.T) {
	var all sync.WaitGroup
	done := make(chan int, 3*crewIdle)
	hold := make(chan struct{})
	c := newCrew(&all, func(n int) {
		if n < 0 {
			<-hold
		}
		done <- n
	})
	waiting := func(want int) {
		t.Helper()
		for end := time.Now().Add(10 * time.Second); int(c.idle.Load()) != want; time.Sleep(time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("%d goroutines wait for work, want %d", c.idle.Load(), want)
			}
		}
	}
	for n := range 10 {
		c.do(n)
		if got := <-done; got != n {
			t.Fatal(got)
		}
		waiting(1) // the one that there is has done all
	}
	for range 2 * crewIdle {
		c.do(-1) // none waits for another
	}
	close(hold)
	for range 2 * crewIdle {
		<-done
	}
	waiting(crewIdle)
	c.end()
	all.Wait()
}
