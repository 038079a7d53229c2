package main

import (
	"fmt"

	"github.com/spf13/cobra"
)

func completionCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:   "completion bash|zsh|fish",
		Short: "Print what makes a shell complete commands and options",
		Example: `  source <(tproxyd completion bash)
  tproxyd completion zsh >/usr/share/zsh/site-functions/_tproxyd`,
		Args:      takes("shell"),
		ValidArgs: []string{"bash", "zsh", "fish"},
		RunE: func(c *cobra.Command, args []string) error {
			switch args[0] {
			case "bash":
				return failed(c.Root().GenBashCompletionV2(e.stdout, true))
			case "zsh":
				return failed(c.Root().GenZshCompletion(e.stdout))
			case "fish":
				return failed(c.Root().GenFishCompletion(e.stdout, true))
			}
			return fmt.Errorf("completion: %q is not bash, zsh or fish", args[0])
		},
	}
}
