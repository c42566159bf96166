"""Exporting a volume as a raw image, in order of logical blocks; holes stay holes (format document, section 15)."""

from __future__ import annotations

import errno
import operator
import os
import struct
from collections.abc import Callable, Iterator, Sequence

from jindiskd.jindisk.bulk import lengthen
from jindiskd.jindisk.crypto import OpeningKey
from jindiskd.jindisk.device import FileDevice, read_parts
from jindiskd.jindisk.errors import VolumeDeviceFailed, VolumeError, VolumeInconsistent, VolumeUnauthentic
from jindiskd.jindisk.geometry import BLOCK, ENTRY_BYTES, PER_LEAF, Geometry, Kind
from jindiskd.jindisk.memtable import UNMAPPED
from jindiskd.jindisk.pool import Pool, default_workers
from jindiskd.jindisk.runs import OpeningRun
from jindiskd.jindisk.segments import data_name
from jindiskd.jindisk.volume import ZERO_BLOCK, Volume

SMALL_BLOCKS = 8192
LEAVES = 6
"""Leaves of the map in a task: 1020 blocks, 4 MiB."""
STEP_BLOCKS = 170
"""Read, opened and written at once."""
_LEAF, _ENTRY = PER_LEAF[Kind.F], ENTRY_BYTES[Kind.F]
_USED, _ENTRY_WORDS = _LEAF * _ENTRY, _ENTRY // 8
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
    lengthen(target_fd, target_offset_bytes + total)
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


def _task(volume: Volume, leaves: list[tuple[int, bytes]], damaged: Callable[[VolumeError], None] | None) -> bytes:
    """Leaves of the map with the keys of the segments they point into."""
    geometry, parts, keys = volume.geometry, [], dict[int, bytes]()
    for index, page in leaves:
        raws, used = _RAWS.unpack_from(page), page[:_USED]
        wrong: dict[int, VolumeInconsistent] = {}
        for segment in {(raw - geometry.data_start) >> geometry.segment_bits for raw in raws if raw} - keys.keys():
            if not 0 <= segment < geometry.segments:
                some = next(raw for raw in raws if raw and not geometry.data_start <= raw < geometry.end)
                what = f"raw block {some} lies outside the data region"
                wrong[segment] = VolumeInconsistent(f"leaf {index} of tree F", what)
                continue
            try:
                keys[segment] = volume.segments.key(segment)
            except VolumeInconsistent as exc:
                wrong[segment] = exc
        if wrong:
            used = _without(used, wrong, geometry, damaged)
        parts.append(_INDEX.pack(index) + used)
    packed = b"".join(_KEY.pack(segment, key) for segment, key in keys.items())
    return _HEAD.pack(len(leaves), len(keys)) + packed + b"".join(parts)


def _without(
    page: bytes,
    wrong: dict[int, VolumeInconsistent],
    geometry: Geometry,
    damaged: Callable[[VolumeError], None] | None,
) -> bytes:
    """A leaf without the entries that point into these segments. Raises the first one's error without `damaged`."""
    left = bytearray(page)
    for at, (raw, _) in enumerate(_MAPPING.iter_unpack(page)):
        error = wrong.get((raw - geometry.data_start) >> geometry.segment_bits) if raw else None
        if error is None:
            continue
        if damaged is None:
            raise error
        damaged(error)
        left[at * _ENTRY : (at + 1) * _ENTRY] = UNMAPPED
    return bytes(left)


class _Worker:
    """The task, as it runs in the worker processes."""

    def __init__(self, volume: Volume, target_fd: int, offset: int, *, onward: bool) -> None:
        self._device, self._geometry, self._onward = volume.device, volume.geometry, onward
        self._target = FileDevice(target_fd, name="the target", offset_bytes=offset)
        # Used again and again: memory that is new costs more than the cipher.
        self._room, self._plain = OpeningRun(STEP_BLOCKS), memoryview(bytearray(STEP_BLOCKS * BLOCK))
        self._plains = [self._plain[at : at + BLOCK] for at in range(0, len(self._plain), BLOCK)]
        self._bad: list[bytes] = []

    def work(self, task: bytes) -> bytes:
        """Read, open and write the blocks of some leaves; how many, and which ones cannot be read."""
        leaves, keys = _HEAD.unpack_from(task)
        at = _HEAD.size + keys * _KEY.size
        opening = {segment: OpeningKey(key) for segment, key in _KEY.iter_unpack(task[_HEAD.size : at])}
        start, bits = self._geometry.data_start, self._geometry.segment_bits
        self._bad, count = [], 0
        with memoryview(task) as whole:
            for _ in range(leaves):
                (index,) = _INDEX.unpack_from(task, at)
                at += _INDEX.size
                raws = _RAWS.unpack_from(task, at)
                with whole[at : at + _USED] as page, page.cast("Q") as words:
                    for first, length in _runs(raws, bits, start):
                        if self._bad and not self._onward:
                            break
                        tags = words[first * _ENTRY_WORDS : (first + length) * _ENTRY_WORDS]
                        self._run(index * _LEAF + first, raws[first], tags, opening[(raws[first] - start) >> bits])
                        tags.release()
                        count += length
                at += _USED
        return _GOOD.pack(count - len(self._bad)) + b"".join(self._bad)

    def _run(self, lba: int, raw: int, entries: memoryview, key: OpeningKey) -> None:
        """Blocks that lie one behind the other in the image and in one segment."""
        count = len(entries) // _ENTRY_WORDS
        failed = self._read(raw, count)
        self._room.put_tags(entries[1::_ENTRY_WORDS], entries[2::_ENTRY_WORDS])
        self._room.number(raw, range(lba, lba + count))
        if failed or not key.open_run(self._room, self._plains[:count]):
            for number in range(count):
                if number in failed or not key.open_run_at(self._room, number, self._plains[number]):
                    self._bad.append(_BAD.pack(lba + number, raw + number, failed.get(number, 0)))
                    self._plains[number][:] = ZERO_BLOCK
        self._target.pwrite(lba * BLOCK, self._plain[: count * BLOCK])

    def _read(self, raw: int, count: int) -> dict[int, int]:
        """Raw blocks; going on past damage, with the error number of each that the device does not give."""
        try:
            read_parts(self._device, raw * BLOCK, self._room.blocks[:count])
        except OSError:
            if not self._onward:
                raise
        else:
            return {}
        failed = {}
        for number in range(count):
            try:
                read_parts(self._device, (raw + number) * BLOCK, [self._room.blocks[number]])
            except OSError as exc:
                failed[number] = exc.errno or errno.EIO
        return failed


def _runs(raws: Sequence[int], bits: int, start: int) -> Iterator[tuple[int, int]]:
    """Where in a leaf, and how many, entries follow each other on the disk, each run in one segment."""
    ends = [at for at, step in enumerate(map(operator.sub, raws[1:], raws), 1) if step != 1]
    first = 0
    for end in (*ends, len(raws)):
        if raws[first]:
            at = first
            while at < end:
                in_segment = (1 << bits) - (raws[at] - start & (1 << bits) - 1)
                length = min(end - at, in_segment, STEP_BLOCKS)
                yield at, length
                at += length
        first = end
