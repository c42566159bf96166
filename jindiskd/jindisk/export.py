"""Exporting a volume as a raw image, in order of logical blocks; holes stay holes (format document, section 15)."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable

from jindiskd.jindisk.crypto import TAG_BYTES, OpeningKey
from jindiskd.jindisk.errors import VolumeDeviceFailed, VolumeError, VolumeInconsistent, VolumeUnauthentic
from jindiskd.jindisk.geometry import BLOCK, ENTRY_BYTES, PER_LEAF, Kind
from jindiskd.jindisk.memtable import UNMAPPED
from jindiskd.jindisk.pool import Pool, default_workers
from jindiskd.jindisk.segments import Wanted, data_name, open_run
from jindiskd.jindisk.volume import ZERO_BLOCK, Volume

SMALL_BLOCKS = 8192
LEAVES = 6
"""Leaves of the map in a task: 1020 blocks, 4 MiB."""
_LEAF, _ENTRY = PER_LEAF[Kind.F], ENTRY_BYTES[Kind.F]
_USED = _LEAF * _ENTRY
_TASK_BYTES = LEAVES * _LEAF * BLOCK
_HEAD = struct.Struct("<II")  # leaves, keys
_KEY = struct.Struct("<Q32s")
_INDEX = struct.Struct("<Q")
_GOOD = struct.Struct("<Q")  # blocks written
_BAD = struct.Struct("<QQI")  # logical block, raw block, error number or zero
_RAWS = struct.Struct("<" + f"Q{_ENTRY - 8}x" * _LEAF)
_MAPPING = struct.Struct("<Q16s")


def bulk_export(
    volume: Volume,
    target_fd: int,
    *,
    target_offset_bytes: int = 0,
    progress: Callable[[int, int], None] | None = None,
    workers: int | None = None,
    damaged: Callable[[VolumeError], None] | None = None,
) -> int:
    """Write the content of a volume to a file or device; returns the bytes of data written.

    Args:
        volume: open for reading, not in a session.
        target_fd: written at `target_offset_bytes` and after it. Holes are not written: what is there must be zeros,
            as in a new file, which is given its full length.
        target_offset_bytes: where the image begins in the target.
        progress: called with bytes of the volume done, and in all.
        workers: processes; None for one on each processor.
        damaged: called with each block or page that cannot be read, whose bytes become zeros; without it the first
            ends the export.

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
        result = pool.next()
        for lba, raw, number in _BAD.iter_unpack(result[_GOOD.size :]):
            bad: VolumeError = VolumeUnauthentic(data_name(lba, raw))
            if number:
                bad = VolumeDeviceFailed(f"reading {data_name(lba, raw)}", OSError(number, os.strerror(number)))
            if damaged is None:
                raise bad
            damaged(bad)
        written += _GOOD.unpack_from(result)[0] * BLOCK
        tell(min(ends.pop(0) * _LEAF * BLOCK, total), total)

    worker = _Worker(volume, target_fd, target_offset_bytes, onward=damaged is not None)
    with Pool(worker.work, workers) as pool:
        batch: list[tuple[int, bytes]] = []
        for leaf in volume.leaves(damaged):
            batch.append(leaf)
            if len(batch) == LEAVES:
                while pool.full:
                    take()
                ends.append(batch[-1][0] + 1)
                pool.give(_task(volume, batch, damaged))
                batch = []
        if batch:
            while pool.full:
                take()
            ends.append(batch[-1][0] + 1)
            pool.give(_task(volume, batch, damaged))
        while pool.waiting:
            take()
    tell(total, total)
    return written


def _task(
    volume: Volume, leaves: list[tuple[int, bytes]], damaged: Callable[[VolumeError], None] | None
) -> bytes:
    """Leaves of the map with the keys of the segments they point into."""
    geometry, parts, keys = volume.geometry, [], {}
    start, end, bits = geometry.data_start, geometry.end, geometry.segment_bits
    for index, page in leaves:
        used = bytearray(page[:_USED])
        for at, raw in enumerate(_RAWS.unpack_from(page)):
            if not raw or (start <= raw < end and (raw - start) >> bits in keys):
                continue
            try:
                if not start <= raw < end:
                    what = f"leaf {index} of tree F"
                    raise VolumeInconsistent(what, f"raw block {raw} lies outside the data region")
                keys[geometry.segment_of(raw)] = volume.segments.key(geometry.segment_of(raw))
            except VolumeInconsistent as exc:
                if damaged is None:
                    raise
                damaged(exc)
                used[at * _ENTRY : (at + 1) * _ENTRY] = UNMAPPED
        parts.append(_INDEX.pack(index) + used)
    packed = b"".join(_KEY.pack(segment, key) for segment, key in keys.items())
    return _HEAD.pack(len(leaves), len(keys)) + packed + b"".join(parts)


class _Worker:
    """The task, as it runs in the worker processes."""

    def __init__(self, volume: Volume, target_fd: int, offset: int, *, onward: bool) -> None:
        self._device, self._geometry, self._onward = volume.device, volume.geometry, onward
        self._target, self._offset = target_fd, offset
        # Used again and again: memory that is new costs more than the cipher.
        self._sealed, self._plain = bytearray(_TASK_BYTES + TAG_BYTES), bytearray(_TASK_BYTES)

    def work(self, task: bytes) -> bytes:
        """Read, open and write the blocks of some leaves; how many, or which one is not authentic."""
        leaves, keys = _HEAD.unpack_from(task)
        at = _HEAD.size + keys * _KEY.size
        opening = {segment: OpeningKey(key) for segment, key in _KEY.iter_unpack(task[_HEAD.size : at])}
        mapped: list[Wanted] = []
        start, bits = self._geometry.data_start, self._geometry.segment_bits
        for _ in range(leaves):
            (index,) = _INDEX.unpack_from(task, at)
            entries = _MAPPING.iter_unpack(task[at + _INDEX.size : at + _INDEX.size + _USED])
            for number, (raw, tag) in enumerate(entries, index * _LEAF):
                if raw:
                    mapped.append((number, raw, tag, opening[(raw - start) >> bits]))
            at += _INDEX.size + _USED
        done = 0
        bad: list[bytes] = []
        with memoryview(self._sealed) as sealed, memoryview(self._plain) as plain:
            while done < len(mapped) and (self._onward or not bad):
                lba, raw, _, _ = mapped[done]
                run = 1
                while done + run < len(mapped):
                    next_lba, next_raw, _, _ = mapped[done + run]
                    if next_lba != lba + run or next_raw != raw + run:
                        break
                    run += 1
                failed = self._read(raw, run, sealed)
                for number in open_run(mapped[done : done + run], sealed, plain, range(0, run * BLOCK, BLOCK)):
                    bad.append(_BAD.pack(lba + number, raw + number, failed.get(number, 0)))
                    plain[number * BLOCK : (number + 1) * BLOCK] = ZERO_BLOCK
                _write(self._target, plain[: run * BLOCK], self._offset + lba * BLOCK)
                done += run
        return _GOOD.pack(len(mapped) - len(bad)) + b"".join(bad)

    def _read(self, raw: int, count: int, into: memoryview) -> dict[int, int]:
        """Raw blocks; going on past damage, with the error number of each that the device does not give."""
        try:
            into[: count * BLOCK] = self._device.pread(raw * BLOCK, count * BLOCK)
        except OSError:
            if not self._onward:
                raise
        else:
            return {}
        failed = {}
        for number in range(count):
            block = ZERO_BLOCK
            try:
                block = self._device.pread((raw + number) * BLOCK, BLOCK)
            except OSError as exc:
                failed[number] = exc.errno or errno.EIO
            into[number * BLOCK : (number + 1) * BLOCK] = block
        return failed


def _write(fd: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count
