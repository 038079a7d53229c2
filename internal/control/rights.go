package control

import (
	"context"
	"net"
	"net/http"
	"os"
	"syscall"
)

// peerKey is where the context of a request has the user at the other end.
type peerKey struct{}

// withPeer notes which user opened a connection, as the kernel saw it.
func withPeer(ctx context.Context, c net.Conn) context.Context {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return ctx
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return ctx
	}
	var peer *syscall.Ucred
	if err := raw.Control(func(fd uintptr) {
		peer, _ = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	}); err != nil || peer == nil {
		return ctx
	}
	return context.WithValue(ctx, peerKey{}, int(peer.Uid))
}

// rights lets everybody read who could open the socket, and change something
// those alone who could do so without it. Of whom nothing is known may read.
func rights(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet && r.Method != http.MethodHead {
			if uid, known := r.Context().Value(peerKey{}).(int); !known || uid != 0 && uid != os.Geteuid() {
				http.Error(w, "only root, and the user that the daemon runs as, may change something", http.StatusForbidden)
				return
			}
		}
		next.ServeHTTP(w, r)
	})
}
