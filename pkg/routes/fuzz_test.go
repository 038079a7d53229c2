package routes

import (
	"os"
	"testing"
)

func FuzzParse(f *testing.F) {
	for _, name := range []string{"testdata/socks.cnf", "testdata/socks.cnf-verbatim"} {
		b, err := os.ReadFile(name)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(string(b))
	}
	f.Add("SERVER a [::1]:99 credential=x\nLIST l 10.0.0.0/8 *.x ::/0\nSOCKD5 @=a $l ne 53 src=$l if=a,b by=name log\nDEFAULT DIRECT\nRESOLVE local .x")
	f.Add("SERVER a 10.9.9.9 udp=off\nSOCKD5 @=a 10.0.0.0/9 udp=direct\nDENY 10.0.0.0/8\nSOCKD5 @=a * eq 443 udp=deny\nSOCKD5 @=a * proto=udp udp=direct")
	f.Add("DENY * uid=0,5 gid=1 cgroup=/a,b.slice mark=1/3 reject=icmp\nSOCKD5 @=10.9.9.9 *.x *=0 cmd=connect auth=none resolve=local timeout=3s\nDIRECT * mac=00:00:5e:00:53:01 mark=2")
	f.Add("direct 10.0.0.0-10.0.0.77 http-alt,1-2 \\\n proto=udp : x")
	f.Fuzz(func(t *testing.T, text string) {
		table, ds := parse(text, map[string]string{"a": text, "b": "DENY *"})
		if (table == nil) != ds.HasErrors() {
			t.Fatalf("table %v with %v", table, ds)
		}
		for _, d := range ds {
			if d.Line < 1 || d.Col < 1 || d.Msg == "" || d.File == "" {
				t.Fatalf("%+v", d)
			}
		}
		if table != nil {
			checkKernel(t, table, 20)
		}
	})
}
