package redirect

import (
	"fmt"
	"strings"
)

// Text returns the table of a plan as nft(8) reads it, in the order in which
// its parts refer to one another, as it is on a kernel that knows owners of
// tables and times of flows. Dynamic elements are not in it.
func Text(p Plan) (string, error) {
	if err := p.check(); err != nil {
		return "", err
	}
	groups, err := findCgroups(p.cgroupNames())
	if err != nil {
		return "", err
	}
	t, err := newTable(&p, "a", liveSets[0], p.wantsAlive(), true, groups, logGroup)
	if err != nil {
		return "", err
	}
	var b strings.Builder
	fmt.Fprintf(&b, "table inet %s {\n", tableName)
	for _, o := range briefs() {
		o.write(&b)
	}
	for _, c := range t.counters() {
		fmt.Fprintf(&b, "\tcounter %s {\n\t}\n\n", c)
	}
	for _, s := range t.sets {
		s.text(&b)
	}
	for _, c := range t.chains {
		fmt.Fprintf(&b, "\tchain %s {\n", c.name)
		if c.kind != "" {
			fmt.Fprintf(&b, "\t\ttype %s hook %s priority mangle; policy accept;\n", c.kind, c.name)
		}
		for _, r := range c.rules {
			fmt.Fprintf(&b, "\t\t%s\n", r.text())
		}
		b.WriteString("\t}\n\n")
	}
	return strings.TrimSuffix(b.String(), "\n") + "}\n", nil
}
