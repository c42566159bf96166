"""A volume as a block device: what a server of any protocol calls. Every failure is an `OSError`."""

from __future__ import annotations

import contextlib
import errno
import threading
from typing import Protocol

from jindiskd.errors import JindiskError
from jindiskd.jindisk.errors import VolumeError
from jindiskd.jindisk.extents import Extent, extents
from jindiskd.jindisk.session import Session
from jindiskd.jindisk.volume import Volume


class Served(Protocol):
    """A block device. Any thread may call; ranges lie within the size; a failure is an `OSError` with its number."""

    @property
    def size_bytes(self) -> int:
        """Length, a multiple of 4096."""

    @property
    def read_only(self) -> bool:
        """Whether every change fails."""

    @property
    def zeroes_fast(self) -> bool:
        """Whether `zero` is quicker than writing zeros."""

    @property
    def fault(self) -> str | None:
        """Why nothing can be written any more, in words; None while all is well."""

    def read(self, offset: int, length: int) -> bytes:
        """The bytes there."""

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write; durable after the next `flush`."""

    def zero(self, offset: int, length: int) -> None:
        """Make the bytes read as zeros; durable after the next `flush`."""

    def discard(self, offset: int, length: int) -> None:
        """These bytes are not needed any more."""

    def flush(self) -> None:
        """Make everything written durable."""

    def extents(self, offset: int, length: int) -> list[Extent]:
        """Lengths from `offset` on, each mapped or reading as zeros; they may end early, but there is at least one."""

    def close(self) -> None:
        """Make everything durable and close for good. Raises a `JindiskError` or `OSError` on failure."""


class ServedSession:
    """A session as a block device. Its own thread reports and cleans."""

    read_only, zeroes_fast = False, True

    def __init__(self, session: Session, *, stack_bytes: int = 0) -> None:
        """Starts the thread; `session` has begun. `stack_bytes`: of threads from now on; 0 for the default."""
        self._session = session
        self.size_bytes = session.size_bytes
        self._ending = threading.Event()
        if stack_bytes:
            threading.stack_size(stack_bytes)
        self._thread = threading.Thread(target=self._keep, name="keep", daemon=True)
        self._thread.start()

    @property
    def fault(self) -> str | None:
        """See `Served`."""
        return self._session.fenced

    def read(self, offset: int, length: int) -> bytes:
        """See `Served`."""
        with as_os_error():
            return self._session.read(offset, length)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """See `Served`."""
        with as_os_error():
            self._session.write(offset, data)

    def zero(self, offset: int, length: int) -> None:
        """See `Served`."""
        with as_os_error():
            self._session.zero(offset, length)

    def discard(self, offset: int, length: int) -> None:
        """See `Served`."""
        with as_os_error():
            self._session.discard(offset, length)

    def flush(self) -> None:
        """See `Served`."""
        with as_os_error():
            self._session.flush()

    def extents(self, offset: int, length: int) -> list[Extent]:
        """See `Served`."""
        with as_os_error():
            return extents(self._session.volume, offset, length)

    def close(self) -> None:
        """See `Served`."""
        self._ending.set()
        self._session.close()

    def _keep(self) -> None:
        """Report, and clean while nothing else is asked. A report may take long; requests are served meanwhile."""
        wait_s = 0.0
        while not self._ending.wait(wait_s):
            with contextlib.suppress(Exception):  # a fenced session says so to whoever writes
                wait_s = self._session.tick()
                self._session.idle()


class ServedVolume:
    """A volume open for reading, as a block device."""

    read_only, zeroes_fast = True, True
    fault = None

    def __init__(self, volume: Volume) -> None:
        """`volume` is in no session."""
        self._volume = volume
        self.size_bytes = volume.size_bytes

    def read(self, offset: int, length: int) -> bytes:
        """See `Served`."""
        with as_os_error():
            return self._volume.read(offset, length)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Fail."""
        raise OSError(errno.EROFS, f"open for reading only: {len(data)} bytes at {offset}")

    def zero(self, offset: int, length: int) -> None:
        """Fail."""
        raise OSError(errno.EROFS, f"open for reading only: {length} bytes at {offset}")

    def discard(self, offset: int, length: int) -> None:
        """Fail."""
        self.zero(offset, length)

    def flush(self) -> None:
        """Nothing was written."""

    def extents(self, offset: int, length: int) -> list[Extent]:
        """See `Served`."""
        with as_os_error():
            return extents(self._volume, offset, length)

    def close(self) -> None:
        """Nothing is left to be done."""


class as_os_error(contextlib.AbstractContextManager[None]):  # noqa: N801 - reads as the function it replaces
    """The engine's errors as what a block device's user is told; any fault of ours as an error of input and output."""

    def __exit__(self, _kind: object, exc: BaseException | None, _traceback: object) -> None:
        if isinstance(exc, VolumeError):
            raise OSError(exc.errno, type(exc).__name__) from exc
        if isinstance(exc, JindiskError):
            raise OSError(errno.EINVAL, type(exc).__name__) from None
        if isinstance(exc, Exception) and not isinstance(exc, OSError):
            raise OSError(errno.EIO, type(exc).__name__) from None
