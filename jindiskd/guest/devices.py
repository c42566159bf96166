"""The volumes' block devices: waiting for them, their sizes, one read of a head."""

from __future__ import annotations

import fcntl
import os
import stat
import time
from pathlib import Path

from jindiskd.errors import TimedOut

BLKGETSIZE64 = 0x80081272  # linux/fs.h
POLL_S = 0.02
BLOCK = Path("/sys/class/block")
SERIAL_BYTES = 64  # virtio has room for 20
VPD_SERIAL, VPD_HEADER = 0x80, 4
"""Unit serial number page and its header (SPC-4, 7.8.15): device type, page code, length in two bytes."""


def with_serial(serial: str, block: Path = BLOCK) -> list[Path]:
    """The nodes of the virtio and SCSI disks that say that this is their serial number."""
    return [Path("/dev", entry.name) for entry in sorted(block.iterdir()) if _serial(entry) == serial.encode()]


def _serial(entry: Path) -> bytes:
    """What a disk says that its serial number is; empty where it says nothing. Partitions have none."""
    try:
        return (entry / "serial").read_bytes()[:SERIAL_BYTES].strip(b"\0\n")
    except OSError:
        pass  # no virtio disk, or it went away
    try:
        page = (entry / "device/vpd_pg80").read_bytes()[: VPD_HEADER + SERIAL_BYTES]
    except OSError:
        return b""
    if len(page) < VPD_HEADER or page[1] != VPD_SERIAL:
        return b""
    return page[VPD_HEADER : VPD_HEADER + int.from_bytes(page[2:4], "big")].strip(b"\0 ")


def wait_for_serial(serial: str, deadline_s: float, block: Path = BLOCK) -> list[Path]:
    """Wait for a disk with a serial number; returns the nodes of all that have it by then.

    Drivers probe in the kernel's own time, and no udev runs in the initrd, so that it is polled for.

    Raises:
        TimedOut: none appeared.
    """
    began_s = time.monotonic()
    while True:
        found = with_serial(serial, block)
        if found and all(node.is_block_device() for node in found):
            return found
        if time.monotonic() >= deadline_s:
            raise TimedOut(f"the appearance of a disk with serial number {serial}", time.monotonic() - began_s)
        time.sleep(POLL_S)


def size_bytes(descriptor: int) -> int:
    """The size of an open block device or file."""
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fstat(descriptor).st_size
    answer = fcntl.ioctl(descriptor, BLKGETSIZE64, bytes(8))
    return int.from_bytes(answer, "little")


def read_head(descriptor: int, length: int) -> bytes:
    """The first `length` bytes, each read exactly once: what the host serves afterwards has no influence.

    Raises:
        EOFError: the device is shorter.
    """
    head = bytearray()
    while len(head) < length:
        part = os.pread(descriptor, min(length - len(head), 1 << 20), len(head))
        if not part:
            raise EOFError(f"the device ends after {len(head)} of {length} bytes")
        head += part
    return bytes(head)
