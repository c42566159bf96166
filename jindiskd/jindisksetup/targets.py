"""Files and block devices that are going to be overwritten: nothing that somebody may want is lost by accident."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import json
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from jindiskd.base.files import fsync_directory
from jindiskd.base.process import run
from jindiskd.cli.app import App
from jindiskd.cli.output import size as words_of
from jindiskd.errors import EXIT_BUSY, Busy, InvalidArgument, JindiskError
from jindiskd.jindisk.identification import MAGIC

PROBE_S = 60.0
BLKROGET = 0x125E  # linux/fs.h
BLKZEROOUT = 0x127F
ZERO_BYTES = 256 << 20
_RANGE = struct.Struct("=QQ")


class SignatureFound(JindiskError, code="SignatureFound", exit_code=EXIT_BUSY):
    """What would be overwritten holds something known."""

    def __init__(self, path: Path, found: str) -> None:
        """`found` names it."""
        super().__init__(f"{path} holds {found}: look whether it is the right one, then use --force to overwrite it")


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A file or device open for overwriting."""

    fd: int
    path: Path
    size_bytes: int
    is_block: bool
    is_new: bool


def same_file(first: Path, second: Path) -> bool:
    """Whether two paths are the same file, or the same block device by whatever node."""
    try:
        one, other = first.stat(), second.stat()
    except FileNotFoundError:
        return False
    if stat.S_ISBLK(one.st_mode) and stat.S_ISBLK(other.st_mode):
        return one.st_rdev == other.st_rdev
    return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)


@contextlib.contextmanager
def overwriting(app: App, path: Path, *, offset_bytes: int, force: bool, yes: bool, what: str) -> Iterator[Target]:
    """Open a target for `what`, locked; a new file is removed again if the block fails.

    Raises:
        SignatureFound: it holds something known, and there is no `force`.
        NotConfirmed: it holds something, and nobody says that it may go.
        Busy: it is in use.
        InvalidArgument: it is neither a file nor a block device.
        OSError: it cannot be opened.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        is_new = True
    except FileExistsError:
        fd, is_new = _existing(path), False
    try:
        found = os.fstat(fd)
        is_block = stat.S_ISBLK(found.st_mode)
        if not is_block and not stat.S_ISREG(found.st_mode):
            raise InvalidArgument("the target", os.fspath(path), "it is neither a file nor a block device")
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise Busy(os.fspath(path), "another process has the volume open; close it there") from exc
        if is_block and _read_only(fd):
            raise InvalidArgument("the target", os.fspath(path), "it is set read-only: blockdev --setrw it")
        end = os.lseek(fd, 0, os.SEEK_END)
        if not force and _holds_data(fd, offset_bytes, end, is_block=is_block):
            known = signature(path, fd, offset_bytes)
            if known is not None:
                raise SignatureFound(path, known)
            question = f"{what} overwrites {path} ({words_of(end)}), which is not empty. Go on?"
            app.confirm(question, f"overwriting {path}", yes=yes)
        yield Target(fd=fd, path=path, size_bytes=end, is_block=is_block, is_new=is_new)
        os.fsync(fd)
        if is_new:
            fsync_directory(path.absolute().parent)
    except BaseException:
        if is_new:
            path.unlink(missing_ok=True)
        raise
    finally:
        os.close(fd)


def _read_only(fd: int) -> bool:
    """Whether a block device is set so; it can be opened for writing all the same."""
    return any(fcntl.ioctl(fd, BLKROGET, bytes(4)))


def _existing(path: Path) -> int:
    # On a block device O_EXCL means: not mounted, not part of another device.
    exclusive = os.O_EXCL if path.is_block_device() else 0
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC | exclusive)
    except OSError as exc:
        if exc.errno == errno.EBUSY:
            raise Busy(os.fspath(path), "it is mounted, or another device lies on it") from exc
        raise


def _holds_data(fd: int, offset: int, end: int, *, is_block: bool) -> bool:
    """Whether there is anything: a device always may hold something, a file if it has data and not only holes."""
    if offset >= end:
        return False
    if is_block:
        return True
    try:
        os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as exc:
        return exc.errno != errno.ENXIO
    return True


def signature(path: Path, fd: int, offset_bytes: int) -> str | None:
    """What is known to lie there: a file system, a partition table, a volume; None if nothing is known.

    wipefs(8) knows all but JinDisk. Version 1 of JinDisk has nothing that could be known by.
    """
    if os.pread(fd, len(MAGIC), offset_bytes) == MAGIC:
        return "a JinDisk 2 volume"
    words = ["wipefs", "--no-act", "--json", f"--offset={offset_bytes}", "--", os.fspath(path)]
    if not offset_bytes:
        del words[3]
    listed = asyncio.run(run(words, timeout_s=PROBE_S)).strip()
    found = json.loads(listed).get("signatures", []) if listed else []
    names = sorted({str(item.get("type")) for item in found})
    return f"a known signature ({', '.join(names)})" if names else None


def make_zero(target: Target, offset: int, length: int) -> None:
    """Make a range read as zeros: by the device's own means, or as the end of a file. Raises `OSError`."""
    if target.is_block:
        for at in range(offset, offset + length, ZERO_BYTES):  # in pieces, so that it can be interrupted
            fcntl.ioctl(target.fd, BLKZEROOUT, _RANGE.pack(at, min(ZERO_BYTES, offset + length - at)))
    else:
        os.ftruncate(target.fd, offset)
        os.ftruncate(target.fd, offset + length)
