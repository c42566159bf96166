"""Exporting a volume as a raw image, in order of logical blocks; holes stay holes (format document, section 15)."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator

from jindiskd.jindisk.bulk import lengthen
from jindiskd.jindisk.crypto import OpeningKey
from jindiskd.jindisk.device import FileDevice, read_parts
from jindiskd.jindisk.errors import VolumeDeviceFailed, VolumeError, VolumeInconsistent, VolumeUnauthentic
from jindiskd.jindisk.geometry import BLOCK, ENTRY_BYTES, PER_LEAF, Geometry, Kind
from jindiskd.jindisk.memtable import UNMAPPED
from jindiskd.jindisk.native import native
from jindiskd.jindisk.pool import Pool, default_workers
from jindiskd.jindisk.runs import OpeningRun
from jindiskd.jindisk.segments import data_name
from jindiskd.jindisk.volume import ZERO_BLOCK, Volume

SMALL_BLOCKS = 8192
LEAVES = 6
"""Leaves of the map in a task: 1020 blocks, 4 MiB."""
STEP_BLOCKS = 256
"""Read, opened and written at once, no more and no others than lie between two multiples of this: for what begins at a
round offset the page cache has large pages."""
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
        self._native = native()
        self._room, self._plain = OpeningRun(STEP_BLOCKS), memoryview(bytearray(STEP_BLOCKS * BLOCK))
        self._plains = [self._plain[at : at + BLOCK] for at in range(0, len(self._plain), BLOCK)]
        self._sealed = memoryview(bytearray(STEP_BLOCKS * BLOCK)) if self._native is not None else memoryview(b"")
        self._bad: list[bytes] = []

    def work(self, task: bytes) -> bytes:
        """Read, open and write the blocks of some leaves; how many, and which ones cannot be read."""
        leaves, keys = _HEAD.unpack_from(task)
        at = _HEAD.size + keys * _KEY.size
        opening = {segment: OpeningKey(key) for segment, key in _KEY.iter_unpack(task[_HEAD.size : at])}
        start, bits = self._geometry.data_start, self._geometry.segment_bits
        self._bad, count = [], 0
        for lba, entries in _stretches(task, at, leaves):
            with memoryview(entries) as view:
                for first, raw, length in self._runs(lba, view, bits, start):
                    if self._bad and not self._onward:
                        break
                    part = view[first * _ENTRY : (first + length) * _ENTRY]
                    self._run(lba + first, raw, part, opening[(raw - start) >> bits])
                    count += length
        return _GOOD.pack(count - len(self._bad)) + b"".join(self._bad)

    def _runs(self, lba: int, entries: memoryview, bits: int, start: int) -> Iterator[tuple[int, int, int]]:
        """Where in these entries, at which raw block, and how many, follow each other in one segment and one step."""
        at, end = 0, len(entries) // _ENTRY
        while at < end:
            (raw,) = _INDEX.unpack_from(entries, at * _ENTRY)
            if not raw:
                at += 1
                continue
            in_segment = (1 << bits) - (raw - start & (1 << bits) - 1)
            most = min(end - at, in_segment, STEP_BLOCKS - (lba + at) % STEP_BLOCKS)
            length = 1
            if self._native is not None:
                length = self._native.following(entries[at * _ENTRY :], most, step=_ENTRY)
            else:
                while length < most and _INDEX.unpack_from(entries, (at + length) * _ENTRY)[0] == raw + length:
                    length += 1
            yield at, raw, length
            at += length

    def _run(self, lba: int, raw: int, entries: memoryview, key: OpeningKey) -> None:
        """Blocks that lie one behind the other in the image and in one segment."""
        count = len(entries) // _ENTRY
        failed = self._read(raw, count)
        if self._native is None:
            with entries.cast("Q") as words:
                self._room.put_tags(words[1::_ENTRY_WORDS], words[2::_ENTRY_WORDS])
            self._room.number(raw, range(lba, lba + count))
        if failed or not self._open(key, lba, raw, entries):
            for number in range(count):
                at = number * _ENTRY
                if number in failed or not self._open(key, lba, raw, entries[at : at + _ENTRY], number):
                    self._bad.append(_BAD.pack(lba + number, raw + number, failed.get(number, 0)))
                    self._plains[number][:] = ZERO_BLOCK
        self._target.pwrite(lba * BLOCK, self._plain[: count * BLOCK])

    def _open(self, key: OpeningKey, lba: int, raw: int, entries: memoryview, number: int = 0) -> bool:
        """Open as many of the blocks as there are entries, from this one on; whether all tags verify."""
        count = len(entries) // _ENTRY
        if self._native is not None:
            sealed, plain = self._sealed[number * BLOCK :], self._plain[number * BLOCK :]
            return key.open_blocks(
                self._native, lba + number, raw + number, sealed=sealed, entries=entries, plain=plain
            )
        if count == 1:
            return key.open_run_at(self._room, number, self._plains[number])
        return key.open_run(self._room, self._plains[:count])

    def _read(self, raw: int, count: int) -> dict[int, int]:
        """Raw blocks; going on past damage, with the error number of each that the device does not give."""
        try:
            read_parts(self._device, raw * BLOCK, self._room_for(0, count))
        except OSError:
            if not self._onward:
                raise
        else:
            return {}
        failed = {}
        for number in range(count):
            try:
                read_parts(self._device, (raw + number) * BLOCK, self._room_for(number, 1))
            except OSError as exc:
                failed[number] = exc.errno or errno.EIO
        return failed

    def _room_for(self, number: int, count: int) -> list[memoryview]:
        """Where ciphertexts are read to."""
        if self._native is not None:
            return [self._sealed[number * BLOCK : (number + count) * BLOCK]]
        return self._room.blocks[number : number + count]


def _stretches(task: bytes, at: int, leaves: int) -> Iterator[tuple[int, bytearray]]:
    """The entries of leaves that follow each other, and the first logical block of each such stretch."""
    first, found = 0, bytearray()
    for _ in range(leaves):
        (index,) = _INDEX.unpack_from(task, at)
        at += _INDEX.size
        if found and index * _LEAF != first + len(found) // _ENTRY:
            yield first, found
            found = bytearray()
        if not found:
            first = index * _LEAF
        found += task[at : at + _USED]
        at += _USED
    if found:
        yield first, found
