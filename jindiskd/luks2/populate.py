"""Encrypting the data of a volume in bulk: the used ranges of a source into the data segment, holes left as holes.

XTS without integrity: whoever holds the disk sees which ranges were never written, and can garble sectors unnoticed
(the format `jindisk` exists for that). The work is divided over forked processes: the cipher is called once a sector,
and threads would wait for the interpreter's lock. They inherit the key with the memory, and die with their parent.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import struct
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from jindiskd.base.secret import Secret
from jindiskd.errors import JindiskError, NoSpace
from jindiskd.luks2 import layout, xts

CHUNK_BYTES = 1 << 20
PR_SET_PDEATHSIG = 1  # linux/prctl.h
Range = tuple[int, int]
"""Offset and length in bytes, both multiples of `layout.SECTOR_BYTES`."""
_REPORT = struct.Struct("<iI")  # error number or zero, bytes done; shorter than PIPE_BUF, so written whole


class SectorCipher(Protocol):
    """`xts.encrypt` or `xts.decrypt`."""

    def __call__(
        self, key: bytes | bytearray, data: bytes | memoryview, *, sector_bytes: int, first_tweak: int, step: int
    ) -> bytes:
        """Whole sectors to whole sectors."""


class PopulateFailed(JindiskError, code="PopulateFailed"):
    """The data could not be encrypted into the volume."""

    def __init__(self, problem: str) -> None:
        """`problem` says what happened."""
        super().__init__(f"the volume could not be filled: {problem}")


def _chunks(ranges: Iterable[Range]) -> Iterator[Range]:
    for offset, length in ranges:
        for start in range(offset, offset + length, CHUNK_BYTES):
            yield start, min(CHUNK_BYTES, offset + length - start)


def read_exactly(fd: int, length: int, offset: int) -> bytes:
    """`length` bytes at `offset`; a short file ends in zeros, as a disk image with a hole at its end does."""
    data = os.pread(fd, length, offset)
    while len(data) < length:
        more = os.pread(fd, length - len(data), offset + len(data))
        if not more:
            return data.ljust(length, b"\0")
        data += more
    return data


def write_exactly(fd: int, data: bytes | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`."""
    view = memoryview(data)
    while view:
        done = os.pwrite(fd, view, offset)
        view, offset = view[done:], offset + done


def populate(
    source_fd: int,
    target_fd: int,
    ranges: Iterable[Range],
    *,
    volume_key: Secret,
    source_offset_bytes: int = 0,
    target_offset_bytes: int = 0,
    workers: int = 1,
    progress: Callable[[int], None] = lambda _done: None,
    cipher: SectorCipher = xts.encrypt,
) -> int:
    """Encrypt `ranges` of the source to the same places of the data segment, which begins at `target_offset_bytes`.

    With `cipher=xts.decrypt` the other way round: the source has the data segment, the target becomes clear.

    Args:
        source_fd: the clear data; read with pread only.
        target_fd: the disk; written with pwrite only.
        ranges: what to encrypt, relative to both offsets. A range of zeros is encrypted like any other.
        volume_key: 64 bytes.
        source_offset_bytes: where the data begins in the source.
        target_offset_bytes: where the data segment begins in the target.
        workers: number of processes.
        progress: called with the number of bytes done so far.

    Returns:
        The number of bytes encrypted.

    Raises:
        NoSpace: the target's file system is full.
        PopulateFailed: reading, writing or a process failed.
    """
    chunks = list(_chunks(ranges))
    workers = max(1, min(workers, len(chunks)))
    reading, writing = os.pipe2(os.O_CLOEXEC)
    parent, children, done, failure, ended = os.getpid(), [], 0, 0, False
    try:
        try:
            for worker in range(workers):
                pid = os.fork()
                if pid == 0:
                    _die_with(parent)
                    os.close(reading)
                    mine = chunks[worker::workers]
                    offsets = source_offset_bytes, target_offset_bytes
                    _work(source_fd, target_fd, mine, volume_key, offsets, writing, cipher)  # does not return
                children.append(pid)
        finally:
            os.close(writing)
        while report := os.read(reading, _REPORT.size):
            number, length = _REPORT.unpack(report)
            if number:
                failure = number
                break
            done += length
            progress(done)
        ended = not failure
    finally:
        os.close(reading)
        if not ended:
            for pid in children:
                os.kill(pid, signal.SIGKILL)
        statuses = [os.waitpid(pid, 0)[1] for pid in children]
    if failure == errno.ENOSPC:
        raise NoSpace("the encrypted disk", sum(length for _, length in chunks))
    if failure:
        raise PopulateFailed(os.strerror(failure))
    if any(statuses) or done != sum(length for _, length in chunks):
        raise PopulateFailed("a process of it ended early")
    return done


def _die_with(parent: int) -> None:
    """Have the kernel kill this process when its parent dies, so that none is left with a key."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _work(
    source_fd: int,
    target_fd: int,
    chunks: Iterable[Range],
    volume_key: Secret,
    offsets: tuple[int, int],
    reports: int,
    cipher: SectorCipher,
) -> None:
    """What a forked process does; it ends here in every case, so that nothing of the parent's runs twice."""
    status = 1
    source_offset, target_offset = offsets
    try:
        for offset, length in chunks:
            data = read_exactly(source_fd, length, source_offset + offset)
            changed = cipher(
                volume_key.reveal(),
                data,
                sector_bytes=layout.SECTOR_BYTES,
                first_tweak=offset // layout.TWEAK_UNIT_BYTES,
                step=layout.SECTOR_BYTES // layout.TWEAK_UNIT_BYTES,
            )
            write_exactly(target_fd, changed, target_offset + offset)
            os.write(reports, _REPORT.pack(0, length))
        status = 0
    except OSError as exc:
        with contextlib.suppress(OSError):
            os.write(reports, _REPORT.pack(exc.errno or errno.EIO, 0))
    except BaseException:  # noqa: BLE001 (a forked process must not unwind into its parent's frames)
        traceback.print_exc()
    finally:
        os._exit(status)
