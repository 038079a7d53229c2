// Package relay moves the bytes of TCP flows between two sockets and does
// nothing else: it knows neither SOCKS nor where a flow wants to go.
//
// An [Engine] owns its sockets as bare descriptors. Until two of them are
// joined each is a [Conn], an ordinary blocking net.Conn, so that a handshake
// is written as straight code on a goroutine of its own. [Engine.Join] then
// takes both over and returns at once: from there on no goroutine belongs to
// the flow, only an entry in the table of an event loop.
//
//	Serve --accept4--> Conn --(handle: a goroutine)--.
//	                                                  Join --> Stream, on a loop
//	                   Conn <--Dial (handle) --------'           |
//	                                                             v
//	          client socket --splice--> pipe --splice--> server socket
//	                        <--splice-- pipe <--splice--
//
// # Promises
//
// A relayed byte is not copied by the relay: splice(2) moves it through a pipe
// that is borrowed for as long as bytes are under way in that direction, so an
// idle flow costs two descriptors, no pipe and less than a kilobyte. The one
// exception is shortage, see below.
//
// What one side does is what the other side sees. A FIN is passed on after all
// data before it, in each direction by itself; a RST is passed on as a RST,
// after what had arrived before it.
//
// A reader that stops makes its sender stop. In each direction at most one
// pipe's content ([Options.PipeSize]) is held outside the socket buffers.
//
// Nothing waits for a stranger. There are at most [Options.MaxPipes] pipes.
// Stalled readers may come to hold all of them, and a process without
// CAP_SYS_RESOURCE may not be allowed as many; a flow that finds no pipe does
// not queue for one. It copies, 64 KiB at a time, and keeps what the other side
// does not take at once. All that is kept is bounded (64 MiB); beyond that a flow
// keeps nothing: it peeks at its data (MSG_PEEK), writes what the other side
// takes, and only then removes that much from the socket (MSG_TRUNC). So flows
// in shortage can neither stall each other nor use up memory. When a pipe comes
// back, the next event of a flow uses it.
//
// Time limits are inactivity limits, kept by one coarse clock for all flows: a
// limit of d ends a flow after d and at most two ticks (two seconds) more.
//
// # Loops
//
// There is one loop for each processor Go uses. A loop is a goroutine with an
// epoll descriptor that is itself watched by Go's network poller: an idle loop
// is a parked goroutine and no thread. Sockets are registered edge-triggered
// and once. Everything about a Stream happens under its mutex; the loop is
// only where its events come in, so that Kill, the clock and Join need not ask
// the loop for anything.
package relay
