package main

import (
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"github.com/tproxyd/tproxyd/pkg/routes/convert"
)

func convertCommand(e *env) *cobra.Command {
	var from string
	c := &cobra.Command{
		Use:   "convert --from FORMAT FILE",
		Short: "Write the rules of an older SOCKS client in the language of this one",
		Long: `Read the configuration of an older SOCKS client and print what it says as a file
of rules. Standard error tells the fate of each of its lines: kept, changed and
how, left out, or refused and why. A refused line stands in the output as a
comment, and the exit status is 2 then. What it would have denied or proxied is
denied in its place as far as its destination is known. FILE can be - for
standard input. User names and passwords are not copied.

Formats: ` + strings.Join(convert.Formats(), ", ") + ".",
		Example: "  tproxyd convert --from hummingbird old/socks.cnf > socks.cnf\n  tproxyd convert --from dante /etc/socks.conf > socks.cnf",
		Args:    takes("FILE"),
	}
	c.Flags().StringVar(&from, "from", "", "`FORMAT` of the file: "+strings.Join(convert.Formats(), ", "))
	c.MarkFlagRequired("from")
	c.RunE = func(_ *cobra.Command, args []string) error {
		return e.convert(convert.Format(strings.ToLower(from)), args[0])
	}
	return c
}

func (e *env) convert(f convert.Format, path string) error {
	if all := convert.Formats(); !slices.Contains(all, string(f)) {
		return fmt.Errorf("convert: no format %q; there are %s", f, strings.Join(all, ", "))
	}
	in, name := io.Reader(os.Stdin), "-"
	if path != "-" {
		file, err := os.Open(path)
		if err != nil {
			return err
		}
		defer file.Close()
		in, name = file, path
	}
	r, err := convert.Convert(f, in)
	if err != nil {
		return err
	}
	var counts [convert.Note + 1]int
	for _, line := range r.Report {
		counts[line.Fate]++
		place := name
		if line.Line > 0 {
			place = fmt.Sprintf("%s:%d", name, line.Line)
		}
		fmt.Fprintf(e.stderr, "%s: %s: %s\n", place, line.Fate, line.Text)
	}
	fmt.Fprintf(e.stderr, "%s: %d kept, %d changed, %d left out, %d refused\n", name, counts[convert.Kept], counts[convert.Changed], counts[convert.LeftOut], counts[convert.Refused])
	if _, err := e.stdout.Write(r.Rules); err != nil {
		return failed(err)
	}
	if r.Refused() {
		return errRefused
	}
	return nil
}
