package fakedns

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// The file of a table is a log: a header, then records, each with a checksum.
// What an answer says is in the file (write(2)) before the answer is sent, so
// it survives the end of the process at any moment; it is on the disk (fsync)
// within a second.
//
//	header  "tproxyd names 1\n"
//	record  kind(1) length(1) index(4) time(4) name(length) crc32c(4)
//
// A record that is cut or wrong ends the log; what is behind it is dropped.
// When the log has grown to several times what it says, it is written anew to
// a second file, which then takes its name.
const (
	logName   = "names.log"
	logHeader = "tproxyd names 1\n"

	recordGiven   = 1 // the index belongs to the name
	recordEvicted = 2 // no more, since that time

	recordHead = 10
	recordTail = 4
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func appendRecord(b []byte, kind byte, index, time uint32, name []byte) []byte {
	start := len(b)
	b = append(b, kind, byte(len(name)))
	b = binary.LittleEndian.AppendUint32(b, index)
	b = binary.LittleEndian.AppendUint32(b, time)
	b = append(b, name...)
	return binary.LittleEndian.AppendUint32(b, crc32.Checksum(b[start:], castagnoli))
}

// cutRecord returns the first record of b and what follows it.
func cutRecord(b []byte) (kind byte, index, time uint32, name, rest []byte, ok bool) {
	if len(b) < recordHead+recordTail {
		return
	}
	end := recordHead + int(b[1])
	if len(b) < end+recordTail || crc32.Checksum(b[:end], castagnoli) != binary.LittleEndian.Uint32(b[end:]) {
		return
	}
	return b[0], binary.LittleEndian.Uint32(b[2:]), binary.LittleEndian.Uint32(b[6:]), b[recordHead:end], b[end+recordTail:], true
}

// load enters what a log says and returns how much of it is good. Records
// that do not fit the table (the pools have become smaller) are passed over.
func (t *table) load(b []byte) (good int) {
	rest := b
	for {
		kind, index, time, name, next, ok := cutRecord(rest)
		if !ok {
			return len(b) - len(rest)
		}
		rest = next
		if index == 0 || index >= t.limit || (kind == recordGiven) != (len(name) > 0) {
			continue
		}
		for uint32(len(t.entries)) <= index {
			t.entries = append(t.entries, entry{})
		}
		t.fresh = max(t.fresh, index+1)
		switch kind {
		case recordGiven:
			if old := t.find(name); old != 0 {
				t.remove(old)
			}
			if t.owner(index) {
				t.remove(index)
			}
			t.put(index, name)
		case recordEvicted:
			if t.owner(index) {
				t.remove(index)
			}
			t.entries[index].evicted = time
		}
	}
}

// requeue rebuilds the quarantine of a table that was loaded: every index
// below fresh that no name has, by the time of its eviction. One that lies in
// the future, because the clock was wrong, becomes now.
func (t *table) requeue(now uint32) {
	var idle []uint32
	for i := uint32(1); i < t.fresh; i++ {
		if !t.owner(i) {
			t.entries[i].evicted = min(t.entries[i].evicted, now)
			idle = append(idle, i)
		}
	}
	slices.SortStableFunc(idle, func(a, b uint32) int {
		return cmp.Compare(t.entries[a].evicted, t.entries[b].evicted)
	})
	t.head, t.tail = 0, 0
	for _, i := range idle {
		t.entries[i].newer = 0
		if t.tail != 0 {
			t.entries[t.tail].newer = i
		} else {
			t.head = i
		}
		t.tail = i
	}
}

// dump returns the log that says just what the table holds, names by last use.
func (t *table) dump() []byte {
	b := make([]byte, 0, len(logHeader)+t.size*40)
	b = append(b, logHeader...)
	for i := t.head; i != 0; i = t.entries[i].newer {
		b = appendRecord(b, recordEvicted, i, t.entries[i].evicted, nil)
	}
	for i := t.oldest; i != 0; i = t.entries[i].newer {
		b = appendRecord(b, recordGiven, i, 0, t.name(i))
	}
	return b
}

// store is the file. It is not safe for concurrent use.
type store struct {
	dir  *os.File // locked as long as the store is open
	file *os.File // nil: broken, see err
	err  error    // why nothing is written
	bad  error    // why what stood in the file was put aside; nil: it was not
	size int      // of the file
	live int      // its size when it was last written anew
}

// openStore opens the file in dir, which is made if need be, and returns what
// stands in it. Only a directory that cannot be used, or is used by another
// process, is an error; a file that makes no sense is put aside.
func openStore(dir string) (s *store, content []byte, err error) {
	if err := os.MkdirAll(dir, 0o750); err != nil {
		return nil, nil, fmt.Errorf("fakedns: %w", err)
	}
	s = &store{}
	if s.dir, err = os.Open(dir); err != nil {
		return nil, nil, fmt.Errorf("fakedns: %w", err)
	}
	if err := unix.Flock(int(s.dir.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		s.dir.Close()
		return nil, nil, fmt.Errorf("fakedns: %s: in use by another process", dir)
	}
	path := filepath.Join(dir, logName)
	b, err := os.ReadFile(path)
	if err == nil && len(b) == 0 { // a crash left it so
		return s, nil, nil
	}
	if err == nil && (len(b) < len(logHeader) || string(b[:len(logHeader)]) != logHeader) {
		err = errors.New("not a log of names")
	}
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			os.Rename(path, path+".bad") // if that fails too, renew reports it
			s.bad = fmt.Errorf("%s: %w", path, err)
		}
		return s, nil, nil
	}
	return s, b[len(logHeader):], nil
}

// append writes records; after an error the file is given up until renew.
func (s *store) append(b []byte) error {
	if s.file == nil {
		return s.err
	}
	n, err := s.file.Write(b)
	s.size += n
	if err != nil {
		s.giveUp(err)
	}
	return err
}

func (s *store) giveUp(err error) {
	s.err = err
	if s.file != nil {
		s.file.Close()
		s.file = nil
	}
}

// bulky tells that the log should be written anew.
func (s *store) bulky() bool { return s.file == nil || s.size > 4*s.live+1<<20 }

// writeAnew writes a log beside the one in force and returns it, on the disk.
func (s *store) writeAnew(log []byte) (f *os.File, err error) {
	f, err = os.OpenFile(filepath.Join(s.dir.Name(), logName+".new"), os.O_CREATE|os.O_TRUNC|os.O_WRONLY|os.O_APPEND, 0o640)
	if err != nil {
		return nil, err
	}
	if _, err = f.Write(log); err == nil {
		err = f.Sync()
	}
	if err != nil {
		f.Close()
		os.Remove(f.Name())
		return nil, err
	}
	return f, nil
}

// adopt puts a log that writeAnew made in force, with what was recorded since.
func (s *store) adopt(f *os.File, size int, since []byte) error {
	_, err := f.Write(since)
	if err == nil {
		err = os.Rename(f.Name(), filepath.Join(s.dir.Name(), logName))
	}
	if err != nil {
		f.Close()
		os.Remove(f.Name())
		return err
	}
	if s.file != nil {
		s.file.Close()
	}
	s.file, s.err, s.size, s.live = f, nil, size+len(since), size
	s.dir.Sync() // the rename itself; a file system that cannot is none the worse
	return nil
}

func (s *store) close() error {
	err := s.err
	if s.file != nil {
		err = errors.Join(s.file.Sync(), s.file.Close())
	}
	s.dir.Close()
	return err
}
