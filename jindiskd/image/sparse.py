"""Files with holes: copying ranges in the kernel, finding data, and files without a name."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path

Range = tuple[int, int]
"""Offset and length in bytes."""
_PIECE = 16 << 20
_NOT_IN_KERNEL = {errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS, errno.EPERM}


def unlinked_file(directory: Path) -> int:
    """Open a new file that has no name: whatever ends the process, the kernel frees it.

    Clear text of an image is only ever kept in such files. The freed blocks are not overwritten, as with any deleted
    file; who wants that too keeps the image store on an encrypted disk.
    """
    try:
        return os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as exc:
        if exc.errno not in {errno.EOPNOTSUPP, errno.EISDIR, errno.EINVAL}:
            raise
    # The file system has no O_TMPFILE; the name lives for an instant, while the file is empty.
    path = directory / f".unlinked-{secrets.token_hex(8)}"
    fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
    path.unlink()
    return fd


def path_of(fd: int) -> str:
    """A path by which a program that inherits the descriptor under the same number can open it."""
    return f"/proc/self/fd/{fd}"


def data_ranges(fd: int, offset: int = 0, length: int | None = None) -> Iterator[Range]:
    """Where the file has data, between `offset` and `offset + length` or its end."""
    end = os.fstat(fd).st_size if length is None else min(os.fstat(fd).st_size, offset + length)
    at = offset
    while at < end:
        try:
            start = os.lseek(fd, at, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:  # only a hole follows
                return
            raise
        if start >= end:
            return
        at = min(os.lseek(fd, start, os.SEEK_HOLE), end)
        yield start, at - start


def block_ranges(fd: int, offset: int, length: int, block_bytes: int = 4096) -> list[Range]:
    """Where the file has data in a part of it, in whole blocks, in order and apart; offsets count from `offset`.

    `length` is a whole number of blocks; what the file lacks of it has no data.
    """
    found: list[Range] = []
    for start, size in data_ranges(fd, offset, length):
        first = (start - offset) // block_bytes * block_bytes
        end = -(-(start + size - offset) // block_bytes) * block_bytes
        if found and first <= sum(found[-1]):
            first = found.pop()[0]
        found.append((first, end - first))
    return found


def copy_range(source: int, target: int, length: int, source_offset: int, target_offset: int) -> int:
    """Copy `length` bytes, in the kernel where it can (it may then share blocks); returns how many there were.

    A source that ends early ends the copy.
    """
    done = 0
    in_kernel = True
    while done < length:
        want = min(_PIECE, length - done)
        if in_kernel:
            try:
                count = os.copy_file_range(source, target, want, source_offset + done, target_offset + done)
            except OSError as exc:
                if exc.errno not in _NOT_IN_KERNEL:
                    raise
                in_kernel = False
                continue
        else:
            piece = os.pread(source, want, source_offset + done)
            count = os.pwrite(target, piece, target_offset + done) if piece else 0
        if count == 0:
            break
        done += count
    return done


def copy_ranges(
    source: int, target: int, ranges: Iterable[Range], *, source_offset: int = 0, target_offset: int = 0
) -> int:
    """Copy ranges, relative to both offsets; returns the bytes copied."""
    return sum(copy_range(source, target, length, source_offset + at, target_offset + at) for at, length in ranges)
