package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"time"

	"github.com/spf13/cobra"
	"github.com/tproxyd/tproxyd/internal/config"
	"github.com/tproxyd/tproxyd/internal/daemon"
	"github.com/tproxyd/tproxyd/internal/doctor"
)

func doctorCommand(e *env) *cobra.Command {
	var conf, socket string
	var asJSON bool
	c := &cobra.Command{
		Use:   "doctor [--json] [-c FILE] [--socket PATH]",
		Short: "Look at this host for what would stop flows",
		Long: `Look at this host and at the running daemon, if there is one, for what would stop
flows or let them pass beside the gateway: filters, marks and settings of others,
limits, servers that do not answer, other routers, clients with DNS over HTTPS.
Each finding says what it is, why it matters, and the command that mends it.
Nothing is changed.

The exit status is 1 if there is a finding, and 2 if a file is wrong. A healthy
host is told nothing.`,
		Example: "  tproxyd doctor\n  tproxyd doctor --json -c /etc/tproxyd/tproxyd.toml",
		Args:    cobra.NoArgs,
	}
	configFlag(c, &conf)
	c.Flags().StringVar(&socket, "socket", "", "the daemon's control socket at `PATH`, in place of the one that the file names")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON: the findings, and how each server answered")
	c.RunE = func(c *cobra.Command, _ []string) error {
		setup, err := e.doctorSetup(conf, c.Flags().Changed("config"))
		if err != nil {
			return err
		}
		i, dns := setup.Config.Intercept, setup.Config.DNS
		h := doctor.Host{Marks: i.Mark, Interfaces: i.Interfaces, Synthetic: []netip.Prefix{dns.Pool4, dns.Pool6}, Socket: setup.Config.Control.Socket}
		if socket != "" {
			h.Socket = socket
		}
		if setup.Table != nil {
			h.State = setup.Config.State.Directory
			h.Servers = func(ctx context.Context) ([]doctor.Server, error) { return greetings(ctx, setup) }
		}
		ctx, cancel := context.WithTimeout(c.Context(), time.Minute)
		defer cancel()
		return e.printReport(doctor.Examine(ctx, h), asJSON)
	}
	return c
}

// doctorSetup reads the files. Where none was named and none is there, the host
// is looked at by itself: then Setup.Table is nil.
func (e *env) doctorSetup(conf string, named bool) (*daemon.Setup, error) {
	if _, err := os.Stat(conf); errors.Is(err, fs.ErrNotExist) && !named {
		return &daemon.Setup{Config: config.Default(conf)}, nil
	}
	setup, diags := daemon.Load(conf, e.getenv("CREDENTIALS_DIRECTORY"))
	return setup, e.tell(diags)
}

// greetings asks each server for one.
func greetings(ctx context.Context, setup *daemon.Setup) (list []doctor.Server, err error) {
	answers, err := setup.Greet(ctx)
	for _, a := range answers {
		s := doctor.Server{Name: a.Name, Took: a.Took}
		if a.Err != nil {
			s.Err = a.Err.Error()
		}
		list = append(list, s)
	}
	return list, err
}

func (e *env) printReport(r doctor.Report, asJSON bool) error {
	if asJSON {
		enc := json.NewEncoder(e.stdout)
		enc.SetIndent("", "  ")
		if r.Findings == nil {
			r.Findings = []doctor.Finding{} // a list, for those who read it
		}
		if err := enc.Encode(r); err != nil {
			return failed(err)
		}
	} else {
		for _, f := range r.Findings {
			fmt.Fprintf(e.stdout, "%s: %s\n  why:  %s\n  mend: %s\n", f.Check, f.What, f.Why, f.Mend)
		}
	}
	switch n := len(r.Findings); n {
	case 0:
		return nil
	case 1:
		return failed(errors.New("doctor: 1 finding"))
	default:
		return failed(fmt.Errorf("doctor: %d findings", n))
	}
}
