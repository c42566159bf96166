"""Writing in bulk past the page cache.

To take memory for the page cache and to copy into it costs more than to encrypt, and a load ends by waiting until all
is on the disk. It writes much, once, and in large parts: the device fetches these from our own memory while the next
are sealed, and what the cache holds for others stays there. An export, which waits for no disk, goes through the cache.
"""

from __future__ import annotations

import errno
import os

from jindiskd.jindisk.device import FileDevice
from jindiskd.jindisk.geometry import BLOCK

LEAST_BYTES = 1 << 18
"""What is smaller goes through the cache, which makes one large write of many small ones."""


class DirectWriter:
    """Writes to a file or device past the page cache, where that can be had; in the process that made it, or a fork."""

    __slots__ = ("_device", "_fd")

    def __init__(self, device: FileDevice) -> None:
        """`device` stays the caller's."""
        self._device, self._fd = device, device.open_again(os.O_WRONLY | os.O_DIRECT)

    def write(self, offset: int, data: memoryview) -> None:
        """Write all of `data`, which lies in `page_memory`, at an offset in bytes; durable after a flush.

        Raises `OSError`.
        """
        done = 0
        if self._fd >= 0 and len(data) >= LEAST_BYTES and not (offset | len(data)) % BLOCK:
            try:
                done = self._device.write_by(self._fd, offset, data)
            except OSError as exc:
                if exc.errno != errno.EINVAL:
                    raise
                self.close()  # this file system, or this alignment, cannot be written so
        if done < len(data):
            self._device.pwrite(offset + done, data[done:])

    def close(self) -> None:
        """Write through the cache from now on."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
