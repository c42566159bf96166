"""The last program: systemd-shutdown changes its root to the kept initrd and runs this as PID 1.

It unmounts the system's root, has the storage process close the volume below it, and ends the machine as asked.
Source: systemd, "initrd interface" (`/run/initramfs/shutdown`); its first argument is the verb, the old root is at
`/oldroot`.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import time
from pathlib import Path
from typing import NoReturn

from jindiskd.guest import kernel, power, storage

OLD_ROOT = Path("/oldroot")
MOUNTS = Path("/proc/self/mounts")
VERBS = {
    "poweroff": kernel.REBOOT_POWER_OFF,
    "reboot": kernel.REBOOT_RESTART,
    "halt": kernel.REBOOT_HALT,
    "kexec": kernel.REBOOT_KEXEC,
}
ESCAPE = re.compile(r"\\([0-7]{3})")
UNMOUNT_LIMIT_S = 5.0
PAUSE_S = 0.1


def mounts_below(text: str, top: Path) -> list[Path]:
    """The mount points at and below `top` in the text of /proc/self/mounts, the innermost and latest first."""
    found = []
    for line in text.splitlines():
        fields = line.split(" ")
        if len(fields) > 1:
            # The kernel writes space, tab, newline and backslash as octal escapes.
            path = Path(ESCAPE.sub(lambda match: chr(int(match[1], 8)), fields[1]))
            if path == top or top in path.parents:
                found.append(path)
    found.reverse()
    return sorted(found, key=lambda path: -len(path.parts))


def unmount_all(top: Path, limit_s: float = UNMOUNT_LIMIT_S) -> bool:
    """Unmount everything at and below `top`, trying again while something is busy; whether all of it went."""
    end_s = time.monotonic() + limit_s
    while left := mounts_below(MOUNTS.read_text(encoding="utf-8", errors="surrogateescape"), top):
        for path in left:
            with contextlib.suppress(OSError):
                kernel.unmount(path)
        if time.monotonic() >= end_s:
            return False
        if len(mounts_below(MOUNTS.read_text(encoding="utf-8", errors="surrogateescape"), top)) == len(left):
            time.sleep(PAUSE_S)
    return True


def make_read_only(top: Path) -> bool:
    """Remount a file system read-only; whether it is."""
    with contextlib.suppress(OSError):
        kernel.mount("", top, "", kernel.MS_REMOUNT | kernel.MS_RDONLY)
        return True
    return False


def main() -> NoReturn:
    """PID 1 of the end."""
    command = VERBS.get(sys.argv[1] if len(sys.argv) > 1 else "", kernel.REBOOT_POWER_OFF)
    try:
        os.chdir("/")
        # A file system that is read-only writes no more, so the volume below it may be closed even if something
        # keeps it mounted. Otherwise it stays open, and opens the next time as after a power failure.
        if unmount_all(OLD_ROOT) or make_read_only(OLD_ROOT):
            storage.ask_to_close()
    finally:
        try:
            os.sync()
            kernel.reboot(command)
        finally:
            power.power_off()
