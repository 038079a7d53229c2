package daemon

import (
	"encoding/json"
	"fmt"
	"reflect"
	"strings"
	"testing"
)

// TestCountsAdd: every counter of the process before is added, and no figure that is
// of this moment; rules are found by file and words, and what is not found is gone.
func TestCountsAdd(t *testing.T) {
	moment := []string{"Flows.Live", "DNS.Pool.Names", "DNS.Pool.Max", "DNS.Pool.Pinned", "Relay.Conns", "Relay.Clients", "Relay.Streams", "Relay.Pipes", "Relay.PipesLent",
		"Relay.MaxConns", "Relay.MaxPipes", "UDP.Sessions", "UDP.Flows", "UDP.Outlets", "UDP.Sockets", "UDP.MaxSessions", "UDP.MaxFlows", "UDP.MaxSockets"}
	var c, o counts
	fields := map[string]int{}
	var fill func(path string, v reflect.Value, by int)
	fill = func(path string, v reflect.Value, by int) {
		switch v.Kind() {
		case reflect.Struct:
			for i := range v.NumField() {
				if f := v.Type().Field(i); f.IsExported() {
					fill(strings.TrimPrefix(path+"."+f.Name, "."), v.Field(i), by)
				}
			}
		case reflect.Uint64:
			v.SetUint(uint64(by))
			fields[path]++
		case reflect.Int, reflect.Int64:
			v.SetInt(int64(by))
			fields[path]++
		case reflect.Map:
			v.Set(reflect.ValueOf(map[string]uint64{"why": uint64(by)}))
		}
	}
	fill("", reflect.ValueOf(&c).Elem(), 100)
	fill("", reflect.ValueOf(&o).Elem(), 7)
	c.Rules = []RuleStatus{{Position: "socks.cnf:3", Text: "DIRECT *", Flows: 1}, {Position: "socks.cnf:4", Text: "DIRECT *", Flows: 1}, {Position: "other.cnf:1", Text: "DENY *", Up: 1}}
	o.Rules = []RuleStatus{
		{Position: "socks.cnf:9", Text: "DIRECT *", Flows: 10, Up: 20, Down: 30, Packets: 40, Bytes: 50},
		{Position: "socks.cnf:10", Text: "DIRECT *", Flows: 100},
		{Position: "socks.cnf:1", Text: "DENY *", Flows: 1000},
	}
	c.add(&o)
	var look func(path string, v reflect.Value)
	look = func(path string, v reflect.Value) {
		want := uint64(107)
		if path == "Gone.Flows" {
			want += 1000
		}
		for _, m := range moment {
			if path == m {
				want = 100
			}
		}
		switch v.Kind() {
		case reflect.Struct:
			for i := range v.NumField() {
				if f := v.Type().Field(i); f.IsExported() {
					look(strings.TrimPrefix(path+"."+f.Name, "."), v.Field(i))
				}
			}
		case reflect.Uint64:
			if v.Uint() != want {
				t.Errorf("%s is %d, want %d", path, v.Uint(), want)
			}
		case reflect.Int, reflect.Int64:
			if uint64(v.Int()) != want {
				t.Errorf("%s is %d, want %d", path, v.Int(), want)
			}
		case reflect.Map:
			if n := v.MapIndex(reflect.ValueOf("why")).Uint(); n != 107 {
				t.Errorf("%s is %d, want 107", path, n)
			}
		}
	}
	look("", reflect.ValueOf(c))
	if len(fields) < 30 {
		t.Errorf("only %d figures were looked at", len(fields))
	}
	if r := c.Rules[0]; r.Flows != 111 || r.Up != 20 || r.Down != 30 || r.Packets != 40 || r.Bytes != 50 {
		t.Errorf("the rule has %+v", r)
	}
	if c.Rules[1].Flows != 1 || c.Rules[2].Up != 1 || c.Rules[2].Flows != 0 {
		t.Errorf("the others have %+v", c.Rules[1:])
	}
}

// TestCountsSome: what goes over is bounded, and its sum is whole.
func TestCountsSome(t *testing.T) {
	var c counts
	for i := range maxTold + 10 {
		c.Rules = append(c.Rules, RuleStatus{Position: fmt.Sprintf("socks.cnf:%d", i), Flows: 1}, RuleStatus{Text: "has counted nothing"})
	}
	s := c.some()
	if len(s.Rules) != maxTold || s.Gone.Flows != 10 {
		t.Errorf("%d rules, and %d flows of others", len(s.Rules), s.Gone.Flows)
	}
	if _, err := json.Marshal(s); err != nil {
		t.Error(err)
	}
}

// TestDirectBytes: a table that is made anew counts from 0, and the sum goes on.
func TestDirectBytes(t *testing.T) {
	var b directBytes
	for _, step := range [][2]uint64{{5, 5}, {9, 9}, {9, 9}, {2, 11}, {3, 12}, {0, 12}, {1, 13}} {
		b.saw([2]uint64{step[0], 2 * step[0]})
		for i, want := range []uint64{step[1], 2 * step[1]} {
			if got := b.sum[i] + b.table[i]; got != want {
				t.Errorf("with %d of the table the sum is %d, want %d", step[0], got, want)
			}
		}
	}
}
