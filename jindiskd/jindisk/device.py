"""The device below a volume: a file, a block device, or a window of one."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from jindiskd.errors import Busy, InvalidArgument


class Device(Protocol):
    """What a volume needs of a device. Offsets and lengths in bytes; failures are `OSError`."""

    @property
    def size_bytes(self) -> int:
        """Length."""

    def pread(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes."""

    def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write all of `data`; durable after the next `flush`."""

    def flush(self) -> None:
        """Make all earlier writes durable: the barrier of the format document, section 11."""

    def discard(self, offset: int, length: int) -> None:
        """The bytes are not needed any more; may do nothing."""


class FileDevice:
    """A window of an open file or block device."""

    __slots__ = ("_fd", "_offset", "name", "size_bytes")

    def __init__(self, fd: int, *, name: str, offset_bytes: int = 0, size_bytes: int | None = None) -> None:
        """Use `fd`, which stays the caller's; the window reaches to the end unless `size_bytes` is given."""
        self._fd, self._offset, self.name = fd, offset_bytes, name
        end = os.lseek(fd, 0, os.SEEK_END)  # the size of a block device too
        self.size_bytes = max(0, end - offset_bytes) if size_bytes is None else size_bytes

    def pread(self, offset: int, length: int) -> bytes:
        """Exactly `length` bytes. Raises `OSError`."""
        data = os.pread(self._fd, length, self._offset + offset)
        while len(data) < length:
            more = os.pread(self._fd, length - len(data), self._offset + offset + len(data))
            if not more:
                raise OSError(errno.EIO, "the device ends before the volume does")
            data += more
        return data

    def pwrite(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write all. Raises `OSError`."""
        done = os.pwrite(self._fd, data, self._offset + offset)
        while done < len(data):
            with memoryview(data) as view:
                done += os.pwrite(self._fd, view[done:], self._offset + offset + done)

    def preadv(self, offset: int, parts: list[memoryview]) -> None:
        """Fill parts, at most 1024, with what follows `offset`. Raises `OSError`."""
        done = os.preadv(self._fd, parts, self._offset + offset)
        if done < sum(map(len, parts)):  # part by part, which knows what to do
            for part in parts:
                part[:] = self.pread(offset, len(part))
                offset += len(part)

    def open_again(self, flags: int) -> int:
        """Another descriptor of the same file with other flags, the caller's to close; -1 if that cannot be had."""
        try:
            return os.open(f"/proc/self/fd/{self._fd}", flags | os.O_CLOEXEC)
        except OSError:
            return -1

    def write_by(self, fd: int, offset: int, data: memoryview) -> int:
        """Write by a descriptor from `open_again`; how many bytes were written. Raises `OSError`."""
        return os.pwrite(fd, data, self._offset + offset)

    def pwritev(self, offset: int, parts: Sequence[bytes | memoryview]) -> None:
        """Write parts, at most 1024, one after the other. Raises `OSError`."""
        done = os.pwritev(self._fd, parts, self._offset + offset)
        if done < sum(map(len, parts)):
            self.pwrite(offset + done, b"".join(parts)[done:])

    def flush(self) -> None:
        """`fdatasync`. Raises `OSError`."""
        os.fdatasync(self._fd)

    def discard(self, offset: int, length: int) -> None:
        """Do nothing: holes in the file would tell which segments are free (format document, section 14.3)."""


def read_parts(device: Device, offset: int, parts: list[memoryview]) -> None:
    """Fill parts, at most 1024, with what follows `offset`, with one call where the device can. Raises `OSError`."""
    if isinstance(device, FileDevice):
        device.preadv(offset, parts)
        return
    data, at = device.pread(offset, sum(map(len, parts))), 0
    for part in parts:
        part[:] = data[at : at + len(part)]
        at += len(part)


def write_parts(device: Device, offset: int, parts: Sequence[bytes | memoryview]) -> None:
    """Write parts, at most 1024, one after the other, with one call where the device can. Raises `OSError`."""
    if isinstance(device, FileDevice):
        device.pwritev(offset, parts)
    else:
        device.pwrite(offset, b"".join(parts))


class OpenFile:
    """A file or block device opened by path, locked against a second writer, as a context manager giving its device."""

    def __init__(self, path: Path, *, writable: bool, offset_bytes: int = 0, size_bytes: int | None = None) -> None:
        """Nothing is opened yet."""
        self._path, self._writable, self._offset, self._size = path, writable, offset_bytes, size_bytes
        self._fd = -1

    def __enter__(self) -> FileDevice:
        flags = os.O_RDWR if self._writable else os.O_RDONLY
        if self._writable and self._path.is_block_device():
            flags |= os.O_EXCL  # not while it is mounted, or another device lies on it
        try:
            self._fd = os.open(self._path, flags | os.O_CLOEXEC)
        except OSError as exc:
            if exc.errno == errno.EBUSY:
                raise Busy(os.fspath(self._path), "it is mounted, or another device lies on it") from exc
            raise
        mode = os.fstat(self._fd).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISBLK(mode):
            self.__exit__()
            raise InvalidArgument("the device", os.fspath(self._path), "it is neither a file nor a block device")
        try:
            fcntl.flock(self._fd, (fcntl.LOCK_EX if self._writable else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            self.__exit__()
            raise Busy(os.fspath(self._path), "another process has the volume open; close it there") from exc
        return FileDevice(self._fd, name=os.fspath(self._path), offset_bytes=self._offset, size_bytes=self._size)

    def __exit__(self, *_exc: object) -> None:
        with contextlib.suppress(OSError):
            os.close(self._fd)
