"""The root volume's block device: waiting for it, its size, one read of its head."""

from __future__ import annotations

import fcntl
import os
import stat
import time
from pathlib import Path

from jindiskd.errors import TimedOut

BLKGETSIZE64 = 0x80081272  # linux/fs.h
POLL_S = 0.02


def wait_for_device(path: Path, deadline_s: float) -> None:
    """Wait until `path` is a block device; `deadline_s` is a `time.monotonic()` value.

    Drivers probe in the kernel's own time, and no udev runs in the initrd, so the node is polled for.

    Raises:
        TimedOut: it did not appear.
    """
    began_s = time.monotonic()
    while True:
        try:
            if stat.S_ISBLK(path.stat().st_mode):
                return
        except OSError:
            pass  # not there yet; what remains wrong ends by the deadline
        if time.monotonic() >= deadline_s:
            raise TimedOut(f"the appearance of {path}", time.monotonic() - began_s)
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
