"""A JinDisk 1 volume as a block device, for any server. The format does not protect it: see the package."""

from __future__ import annotations

import errno

from jindiskd.errors import InvalidArgument
from jindiskd.jindisk.extents import Extent
from jindiskd.jindisk.served import as_os_error
from jindiskd.jindisk.v1.layout import BLOCK
from jindiskd.jindisk.v1.session import Session
from jindiskd.jindisk.v1.volume import Volume

EXTENT_BLOCKS = 8192
"""Blocks looked at for one answer."""


class ServedVersion1:
    """A volume open for reading, or a session, as `served.Served`. Discarding does nothing: see `Session.discard`."""

    zeroes_fast = False

    def __init__(self, target: Volume | Session) -> None:
        """Raises `InvalidArgument` if the size is no multiple of 4096."""
        if target.size_bytes % BLOCK:
            raise InvalidArgument("a size of", f"{target.size_bytes} bytes", "only multiples of 4096 can be served")
        self._target = target
        self._session = target if isinstance(target, Session) else None
        self.size_bytes = target.size_bytes
        self.read_only = self._session is None

    @property
    def fault(self) -> str | None:
        """See `Served`."""
        return self._session.fenced if self._session is not None else None

    def read(self, offset: int, length: int) -> bytes:
        """See `Served`."""
        with as_os_error():
            return self._target.read(offset, length)

    def _writer(self) -> Session:
        if self._session is None:
            raise OSError(errno.EROFS, "open for reading only")
        return self._session

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """See `Served`."""
        with as_os_error():
            self._writer().write(offset, data)

    def zero(self, offset: int, length: int) -> None:
        """See `Served`. The zeros are stored."""
        with as_os_error():
            self._writer().zero(offset, length)

    def discard(self, offset: int, length: int) -> None:
        """See `Served`. The blocks keep their content."""
        with as_os_error():
            self._writer().discard(offset, length)

    def flush(self) -> None:
        """See `Served`."""
        if self._session is not None:
            with as_os_error():
                self._session.flush()

    def extents(self, offset: int, length: int) -> list[Extent]:
        """See `Served`; of at most 32 MiB."""
        with as_os_error():
            volume = self._target.volume if isinstance(self._target, Session) else self._target
            volume.check_range(offset, length)
            first = offset // BLOCK
            end = min(-(-(offset + length) // BLOCK), first + EXTENT_BLOCKS)
            found: list[Extent] = []
            with self._target.lock:
                for lba in range(first, end):
                    start, stop = max(lba * BLOCK, offset), min((lba + 1) * BLOCK, offset + length)
                    mapped = self._mapped(lba)
                    if found and found[-1][1] == mapped:
                        found[-1] = (found[-1][0] + stop - start, mapped)
                    else:
                        found.append((stop - start, mapped))
            return found

    def _mapped(self, lba: int) -> bool:
        if self._session is not None and lba in self._session.pending:
            return True
        return self._target.record(lba) is not None

    def close(self) -> None:
        """See `Served`."""
        if self._session is not None:
            self._session.close()
