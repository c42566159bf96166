"""The device below a volume: opened by number, and only if udev has tagged it as one that carries a volume."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

from jindiskd.errors import Busy, JindiskError, NotFound
from jindiskd.helper.protocol import Below

BLKGETDISKSEQ = 0x80081280  # _IOR(0x12, 128, __u64), linux/fs.h
TAG = "jindisk"
RECORD_BYTES = 65_536
_NAME = re.compile(r"DEVNAME=([A-Za-z0-9!_.-]+(?:/[A-Za-z0-9!_.-]+)*)")


class DeviceNotOurs(JindiskError, code="DeviceNotOurs"):
    """A block device that udev has not tagged: the helper touches none of these."""

    def __init__(self, below: Below) -> None:
        super().__init__(
            f"udev does not know device {below} as one with a volume: install its rules with 'jindiskctl system-files "
            "install', then 'udevadm trigger --subsystem-match=block'"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where the kernel and udev tell of devices."""

    sys: Path = Path("/sys")
    udev: Path = Path("/run/udev/data")
    dev: Path = Path("/dev")


def is_tagged(below: Below, places: Places) -> bool:
    """Whether udev's record of the device has the tag now (its lines are those of systemd's udev: `Q:` or `G:`)."""
    try:
        with (places.udev / f"b{below}").open("rb") as file:
            lines = file.read(RECORD_BYTES).split(b"\n")
    except OSError:
        return False
    current = {line[2:] for line in lines if line.startswith(b"Q:")}
    tags = current or {line[2:] for line in lines if line.startswith(b"G:")}
    return TAG.encode() in tags


def open_below(below: Below, places: Places, *, writable: bool, exclusive: bool) -> int:
    """Open the device; the caller closes the descriptor.

    Raises:
        NotFound: there is none of these numbers, or another has them by now.
        DeviceNotOurs: udev has not tagged it.
        Busy: it is in use.
        OSError: it cannot be opened.
    """
    if not is_tagged(below, places):
        raise DeviceNotOurs(below)
    try:
        event = (places.sys / "dev/block" / str(below) / "uevent").read_text(encoding="ascii", errors="replace")
    except OSError as exc:
        raise NotFound("block device", str(below)) from exc
    name = next((match[1] for line in event.split("\n") if (match := _NAME.fullmatch(line))), "")
    if not name or ".." in name.split("/"):
        raise NotFound("block device", str(below))
    flags = os.O_RDWR if writable else os.O_RDONLY
    flags |= os.O_EXCL if exclusive else 0
    try:
        fd = os.open(places.dev / name, flags | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as exc:
        if exc.errno == errno.EBUSY:
            raise Busy(f"/dev/{name}", "it is mounted, or another device lies on it, an open volume perhaps") from exc
        if exc.errno in {errno.ENOENT, errno.ENXIO, errno.ENODEV}:
            raise NotFound("block device", str(below)) from exc
        raise
    try:
        found = os.fstat(fd)
        numbers = (os.major(found.st_rdev), os.minor(found.st_rdev))
        if not stat.S_ISBLK(found.st_mode) or numbers != (below.major, below.minor) or _sequence(fd) != below.sequence:
            raise NotFound("block device", str(below))
    except BaseException:
        os.close(fd)
        raise
    return fd


def _sequence(fd: int) -> int:
    buffer = bytearray(8)
    try:
        fcntl.ioctl(fd, BLKGETDISKSEQ, buffer, True)
    except OSError:
        return 0  # a kernel before 5.15 does not count
    return int(struct.unpack("=Q", buffer)[0])
