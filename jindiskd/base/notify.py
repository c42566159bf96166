"""The protocol of the service manager: readiness, watchdog, sockets and credentials. Standard library only.

sd_notify(3), sd_listen_fds(3), systemd.exec(5) "Credentials". Without a service manager each of these does nothing.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from jindiskd.base.secret import Secret

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


def take_sockets(environment: MutableMapping[str, str] = os.environ) -> dict[str, list[socket.socket]]:
    """Sockets of socket units, by FileDescriptorName. Call once, before any program is started."""
    found: dict[str, list[socket.socket]] = {}
    if environment.get("LISTEN_PID") == str(os.getpid()):
        names = environment.get("LISTEN_FDNAMES", "").split(":")
        for at in range(int(environment.get("LISTEN_FDS", "0"))):
            os.set_inheritable(FIRST_FD + at, False)
            found.setdefault(names[at] if at < len(names) else "", []).append(socket.socket(fileno=FIRST_FD + at))
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        environment.pop(name, None)
    return found


def credential(name: str, environment: Mapping[str, str] = os.environ) -> Secret | None:
    """A credential of the unit, or None if it has none of that name."""
    folder = environment.get("CREDENTIALS_DIRECTORY")
    if not folder:
        return None
    try:
        return Secret(bytearray((Path(folder) / name).read_bytes()))
    except FileNotFoundError:
        return None
