"""Progress for the host: a few fixed words over vsock, best effort.

Whoever reads them can neither delay the boot by more than `BUDGET_S` in all nor influence it: nothing is read from
the connection.
"""

from __future__ import annotations

import contextlib
import enum
import socket
import time
from collections.abc import Callable

from jindiskd.guest.codes import Code
from jindiskd.guest.config import PROGRESS_PORT

BUDGET_S = 1.0
# `struct linger`, linux/socket.h: on, for 1 s. Python takes options of vsock sockets as 64-bit integers only.
LINGER = 1 | 1 << 32
HOST_CID = 2


class Stage(enum.StrEnum):
    """What the agent has done; one line each."""

    BOOT = "boot"
    REPORT = "report"
    ATTESTED = "attested"
    KEY = "key"
    UNLOCKED = "unlocked"
    RUNNING = "running"


def connect_to_host() -> socket.socket:
    """A new vsock stream to the host's progress port."""
    stream = socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM)
    stream.settimeout(BUDGET_S)
    try:
        stream.connect((HOST_CID, PROGRESS_PORT))
    except OSError:
        stream.close()
        raise
    return stream


class Progress:
    """One connection for all lines, made at the first; after a failure it is not tried again."""

    def __init__(self, connect: Callable[[], socket.socket] = connect_to_host) -> None:
        self._connect = connect
        self._stream: socket.socket | None = None
        self._left_s = BUDGET_S

    def stage(self, stage: Stage) -> None:
        """Tell the host that `stage` is done."""
        self._send(f"{stage.value}\n")

    def failed(self, code: Code) -> None:
        """Tell the host why the guest powers off, with a budget of its own, and wait until it was taken."""
        self._left_s = BUDGET_S
        self._send(f"fail {code.value}\n")
        if self._stream is not None and self._stream.family == socket.AF_VSOCK:
            with contextlib.suppress(OSError):
                # Closing a vsock stream then waits, so many seconds at most, for the host's side to confirm the end;
                # without that the machine may be off before the line has left it.
                self._stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER)
        self.close()

    def close(self) -> None:
        """Close the connection. The kernel goes on sending what is left."""
        stream, self._stream = self._stream, None
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()

    def _send(self, line: str) -> None:
        if self._left_s <= 0:
            return
        began_s = time.monotonic()
        try:
            if self._stream is None:
                self._stream = self._connect()
            self._stream.settimeout(self._left_s)
            self._stream.sendall(line.encode("ascii"))
        except OSError:
            self._left_s = 0.0
            if self._stream is not None:
                self._stream.close()
                self._stream = None
        else:
            self._left_s -= time.monotonic() - began_s
