package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/tproxyd/tproxyd/internal/config"
	"github.com/tproxyd/tproxyd/internal/control"
	"github.com/tproxyd/tproxyd/pkg/routes"
)

// controlFlags gives a command -c and --socket and returns what finds the
// daemon by them.
func controlFlags(e *env, c *cobra.Command) func() (*control.Client, error) {
	var conf, socket string
	configFlag(c, &conf)
	c.Flags().StringVar(&socket, "socket", "", "the daemon's control socket at `PATH`, in place of the one that the file names")
	return func() (*control.Client, error) {
		if socket != "" {
			return control.NewClient(socket), nil
		}
		cfg, diags := config.Load(conf)
		if err := e.tell(diags); err != nil {
			return nil, err
		}
		return control.NewClient(cfg.Control.Socket), nil
	}
}

// reloaded is what became of a reload, for programs.
type reloaded struct {
	Result string   `json:"result"` // reloaded or refused
	Errors []string `json:"errors"` // of the files, one a line
}

// reloadLimit is less than what systemd waits for by default.
const reloadLimit = 80 * time.Second

func reloadCommand(e *env) *cobra.Command {
	var upgrade, asJSON bool
	c := &cobra.Command{
		Use:   "reload [--upgrade | --json] [-c FILE | --socket PATH]",
		Short: "Make the running daemon read its files again",
		Long: `Make the running daemon read its files again. No flow is cut, but those that
were DIRECT and no longer may be. If a file has an error the old rules stay in
force, the errors are printed and the exit status is 2.

With --upgrade, if the daemon runs another program file than this one, as after an
upgrade, this one takes its place without cutting a flow: it is started as the
daemon was, with --takeover, and the command ends when it serves. If it does not,
the daemon that runs goes on, and the exit status is that of the new one. A daemon
in a unit of systemd is upgraded so by "systemctl reload".`,
		Example: "  tproxyd reload\n  tproxyd reload --socket /run/tproxyd/control.sock\n  tproxyd reload --upgrade",
		Args:    cobra.NoArgs,
	}
	daemon := controlFlags(e, c)
	c.Flags().BoolVar(&upgrade, "upgrade", false, "take the daemon's place if it is of another program file than this command")
	c.Flags().BoolVar(&asJSON, "json", false, "print JSON: the result, reloaded or refused, and the errors")
	c.MarkFlagsMutuallyExclusive("json", "upgrade")
	c.RunE = func(c *cobra.Command, _ []string) error {
		client, err := daemon()
		if err != nil {
			var diags routes.Diagnostics
			if asJSON && errors.As(err, &diags) {
				json.NewEncoder(e.stdout).Encode(reloaded{"refused", strings.Split(diags.Error(), "\n")})
			}
			return err
		}
		ctx, cancel := context.WithTimeout(c.Context(), reloadLimit)
		defer cancel()
		if upgrade {
			if done, err := e.upgrade(ctx, client); done || err != nil {
				return err
			}
		}
		err = client.Reload(ctx)
		var refused *control.Refused
		result := reloaded{Result: "reloaded", Errors: []string{}}
		switch {
		case errors.As(err, &refused):
			result = reloaded{"refused", strings.Split(strings.TrimRight(refused.Text, "\n"), "\n")}
			err = errRefused
		case err != nil:
			return failed(err)
		}
		if asJSON {
			if err := json.NewEncoder(e.stdout).Encode(result); err != nil {
				return failed(err)
			}
		} else if refused != nil {
			fmt.Fprintln(e.stderr, strings.Join(result.Errors, "\n"))
		}
		return err
	}
	return c
}
