"""The libvirtd of scripts/testenv, to be ended and started again by tests of what happens then."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

DEADLINE_S = 180.0
AGAIN_S = 2.0


def pid() -> int | None:
    """Its process; the environment's namespace holds no other."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                if (entry / "comm").read_text().strip() == "libvirtd" and "State:\tZ" not in (
                    entry / "status"
                ).read_text():
                    return int(entry.name)
            except OSError:
                continue
    return None


def stop(number: int = signal.SIGKILL) -> None:
    """End it; machines go on."""
    assert os.environ.get("JD_TESTENV") == "1", "the machine's own libvirtd is left alone"
    found = pid()
    assert found is not None
    os.kill(found, number)
    end = time.monotonic() + DEADLINE_S
    while pid() == found:
        assert time.monotonic() < end, "libvirtd does not end"
        time.sleep(0.02)


def start() -> None:
    """Start it; returns when it answers.

    One that ends is started again: what the last one had just forked may hold its lock for a moment longer.
    """
    words = ["setsid", "--fork", "libvirtd", "--timeout", "0"]
    asked = ["virsh", "-c", "qemu:///system", "version"]
    began = again = time.monotonic()
    while True:
        if again <= time.monotonic() and pid() is None:
            subprocess.run(
                words, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
            )
            again = time.monotonic() + AGAIN_S
        if subprocess.run(asked, capture_output=True, check=False).returncode == 0:
            return
        assert time.monotonic() < began + DEADLINE_S, "libvirtd does not answer"
        time.sleep(0.1)


def restart(number: int = signal.SIGKILL) -> None:
    """End it and start it again."""
    stop(number)
    start()
