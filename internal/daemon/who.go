package daemon

import (
	"bufio"
	"fmt"
	"os"

	"github.com/tproxyd/tproxyd/pkg/flow"
)

// who completes a flow by what the kernel has noted of its client. In the user
// namespace of a command or a container users have other numbers than on this host,
// by which rules name them.
func (d *Daemon) who(f *flow.Flow) error {
	if err := d.kernel.Who(f); err != nil || d.enclosure == nil || !f.Owner.Known {
		return err
	}
	for path, id := range map[string]*uint32{"/proc/self/uid_map": &f.Owner.UID, "/proc/self/gid_map": &f.Owner.GID} {
		file, err := os.Open(path)
		if err != nil {
			return err
		}
		ids := readIDMap(bufio.NewScanner(file))
		file.Close()
		*id = ids.outside(*id)
	}
	return nil
}

// idMap is user_namespaces(7)'s, of this process.
type idMap [][3]uint32

// readIDMap reads lines of the first number inside, the first one outside, and how
// many there are; what is not such a line says nothing.
func readIDMap(sc *bufio.Scanner) (m idMap) {
	for sc.Scan() {
		var l [3]uint32
		if n, _ := fmt.Sscan(sc.Text(), &l[0], &l[1], &l[2]); n == 3 {
			m = append(m, l)
		}
	}
	return m
}

// outside returns the number outside of one inside, itself if there is none.
func (m idMap) outside(id uint32) uint32 {
	for _, l := range m {
		if id >= l[0] && id-l[0] < l[2] {
			return l[1] + (id - l[0])
		}
	}
	return id
}
