package main

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
	"github.com/tproxyd/tproxyd/pkg/redirect"
)

// version is set by the linker (-X main.version=…); else the module's own.
var version = ""

func versionCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "Print the version, that of Go, and what the kernel can do",
		Example: "  tproxyd version",
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			fmt.Fprintf(e.stdout, "tproxyd %s\n%s %s/%s\n", buildVersion(), runtime.Version(), runtime.GOOS, runtime.GOARCH)
			for _, a := range redirect.Abilities() {
				fmt.Fprintf(e.stdout, "%-28s %s\n", a.Name, a.State)
			}
			return nil
		},
	}
}

func buildVersion() string {
	if version != "" {
		return version
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" {
		return info.Main.Version
	}
	return "(devel)"
}
