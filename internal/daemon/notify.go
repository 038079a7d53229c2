package daemon

import (
	"fmt"

	"github.com/coreos/go-systemd/v22/daemon"
	"golang.org/x/sys/unix"
)

// What systemd is told (sd_notify(3)). Without systemd it goes nowhere.

func notifyReady(status string) { notify(daemon.SdNotifyReady + "\nSTATUS=" + status) }

func notifyReloading() {
	var now unix.Timespec
	unix.ClockGettime(unix.CLOCK_MONOTONIC, &now) // cannot fail for this clock
	notify(fmt.Sprintf("%s\nMONOTONIC_USEC=%d", daemon.SdNotifyReloading, now.Nano()/1000))
}

func notifyStopping() { notify(daemon.SdNotifyStopping) }

// notifyMain tells who serves from now on.
func notifyMain(pid int) { notify(fmt.Sprintf("MAINPID=%d", pid)) }

// notify ignores the error: whoever started us without a socket, or closed
// it, does not want to know.
func notify(state string) { daemon.SdNotify(false, state) }
