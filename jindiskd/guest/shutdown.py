"""The last program: systemd-shutdown changes its root to the kept initrd and runs this as PID 1.

It unmounts the system's root and what is mounted on it, has the volumes below closed, by their storage processes or by
removing the mapping, and ends the machine as asked.
Source: systemd, "initrd interface" (`/run/initramfs/shutdown`); its first argument is the verb, the old root is at
`/oldroot`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import sys
import time
from pathlib import Path
from typing import NoReturn

from jindiskd.guest import dm, kernel, power, storage

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
IN_MEMORY = frozenset({"cgroup", "cgroup2", "devpts", "devtmpfs", "mqueue", "proc", "ramfs", "sysfs", "tmpfs"})
REMOVE_LIMIT_S = 5.0
RECORD = Path("/mapping")
"""In the initrd, where the system does not look: a mapping that must be removed at the end. Its sectors, name and
UUID, and the device below it."""
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
    """Unmount everything at and below `top`, trying again while something is busy; whether all of it went.

    What the kernel keeps in memory is taken off the tree, busy or not: the control sockets of the storage processes
    hold the old /run, and would hold the root below it.
    """
    end_s = time.monotonic() + limit_s
    while left := mounts_below(text := MOUNTS.read_text(encoding="utf-8", errors="surrogateescape"), top):
        in_memory = set(mounts_below("\n".join(filter(_in_memory, text.splitlines())), top))
        for path in left:
            with contextlib.suppress(OSError):
                kernel.unmount(path, kernel.MNT_DETACH if path in in_memory else 0)
        if time.monotonic() >= end_s:
            return False
        if len(mounts_below(MOUNTS.read_text(encoding="utf-8", errors="surrogateescape"), top)) == len(left):
            time.sleep(PAUSE_S)
    return True


def writable_devices(text: str, top: Path) -> set[str]:
    """The names of the block devices that are mounted at or below `top` and can be written to, by the text of
    /proc/self/mounts."""
    places = set(mounts_below(text, top))
    found = set()
    for line in text.splitlines():
        fields = line.split(" ")
        if len(fields) > 3 and "ro" not in fields[3].split(",") and places & set(mounts_below(line, top)):
            found.add(Path(fields[0]).name)
    return found


def close_volumes() -> None:
    """Have the volumes closed that nothing can write to any more: first those below the root, then the root's.

    A file system that is read-only writes no more, so the volume below it may be closed even if something keeps it
    mounted. Otherwise it stays open, and opens the next time as after a power failure.
    """
    if not unmount_all(OLD_ROOT):
        for place in mounts_below(MOUNTS.read_text(encoding="utf-8", errors="surrogateescape"), OLD_ROOT):
            make_read_only(place)
    os.sync()  # a device without a file system may have been written to as well
    left = writable_devices(MOUNTS.read_text(encoding="utf-8", errors="surrogateescape"), OLD_ROOT)
    for name in storage.running():
        if name not in left:
            storage.ask_to_close(storage.CONTROLS / name)


def _in_memory(line: str) -> bool:
    """Whether a line of /proc/self/mounts is of a file system without any device below it."""
    fields = line.split(" ")
    return len(fields) > 2 and fields[2] in IN_MEMORY


def make_read_only(top: Path) -> bool:
    """Remount a file system read-only; whether it is."""
    with contextlib.suppress(OSError):
        kernel.mount("", top, "", kernel.MS_REMOUNT | kernel.MS_RDONLY)
        return True
    return False


def remember_mapping(name: str, uuid: str, sectors: int, device: Path, record: Path = RECORD) -> None:
    """Have a mapping removed at shutdown. Called by the agent, in the initrd that is kept."""
    record.write_text(f"{sectors}\n{name}\n{uuid}\n{device}", encoding="utf-8")


def end_mapping(record: Path = RECORD, limit_s: float = REMOVE_LIMIT_S) -> bool:
    """End the mapping below the root, if one is remembered, so that its target writes what it still has in memory.

    It is removed; if something keeps it open for as long as `limit_s`, its target is taken away from below that.
    Whether the target has ended, or there is none.
    """
    try:
        sectors, name, uuid, device = record.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return True
    ended = _remove(name, uuid, limit_s)
    if not ended:
        with contextlib.suppress(OSError):
            dm.wipe(name, int(sectors))
            ended = True
    with contextlib.suppress(OSError):  # the target leaves it to others to have the device make all of it durable
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    return ended


def _remove(name: str, uuid: str, limit_s: float) -> bool:
    """Remove a mapping, trying again while something has it open; whether it is gone."""
    end_s = time.monotonic() + limit_s
    while True:
        try:
            dm.remove(name, uuid)
        except OSError as exc:
            if exc.errno == errno.ENXIO:
                return True
            if exc.errno != errno.EBUSY or time.monotonic() >= end_s:
                return False
        else:
            return True
        time.sleep(PAUSE_S)


def main() -> NoReturn:
    """PID 1 of the end."""
    command = VERBS.get(sys.argv[1] if len(sys.argv) > 1 else "", kernel.REBOOT_POWER_OFF)
    try:
        os.chdir("/")
        close_volumes()
        os.sync()
        end_mapping()
    finally:
        try:
            os.sync()
            kernel.reboot(command)
        finally:
            power.power_off()
