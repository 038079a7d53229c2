package main

import (
	"github.com/spf13/cobra"
	"github.com/tproxyd/tproxyd/pkg/redirect"
)

func cleanupCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:   "cleanup",
		Short: "Remove everything of ours from the kernel",
		Long: `Remove the nftables table, the policy routing rules and the routes that tproxyd
put into the kernel. It needs neither a daemon nor a file, and twice is once.
A table that belongs to a living daemon is not touched: stop the daemon first.`,
		Example: "  tproxyd cleanup",
		Args:    cobra.NoArgs,
		RunE:    func(*cobra.Command, []string) error { return failed(redirect.Remove()) },
	}
}
