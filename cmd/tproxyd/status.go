package main

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"github.com/tproxyd/tproxyd/internal/daemon"
)

func statusCommand(e *env) *cobra.Command {
	var asJSON, all bool
	c := &cobra.Command{
		Use:   "status [--all] [--json] [-c FILE | --socket PATH]",
		Short: "Print how the running daemon is doing",
		Long: `Print how the running daemon is doing: what is wrong, rules and servers with what
they did, DNS, and how near its limits are. Of the rules those are shown that
decided something; --all shows every one.`,
		Example: "  tproxyd status\n  tproxyd status --json | jq .servers",
		Args:    cobra.NoArgs,
	}
	find := controlFlags(e, c)
	c.Flags().BoolVar(&asJSON, "json", false, "print all figures as JSON")
	c.Flags().BoolVar(&all, "all", false, "print the rules too that decided nothing")
	c.RunE = func(c *cobra.Command, _ []string) error {
		client, err := find()
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(c.Context(), 10*time.Second)
		defer cancel()
		b, err := client.Status(ctx)
		if err != nil {
			return failed(err)
		}
		if asJSON {
			_, err := e.stdout.Write(b)
			return failed(err)
		}
		var s daemon.Status
		if err := json.Unmarshal(b, &s); err != nil {
			return failed(fmt.Errorf("status: the daemon's answer: %w", err))
		}
		p := page{tabwriter.NewWriter(e.stdout, 0, 0, 2, ' ', 0)}
		p.status(s, all, time.Now())
		return failed(p.Flush())
	}
	return c
}

// page writes a Status for people.
type page struct{ *tabwriter.Writer }

func (p page) line(format string, args ...any) { fmt.Fprintf(p, format+"\n", args...) }

func (p page) status(s daemon.Status, all bool, now time.Time) {
	p.line("up\t%s, since %s, version %s, process %d", span(now.Sub(s.Started)), s.Started.Local().Format(time.DateTime), s.Version, s.Pid)
	if s.Config != "" {
		p.line("file\t%s, reloaded %d times, refused %d", s.Config, s.Reloads.Done, s.Reloads.Refused)
	}
	p.line("flows\t%d TCP now, %d UDP; since the start %d proxied, %d dialled here, %s up, %s down",
		s.Flows.Live, s.UDP.Flows, s.Flows.Proxied, s.Flows.Direct, size(s.Flows.Up+s.UDP.Up), size(s.Flows.Down+s.UDP.Down))
	p.line("refused\t%s; datagrams: %d", counts(s.Flows.Refused), s.UDP.Refused)
	if d := counts(s.UDP.Dropped); d != nothing {
		p.line("dropped\tdatagrams: %s", d)
	}
	d := s.DNS
	p.line("dns\t%d synthetic, %d local, %d remote, %d refused, %d failed, %d without an answer", d.Synthetic, d.Local, d.Remote, d.Refused, d.Failed, d.Dropped)
	p.line("names\t%d of %d, %d with living flows; %d gave way, %d times none was free", d.Pool.Names, d.Pool.Max, d.Pool.Pinned, d.Pool.Evicted, d.Pool.Full)
	k := s.Kernel
	p.line("kernel\tpackets: %d direct, %d denied, %d refused, %d kept back by the guard", k.Direct.Packets, k.Denied.Packets, k.Refused.Packets, k.Guard.Packets)
	p.line("healed\t%d tables, %d rules, %d routes, %d marks", k.Healed.Tables, k.Healed.Rules, k.Healed.Routes, k.Healed.Marks)
	for _, b := range s.Before {
		p.line("before\tprocess %d still carries %d TCP flows and %d UDP sessions", b.Pid, b.Flows, b.Sessions)
	}
	for _, t := range s.Trouble {
		p.line("TROUBLE\t%s", t)
	}
	p.Flush() // the tables below have columns of their own

	p.line("\nLIMIT\tUSED\tOF\t")
	for _, l := range s.Limits {
		p.line("%s\t%d\t%d\t%s", strings.ReplaceAll(l.Name, "_", " "), l.Used, l.Max, percent(l.Used, l.Max))
	}
	p.Flush()

	p.servers(s)
	p.line("\nRULE\tFLOWS\tUP\tDOWN\tKERNEL\t")
	hidden := 0
	for _, r := range s.Rules {
		if r.Flows == 0 && r.Packets == 0 && !all {
			hidden++
			continue
		}
		p.line("%s\t%d\t%s\t%s\t%s\t%s", r.Position, r.Flows, size(r.Up), size(r.Down), size(r.Bytes), r.Text)
	}
	if g := s.Gone; g.Flows > 0 || g.Packets > 0 {
		p.line("gone\t%d\t%s\t%s\t%s\trules that were in force before", g.Flows, size(g.Up), size(g.Down), size(g.Bytes))
	}
	p.Flush()
	if hidden > 0 {
		p.line("%d more decided nothing", hidden)
	}
}

func (p page) servers(s daemon.Status) {
	total := 0
	for _, u := range s.Servers {
		total += int(u.Carried + u.Associations)
	}
	if len(s.Servers) > 0 {
		p.line("\nSERVER\tADDRESS\tSTATE\tSHARE\tFLOWS\tCARRIED\tUDP\tFAULTS\tGREETS IN\tWARM")
	}
	for _, u := range s.Servers {
		state := "up"
		switch {
		case u.Trial:
			state = "coming back"
		case !u.Up:
			state = "AT FAULT"
		}
		setup := "-"
		if u.Setup > 0 {
			setup = fmt.Sprintf("%.1f ms", u.Setup*1000)
		}
		p.line("%s\t%s\t%s\t%s\t%d\t%d\t%d\t%d\t%s\t%d", u.Name, u.Address, state, percent(int(u.Carried+u.Associations), total), u.Flows, u.Carried, u.Associations, u.Faults, setup, u.Warm)
	}
	p.Flush()
}

// nothing is what counts says of no count at all.
const nothing = "none"

// counts spells what is counted by reason, the most frequent first.
func counts(by map[string]uint64) string {
	var reasons []string
	for reason, n := range by {
		if n > 0 {
			reasons = append(reasons, reason)
		}
	}
	if reasons == nil {
		return nothing
	}
	slices.SortFunc(reasons, func(a, b string) int {
		if by[a] != by[b] {
			return int(min(max(int64(by[b])-int64(by[a]), -1), 1))
		}
		return strings.Compare(a, b)
	})
	for i, reason := range reasons {
		reasons[i] = fmt.Sprintf("%d %s", by[reason], reason)
	}
	return strings.Join(reasons, ", ")
}

func percent(part, whole int) string {
	if whole <= 0 {
		return "-"
	}
	return fmt.Sprintf("%.0f %%", 100*float64(part)/float64(whole))
}

// size spells a number of bytes with three digits or so.
func size(n uint64) string {
	const units = "kMGTPE"
	if n < 1000 {
		return fmt.Sprintf("%d B", n)
	}
	v, unit := float64(n)/1000, 0
	for v >= 999.5 {
		v /= 1000
		unit++
	}
	if v < 10 {
		return fmt.Sprintf("%.1f %cB", v, units[unit])
	}
	return fmt.Sprintf("%.0f %cB", v, units[unit])
}

// span spells a time by its two largest units.
func span(d time.Duration) string {
	d = d.Round(time.Second)
	days, rest := d/(24*time.Hour), d%(24*time.Hour)
	switch {
	case days > 0:
		return fmt.Sprintf("%dd%dh", days, rest/time.Hour)
	case d >= time.Hour:
		return fmt.Sprintf("%dh%dm", d/time.Hour, d%time.Hour/time.Minute)
	}
	return d.String()
}
