"""Making JinDisk 1 volumes: empty, or with a whole image, in one pass (`docs/formats/jindisk1.md`, section 9).

The volume protects nothing against whoever holds the disk; it is for the reference module. Within what the format
leaves free it is better than the module's own: every block has a fresh key, so no key stream is used twice for data.
"""

from __future__ import annotations

import errno
import os
import struct
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

from jindiskd.base.secret import Secret
from jindiskd.errors import InvalidArgument, NoSpace
from jindiskd.jindisk.bulk import lengthen
from jindiskd.jindisk.device import Device, FileDevice
from jindiskd.jindisk.direct import DirectWriter
from jindiskd.jindisk.errors import VolumeDeviceFailed, VolumeMalformed
from jindiskd.jindisk.native import native
from jindiskd.jindisk.pieces import data_pieces
from jindiskd.jindisk.pool import Pool, default_workers
from jindiskd.jindisk.runs import SealingRun
from jindiskd.jindisk.v1 import superblock
from jindiskd.jindisk.v1.catalogue import Entry
from jindiskd.jindisk.v1.index_file import IndexWriter
from jindiskd.jindisk.v1.keys import KEY_BYTES, blocks_of, check_root, seal_run
from jindiskd.jindisk.v1.layout import (
    BITC_PER_BLOCK,
    BLOCK,
    FILE_RECORDS,
    RIT_PER_BLOCK,
    SEGMENT_BLOCKS,
    SEGMENT_BYTES,
    Layout,
    ceil_div,
    layout_for,
)
from jindiskd.jindisk.v1.nodes import RECORD_BYTES, pack_records
from jindiskd.jindisk.v1.tables import EMPTY_ENTRY, FULL_ENTRY, dst_block, dst_entry, first_bits, must_pad, write_zeros

SMALL_BLOCKS = 8192
"""Below this, processes cost more than they bring."""
STEP_BLOCKS = 64
"""Read, sealed and written at once."""
_RUN = struct.Struct("<QI")
_ZERO = bytes(BLOCK)
Run = tuple[int, int]
"""First and count: of blocks, or in `ranges` of bytes."""


def create_empty(device: Device, *, layout: Layout, key: Secret, blank: bool = False) -> None:
    """Format a device or file as the module does: superblock, and copy 0 of all tables zero.

    Args:
        device: at least `layout.total_bytes` long; what it holds is lost.
        layout: see `layout_for` and `largest_layout`.
        key: 28 bytes, root key and root IV.
        blank: the device is known to hold zeros, as a new file does.

    Raises:
        VolumeMalformed: the device is too small.
        OSError: writing failed.
    """
    _begin(device, layout, key, blank=blank)
    _finish(device, layout, key)


def _begin(device: Device, layout: Layout, key: Secret, *, blank: bool) -> None:
    check_root(key)
    if device.size_bytes < layout.total_bytes:
        need = f"it has {device.size_bytes} bytes, the volume needs {layout.total_bytes}"
        raise VolumeMalformed("device", need)
    if not blank:
        device.pwrite(0, bytes(superblock.SEALED_BYTES))
        device.flush()
        for _, start, blocks in layout.tables:
            write_zeros(device, start, blocks)


def _finish(device: Device, layout: Layout, key: Secret) -> None:
    """The superblock, last of all."""
    device.flush()
    device.pwrite(0, superblock.seal(layout, key))
    device.flush()


def bulk_load(
    source_fd: int,
    target_fd: int,
    *,
    size_bytes: int,
    key: Secret,
    layout: Layout | None = None,
    source_offset_bytes: int = 0,
    target_offset_bytes: int = 0,
    skip_zeros: bool = False,
    ranges: Sequence[Run] | None = None,
    progress: Callable[[int, int], None] | None = None,
    entropy: Callable[[int], bytes] = os.urandom,
    workers: int | None = None,
) -> Layout:
    """Write a new JinDisk 1 volume with the content of an image. The format does not protect it: see the package.

    Args:
        source_fd: the clear image; read with `pread`, its end counts as zeros.
        target_fd: read and written at `target_offset_bytes` and after it, for `layout.total_bytes` bytes. A file that
            ends before is made longer. Whatever it holds is lost.
        size_bytes: of the image; the volume has whole segments of 4 MiB and does not record it.
        key: 28 bytes, root key and root IV; stays the caller's.
        layout: None for the smallest volume that takes the image.
        source_offset_bytes: where the image begins in the source.
        target_offset_bytes: where the volume begins in the target.
        skip_zeros: leave blocks of zeros unwritten. The module returns stale memory for such blocks, unless it is
            read through the page cache: only for images whose zeros nobody reads. Otherwise every block is stored.
        ranges: offset and length in bytes of what is used of the image, ascending, whole blocks: stored with the zeros
            in them, and nothing else is. None for all.
        progress: called with bytes of the volume done, and in all.
        entropy: the source of random bytes: 16 for each block and each index file. The same source, image and options
            give the same volume, whatever the number of workers.
        workers: processes; None for one on each processor.

    Returns:
        The layout.

    Raises:
        InvalidArgument: size or key.
        NoSpace: the target's file system is full.
        VolumeMalformed: the target is a device, and too small.
        VolumeDeviceFailed: reading or writing failed.
        WorkerFailed: a process was killed.
    """
    shape = layout or layout_for(size_bytes)
    if not 0 < size_bytes <= shape.size_bytes + SEGMENT_BYTES - BLOCK:
        raise InvalidArgument("an image of", f"{size_bytes} bytes", f"the volume takes {shape.size_bytes}")
    if workers is None:
        workers = default_workers() if size_bytes > SMALL_BLOCKS * BLOCK else 1
    # All segments are filled, so that the module finds no block that it would not read as zeros.
    blocks = ceil_div(size_bytes, BLOCK) if skip_zeros else max(ceil_div(size_bytes, BLOCK), shape.size_bytes // BLOCK)
    try:
        blank = os.fstat(target_fd).st_size == 0 and os.lseek(target_fd, 0, os.SEEK_END) == 0
        lengthen(target_fd, target_offset_bytes + shape.total_bytes)
        device = FileDevice(target_fd, name="the target", offset_bytes=target_offset_bytes)
        loader = _Loader(device, shape, entropy)
        _begin(device, shape, key, blank=blank)
        source = _Source(source_fd, source_offset_bytes, size_bytes)
        with closing(_Worker(source, device)) as worker, Pool(worker.work, workers) as pool:
            if ranges is not None:
                runs = _runs(ranges, blocks)
            else:
                runs = source.written(blocks) if skip_zeros else iter([(0, blocks)])
            loader.run(pool, runs, blocks * BLOCK, progress or (lambda _done, _total: None))
        loader.finish()
        _finish(device, shape, key)
    except OSError as exc:
        if exc.errno == errno.ENOSPC:
            raise NoSpace("the JinDisk 1 volume", shape.total_bytes) from exc
        raise VolumeDeviceFailed("loading the volume", exc) from exc
    return shape


def _runs(ranges: Sequence[Run], blocks: int) -> Iterator[Run]:
    """Ranges of bytes as runs of blocks. Raises `InvalidArgument`."""
    before = 0
    for offset, length in ranges:
        first, end = offset // BLOCK, (offset + length) // BLOCK
        if offset % BLOCK or length % BLOCK or not before <= first < end <= blocks:
            raise InvalidArgument("a range of", f"{length} bytes at {offset}", "whole blocks, in order, in the image")
        yield first, end - first
        before = end


class _Source:
    """The image."""

    def __init__(self, fd: int, offset: int, size: int) -> None:
        self._fd, self._offset, self._size = fd, offset, size

    def read(self, lba: int, count: int) -> bytes:
        """Blocks; zeros behind the end."""
        start, length = lba * BLOCK, count * BLOCK
        want, data = max(0, min(length, self._size - start)), b""
        while len(data) < want:
            more = os.pread(self._fd, want - len(data), self._offset + start + len(data))
            if not more:
                break
            data += more
        return data.ljust(length, b"\0")

    def read_into(self, lba: int, view: memoryview) -> None:
        """Blocks; zeros behind the end."""
        done, want = 0, max(0, min(len(view), self._size - lba * BLOCK))
        while done < want:
            more = os.preadv(self._fd, [view[done:want]], self._offset + lba * BLOCK + done)
            if not more:
                break
            done += more
        if done < len(view):
            view[done:] = bytes(len(view) - done)

    def written(self, blocks: int) -> Iterator[Run]:
        """Runs of blocks that are not zero; holes are not read."""
        for lba, count in data_pieces(self._fd, self._offset, blocks):
            data = self.read(lba, count)
            start = -1
            for number in range(count):
                if data[number * BLOCK : (number + 1) * BLOCK] == _ZERO:
                    if start >= 0:
                        yield lba + start, number - start
                    start = -1
                elif start < 0:
                    start = number
            if start >= 0:
                yield lba + start, count - start


class _Worker:
    """The task, as it runs in the worker processes: seal blocks into a segment; their tags."""

    def __init__(self, source: _Source, target: FileDevice) -> None:
        self._source, self._target, self._native = source, DirectWriter(target), native()
        # Used again and again: memory that is new costs more than the cipher.
        self._room, self._plain = SealingRun(STEP_BLOCKS), memoryview(bytearray(STEP_BLOCKS * BLOCK))
        self._plains = [self._plain[at : at + BLOCK] for at in range(0, len(self._plain), BLOCK)]

    def close(self) -> None:
        """In the process that made it: nothing is left open."""
        self._target.close()

    def work(self, task: bytes) -> bytes:
        """First raw block, PBA, number of runs, the runs, a key for each block."""
        raw, position, count = struct.unpack_from("<QQI", task)
        at = struct.calcsize("<QQI")
        runs = [_RUN.unpack_from(task, at + number * _RUN.size) for number in range(count)]
        at += count * _RUN.size
        keys = struct.unpack_from(f"{KEY_BYTES}s" * ((len(task) - at) // KEY_BYTES), task, at)
        tags, done = list[bytes](), 0
        for lba, length in runs:
            for start in range(0, length, STEP_BLOCKS):
                count = min(STEP_BLOCKS, length - start)
                self._source.read_into(lba + start, self._plain[: count * BLOCK])
                if self._native is not None:
                    blocks = blocks_of(keys[done : done + count], position + done)
                    self._room.seal(self._native, blocks, self._plain)
                else:
                    seal_run(keys[done : done + count], position + done, self._plains[:count], self._room)
                self._target.write((raw + done) * BLOCK, self._room.data(count))
                tags.append(self._room.tags(count))
                done += count
        return b"".join(tags)


class _Loader:
    """What the parent does: keys, index files, tables."""

    def __init__(self, device: FileDevice, layout: Layout, entropy: Callable[[int], bytes]) -> None:
        self._device, self._layout, self._entropy = device, layout, entropy
        self._writer: IndexWriter | None = None
        self._entries: list[Entry] = []
        self._next = 0
        # Drawn in the order of the content, so that the result does not depend on how far the workers are.
        self._file_keys: list[bytes] = []
        self._sealing: deque[tuple[int, list[int], bytes]] = deque()

    def run(self, pool: Pool, runs: Iterator[Run], total: int, progress: Callable[[int, int], None]) -> None:
        """Seal everything."""

        def take() -> None:
            position, keys, secret = self._sealing.popleft()
            self._place(position, keys, secret, pool.next())
            progress(min((keys[-1] + 1) * BLOCK, total), total)

        for part in _segments(runs):
            while pool.full:
                take()
            pool.give(self._task(part))
        while self._sealing:
            take()
        progress(total, total)

    def _task(self, runs: list[Run]) -> bytes:
        keys = [lba + number for lba, count in runs for number in range(count)]
        secret = self._entropy(KEY_BYTES * len(keys))
        position = self._next
        self._next += len(keys)
        while len(self._file_keys) * FILE_RECORDS < self._next:
            self._file_keys.append(self._entropy(KEY_BYTES))
        self._sealing.append((position, keys, secret))
        head = struct.pack("<QQI", self._layout.data_start + position, position, len(runs))
        return head + b"".join(_RUN.pack(*run) for run in runs) + secret

    def _place(self, position: int, keys: list[int], secret: bytes, tags: bytes) -> None:
        """Enter a sealed segment into index and RIT."""
        layout = self._layout
        first, used = layout.rit_start + position // RIT_PER_BLOCK, len(keys)
        whole = struct.pack(f"<{used}Q", *keys).ljust(ceil_div(used, RIT_PER_BLOCK) * BLOCK, b"\0")
        self._device.pwrite(first * BLOCK, whole)
        records = pack_records(position, tags, secret)
        at = 0
        while at < used:
            if self._writer is None:
                number = len(self._entries)
                self._writer = IndexWriter(layout, number, self._file_keys[number])
            count = min(self._writer.room, used - at)
            self._writer.add(keys[at : at + count], records[at * RECORD_BYTES : (at + count) * RECORD_BYTES])
            at += count
            if not self._writer.room:
                self._end_file()

    def _end_file(self) -> None:
        if self._writer is not None:
            # Odd versions, ascending with the slot: the module's next version is greater than all (rule 4).
            version = 2 * len(self._entries) + 1
            self._entries.append(self._writer.finish(self._device, level=1, version=version))
            self._writer = None

    def finish(self) -> None:
        """Write what is left of the index, and the tables."""
        self._end_file()
        layout, device = self._layout, self._device
        full, rest = divmod(self._next, SEGMENT_BLOCKS)
        allocated = full + bool(rest)
        last = dst_entry(first_bits(rest))
        if must_pad(layout.logical_segments, allocated):
            last = FULL_ENTRY

        def entry_of(segment: int) -> bytes:
            return FULL_ENTRY if segment < full else last if segment < allocated else EMPTY_ENTRY

        for number in range(layout.dst_blocks):
            block = dst_block(entry_of, layout, number)
            if block == _ZERO:
                break
            device.pwrite((layout.dst_start + number) * BLOCK, block)
        device.pwrite(layout.svt_start * BLOCK, _bits(allocated))
        for number in range(0, len(self._entries), BITC_PER_BLOCK):
            block = b"".join(entry.encode() for entry in self._entries[number : number + BITC_PER_BLOCK])
            device.pwrite((layout.bitc_start + number // BITC_PER_BLOCK) * BLOCK, block.ljust(BLOCK, b"\0"))
        device.pwrite(layout.bvt_start * BLOCK, _bits(len(self._entries)))


def _bits(count: int) -> bytes:
    """Whole blocks whose first `count` bits are set."""
    data = ((1 << count) - 1).to_bytes(ceil_div(count, 8), "little")
    return data.ljust(max(1, ceil_div(len(data), BLOCK)) * BLOCK, b"\0")


def _segments(runs: Iterator[Run]) -> Iterator[list[Run]]:
    """Runs gathered and cut so that each list but the last fills a segment."""
    part: list[Run] = []
    room = SEGMENT_BLOCKS
    for first, length in runs:
        lba, count = first, length
        while count:
            size = min(room, count)
            part.append((lba, size))
            lba, count, room = lba + size, count - size, room - size
            if not room:
                yield part
                part, room = [], SEGMENT_BLOCKS
    if part:
        yield part
