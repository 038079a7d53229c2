// Command tproxyd is a transparent redirector for Linux gateways: it takes
// flows out of the kernel, knows their names, decides by rules and carries
// them to SOCKS servers. See tproxyd(8).
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/tproxyd/tproxyd/internal/config"
	"github.com/tproxyd/tproxyd/pkg/routes"
)

// env is all that a command has of its surroundings.
type env struct {
	stdout, stderr io.Writer
	getenv         func(string) string
}

// The exit statuses of every command.
const (
	exitDone   = 0
	exitFailed = 1 // at run time
	exitUsage  = 2 // the command line or a file is wrong
)

func main() {
	os.Exit(run(&env{os.Stdout, os.Stderr, os.Getenv}, os.Args[1:]))
}

// run executes one command line and returns its exit status.
func run(e *env, args []string) int {
	root := rootCommand(e)
	root.SetArgs(args)
	root.SetOut(e.stdout)
	root.SetErr(e.stderr)
	c, err := root.ExecuteContextC(context.Background())
	return e.status(c, err)
}

// status says what went wrong in a command and returns the exit status that it
// deserves.
func (e *env) status(c *cobra.Command, err error) int {
	var diags routes.Diagnostics
	var failed *failure
	var x exited
	switch {
	case errors.As(err, &x):
		return int(x)
	case err == nil:
		return exitDone
	case errors.As(err, &diags), errors.Is(err, errRefused): // said already, place by place
		return exitUsage
	case errors.As(err, &failed):
		fmt.Fprintf(e.stderr, "tproxyd: %v\n", failed.err)
		if h := hint(failed.err); h != "" {
			fmt.Fprintf(e.stderr, "hint: %s\n", h)
		}
		return exitFailed
	}
	fmt.Fprintf(e.stderr, "tproxyd: %v\nTry '%s --help'.\n", err, c.CommandPath())
	return exitUsage
}

// errRefused says that the daemon refused the files, and that what it said of
// them has been printed.
var errRefused = errors.New("refused")

// failure is an error at run time; every other error of a command is one of
// its command line.
type failure struct{ err error }

func (f *failure) Error() string { return f.err.Error() }
func (f *failure) Unwrap() error { return f.err }

// failed marks an error as one at run time; nil stays nil.
func failed(err error) error {
	if err == nil {
		return nil
	}
	return &failure{err}
}

// hint is what an operator can do about an error; empty: nothing is known.
func hint(err error) string {
	switch {
	case errors.Is(err, syscall.EPERM), errors.Is(err, syscall.EACCES):
		return "run it as root, or give it CAP_NET_ADMIN, CAP_NET_RAW and CAP_NET_BIND_SERVICE; see tproxyd(8), CAPABILITIES"
	}
	return ""
}

// tell writes diagnostics to standard error and returns them as an error if
// one of them is.
func (e *env) tell(diags routes.Diagnostics) error {
	for _, d := range diags {
		fmt.Fprintln(e.stderr, d)
	}
	if diags.HasErrors() {
		return diags
	}
	return nil
}

func rootCommand(e *env) *cobra.Command {
	root := &cobra.Command{
		Use:   "tproxyd",
		Short: "Transparent redirector to SOCKS servers for Linux gateways",
		Long: strings.TrimSpace(`
tproxyd takes flows out of the kernel with nftables TPROXY rules, answers DNS
with synthetic addresses so that it knows their names, decides by rules in the
manner of Hummingbird's socks.cnf, and carries them to SOCKS servers. Hosts
behind it are not touched.`),
		Example: strings.Trim(`
  tproxyd demo                                  see it work, no set-up needed
  tproxyd check -c /etc/tproxyd/tproxyd.toml    every mistake in the files
  tproxyd explain www.example.org:80            what becomes of a flow, and why
  tproxyd serve -c /etc/tproxyd/tproxyd.toml    the daemon`, "\n"),
		Version:       buildVersion(),
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.NoArgs,
		RunE:          func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	root.SetVersionTemplate("tproxyd {{.Version}}\n")
	root.AddCommand(
		serveCommand(e), checkCommand(e), explainCommand(e), convertCommand(e), reloadCommand(e), statusCommand(e), flowsCommand(e), doctorCommand(e),
		closeCommand(e), runCommand(e), attachCommand(e), cleanupCommand(e), demoCommand(e), completionCommand(e), versionCommand(e),
	)
	return root
}

// takes is what a command takes, by the words of its usage line.
func takes(names ...string) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		switch {
		case len(args) < len(names):
			return fmt.Errorf("%s: %s is missing", c.Name(), names[len(args)])
		case len(args) > len(names):
			return fmt.Errorf("%s: %q is too much, it takes one %s", c.Name(), args[len(names)], strings.Join(names, " "))
		}
		return nil
	}
}

// configFlag gives a command the flag -c.
func configFlag(c *cobra.Command, path *string) {
	c.Flags().StringVarP(path, "config", "c", config.DefaultPath, "the daemon's `FILE`")
}
