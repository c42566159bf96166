"""The end of a boot that cannot go on: a code on the console, one for the host, power off; and the limit of time."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path
from typing import NoReturn

from jindiskd.guest import kernel
from jindiskd.guest.codes import Code
from jindiskd.guest.progress import Progress

CONSOLE = Path("/dev/console")
ANNOUNCE_S = 1.0
PAUSE_S = 0.02


def announce(code: Code) -> None:
    """Print the code on the console; never anything else. What others have printed may have to go out first."""
    text, end_s = f"\r\njindisk: {code.value}\r\n".encode(), time.monotonic() + ANNOUNCE_S
    with contextlib.suppress(OSError):
        console = os.open(CONSOLE, os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            while text and time.monotonic() < end_s:
                try:
                    text = text[os.write(console, text) :]
                except BlockingIOError:
                    time.sleep(PAUSE_S)
        finally:
            os.close(console)


def power_off() -> NoReturn:
    """Switch the machine off. Where the kernel cannot, restart it, and where it cannot do that either, stand still."""
    for command in (kernel.REBOOT_POWER_OFF, kernel.REBOOT_RESTART):
        with contextlib.suppress(OSError):
            kernel.reboot(command)
    while True:
        signal.pause()


def give_up(code: Code, progress: Progress) -> NoReturn:
    """Say why, and switch off. Nothing was written anywhere, so nothing needs to be synced but what init left us."""
    try:
        announce(code)
        progress.failed(code)
        os.sync()
    finally:
        power_off()  # PID 1 may not end, so no fault of the above may keep us from it


class Watchdog:
    """A process that switches the machine off when time is up, whatever the agent is stuck in.

    It is forked before any key exists, so its copy of the memory holds none. It does not sync: that may be what hangs.
    """

    def __init__(self, seconds: float, progress: Progress) -> None:
        """Start it; `seconds` from now the machine goes off unless `stop` is called."""
        self._process = os.fork()
        if self._process == 0:
            self._watch(seconds, progress)

    def _watch(self, seconds: float, progress: Progress) -> NoReturn:
        try:
            progress.close()
            end_s = time.monotonic() + seconds
            while (left_s := end_s - time.monotonic()) > 0:
                time.sleep(left_s)
            announce(Code.TIMEOUT)
            Progress().failed(Code.TIMEOUT)
        finally:
            power_off()

    def stop(self) -> None:
        """End it."""
        os.kill(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)
