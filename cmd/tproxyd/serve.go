package main

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"

	"github.com/spf13/cobra"
	"github.com/tproxyd/tproxyd/internal/daemon"
	"github.com/tproxyd/tproxyd/internal/sandbox"
)

func serveCommand(e *env) *cobra.Command {
	var conf string
	var logs serveLog
	var takeover bool
	c := &cobra.Command{
		Use:   "serve [-c FILE] [--takeover]",
		Short: "Run the daemon",
		Long: `Run the daemon in the foreground. It prints one line when it is ready and tells
systemd. SIGHUP makes it read its files again, SIGUSR1 write its state to the log,
SIGTERM and SIGINT stop it.

With --takeover it takes the place of the daemon that runs, which carries to
their end the flows that it has, for "drain" seconds at most, and ends. No flow
is cut or refused, nor a question of DNS. If that cannot be, the daemon that runs
goes on, and the exit status is 2 if what the files say is the reason. If none
runs it starts as always.`,
		Example: "  tproxyd serve -c /etc/tproxyd/tproxyd.toml\n  tproxyd serve --log-level debug --log-format json\n  tproxyd serve --takeover",
		Args:    cobra.NoArgs,
	}
	configFlag(c, &conf)
	c.Flags().BoolVar(&takeover, "takeover", false, "take the place of the daemon that runs, without cutting a flow")
	logs.flags(c)
	c.RunE = func(c *cobra.Command, _ []string) error {
		log, err := logs.logger(e)
		if err != nil {
			return err
		}
		slog.SetDefault(log) // what net/http prints goes the same way
		slog.SetLogLoggerLevel(slog.LevelWarn)
		if e.getenv(searcherVariable) != "" {
			return failed(e.search())
		}
		setup, diags := daemon.Load(conf, e.getenv("CREDENTIALS_DIRECTORY"))
		if err := e.tell(diags); err != nil {
			return err
		}
		var looks *searcher
		if setup.Config.Sandbox && setup.NamesPrograms() {
			looks = &searcher{}
			setup.SearchBy(looks.ask)
		}
		ctx, stop := signal.NotifyContext(c.Context(), syscall.SIGTERM, syscall.SIGINT)
		defer stop()
		hup := make(chan os.Signal, 1)
		signal.Notify(hup, syscall.SIGHUP)
		defer signal.Stop(hup)
		usr1 := make(chan os.Signal, 1)
		signal.Notify(usr1, syscall.SIGUSR1)
		defer signal.Stop(usr1)
		e.leaveProcessors()
		var d *daemon.Daemon
		if takeover {
			d, err = daemon.TakeOver(ctx, setup, log)
		} else {
			d, err = daemon.New(setup, log)
		}
		var refused *daemon.RefusedError
		if errors.As(err, &refused) && refused.Files {
			fmt.Fprintf(e.stderr, "tproxyd: %v\n", err)
			return errRefused
		}
		if err != nil {
			return failed(err)
		}
		go dumpState(ctx, usr1, func() any { return d.Status() }, log)
		if looks != nil { // from here on descriptors of others are none that it would get
			if err := looks.start(e); err != nil {
				return failed(err)
			}
			defer looks.stop()
		}
		if setup.Config.Sandbox {
			e.enterSandbox(setup, log)
		}
		return failed(d.Run(ctx, daemon.Signals{Reload: hup, Version: buildVersion(), Ready: func(line string) { fmt.Fprintln(e.stdout, line) }}))
	}
	return c
}

// enterSandbox gives up the rights that serving needs no longer, for good.
func (e *env) enterSandbox(setup *daemon.Setup, log *slog.Logger) {
	read, write := setup.Files()
	read = append(read, e.getenv("SSL_CERT_FILE")) // of crypto/x509
	for _, dir := range filepath.SplitList(e.getenv("SSL_CERT_DIR")) {
		read = append(read, filepath.Join(dir, "ca.pem"))
	}
	for _, what := range sandbox.Enter(sandbox.Files{Read: sandbox.Folders(read...), Write: sandbox.Folders(write...)}) {
		log.Warn("the sandbox is weaker than it could be", "missing", what)
	}
}

// leaveProcessors takes half of the processors, at least one, unless the
// environment says how many. Most of what a flow costs is the kernel's work on
// its packets; where that finds the other half free, a byte and a connection
// cost less, and more of them pass.
func (e *env) leaveProcessors() {
	if e.getenv("GOMAXPROCS") == "" {
		runtime.GOMAXPROCS(max(1, runtime.GOMAXPROCS(0)/2))
	}
}

func closeCommand(e *env) *cobra.Command {
	var conf string
	c := &cobra.Command{
		Use:   "close [-c FILE]",
		Short: "Refuse what would be proxied, without a daemon",
		Long: `Put the closed table in place: what the rules send through a SOCKS server and
port 53 are refused at once, what they make DIRECT by address passes. Meant for
the time between boot and the daemon; 'tproxyd serve' takes the table over,
'tproxyd cleanup' removes it. It needs no credentials. If a file has an
error it closes everything, and the exit status is 2.`,
		Example: "  tproxyd close -c /etc/tproxyd/tproxyd.toml",
		Args:    cobra.NoArgs,
	}
	configFlag(c, &conf)
	c.RunE = func(*cobra.Command, []string) error {
		setup, diags := daemon.LoadClosed(conf)
		wrong := e.tell(diags)
		if setup == nil {
			return wrong
		}
		if err := daemon.CloseTable(setup); err != nil {
			return failed(err)
		}
		if wrong != nil {
			fmt.Fprintln(e.stderr, "tproxyd: closed all the same: without rules nothing is DIRECT")
		}
		return wrong
	}
	return c
}
