package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/tproxyd/tproxyd/internal/config"
	"github.com/tproxyd/tproxyd/internal/control"
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

func reloadCommand(e *env) *cobra.Command {
	c := &cobra.Command{
		Use:   "reload [-c FILE | --socket PATH]",
		Short: "Make the running daemon read its files again",
		Long: `Make the running daemon read its files again. No flow is cut, but those that
were DIRECT and no longer may be. If a file has an error the old rules stay in
force, the errors are printed and the exit status is 2.`,
		Example: "  tproxyd reload\n  tproxyd reload --socket /run/tproxyd/control.sock",
		Args:    cobra.NoArgs,
	}
	daemon := controlFlags(e, c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		client, err := daemon()
		if err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(c.Context(), time.Minute)
		defer cancel()
		err = client.Reload(ctx)
		var refused *control.Refused
		if errors.As(err, &refused) {
			fmt.Fprintln(e.stderr, strings.TrimRight(refused.Text, "\n"))
			return errRefused
		}
		return failed(err)
	}
	return c
}
