"""Exporting a volume as a raw image, in order of logical blocks; holes stay holes (format document, section 15)."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable

from jindiskd.jindisk.crypto import OpeningKey, block_nonce
from jindiskd.jindisk.errors import VolumeInconsistent, VolumeUnauthentic
from jindiskd.jindisk.geometry import BLOCK, ENTRY_BYTES, PER_LEAF, Kind
from jindiskd.jindisk.pool import Pool, default_workers
from jindiskd.jindisk.segments import data_aad, data_name
from jindiskd.jindisk.volume import Volume

SMALL_BLOCKS = 8192
LEAVES = 6
"""Leaves of the map in a task: 1020 blocks, 4 MiB."""
_LEAF, _ENTRY = PER_LEAF[Kind.F], ENTRY_BYTES[Kind.F]
_USED = _LEAF * _ENTRY
_HEAD = struct.Struct("<II")  # leaves, keys
_KEY = struct.Struct("<Q32s")
_INDEX = struct.Struct("<Q")
_RESULT = struct.Struct("<BQQ")
_MAPPING = struct.Struct("<Q16s")
GOOD, BAD = 0, 1


def bulk_export(
    volume: Volume,
    target_fd: int,
    *,
    target_offset_bytes: int = 0,
    progress: Callable[[int, int], None] | None = None,
    workers: int | None = None,
) -> int:
    """Write the content of a volume to a file or device; returns the bytes of data written.

    Args:
        volume: open for reading, not in a session.
        target_fd: written at `target_offset_bytes` and after it. Holes are not written: what is there must be zeros,
            as in a new file, which is given its full length.
        target_offset_bytes: where the image begins in the target.
        progress: called with bytes of the volume done, and in all.
        workers: processes; None for one on each processor.

    Raises:
        VolumeError: the first block or page that cannot be read; the target is incomplete then.
        OSError: reading or writing failed.
    """
    total, written = volume.size_bytes, 0
    if workers is None:
        workers = default_workers() if volume.superblock.mapped > SMALL_BLOCKS else 1
    tell = progress or (lambda _done, _total: None)
    status = os.fstat(target_fd)
    if status.st_mode & 0o170000 == 0o100000 and status.st_size < target_offset_bytes + total:  # a regular file
        os.ftruncate(target_fd, target_offset_bytes + total)
    ends: list[int] = []

    def take() -> None:
        nonlocal written
        result, first, second = _RESULT.unpack(pool.next())
        if result == BAD:
            raise VolumeUnauthentic(data_name(first, second))
        written += first * BLOCK
        tell(min(ends.pop(0) * _LEAF * BLOCK, total), total)

    with Pool(_Worker(volume, target_fd, target_offset_bytes).work, workers) as pool:
        batch: list[tuple[int, bytes]] = []
        for leaf in volume.leaves():
            batch.append(leaf)
            if len(batch) == LEAVES:
                while pool.full:
                    take()
                ends.append(batch[-1][0] + 1)
                pool.give(_task(volume, batch))
                batch = []
        if batch:
            while pool.full:
                take()
            ends.append(batch[-1][0] + 1)
            pool.give(_task(volume, batch))
        while pool.waiting:
            take()
    tell(total, total)
    return written


def _task(volume: Volume, leaves: list[tuple[int, bytes]]) -> bytes:
    """Leaves of the map with the keys of the segments they point into."""
    geometry, parts, segments = volume.geometry, [], set()
    for index, page in leaves:
        for raw, _ in _MAPPING.iter_unpack(page[:_USED]):
            if raw and not geometry.data_start <= raw < geometry.end:
                what = f"leaf {index} of tree F"
                raise VolumeInconsistent(what, f"raw block {raw} lies outside the data region")
            if raw:
                segments.add(geometry.segment_of(raw))
        parts.append(_INDEX.pack(index) + page[:_USED])
    keys = b"".join(_KEY.pack(segment, volume.segments.key(segment)) for segment in sorted(segments))
    return _HEAD.pack(len(leaves), len(segments)) + keys + b"".join(parts)


class _Worker:
    """The task, as it runs in the worker processes."""

    def __init__(self, volume: Volume, target_fd: int, offset: int) -> None:
        self._device, self._geometry = volume.device, volume.geometry
        self._target, self._offset = target_fd, offset

    def work(self, task: bytes) -> bytes:
        """Read, open and write the blocks of some leaves; how many, or which one is not authentic."""
        leaves, keys = _HEAD.unpack_from(task)
        at = _HEAD.size + keys * _KEY.size
        opening = {segment: OpeningKey(key) for segment, key in _KEY.iter_unpack(task[_HEAD.size : at])}
        mapped = []
        for _ in range(leaves):
            (index,) = _INDEX.unpack_from(task, at)
            entries = _MAPPING.iter_unpack(task[at + _INDEX.size : at + _INDEX.size + _USED])
            mapped += [(index * _LEAF + n, raw, tag) for n, (raw, tag) in enumerate(entries) if raw]
            at += _INDEX.size + _USED
        done = 0
        while done < len(mapped):
            lba, raw, _ = mapped[done]
            run = 1
            while done + run < len(mapped) and mapped[done + run][:2] == (lba + run, raw + run):
                run += 1
            data = self._device.pread(raw * BLOCK, run * BLOCK)
            plain = []
            for number, (block, here, tag) in enumerate(mapped[done : done + run]):
                sealed = data[number * BLOCK : (number + 1) * BLOCK] + tag
                key = opening[self._geometry.segment_of(here)]
                opened = key.opens(block_nonce(here), sealed, data_aad(block))
                if opened is None:
                    return _RESULT.pack(BAD, block, here)
                plain.append(opened)
            _write(self._target, b"".join(plain), self._offset + lba * BLOCK)
            done += run
        return _RESULT.pack(GOOD, len(mapped), 0)


def _write(fd: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(fd, view, offset)
        view, offset = view[count:], offset + count
