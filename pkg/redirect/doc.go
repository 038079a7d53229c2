// Package redirect is the kernel side of a transparent proxy: it takes flows
// out of the packet path without touching the hosts that make them, and keeps
// every flow that it does not take, and cannot let pass, from leaving.
//
// One nftables table ("inet tproxyd"), a second one while a process has it, a
// handful of policy routing rules, one routing table and a classifier on each
// named interface are all that it puts into the kernel. Apply makes them what a
// Plan says, from whatever is there, the rules in one transaction; Remove takes
// all of it away, knowing neither plan nor process. What a packet goes through:
//
//	lan0 ──► classifier ──────────────────────────────────────────────► Entered mark
//	     ──► prerouting ─► lan ─┬─ of a flow that we serve ───────────► Lan mark
//	                            ├─ port 53 ──► dns ── tproxy ─────────► Lan mark
//	                            └─ decide ─┬─ DIRECT ► direct ────────► Direct mark
//	lo, Local mark ─► local ► tproxy       ├─ DENY ──► denied ─ reject
//	                                       └─ proxy ─► take ── tproxy ► Lan mark
//	this host ─► output ─► decide, the same; Local mark ► rerouted to lo
//
//	routing   Lan mark, from lan0 ─► table: everything is local, on lo
//	          Local mark, from lo ─► the same
//	          Direct mark         ─► the host's other rules
//	          Entered mark (IPv4), from lan0 (IPv6) ─► prohibited
//
// Before denied rejects and before take takes anything, the chain "implicit"
// lets pass what is never ours: replies of flows that were opened from outside,
// addresses of this host, ICMP errors, neighbour discovery, the SOCKS servers
// themselves; and the chain "admitted" what Admit let in, unless a final block
// decides. Both stand there and not in front because all of it ends as DIRECT
// would: so a packet that a rule sends DIRECT pays for none of it.
//
// Only one refusal cannot be sent there: that of this host's own datagram over
// IPv4 whose listener is gone. It is known not before the packet is back on lo,
// where its destination counts as ours, and the kernel would send the ICMP error
// from that. So there is a second table, "inet tproxyd_alive", where Local and
// Linux 6.9 or later allow it, which the kernel removes when this process ends:
// it marks datagrams that are diverted as long as somebody is there to take them,
// and output refuses those without the mark. Without it, or if a process closes
// its listener and goes on, such a datagram gets no answer until the next Apply.
//
// Of a connection the first packet is decided, and the rest goes to its socket.
// Each datagram is decided: so what the rules refuse is refused, whatever there
// is of its flow. What they divert tproxy gives to the connected socket of its
// flow (ConnectUDP), or else to the listener.
//
// Three guards hold independently of one another. In the table, a tproxy
// without a listener falls through to a reject, never past it. In routing,
// what entered by a named interface and did not go through the table is
// prohibited, so that a table that somebody flushed lets nothing pass. And in
// postrouting, what carries a divert mark leaves by no interface but lo, so that
// a deleted routing rule sends nothing out.
//
// The marks use only the bits of Plan.Marks.Mask, of the packet mark and of the
// connection mark (where the Own value says that the connection ends at us, and
// the Lan value that it did until it was refused); all other bits are kept. Connection tracking is used, and therefore switched
// on, for the one question that nothing else answers: whether a packet belongs
// to a flow that was opened from the other side.
//
// Sockets and netlink connections belong to the network namespace of the
// thread that calls Open, Listen… or Remove; the methods of a Redirect may then
// be called from anywhere. Everything needs CAP_NET_ADMIN in that namespace, and
// ListenDNS also CAP_NET_RAW.
package redirect
