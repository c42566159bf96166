"""The protocol of the service manager: readiness, reload, watchdog, sockets. Standard library only.

sd_notify(3), sd_watchdog_enabled(3), sd_listen_fds(3). Without a service manager each of these does nothing.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, MutableMapping

FIRST_FD = 3  # SD_LISTEN_FDS_START


def notify(*lines: str, environment: Mapping[str, str] = os.environ) -> bool:
    """Tell the service manager, for example `READY=1`; False without one."""
    address = environment.get("NOTIFY_SOCKET", "")
    if address[:1] not in {"/", "@"}:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.connect("\0" + address[1:] if address[0] == "@" else address)
        sock.sendall("\n".join(lines).encode())
    return True


def reloading() -> None:
    """Before a reload; `READY=1` follows after it. The time is for Type=notify-reload of systemd 253 and later."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")


def watchdog_interval_s(environment: Mapping[str, str] = os.environ) -> float | None:
    """Seconds between signs of life: half of what the service manager allows; None if it does not watch us."""
    usec = environment.get("WATCHDOG_USEC", "")
    if not usec.isdecimal() or environment.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None
    return int(usec) / 2e6


def take_sockets(environment: MutableMapping[str, str] = os.environ) -> list[socket.socket]:
    """The sockets that the service manager listens on for us. Call once, before any program is started."""
    mine, count = environment.get("LISTEN_PID") == str(os.getpid()), environment.get("LISTEN_FDS", "")
    found = []
    if mine and count.isdecimal():
        for fd in range(FIRST_FD, FIRST_FD + int(count)):
            os.set_inheritable(fd, False)
            found.append(socket.socket(fileno=fd))
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        environment.pop(name, None)
    return found
