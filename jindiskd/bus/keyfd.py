"""Secrets and files come as descriptors. They are somebody else's: they may block, lie, or be something odd.

A secret is read with a limit and a deadline, off the loop, from a pipe, a socket or a regular file. A disk image must
be a regular file, open for reading. `O_PATH` descriptors prove no right to read and are refused.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import select
import stat
import time

from jindiskd.base.secret import Secret
from jindiskd.bus.faults import INVALID_ARGS, BusFault
from jindiskd.bus.peers import Descriptor
from jindiskd.errors import TimedOut

O_PATH = os.O_PATH
SECRET_LIMIT_BYTES = 4096
SECRET_TIMEOUT_S = 5.0


def _check_readable(fd: int) -> None:
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    if flags & O_PATH or flags & os.O_ACCMODE == os.O_WRONLY:
        raise BusFault(INVALID_ARGS, "the file descriptor is not open for reading")


def _read(fd: int, limit: int, timeout_s: float) -> Secret:
    mode = os.fstat(fd).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
        raise BusFault(INVALID_ARGS, "pass a pipe, a socket, a memfd or a regular file")
    _check_readable(fd)
    deadline = time.monotonic() + timeout_s
    buffer, used = bytearray(limit + 1), 0
    ready = select.poll()
    ready.register(fd, select.POLLIN)
    try:
        with memoryview(buffer) as view:
            while used <= limit:
                left = deadline - time.monotonic()
                if left <= 0 or not ready.poll(left * 1000):
                    raise TimedOut("the arrival of the secret on its file descriptor", timeout_s)
                got = os.readv(fd, [view[used:]])
                if not got:
                    return Secret(view[:used])
                used += got
        raise BusFault(INVALID_ARGS, f"the secret is longer than {limit} bytes")
    finally:
        buffer[:] = bytes(len(buffer))


async def read_secret(
    descriptor: Descriptor, *, limit_bytes: int = SECRET_LIMIT_BYTES, timeout_s: float = SECRET_TIMEOUT_S
) -> Secret:
    """All that is behind the descriptor, which is closed in any case.

    Raises:
        BusFault: not readable, not of a fit kind, or longer than `limit_bytes`.
        TimedOut: its end did not come within `timeout_s`.
    """
    fd = descriptor.take()
    try:
        return await asyncio.to_thread(_read, fd, limit_bytes, timeout_s)
    finally:
        os.close(fd)


def take_regular_file(descriptor: Descriptor) -> int:
    """A descriptor of a regular file that is open for reading; the taker closes it.

    Raises:
        BusFault: it is something else; it is closed then.
    """
    fd = descriptor.take()
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise BusFault(INVALID_ARGS, "pass a regular file: a directory, device or pipe cannot be a base")
        _check_readable(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


def document_descriptor(name: str, data: bytes) -> Descriptor:
    """A readable descriptor of a document, in memory alone; `name` is shown by tools."""
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with os.fdopen(os.dup(fd), "wb") as stream:
            stream.write(data)
        os.lseek(fd, 0, os.SEEK_SET)
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    except BaseException:
        os.close(fd)
        raise
    return Descriptor(fd)


def take_stream(descriptor: Descriptor, *, writing: bool) -> int:
    """A descriptor of a regular file, a pipe or a socket that can be read, or written; the taker closes it.

    Raises:
        BusFault: it is something else; it is closed then.
    """
    fd = descriptor.take()
    try:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)):
            raise BusFault(INVALID_ARGS, "pass a regular file, a pipe or a socket")
        if writing:
            flags = fcntl.fcntl(fd, fcntl.F_GETFL)
            if flags & O_PATH or flags & os.O_ACCMODE == os.O_RDONLY:
                raise BusFault(INVALID_ARGS, "the file descriptor is not open for writing")
        else:
            _check_readable(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd
