"""Files that are whole or absent: durable replacement and creation."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from jindiskd.errors import NoSpace

RENAME_NOREPLACE = 1  # linux/fs.h
RENAME_EXCHANGE = 2
AT_FDCWD = -100  # linux/fcntl.h


@contextlib.contextmanager
def space_for(path: Path) -> Iterator[None]:
    """Tell by its own error that the file system of `path`, or its owner's share of it, is full.

    Raises:
        NoSpace: it is.
        OSError: anything else that went wrong.
    """
    try:
        yield
    except OSError as exc:
        if exc.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise NoSpace(os.fspath(path)) from exc
        raise


def fsync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_file(path: Path, data: bytes | bytearray, mode: int = 0o644) -> None:
    """Give `path` new content: after a crash it has the old content or the new, never a mixture.

    Written under a random name beside it, synced, renamed, and the directory synced. `mode` is set before the
    content is written, so a secret is never readable by others.
    """
    staged = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    fd = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    try:
        try:
            os.fchmod(fd, mode)
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            os.fsync(fd)
        finally:
            os.close(fd)
        staged.rename(path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            staged.unlink()
        raise
    fsync_directory(path.parent)


def rename_new(source: Path, target: Path) -> None:
    """Rename `source` to `target`, which must not exist; make it durable.

    Raises:
        FileExistsError: `target` exists; nothing was changed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(AT_FDCWD, os.fsencode(source), AT_FDCWD, os.fsencode(target), RENAME_NOREPLACE) != 0:
        number = ctypes.get_errno()
        if number == errno.EINVAL:  # a file system without RENAME_NOREPLACE; link(2) is no help for directories
            if target.exists():
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), os.fspath(target))
            source.rename(target)
        else:
            raise OSError(number, os.strerror(number), os.fspath(target))
    fsync_directory(target.parent)
    if source.parent != target.parent:
        fsync_directory(source.parent)


def exchange(one: Path, other: Path) -> None:
    """Give each of two things, in one directory, the name of the other, at once and durably.

    Raises:
        OSError: one is not there, or the file system cannot do that; nothing was changed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), RENAME_EXCHANGE) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fspath(other))
    fsync_directory(other.parent)
